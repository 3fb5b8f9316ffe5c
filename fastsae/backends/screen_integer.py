"""The screen of encode_topk by products of int8 (`csrc/cpu/integer_screen.cpp`): exact sums, a coarser bound.

Rows of x and of W_enc are whole multiples of a scale of their own, at most 127 of it; what that loses is measured for
each row and bounds the error (docs/maths.md, "Integer products"). A row whose candidates overflow goes to the screen of
`fastsae.backends.screen`. Where some dimensions of x are much larger than others, they are made smaller by powers of
two and those of W_enc larger: the products are the same, and the common scale of a row fits all of it.

Not the default: on two cores of Sapphire Rapids, whose bfloat16 products are those of AMX, encode_topk takes 222 ms
with it and 196 ms with the bfloat16 screen, and the whole step 319 and 317 ms
(benchmarks/results/gpt2-small-float32-amx.json). Where it goes: 85 ms products, 23 ms packing W_enc at each call, the
rest the candidates, four times as many as bfloat16 leaves.
"""

import torch
from torch import Tensor
from torch.nn.functional import pad

from fastsae.backends import native
from fastsae.backends.screen_common import _DTYPES, _address, _gamma, _State

_PANEL = 64
# Sums of int32 hold 255 · 127 of so many dimensions.
MOST_DIMENSIONS = (2**31 - 1) // (255 * 127)
# Rows whose candidates are kept at a time. Of Gaussian rows and latents at D = 768, F = 24,576, k = 32 some 375 are
# candidates in the end, and at most 1,024 of any of 2,048 rows.
MOST_ROWS = 512
# Tokens and latents whose root mean squares decide how dimensions are made even.
_SAMPLE = 256
_MOST_EXPONENT = 20


class Quantized:
    """Rows in one of the layouts of `csrc/cpu/quantize_rows.cpp`, and what is known of each."""

    def __init__(self, rows: Tensor, shift: Tensor | None, powers: Tensor | None, by_panels: bool, not_finite=None):
        n, d = rows.shape
        self.bytes = -(-d // 4) * 4
        padded = -(-n // _PANEL) * _PANEL if by_panels else n
        self.packed = torch.empty(padded * self.bytes, dtype=torch.int8)
        self.scale, self.norm, self.residual = torch.empty(3, padded)
        self.true_norm = torch.zeros(padded)
        self.offset = torch.empty(padded, dtype=torch.int32) if by_panels else None
        native.cpu.quantize_rows(
            _address(rows), rows.stride(0), _DTYPES[rows.dtype], _address(shift), _address(powers), n, d, by_panels,
            _address(self.packed), _address(self.scale), _address(self.norm), _address(self.residual),
            _address(self.true_norm), _address(self.offset), _address(not_finite),
        )  # fmt: skip


def powers_of_two(x: Tensor, b_dec: Tensor | None, w_enc: Tensor) -> tuple[Tensor, Tensor] | None:
    """Factors of the dimensions of x and of W_enc, inverse to each other, that make both even; None if they are.

    With root mean squares a_d and b_d, factors √(b_d / a_d) make them the same in both.
    """

    def spread(rows: Tensor, shift: Tensor | None) -> Tensor:
        some = rows[:: max(1, len(rows) // _SAMPLE)].float()
        return (some if shift is None else some - shift).square().mean(dim=0)

    # A dimension without activations, or with one that is not finite, has no say.
    exponents = (spread(w_enc, None) / spread(x, b_dec)).log2().div(4)
    exponents = exponents.where(exponents.isfinite(), torch.nan)
    exponents = (exponents - exponents.nanmedian()).round().nan_to_num(nan=0.0)
    exponents = exponents.clamp(-_MOST_EXPONENT, _MOST_EXPONENT)
    if not exponents.any():
        return None
    return exponents.exp2(), (-exponents).exp2()


class IntegerProducts:
    """W_enc as int8, and the screen of blocks of rows with it."""

    def __init__(
        self,
        x: Tensor,
        w_enc: Tensor,
        b_enc: Tensor | None,
        b_dec: Tensor | None,
        k: int,
        scale: Tensor | None,
    ):
        self.d_sae, self.d = w_enc.shape
        self.b_dec, self.k = b_dec, k
        self.capacity = 24 * k + 256
        powers = powers_of_two(x, b_dec, w_enc) if len(x) else None
        self._x_powers, w_powers = powers or (None, None)
        self.w = Quantized(w_enc, None, w_powers, by_panels=True)
        more = -self.d_sae % _PANEL
        self.b_enc = None if b_enc is None else pad(b_enc, (0, more))
        self.scale = None if scale is None else pad(scale, (0, more))
        self.w.residual *= 1 + 1e-5
        self.w.norm *= 1 + 1e-5
        largest = self.w.true_norm[self.w.true_norm.isfinite()]
        self._largest_norm = float(largest.max()) if len(largest) else 0.0

    def select(self, x: Tensor, state: _State) -> None:
        """Finds the candidates of a block of rows."""
        rows = Quantized(x, self.b_dec, self._x_powers, by_panels=False, not_finite=state.redo)
        # Powers of two may flush an entry to zero: each hides at most 2⁻¹²⁶.
        flushed = torch.where(rows.norm > 0, self.d**0.5 * 2.0**-126, 0.0)
        residual = rows.residual + flushed
        norm = (rows.norm + residual) * (1 + 1e-5)
        # The defined dot product's own rounding, and underflow.
        absolute = rows.true_norm * (self._largest_norm * _gamma(self.d // 16 + 8) * (1 + 1e-5))
        absolute += (2 * self.d + 16) * 2.0**-126
        w = self.w
        native.cpu.integer_screen(
            *map(_address, (rows.packed, rows.scale, norm, residual, absolute)),
            *map(_address, (w.packed, w.scale, w.offset, w.norm, w.residual)),
            len(x), w.bytes, self.d_sae, _address(self.b_enc), _address(self.scale), self.k, *state.arguments(),
        )  # fmt: skip
