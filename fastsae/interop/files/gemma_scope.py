"""Gemma Scope's params.npz: a JumpReLU SAE that does not subtract b_dec, or a transcoder of another width."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from fastsae.interop.files.build import build
from fastsae.interop.files.tensors import Tensors, exactly, read_npz
from fastsae.interop.files.write import cannot, check, folder, write_npz
from fastsae.saes import JumpReLUSAE
from fastsae.saes.base import SAE

WEIGHTS_NAME = "params.npz"
NAMES = (WEIGHTS_NAME,)
MAIN = WEIGHTS_NAME
KEEPS_METADATA = False


def recognizes(path: Path) -> bool:
    return (path / WEIGHTS_NAME).is_file() if path.is_dir() else path.suffix == ".npz"


def read(path: Path, device: torch.device | str) -> SAE:
    path = path / WEIGHTS_NAME if path.is_dir() else path
    tensors = read_npz(path)
    # Some releases write the weights' names in lower case.
    w_enc, w_dec = _spelled(tensors, "W_enc"), _spelled(tensors, "W_dec")
    d_in, d_sae = tensors.shape(w_enc, 2)
    d_out = tensors.shape(w_dec, 2)[1]
    weights = {
        "W_enc": tensors.take(w_enc, d_in, d_sae),
        "b_enc": tensors.take("b_enc", d_sae),
        "W_dec": tensors.take(w_dec, d_sae, d_out),
        "b_dec": tensors.take("b_dec", d_out),
        "threshold": exactly(tensors.take("threshold", d_sae), torch.float32, "threshold", tensors.where),
    }
    tensors.done()
    # Of one width a transcoder without skip and an SAE that leaves b_dec out of its input are the same function.
    target: dict[str, Any] = {"apply_b_dec_to_input": False} if d_out == d_in else {"d_out": d_out}
    return build(JumpReLUSAE, tensors.where, weights, device, d_in=d_in, d_sae=d_sae, normalize_decoder=False, **target)


def _spelled(tensors: Tensors, name: str) -> str:
    return name.lower() if name.lower() in tensors and name not in tensors else name


def write(sae: SAE, path: Path, metadata: Mapping[str, Any]) -> None:
    """To the file `path` if it ends in .npz, else into the folder."""
    if not isinstance(sae, JumpReLUSAE):
        raise cannot(sae, "Gemma Scope", f"architecture = {sae.architecture!r}", "they are JumpReLU SAEs alone")
    check(sae, "Gemma Scope", transcoders=True, subtracts_b_dec=False)
    if sae.skip:
        raise cannot(sae, "Gemma Scope", "skip = True", "there is no W_skip in them")
    if sae.dtype == torch.bfloat16:
        raise cannot(sae, "Gemma Scope", "dtype = torch.bfloat16", "numpy has no such dtype; cast it: sae.float()")
    if path.suffix != ".npz":
        path = folder(path) / WEIGHTS_NAME
    folder(path.parent)
    tensors = {name: getattr(sae, name) for name in ("W_enc", "b_enc", "W_dec", "b_dec")}
    write_npz(path, tensors | {"threshold": sae.thresholds()})
