"""encode_threshold on a CPU: the screen of encode_topk, with each latent's own threshold in place of a running one.

Every score that cannot be ruled out is computed anew by the defined dot product and compared exactly
(`csrc/cpu/encode_threshold.cpp`), chunk by chunk. How many survive is found, not guessed: a chunk's survivors are moved
together as soon as they are known, and a block's chunks are merged row by row at its end. Where so many survive that
the screen spares nothing, the next chunk goes without it; the values are the same to the bit.
"""

from collections.abc import Callable, Iterator
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from fastsae.backends import native
from fastsae.backends.packed_encoders import packed_encoder
from fastsae.backends.screen import (
    _DTYPES,
    _LATENTS,
    _ROWS,
    _address,
    _Packed,
    _Packer,
    product_dtype,
    scored_chunks,
    screen_dtype,
)
from fastsae.backends.screen_panels import LANES, Kind, Panels

# The share of a chunk that is kept from which on the next goes without a screen. N = 2,048, D = 768, F = 24,576 on two
# cores, milliseconds with a bfloat16 screen / with a float32 screen / without: 685 / 932 / 884 to 970 at a share of
# 0.12, 1,122 / - / 906 at 0.24.
_SCREEN_SPARES_NOTHING = {torch.bfloat16: 0.18, torch.float32: 0.1}
# Survivors that wait to be merged: a block that has more goes on as two halves, so that beside a result of
# gigabytes no second one stands.
_MOST_WAITING = 1 << 25  # entries of 8 bytes: 256 MiB
_FEWEST_ROWS = 64
# A one-pass screen keeps the survivors of so many rows at a time, up to a share of the latents of each.
_PANEL_ROWS = 512
_MOST_SURVIVORS = 1 / 16


class _Rows:
    """Rows of x from `start` on, as they are and, once asked for, as PyTorch's products take them."""

    def __init__(self, start: int, x: Tensor, pack: Callable[[Tensor], _Packed]):
        self.start, self.x, self._pack = start, x, pack

    @cached_property
    def packed(self) -> _Packed:
        return self._pack(self.x)

    def part(self, begin: int, end: int) -> "_Rows":
        p, rows = self.packed, slice(begin, end)
        packed = _Packed(p.rows[rows], p.norm[rows], p.residual[rows], p.not_finite[rows])
        return _Rows(self.start + begin, self.x[rows], lambda x: packed)


class _Piece:
    """What some rows keep of a chunk: counts [rows], and where the entries of each row start."""

    def __init__(self, counts: Tensor, starts: Tensor, values: Tensor, indices: Tensor):
        self.counts, self.starts, self.values, self.indices = counts, starts, values, indices

    def part(self, begin: int, end: int) -> "_Piece":
        return _Piece(self.counts[begin:end], self.starts[begin:end], self.values, self.indices)


class _Growing:
    """A flat tensor that grows by what is appended to it; the system moves a large block's pages, not its bytes."""

    def __init__(self, dtype: torch.dtype):
        self._dtype, self._memory = dtype, np.empty(0, np.uint8)

    def extend(self, count: int) -> Tensor:
        """The new part [count]; it must be gone before the next call, which may move it."""
        begin = self._memory.size
        if count == 0:
            return torch.empty(0, dtype=self._dtype)
        self._memory.resize(begin + count * self._dtype.itemsize, refcheck=False)
        return torch.from_numpy(self._memory[begin:]).view(self._dtype)

    def tensor(self) -> Tensor:
        if self._memory.size == 0:
            return torch.empty(0, dtype=self._dtype)
        return torch.from_numpy(self._memory).view(self._dtype)


class _ChunkMemory:
    """What the chunks of a batch are packed, multiplied and looked through in."""

    def __init__(self, x: Tensor, w_enc: Tensor, dtype: torch.dtype, b_dec: Tensor | None):
        rows, latents = max(1, min(_ROWS, x.shape[0])), min(_LATENTS, w_enc.shape[0])
        self.scores = torch.empty(rows * latents, dtype=dtype)
        self.values = torch.empty(rows * latents)
        self.indices = torch.empty(rows * latents, dtype=torch.int32)
        self._not_finite = torch.empty(rows, dtype=torch.uint8)
        self._pack_x = _Packer(rows, x, dtype, b_dec)
        self.pack_w = _Packer(latents, w_enc, dtype, None)

    def pack_x(self, x: Tensor) -> _Packed:
        """A block of rows as the product takes them, until the next is asked for."""
        return self._pack_x(x, self._not_finite[: x.shape[0]].zero_())


