"""Files written whole or not at all: beside, synced, renamed (fastsae.durable)."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor

from fastsae.durable import replace_file, replace_file_by
from fastsae.saes.base import SAE


def plain(tensor: Tensor) -> Tensor:
    """A contiguous copy on the CPU with memory of its own: what a file should hold."""
    return tensor.detach().cpu().clone(memory_format=torch.contiguous_format)


def narrowest(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """`tensor` in `dtype` if that holds it exactly, else as it is."""
    narrowed = tensor.to(dtype)
    return narrowed if torch.equal(narrowed.to(tensor.dtype), tensor) else tensor


def cannot(sae: SAE, library: str, what: str, instead: str) -> ValueError:
    return ValueError(f"{type(sae).__name__} with {what} has no form in {library}'s files: {instead}")


def folder(path: Path) -> Path:
    path.mkdir(parents=True, exist_ok=True)
    return path


def write_json(path: Path, values: Mapping[str, Any]) -> None:
    replace_file(path, (json.dumps(values, indent=2, allow_nan=False) + "\n").encode())


def write_safetensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    content = {name: plain(tensor) for name, tensor in tensors.items()}
    replace_file_by(path, lambda temporary: save_file(content, temporary, metadata={"format": "pt"}))


def write_pickle(path: Path, values: Mapping[str, Any]) -> None:
    content = {name: plain(value) if isinstance(value, Tensor) else value for name, value in values.items()}
    replace_file_by(path, lambda temporary: torch.save(content, temporary))


def write_npz(path: Path, tensors: Mapping[str, Tensor]) -> None:
    def write(temporary: Path) -> None:
        # Given a name, numpy would add its own ending.
        with temporary.open("wb") as file:
            np.savez(file, **{name: plain(tensor).numpy() for name, tensor in tensors.items()})

    replace_file_by(path, write)


def check(
    sae: SAE,
    library: str,
    *,
    normalizations: tuple[str, ...] = ("none",),
    transcoders: bool = False,
    subtracts_b_dec: bool | None = None,
) -> None:
    """Refuses what a library's files cannot say: sites, normalisation, transcoders, b_dec of the input or not.

    `subtracts_b_dec` is what the files imply of an SAE that is no transcoder; None where they say it themselves.

    Raises ValueError.
    """
    if sae.sites is not None or sae.sites_out is not None:
        raise cannot(sae, library, f"sites = {sae.sites}", "its SAEs read one site; use format='fastsae'")
    if sae.normalize_activations not in normalizations:
        raise cannot(
            sae,
            library,
            f"normalize_activations = {sae.normalize_activations!r}",
            f"expected {' or '.join(map(repr, normalizations))}; use format='fastsae'",
        )
    if sae.is_transcoder and not transcoders:
        raise cannot(sae, library, f"d_out = {sae.d_out}", "it keeps no transcoders of this kind; use format='fastsae'")
    if getattr(sae, "selection", "topk") != "topk" and library != "sparsify":
        raise cannot(sae, library, f"selection = {sae.selection!r}", "only sparsify's have; use format='sparsify'")
    if subtracts_b_dec is not None and not sae.is_transcoder and sae.apply_b_dec_to_input is not subtracts_b_dec:
        raise cannot(
            sae,
            library,
            f"apply_b_dec_to_input = {sae.apply_b_dec_to_input}",
            f"there b_dec is {'always' if subtracts_b_dec else 'never'} subtracted from x; use format='fastsae'",
        )


def threshold_of(sae: SAE, library: str) -> Tensor:
    """The threshold that stands in for BatchTopK's batch: float32 scalar, as the encoder compares with it.

    Raises ValueError while there is none.
    """
    if sae.threshold < 0:
        raise cannot(sae, library, "no threshold yet", "it is learned in training; use format='fastsae' until then")
    threshold = sae.threshold.float()
    if sae.dtype == torch.float64 and threshold.double() != sae.threshold:
        raise cannot(sae, library, "a threshold beyond float32", "cast the SAE first: sae.float()")
    return threshold
