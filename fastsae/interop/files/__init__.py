"""SAE files of every library that fastsae reads and writes, one library in each file."""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from fastsae.interop.files.hub import local_path
from fastsae.interop.files.registry import FORMATS, detect, named
from fastsae.saes.base import SAE

__all__ = ["FORMATS", "detect", "load", "save"]


def load(
    path: str | os.PathLike,
    format: str | None = None,
    *,
    device: torch.device | str = "cpu",
    revision: str | None = None,
    cache_dir: str | os.PathLike | None = None,
    token: str | bool | None = None,
) -> SAE:
    """The SAE in a file or folder of any format that fastsae knows, in its dtype, on `device`, in eval mode.

    It computes what its library computes (`fastsae.testing`); docs/files.md says what each format holds and what is
    refused. Nothing that could run code is unpickled, and a module comes whole or not at all.

    Args:
        path: a local file or folder, or, if there is none, a name on the Hugging Face hub: "owner/name", or
            "owner/name/folder" for one of several SAEs.
        format: "fastsae", "saelens", "sparsify", "dictionary_learning", "openai", "openmoss" or "gemma_scope"; None
            finds out from the files' names.
        revision, cache_dir, token: for the hub, as huggingface_hub takes them.

    Raises:
        FileNotFoundError: a file is missing, here and on the hub.
        ValueError: a file is truncated, hostile, lacks something, has something unknown or of another shape, or asks
            for something that fastsae's SAEs do not do; the message names the file and the tensor or field.
    """
    known = None if format is None else named(format)
    found = local_path(path, revision=revision, cache_dir=cache_dir, token=token)
    return (known or FORMATS[detect(found)]).read(found, device)


def save(
    sae: SAE, path: str | os.PathLike, format: str = "fastsae", *, metadata: Mapping[str, Any] | None = None
) -> None:
    """Writes an SAE as `SAE.save` says."""
    known, metadata = named(format), dict(metadata or {})
    if metadata and not known.KEEPS_METADATA:
        raise ValueError(f"metadata = {metadata}: expected none, as format {format!r} has no place for it")
    try:
        json.dumps(metadata, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise ValueError(f"metadata = {metadata}: expected what JSON can hold ({error})") from error
    known.write(sae, Path(path), metadata)
