"""The text of the experiment: the standard library of the running Python, or the user's own."""

import os
import platform
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

# Sources and documentation, as CPython's standard library and most projects keep them.
_STANDARD_LIBRARY_SUFFIXES = {".py", ".pyi", ".txt", ".rst", ".md"}
# Packages of others; tests, which repeat what they test; tables of characters, which are no prose and no code.
_STANDARD_LIBRARY_SKIPPED = {"site-packages", "dist-packages", "test", "tests", "idle_test", "encodings", "lib-dynload"}
# Folders that hold what machines wrote.
_ALWAYS_SKIPPED = {"__pycache__", "node_modules"}
# More text than a laptop tokenises in half a minute teaches a one-layer model nothing new.
MAX_BYTES = 64 * 2**20
# Every so many documents one is held out, or the last such part of the text where documents are fewer.
HELD_OUT_EVERY = 20


@dataclass(frozen=True)
class Corpus:
    """Texts to learn from and, held out, texts to evaluate on. `name` says in words where they come from."""

    name: str
    training: list[str]
    held_out: list[str]

    @property
    def n_characters(self) -> int:
        return sum(map(len, self.training)) + sum(map(len, self.held_out))


def read_corpus(path: Path | None = None) -> Corpus:
    """The text under `path`, a file or a folder; by default the running Python's standard library.

    Of a folder every file that is UTF-8 text is taken, by name, a folder's own files before those in its folders, and
    nothing hidden; of the standard library only sources and documentation. Files are read until there are 64 MiB.
    Raises FileNotFoundError for a path that is not there and ValueError where there is no text.
    """
    if path is None:
        folder = Path(sysconfig.get_path("stdlib"))
        name = f"the standard library of Python {platform.python_version()}"
        documents = _read(_files(folder, _STANDARD_LIBRARY_SKIPPED, _STANDARD_LIBRARY_SUFFIXES))
        advice = "this Python keeps its standard library elsewhere: pass --text with a file or folder of text"
    else:
        folder, name = path, path.name or str(path)
        if not path.exists():
            raise FileNotFoundError(f"--text {path} does not exist: expected a file or folder of text")
        documents = _read(_files(path, set(), None) if path.is_dir() else iter([path]))
        advice = "expected a file of UTF-8 text, or a folder with such files"
    if not documents:
        raise ValueError(f"{folder} holds no text: {advice}")
    return Corpus(name, *_split(documents))


def _files(folder: Path, skipped: set[str], suffixes: set[str] | None) -> Iterator[Path]:
    for place, folders, names in os.walk(folder):
        # Sorted in place: os.walk then goes through the folders in this order, on every file system the same.
        folders[:] = sorted(f for f in folders if f not in skipped | _ALWAYS_SKIPPED and not f.startswith("."))
        for name in sorted(names):
            if not name.startswith(".") and (suffixes is None or os.path.splitext(name)[1] in suffixes):
                yield Path(place, name)


def _read(files: Iterator[Path]) -> list[str]:
    documents, n_bytes = [], 0
    for file in files:
        if n_bytes >= MAX_BYTES:
            break
        try:
            with open(file, "rb") as opened:
                content = opened.read(MAX_BYTES - n_bytes)
        except OSError:
            continue
        text = _decoded(content)
        if text and not text.isspace():
            documents.append(text)
            n_bytes += len(content)
    return documents


def _decoded(content: bytes) -> str | None:
    """The text of a file, None for anything that is not UTF-8 text; a last character cut in two is left out."""
    if b"\0" in content:
        return None
    try:
        return content.decode()
    except UnicodeDecodeError as error:
        whole = error.end == len(content) and error.reason == "unexpected end of data"
        return content[: error.start].decode() if whole else None


def _split(documents: list[str]) -> tuple[list[str], list[str]]:
    """(training, held out): whole documents where there are enough of them."""
    if len(documents) >= HELD_OUT_EVERY:
        held_out = documents[HELD_OUT_EVERY // 2 :: HELD_OUT_EVERY]
        training = [text for i, text in enumerate(documents) if i % HELD_OUT_EVERY != HELD_OUT_EVERY // 2]
        return training, held_out
    n_held_out = sum(map(len, documents)) // HELD_OUT_EVERY
    training, held_out = list(documents), []
    # From the end backwards, so that what is held out is one stretch of text.
    while n_held_out > 0:
        last = training.pop()
        cut = max(0, len(last) - n_held_out)
        held_out.insert(0, last[cut:])
        n_held_out -= len(last) - cut
        if cut:
            training.append(last[:cut])
    return training, held_out
