"""Activations in files: mapped into memory, shuffled in blocks, the same on every run and from any batch on."""

import os
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

SUFFIXES = (".npy", ".safetensors")


class ActivationStore:
    """Activations [n_tokens, d_in] in .npy and .safetensors files, of which only what is used is read from disk.

    Args:
        paths: files, or folders whose .npy and .safetensors files are taken in the order of their names. Each holds
            activations [..., d_in], all of one width and one floating dtype.
        tensor: the name to read from a .safetensors file; it may be left out where a file holds only one tensor.

    Attributes:
        d_in, n_tokens, dtype: width, number and dtype of the activations.

    Raises FileNotFoundError for a missing path, ValueError that names the file and the tensor for anything else that
    does not fit. Nothing is unpickled.
    """

    def __init__(self, paths: str | os.PathLike | Sequence[str | os.PathLike], *, tensor: str | None = None):
        files = _files([paths] if isinstance(paths, (str, os.PathLike)) else paths)
        self._parts = [_open(file, tensor) for file in files]
        first = self._parts[0]
        for file, part in zip(files, self._parts, strict=True):
            if part.shape[1] != first.shape[1] or part.dtype != first.dtype:
                raise ValueError(
                    f"{file} holds {part.dtype} activations of width {part.shape[1]}: expected {first.dtype} and "
                    f"{first.shape[1]}, as in {files[0]}"
                )
        self._ends = numpy.cumsum([part.shape[0] for part in self._parts])
        self.n_tokens, self.d_in, self.dtype = int(self._ends[-1]), first.shape[1], first.dtype
        if not self.n_tokens:
            raise ValueError(f"{', '.join(map(str, files))}: expected at least one activation, found none")

    def __len__(self) -> int:
        return self.n_tokens

    def rows(self, start: int, stop: int) -> Tensor:
        """Tokens `start` up to `stop` in the order of the files, as a new tensor [stop - start, d_in]."""
        pieces = []
        for part, end in zip(self._parts, self._ends.tolist(), strict=True):
            begin = end - part.shape[0]
            pieces.append(part[max(start - begin, 0) : max(stop - begin, 0)])
        return torch.cat(pieces)

    def in_order(self, batch_size: int, n_tokens: int | None = None) -> Iterator[Tensor]:
        """Every token once (or the first `n_tokens`), in the order of the files; the last batch may be smaller."""
        _at_least_one("batch_size", batch_size)
        stop = self.n_tokens if n_tokens is None else min(n_tokens, self.n_tokens)
        for start in range(0, stop, batch_size):
            yield self.rows(start, min(start + batch_size, stop))

    def batches(
        self, batch_size: int, *, seed: int = 0, start: int = 0, block_tokens: int = 512, buffer_blocks: int = 64
    ) -> Iterator[Tensor]:
        """Batches [batch_size, d_in] without end, each pass over all tokens in another order.

        A pass takes the blocks of `block_tokens` neighbouring tokens in a random order and shuffles the tokens of
        `buffer_blocks` of them at a time. So the disk is read in long stretches, and one buffer is in memory. What is
        left at the end of a pass comes first in the next.

        The order depends on the arguments and the number of tokens alone. `start` leaves out that many batches without
        reading them: a run resumed after step s goes on with start=s.

        Raises ValueError for an argument out of its range.
        """
        for name, value in (
            ("batch_size", batch_size),
            ("block_tokens", block_tokens),
            ("buffer_blocks", buffer_blocks),
        ):
            _at_least_one(name, value)
        if isinstance(start, bool) or not isinstance(start, int) or start < 0:
            raise ValueError(f"start = {start!r}: expected an int of at least 0")
        return self._batches(batch_size, seed, start * batch_size, block_tokens, buffer_blocks)

    def _batches(
        self, batch_size: int, seed: int, start: int, block_tokens: int, buffer_blocks: int
    ) -> Iterator[Tensor]:
        epoch, skip = divmod(start, self.n_tokens)
        waiting, n_waiting = [], 0
        while True:
            for buffer in self._shuffled_pass(seed, epoch, skip, block_tokens, buffer_blocks):
                waiting.append(buffer)
                n_waiting += len(buffer)
                if n_waiting >= batch_size:
                    tokens = torch.cat(waiting)
                    n_served = n_waiting // batch_size * batch_size
                    yield from tokens[:n_served].split(batch_size)
                    # A copy: a view would keep the served tokens in memory as well.
                    waiting, n_waiting = [tokens[n_served:].clone()], n_waiting - n_served
            epoch, skip = epoch + 1, 0

    def _shuffled_pass(
        self, seed: int, epoch: int, skip: int, block_tokens: int, buffer_blocks: int
    ) -> Iterator[Tensor]:
        """One pass in shuffled buffers, without its first `skip` tokens."""
        n_blocks = -(-self.n_tokens // block_tokens)
        order = numpy.random.default_rng([seed, epoch]).permutation(n_blocks)
        for number, first in enumerate(range(0, n_blocks, buffer_blocks)):
            starts = order[first : first + buffer_blocks] * block_tokens
            stops = numpy.minimum(starts + block_tokens, self.n_tokens)
            n_tokens = int((stops - starts).sum())
            if skip < n_tokens:
                # In the order of the files, so that the disk is read forwards.
                places = sorted(zip(starts.tolist(), stops.tolist(), strict=True))
                buffer = torch.cat([self.rows(*place) for place in places])
                shuffled = numpy.random.default_rng([seed, epoch, number]).permutation(n_tokens)
                yield buffer[torch.from_numpy(shuffled[skip:])]
            skip = max(skip - n_tokens, 0)


def _files(paths: Sequence[str | os.PathLike]) -> list[Path]:
    files: list[Path] = []
    for path in map(Path, paths):
        if path.is_dir():
            found = sorted(file for file in path.iterdir() if file.suffix in SUFFIXES)
            if not found:
                raise FileNotFoundError(f"{path} holds no {' or '.join(SUFFIXES)} file")
            files += found
        elif path.is_file():
            files.append(path)
        else:
            raise FileNotFoundError(f"{path} does not exist: expected a file or folder of activations")
    if not files:
        raise ValueError("paths is empty: expected at least one file or folder of activations")
    return files


def _open(file: Path, name: str | None) -> Tensor:
    """The file's activations as [n_tokens, d_in], mapped into memory."""
    if file.suffix == ".npy":
        tensor, what = _open_npy(file), str(file)
    elif file.suffix == ".safetensors":
        name, tensor = _open_safetensors(file, name)
        what = f"{file}: {name}"
    else:
        raise ValueError(f"{file}: expected a file that ends in {' or '.join(SUFFIXES)}")
    if not tensor.is_floating_point() or tensor.dim() < 2 or not tensor.shape[-1]:
        raise ValueError(f"{what} is {tensor.dtype} {list(tensor.shape)}: expected floating activations [..., d_in]")
    return tensor.reshape(-1, tensor.shape[-1])


def _open_npy(file: Path) -> Tensor:
    try:
        # Copy on write: the pages stay those of the file, and torch gets an array it may call writable.
        array = numpy.load(file, mmap_mode="c", allow_pickle=False)
        tensor = torch.from_numpy(array)
    except (ValueError, TypeError, EOFError) as error:
        raise ValueError(f"{file} is not a whole .npy file of numbers ({error})") from error
    if not tensor.is_contiguous():
        raise ValueError(f"{file} is in Fortran order: expected C order (numpy.ascontiguousarray)")
    return tensor


def _open_safetensors(file: Path, name: str | None) -> tuple[str, Tensor]:
    try:
        with safe_open(file, framework="pt") as opened:
            names = sorted(opened.keys())
            if name is None and len(names) == 1:
                name = names[0]
            if name not in names:
                raise ValueError(f"{file} holds the tensors {names}: expected tensor= to name one, not {name!r}")
            return name, opened.get_tensor(name)
    except SafetensorError as error:
        raise ValueError(f"{file} is not a whole safetensors file ({error})") from error


def _at_least_one(name: str, value: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f"{name} = {value!r}: expected an int of at least 1")
