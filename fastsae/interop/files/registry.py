"""Every format by its name, and which of them a path holds."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import torch

from fastsae.interop.files import dictionary_learning, gemma_scope, native, openai, openmoss, saelens, sparsify
from fastsae.saes.base import SAE


class Format(Protocol):
    """What the module of a format has.

    Attributes:
        NAMES: its files in a folder, for a hub to fetch.
        MAIN: that among them which tells it from others, for messages.
        KEEPS_METADATA: whether `write` has a place for it.
    """

    NAMES: tuple[str, ...]
    MAIN: str
    KEEPS_METADATA: bool

    def recognizes(self, path: Path) -> bool:
        """Whether an existing file or folder looks like this format."""

    def read(self, path: Path, device: torch.device | str) -> SAE:
        """The SAE in a file or folder, in eval mode; raises as `fastsae.load`."""

    def write(self, sae: SAE, path: Path, metadata: Mapping[str, Any]) -> None:
        """Writes the files; raises ValueError, before anything is written, for what they cannot say."""


FORMATS: Mapping[str, Format] = {
    "fastsae": native,
    "saelens": saelens,
    "sparsify": sparsify,
    "dictionary_learning": dictionary_learning,
    "openai": openai,
    "openmoss": openmoss,
    "gemma_scope": gemma_scope,
}


def named(format: str) -> Format:
    """The format of this name. Raises ValueError for any other."""
    if format not in FORMATS:
        raise ValueError(f"format = {format!r}: expected one of {', '.join(map(repr, FORMATS))}")
    return FORMATS[format]


def detect(path: Path) -> str:
    """The name of the format that a file or folder is in.

    Raises ValueError if it looks like none, or like several.
    """
    found = [name for name, known in FORMATS.items() if known.recognizes(path)]
    if len(found) == 1:
        return found[0]
    if found:
        raise ValueError(f"{path} has files of several formats: pass format=, one of {', '.join(map(repr, found))}")
    known = ", ".join(f"{known.MAIN} ({name})" for name, known in FORMATS.items())
    raise ValueError(f"{path} holds no SAE that fastsae knows: expected {known}; or pass format=")
