"""Writes that leave the old or the new content after a crash, never a part: beside, synced, renamed."""

import os
import shutil
from collections.abc import Callable
from pathlib import Path


def replace_file(path: Path, content: bytes) -> None:
    """Makes `content` the content of the file at `path`."""
    replace_file_by(path, lambda temporary: temporary.write_bytes(content))


def replace_file_by(path: Path, write: Callable[[Path], object]) -> None:
    """Makes the file at `path` what `write(temporary path)` writes; a failed write leaves `path` as it is."""
    temporary = path.with_name(f".{path.name}.partial")
    try:
        write(temporary)
        sync(temporary)
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    sync(path.parent)


def replace_folder(temporary: Path, path: Path) -> None:
    """Renames the folder `temporary` to `path`; a folder that stood at `path` is removed.

    A non-empty folder cannot be renamed over in one move, so the old one stands at `previous_folder(path)` between two
    moves. `recover_folder` puts it back if the second move never came.
    """
    for file in temporary.iterdir():
        sync(file)
    sync(temporary)
    previous = previous_folder(path)
    if path.exists():
        shutil.rmtree(previous, ignore_errors=True)
        os.rename(path, previous)
    try:
        os.rename(temporary, path)
    except BaseException:
        recover_folder(path)
        raise
    sync(path.parent)
    shutil.rmtree(previous, ignore_errors=True)


def recover_folder(path: Path) -> None:
    """Puts back the folder that `replace_folder` had moved away, if nothing took its place."""
    previous = previous_folder(path)
    if previous.exists() and not path.exists():
        os.rename(previous, path)


def previous_folder(path: Path) -> Path:
    return path.with_name(f".{path.name}.previous")


def sync(path: Path) -> None:
    """Waits until a file's content, or a folder's list of names, is on disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
