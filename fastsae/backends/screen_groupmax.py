"""encode_groupmax on a CPU: the screen of encode_topk, with a best value of each group in place of a running threshold.

What could be the best of its group is computed anew by the defined dot product, chunk by chunk
(`csrc/cpu/encode_groupmax.cpp`); nothing but the k best of a row is kept between chunks.
"""

import torch
from torch import Tensor

from fastsae.backends import native
from fastsae.backends.screen import _DTYPES, _LATENTS, _ROWS, _address, _Packed, _Packer, product_dtype, scored_chunks

# In groups smaller than this so many latents remain that the screen spares nothing.
_LEAST_GROUP = 16


class GroupScreen:
    """encode_groupmax of x [n_tokens, d_in] with w_enc [d_sae, d_in]: float32 or bfloat16, rows contiguous."""

    def __init__(self, x: Tensor, w_enc: Tensor, b_enc: Tensor | None, b_dec: Tensor | None, k: int):
        self.x, self.w_enc, self.b_enc, self.b_dec, self.k = x, w_enc, b_enc, b_dec, k
        self.dtype, self.size = product_dtype(), w_enc.shape[0] // k
        rows, latents = max(1, min(_ROWS, x.shape[0])), min(_LATENTS, w_enc.shape[0])
        self._scores = torch.empty(rows * latents, dtype=self.dtype)
        self._not_finite = torch.empty(rows, dtype=torch.uint8)
        self._pack_x = _Packer(rows, x, self.dtype, b_dec)
        self._pack_w = _Packer(latents, w_enc, self.dtype, None)

    def run(self) -> tuple[Tensor, Tensor]:
        """values [n_tokens, k] and int32 indices [n_tokens, k]."""
        # relu(pre) is at least zero, and the first latent of a group is the lowest of those that tie.
        values = torch.zeros(self.x.shape[0], self.k)
        first = torch.arange(self.k, dtype=torch.int32) * self.size
        indices = first.repeat(self.x.shape[0], 1)
        for start in range(0, self.x.shape[0], _ROWS):
            block = slice(start, start + _ROWS)
            x = self.x[block]
            packed = self._pack_x(x, self._not_finite[: x.shape[0]].zero_())
            for begin in range(0, self.w_enc.shape[0], _LATENTS):
                self._chunk(x, packed, begin, values[block], indices[block])
        return values.to(self.x.dtype), indices

    def _chunk(self, x: Tensor, packed: _Packed, first: int, values: Tensor, indices: Tensor) -> None:
        w_enc = self.w_enc[first : first + _LATENTS]
        bias = None if self.b_enc is None else self.b_enc[first : first + _LATENTS]
        scores, bounds = None, (0, 0, 0, 0, 0.0, 0.0)
        if self.size >= _LEAST_GROUP:
            chunk = next(scored_chunks(packed, w_enc, self._pack_w, self._scores, self.dtype))
            scores, bounds = chunk.scores, chunk.bounds()
        native.cpu.group_chunk(
            _address(scores), _DTYPES[self.dtype], x.shape[0], first, w_enc.shape[0], self.size, self.k, *bounds,
            _address(x), x.stride(0), _DTYPES[x.dtype], _address(self.b_dec), _address(w_enc), w_enc.stride(0),
            _address(bias), x.shape[1], _address(packed.not_finite), _address(values), _address(indices),
        )  # fmt: skip
