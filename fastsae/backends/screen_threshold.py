"""encode_threshold on a CPU: the screen of encode_topk, with each latent's own threshold in place of a running one.

Every score that cannot be ruled out is computed anew by the defined dot product and compared exactly
(`csrc/cpu/encode_threshold.cpp`), chunk by chunk. How many survive is found, not guessed: a chunk's survivors are moved
together as soon as they are known, and a block's chunks are merged row by row at its end.
"""

import torch
from torch import Tensor

from fastsae.backends import native
from fastsae.backends.screen import _DTYPES, _LATENTS, _ROWS, Chunk, _address, _Packer, scored_chunks, screen_dtype


class _Piece:
    """What a block of rows keeps of a chunk: counts [rows], and their entries one row after the other."""

    def __init__(self, counts: Tensor, starts: Tensor, values: Tensor, indices: Tensor):
        self.counts, self.starts, self.values, self.indices = counts, starts, values, indices


class ThresholdScreen:
    """encode_threshold of x [n_tokens, d_in] with w_enc [d_sae, d_in]: float32 or bfloat16, rows contiguous."""

    def __init__(self, x: Tensor, w_enc: Tensor, b_enc: Tensor | None, b_dec: Tensor | None, threshold: Tensor):
        self.x, self.w_enc, self.b_enc, self.b_dec, self.threshold = x, w_enc, b_enc, b_dec, threshold
        self.dtype = screen_dtype()
        rows, latents = max(1, min(_ROWS, x.shape[0])), min(_LATENTS, w_enc.shape[0])
        self._scores = torch.empty(rows * latents, dtype=self.dtype)
        self._values = torch.empty(rows * latents)
        self._indices = torch.empty(rows * latents, dtype=torch.int32)
        self._not_finite = torch.empty(rows, dtype=torch.uint8)
        self._pack_x = _Packer(rows, x, self.dtype, b_dec)
        self._pack_w = _Packer(latents, w_enc, self.dtype, None)

    def run(self) -> tuple[Tensor, Tensor, Tensor]:
        """values [nnz], int32 indices [nnz] and int64 offsets [n_tokens + 1]; latents ascend within a token."""
        blocks = []
        for start in range(0, self.x.shape[0], _ROWS):
            x = self.x[start : start + _ROWS]
            blocks.append((x.shape[0], self._pieces(x)))
        counts = [sum(piece.counts.long() for piece in pieces) for _, pieces in blocks]
        offsets = torch.zeros(self.x.shape[0] + 1, dtype=torch.int64)
        if counts:
            torch.cumsum(torch.cat(counts), 0, out=offsets[1:])
        values = self.x.new_empty(int(offsets[-1]))
        indices = torch.empty(values.numel(), dtype=torch.int32)
        start = 0
        for rows, pieces in blocks:
            to = offsets[start : start + rows].clone()
            for piece in pieces:
                _move(piece, to, values, indices)
                to += piece.counts
            start += rows
        return values, indices, offsets

    def _pieces(self, x: Tensor) -> list[_Piece]:
        not_finite = self._not_finite[: x.shape[0]].zero_()
        rows = self._pack_x(x, not_finite)
        return [
            self._survivors(x, chunk, not_finite)
            for chunk in scored_chunks(rows, self.w_enc, self._pack_w, self._scores, self.dtype)
        ]

    def _survivors(self, x: Tensor, chunk: Chunk, not_finite: Tensor) -> _Piece:
        n, latents = x.shape[0], slice(chunk.first, chunk.first + chunk.count)
        w_enc = self.w_enc[latents]
        counts = torch.empty(n, dtype=torch.int32)
        native.cpu.threshold_chunk(
            _address(chunk.scores), _DTYPES[self.dtype], n, chunk.first, chunk.count, *chunk.bounds(),
            _address(self.threshold[latents]), _address(x), x.stride(0), _DTYPES[x.dtype], _address(self.b_dec),
            _address(w_enc), w_enc.stride(0), _address(None if self.b_enc is None else self.b_enc[latents]),
            x.shape[1], _address(not_finite), _address(self._values), _address(self._indices), _address(counts),
        )  # fmt: skip
        ends = counts.cumsum(0)
        piece = _Piece(counts, ends - counts, *_empty(int(ends[-1])))
        wide = _Piece(counts, torch.arange(n) * chunk.count, self._values, self._indices)
        _move(wide, piece.starts, piece.values, piece.indices)
        return piece


def _empty(count: int) -> tuple[Tensor, Tensor]:
    return torch.empty(count), torch.empty(count, dtype=torch.int32)


def _move(piece: _Piece, to: Tensor, values: Tensor, indices: Tensor) -> None:
    native.cpu.move_rows(
        _address(piece.values), _address(piece.indices), _address(piece.starts), _address(piece.counts),
        piece.counts.numel(), _address(to), _address(values), _DTYPES[values.dtype], _address(indices),
    )  # fmt: skip
