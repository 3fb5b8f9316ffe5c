"""fastsae's own files: config.json and model.safetensors in one folder, written whole or not at all."""

import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from huggingface_hub import snapshot_download
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from fastsae.durable import replace_file, replace_file_by
from fastsae.saes.registry import ARCHITECTURES
from fastsae.strict_json import read_object

if TYPE_CHECKING:
    from fastsae.saes.base import SAE

CONFIG_NAME = "config.json"
WEIGHTS_NAME = "model.safetensors"


def save_pretrained(
    self: "SAE",
    save_directory: str | os.PathLike,
    *,
    repo_id: str | None = None,
    push_to_hub: bool = False,
    **push_to_hub_kwargs: Any,
) -> str | None:
    """Writes config.json and model.safetensors (tensors in their plain shapes, contiguous) into a folder.

    Each file is written beside, synced and renamed, weights first: a crash leaves the previous file whole. With
    `push_to_hub` the folder goes to the hub as `repo_id` (the folder's name by default), and its address is returned.
    """
    folder = Path(save_directory)
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {name: tensor.detach().contiguous() for name, tensor in self.state_dict().items()}
    replace_file_by(folder / WEIGHTS_NAME, lambda path: save_file(tensors, path, metadata={"format": "pt"}))
    text = json.dumps(_file_config(self), indent=2) + "\n"
    replace_file(folder / CONFIG_NAME, text.encode())
    if push_to_hub:
        return self.push_to_hub(repo_id=repo_id or folder.name, **push_to_hub_kwargs)
    return None


def _file_config(sae: "SAE") -> dict[str, Any]:
    from fastsae import __version__

    return {
        "architecture": sae.architecture,
        "fastsae_version": __version__,
        "dtype": str(sae.dtype).removeprefix("torch."),
        **sae.config(),
    }


def load(path: str | os.PathLike, device: torch.device | str = "cpu") -> "SAE":
    """The SAE that `save_pretrained` wrote into a folder, in the dtype it was written in, on `device`, in eval mode.

    Nothing is unpickled. Raises FileNotFoundError for a missing file, and ValueError that names file and tensor for a
    file that is truncated, lacks a tensor, has one too many or of another shape or dtype.
    """
    folder = Path(path)
    config_path, weights_path = folder / CONFIG_NAME, folder / WEIGHTS_NAME
    for file in (config_path, weights_path):
        if not file.is_file():
            raise FileNotFoundError(f"{file} does not exist: expected a folder that SAE.save_pretrained wrote")
    sae = _build(config_path)
    tensors = _read(weights_path, str(device), sae)
    sae.to_empty(device=device)
    with torch.no_grad():
        for name, tensor in sae.state_dict().items():
            tensor.copy_(tensors[name])
    return sae.eval()


def _build(config_path: Path) -> "SAE":
    """The module a config.json describes, on the meta device: shapes without memory."""
    config = read_object(config_path)
    name = config.pop("architecture", None)
    if not isinstance(name, str) or name not in ARCHITECTURES:
        raise ValueError(f"{config_path}: architecture = {name!r}: expected one of {', '.join(ARCHITECTURES)}")
    config.pop("fastsae_version", None)
    dtype = getattr(torch, str(config.pop("dtype", "float32")), None)
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        raise ValueError(f"{config_path}: dtype is not one of float16, bfloat16, float32, float64")
    try:
        return ARCHITECTURES[name](**config, device="meta", dtype=dtype)
    # torch's own are RuntimeErrors: sizes whose product is beyond 64 bits.
    except (TypeError, ValueError, RuntimeError, OverflowError) as error:
        raise ValueError(f"{config_path} does not describe a {ARCHITECTURES[name].__name__}: {error}") from error


def _read(weights_path: Path, device: str, sae: "SAE") -> dict[str, torch.Tensor]:
    expected = sae.state_dict()
    try:
        with safe_open(weights_path, framework="pt", device=device) as file:
            names = set(file.keys())
            missing, unknown = sorted(set(expected) - names), sorted(names - set(expected))
            if missing or unknown:
                raise ValueError(f"{weights_path}: missing tensors {missing}, unknown tensors {unknown}")
            tensors = {name: file.get_tensor(name) for name in expected}
    except SafetensorError as error:
        raise ValueError(f"{weights_path} is not a whole safetensors file ({error}); copy or save it again") from error
    for name, tensor in tensors.items():
        want = expected[name]
        if tensor.shape != want.shape or tensor.dtype != want.dtype:
            raise ValueError(
                f"{weights_path}: {name} is {tensor.dtype} {tuple(tensor.shape)}: expected {want.dtype} "
                f"{tuple(want.shape)} by {CONFIG_NAME}"
            )
    return tensors


def from_pretrained(
    cls: type["SAE"],
    *,
    model_id: str,
    revision: str | None = None,
    cache_dir: str | os.PathLike | None = None,
    force_download: bool = False,
    local_files_only: bool = False,
    token: str | bool | None = None,
    map_location: torch.device | str = "cpu",
    **unused: Any,
) -> "SAE":
    """What `cls.from_pretrained(folder or hub name)` calls (huggingface_hub's ModelHubMixin)."""
    folder = Path(model_id)
    if not folder.is_dir():
        folder = Path(
            snapshot_download(
                model_id,
                revision=revision,
                cache_dir=cache_dir,
                force_download=force_download,
                local_files_only=local_files_only,
                token=token,
                allow_patterns=[CONFIG_NAME, WEIGHTS_NAME],
            )
        )
    sae = load(folder, device=map_location)
    if not isinstance(sae, cls):
        raise ValueError(f"{folder} holds a {type(sae).__name__}: expected a {cls.__name__}; use fastsae.load")
    return sae
