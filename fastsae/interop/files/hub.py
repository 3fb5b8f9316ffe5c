"""Where an SAE's files are: on this machine, or fetched from the Hugging Face hub."""

import os
import re
from pathlib import Path

from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError

from fastsae.interop.files.registry import FORMATS

# owner/name, or owner/name/folder/in/the/repository.
_HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+(/[^/\\]+)*")


def local_path(
    path: str | os.PathLike,
    *,
    revision: str | None = None,
    cache_dir: str | os.PathLike | None = None,
    token: str | bool | None = None,
) -> Path:
    """`path` if it exists, else the files of a hub name, of which only those that some format reads are fetched.

    Raises FileNotFoundError that says which of the two was tried.
    """
    found = Path(path).expanduser()
    if found.exists():
        return _folder_of(found)
    if not isinstance(path, str) or not _HUB_NAME.fullmatch(path) or path.startswith("."):
        raise FileNotFoundError(
            f"{path} does not exist: expected a file or folder, or a hub name 'owner/name[/folder]'"
        )
    owner, name, *inside = path.split("/")
    try:
        root = snapshot_download(
            f"{owner}/{name}",
            revision=revision,
            cache_dir=cache_dir,
            token=token,
            allow_patterns=_wanted("/".join(inside)),
        )
    # What the hub's client raises for a network that is not there is an OSError, or none of its own names.
    except (HfHubHTTPError, HFValidationError, OSError) as error:
        raise FileNotFoundError(
            f"{path} does not exist, and the hub's {owner}/{name} could not be fetched ({error})"
        ) from error
    fetched = Path(root, *inside)
    if not fetched.exists():
        raise FileNotFoundError(f"{path}: the hub's {owner}/{name} has no files of an SAE in {'/'.join(inside) or '/'}")
    return _folder_of(fetched)


def _wanted(inside: str) -> list[str]:
    names = sorted({name for known in FORMATS.values() for name in known.NAMES})
    if inside.endswith((".pt", ".npz", ".safetensors")):
        above = inside.split("/")[:-1]
        # A config stands beside its weights, or one folder above checkpoints.
        folders = {"/".join(above), "/".join(above[:-1])}
        return [inside, *(f"{folder}/config.json".lstrip("/") for folder in sorted(folders))]
    return [f"{inside}/{name}".lstrip("/") for name in names]


def _folder_of(path: Path) -> Path:
    """The folder where a file that never stands alone was named."""
    pairs = {name for known in FORMATS.values() if len(known.NAMES) > 1 for name in known.NAMES}
    return path.parent if path.is_file() and path.name in pairs and path.suffix != ".pt" else path