class ThresholdScreen:
    """encode_threshold of x [n_tokens, d_in] with w_enc [d_sae, d_in]: float32 or bfloat16, rows contiguous."""

    def __init__(self, x: Tensor, w_enc: Tensor, b_enc: Tensor | None, b_dec: Tensor | None, threshold: Tensor):
        self.x, self.w_enc, self.b_enc, self.b_dec, self.threshold = x, w_enc, b_enc, b_dec, threshold
        self.dtype = product_dtype()
        self._counts = torch.empty(x.shape[0], dtype=torch.int64)
        self._values, self._indices = _Growing(x.dtype), _Growing(torch.int32)
        self._share = 0.0
        kind = Kind.__members__.get(str(screen_dtype()).removeprefix("torch."))
        # Each dimension's power of two would make int8's thresholds those of other latents.
        self._kind = Kind.int16 if kind is Kind.int8 else kind

    @cached_property
    def _panels(self) -> Panels:
        return Panels(packed_encoder(self.w_enc, self._kind), self.b_enc, self.b_dec, None)

    @cached_property
    def _chunks(self) -> "_ChunkMemory":
        return _ChunkMemory(self.x, self.w_enc, self.dtype, self.b_dec)

    def run(self) -> tuple[Tensor, Tensor, Tensor]:
        """values [nnz], int32 indices [nnz] and int64 offsets [n_tokens + 1]; latents ascend within a token."""
        for rows in self._blocks():
            piece = self._survivors_by_panels(rows)
            if piece is None:
                self._go_on(rows, 0, [])
            else:
                self._merge(rows, [piece])
        offsets = torch.zeros(self.x.shape[0] + 1, dtype=torch.int64)
        torch.cumsum(self._counts, 0, out=offsets[1:])
        return self._values.tensor(), self._indices.tensor(), offsets

    def _blocks(self) -> Iterator[_Rows]:
        start = 0
        while start < self.x.shape[0]:
            x = self.x[start : start + (_ROWS if self._kind is None else _PANEL_ROWS)]
            yield _Rows(start, x, lambda x: self._chunks.pack_x(x))
            start += x.shape[0]

    def _survivors_by_panels(self, rows: _Rows) -> _Piece | None:
        """What some rows keep of all latents, by a one-pass screen; None where that is too much for one.

        Then the blocks to come go by chunks: what a batch keeps of its latents differs little from row to row.
        """
        if self._kind is None:
            return None
        n, d_sae = rows.x.shape[0], self.w_enc.shape[0]
        capacity = int(d_sae * _MOST_SURVIVORS) + LANES
        indices = torch.empty(n, capacity + LANES, dtype=torch.int32)
        counts = torch.empty(n, dtype=torch.int32)
        self._panels.survivors(rows.x, self.threshold, indices, counts)
        left_out = int((counts < 0).sum())
        if left_out:
            if left_out > n // 8:
                self._kind = None
            return None
        values = torch.empty(n, capacity + LANES)
        native.cpu.survivors_finish(
            _address(rows.x), rows.x.stride(0), _DTYPES[rows.x.dtype], _address(self.b_dec), _address(self.w_enc),
            self.w_enc.stride(0), _address(self.b_enc), n, rows.x.shape[1], _address(self.threshold),
            _address(indices), capacity, _address(counts), _address(values),
        )  # fmt: skip
        return _Piece(counts, torch.arange(n) * (capacity + LANES), values, indices)

    def _go_on(self, rows: _Rows, first: int, pieces: list[_Piece]) -> None:
        """The rows' chunks from latent `first` on; `pieces` are those before."""
        n, waiting = rows.x.shape[0], sum(int(piece.counts.sum()) for piece in pieces)
        for chunk in range(first, self.w_enc.shape[0], _LATENTS):
            if waiting > _MOST_WAITING and n >= 2 * _FEWEST_ROWS:
                for begin, end in ((0, n // 2), (n // 2, n)):
                    self._go_on(rows.part(begin, end), chunk, [piece.part(begin, end) for piece in pieces])
                return
            pieces.append(self._survivors(rows, chunk))
            waiting += pieces[-1].values.numel()
        self._merge(rows, pieces)

    def _survivors(self, rows: _Rows, first: int) -> _Piece:
        x, n = rows.x, rows.x.shape[0]
        w_enc = self.w_enc[first : first + _LATENTS]
        latents = slice(first, first + w_enc.shape[0])
        scores, bounds = None, (0, 0, 0, 0, 0.0, 0.0)
        if self._share < _SCREEN_SPARES_NOTHING[self.dtype]:
            chunk = next(scored_chunks(rows.packed, w_enc, self._chunks.pack_w, self._chunks.scores, self.dtype))
            scores, bounds = chunk.scores, chunk.bounds()
        counts = torch.empty(n, dtype=torch.int32)
        native.cpu.threshold_chunk(
            _address(scores), _DTYPES[self.dtype], n, first, w_enc.shape[0], *bounds,
            _address(self.threshold[latents]), _address(x), x.stride(0), _DTYPES[x.dtype], _address(self.b_dec),
            _address(w_enc), w_enc.stride(0), _address(None if self.b_enc is None else self.b_enc[latents]),
            x.shape[1], _address(rows.packed.not_finite), _address(self._chunks.values), _address(self._chunks.indices),
            _address(counts),
        )  # fmt: skip
        wide = _Piece(counts, torch.arange(n) * w_enc.shape[0], self._chunks.values, self._chunks.indices)
        piece = self._compact(wide)
        self._share = piece.values.numel() / (n * w_enc.shape[0])
        return piece

    def _compact(self, piece: _Piece) -> _Piece:
        """The same entries, row after row."""
        ends = piece.counts.cumsum(0)
        kept = int(ends[-1])
        moved = _Piece(piece.counts, ends - piece.counts, torch.empty(kept), torch.empty(kept, dtype=torch.int32))
        _move(piece, moved.starts, moved.values, moved.indices)
        return moved

    def _merge(self, rows: _Rows, pieces: list[_Piece]) -> None:
        counts = torch.zeros(rows.x.shape[0], dtype=torch.int64)
        for piece in pieces:
            counts += piece.counts
        self._counts[rows.start : rows.start + counts.numel()] = counts
        to = counts.cumsum(0) - counts
        total = int(counts.sum())
        values, indices = self._values.extend(total), self._indices.extend(total)
        for piece in pieces:
            _move(piece, to, values, indices)
            to += piece.counts


def _move(piece: _Piece, to: Tensor, values: Tensor, indices: Tensor) -> None:
    native.cpu.move_rows(
        _address(piece.values), _address(piece.indices), _address(piece.starts), _address(piece.counts),
        piece.counts.numel(), _address(to), _address(values), _DTYPES[values.dtype], _address(indices),
    )  # fmt: skip
