"""fastsae's own folders (fastsae.saes.files), as one of the formats."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from fastsae.saes import files
from fastsae.saes.base import SAE

NAMES = (files.CONFIG_NAME, files.WEIGHTS_NAME)
MAIN = files.WEIGHTS_NAME
KEEPS_METADATA = False


def recognizes(path: Path) -> bool:
    return (path / files.WEIGHTS_NAME).is_file()


def read(path: Path, device: torch.device | str) -> SAE:
    return files.load(path, device)


def write(sae: SAE, path: Path, metadata: Mapping[str, Any]) -> None:
    sae.save_pretrained(path)
