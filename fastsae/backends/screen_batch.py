"""encode_batch_topk on a CPU: the screen of encode_threshold, with a threshold that rises as entries are found.

The k_total-th largest value found so far is a lower bound of the last one kept, so what lies below it is out. A first
bound is guessed from a few tokens; if that was too high, fewer than k_total are found, and the batch is read again
from a lower one. What is kept is cut exactly at the end (`fastsae.backends.largest`).
"""

import torch
from torch import Tensor

from fastsae.backends.largest import LargestOfBatch
from fastsae.backends.screen import _LATENTS
from fastsae.backends.screen_threshold import ThresholdScreen, _Piece, _Rows

# Tokens of the guess. It aims at half as many entries again as are wanted: too low costs their dot products, too high
# a second reading.
_SAMPLE_TOKENS = 16
_AIM = 1.5
# Dividing by the scale rounds, and so does the ranking: a threshold this much lower is safe.
_SAFE = 1 - 2.0**-21


class BatchScreen(ThresholdScreen):
    """encode_batch_topk of x [n_tokens, d_in] with w_enc [d_sae, d_in]: float32 or bfloat16, rows contiguous."""

    def __init__(
        self,
        x: Tensor,
        w_enc: Tensor,
        b_enc: Tensor | None,
        b_dec: Tensor | None,
        k_total: int,
        scale: Tensor | None = None,
    ):
        super().__init__(x, w_enc, b_enc, b_dec, torch.zeros(w_enc.shape[0]))
        self.k_total, self.scale = k_total, scale

    def run(self) -> tuple[Tensor, Tensor, Tensor]:
        """values [nnz], int32 indices [nnz] and int64 offsets [n_tokens + 1]; latents ascend within a token."""
        guess = self._guess()
        largest = self._read(guess)
        if guess > 0 and not largest.enough:
            largest = self._read(0.0)
        # The working memory of the screen is as large as that of the last cut, which needs none of it.
        self.__dict__.pop("_chunks", None)
        self.__dict__.pop("_panels", None)
        return largest.result(self.x)

    def _guess(self) -> float:
        n_tokens, d_sae = self.x.shape[0], self.w_enc.shape[0]
        if n_tokens <= _SAMPLE_TOKENS or not self.k_total:
            return 0.0
        chosen = torch.linspace(0, n_tokens - 1, _SAMPLE_TOKENS).long()
        x = self.x[chosen].float()
        x = (x if self.b_dec is None else x - self.b_dec).to(self.w_enc.dtype)
        values = (x @ self.w_enc.T).float()
        ranks = self._ranks(values if self.b_enc is None else values + self.b_enc, slice(None))
        # A bad token says nothing of the others.
        ranks = ranks.nan_to_num(nan=0.0, posinf=0.0, neginf=0.0).reshape(-1)
        wanted = int(_AIM * self.k_total * _SAMPLE_TOKENS / n_tokens) + 1
        return max(0.0, float(ranks.topk(min(wanted, _SAMPLE_TOKENS * d_sae)).values[-1]))

    def _ranks(self, values: Tensor, latents: slice | Tensor) -> Tensor:
        return values if self.scale is None else values * self.scale[latents]

    def _read(self, floor: float) -> LargestOfBatch:
        largest = LargestOfBatch(self.k_total, floor)
        for rows in self._blocks():
            self._set_threshold(slice(None), largest.floor)
            piece = self._survivors_by_panels(rows)
            if piece is not None:
                self._add(largest, rows, self._compact(piece))
                continue
            for first in range(0, self.w_enc.shape[0], _LATENTS):
                self._set_threshold(slice(first, first + _LATENTS), largest.floor)
                self._add(largest, rows, self._survivors(rows, first))
        return largest

    def _add(self, largest: LargestOfBatch, rows: _Rows, piece: _Piece) -> None:
        """Gives what some rows keep, row after row, to the largest of the batch."""
        start, n = rows.start, rows.x.shape[0]
        tokens = torch.arange(start, start + n, dtype=torch.int32).repeat_interleave(piece.counts)
        ranks = self._ranks(piece.values, piece.indices)
        entries = tokens, piece.indices, piece.values, ranks
        if self.scale is not None:
            above = ~(ranks <= largest.floor)
            entries = tuple(part[above] for part in entries)
        largest.add(*entries)

    def _set_threshold(self, latents: slice, floor: float) -> None:
        if self.scale is None:
            self.threshold[latents] = floor
        else:
            self.threshold[latents] = floor / self.scale[latents] * _SAFE
