"""W_enc and rows of x as the one-pass screens multiply them (`csrc/cpu/panel_screen.cpp`), in one of three kinds.

    bfloat16   rounded; what the product loses by accumulating in float32 is bounded too
    int8       whole multiples of a scale of each row, at most 127 of it; the sum is exact
    int16      the same, of a scale at which no sum passes 2³¹: a tenth of bfloat16's loss, however the row looks

What rounding loses is measured for each row and bounds the error (docs/maths.md, "Certified selection" and "Integer
products"). In int8, where some dimensions of x are much larger than others, they are made smaller by powers of two and
those of W_enc larger: the products are the same, and the common scale of a row fits all of it.
"""

from enum import IntEnum

import torch
from torch import Tensor
from torch.nn.functional import pad

from fastsae.backends import native
from fastsae.backends.screen_common import _DTYPES, _address, _gamma, _State

_PANEL = 64
# Indices are packed to the front of a vector and stored whole: so many places more.
LANES = 16
# A tile of x has at most so many rows.
_MOST_TILE_ROWS = 32
_BYTES = 64
# Rows of W_enc that share a fingerprint.
_STRIP = 16
# Sums of int32 hold 255 · 127 of so many dimensions.
_MOST_DIMENSIONS_OF_INT8 = (2**31 - 1) // (255 * 127)
# Tokens and latents whose root mean squares decide how dimensions are made even.
_SAMPLE = 256
_MOST_EXPONENT = 20


class Kind(IntEnum):
    """As csrc/include/fastsae/abi.h numbers them."""

    bfloat16 = 0
    int8 = 1
    int16 = 2

    @property
    def itemsize(self) -> int:
        return 1 if self is Kind.int8 else 2

    def serves(self, d: int) -> bool:
        """Whether rows of d dimensions can be multiplied so."""
        return self is not Kind.int8 or d <= _MOST_DIMENSIONS_OF_INT8

    def capacity(self, k: int) -> int:
        """Candidates that a row has room for. Gaussian rows at D = 768, F = 24,576, k = 32 keep some 60, 375 and 35."""
        return 24 * k + 256 if self is Kind.int8 else 4 * k + 128

    @property
    def rows(self) -> int:
        """Rows that share a walk through W_enc, and the memory for their candidates."""
        return 512 if self is Kind.int8 else 1024


class _Packed:
    """Memory for n rows in one of the layouts of `csrc/cpu/pack_panels.cpp`, and for what is known of each."""

    def __init__(self, n: int, d: int, kind: Kind, powers: Tensor | None, by_panels: bool):
        self.kind, self.powers, self._d, self._by_panels = kind, powers, d, by_panels
        self.bytes = -(-d * kind.itemsize // _BYTES) * _BYTES
        padded = -(-n // _PANEL) * _PANEL if by_panels else n
        more = 0 if by_panels else _MOST_TILE_ROWS
        self.packed = torch.empty((padded + more) * self.bytes, dtype=torch.uint8)
        self.scale, self.norm, self.residual = torch.empty(3, padded)
        self.true_norm = torch.zeros(padded)
        self.offset = torch.empty(padded, dtype=torch.int32) if by_panels and kind is Kind.int8 else None
        self._fingerprints = torch.zeros(padded // _STRIP, dtype=torch.int64) if by_panels else None

    def pack(self, rows: Tensor, shift: Tensor | None = None, not_finite: Tensor | None = None) -> None:
        """Packs the rows; panels that hold them already stay as they are."""
        native.cpu.pack_panels(
            _address(rows), rows.stride(0), _DTYPES[rows.dtype], _address(shift), _address(self.powers), len(rows),
            self._d, self.kind, self._by_panels, _address(self.packed), self.bytes, _address(self.scale),
            _address(self.norm), _address(self.residual), _address(self.true_norm), _address(self.offset),
            _address(not_finite), _address(self._fingerprints),
        )  # fmt: skip

    def residual_above(self) -> Tensor:
        """Upper bounds of what the product loses of a row.

        An entry that is subnormal, or made so by a power of two, may be read as zero: each hides at most 2⁻¹²⁶.
        """
        if self.powers is None and self.kind is not Kind.bfloat16:
            return self.residual
        return self.residual + torch.where(self.norm > 0, self._d**0.5 * 2.0**-126, 0.0)


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


def _largest_of_panels(of_latents: Tensor) -> Tensor:
    return of_latents.view(-1, _PANEL).amax(1)


class PackedEncoder:
    """W_enc [d_sae, d_in] by panels of 64 latents."""

    def __init__(self, d_sae: int, d: int, kind: Kind, powers: Tensor | None):
        self.kind, self.powers, self.d_sae, self.d = kind, powers, d_sae, d
        self._memory = w = _Packed(d_sae, d, kind, powers, by_panels=True)
        self.bytes, self.packed, self.scale, self.offset = w.bytes, w.packed, w.scale, w.offset

    def pack(self, w_enc: Tensor) -> None:
        """Makes this the packed form of w_enc: what has changed since the last time is packed again."""
        w = self._memory
        w.pack(w_enc)
        residual = lost = w.residual_above()
        # The defined dot product's own rounding. It works on W_enc itself, whose norms are not those of the evened one.
        value = _gamma(self.d // 16 + 8)
        self.value_rounding = 0.0
        if self.powers is None:
            residual = residual + w.norm * value
        else:
            largest = w.true_norm[w.true_norm.isfinite()]
            self.value_rounding = value * float(largest.max()) * (1 + 1e-5) if len(largest) else 0.0
        if self.kind is Kind.bfloat16:
            residual = residual + (w.norm + lost) * _gamma(self.d + 2)
        # The sums above are of a few float32 operations each: 1e-5 covers their own rounding.
        self.norm, self.residual = w.norm * (1 + 1e-5), residual * (1 + 1e-5)
        self.most_norm, self.most_residual = _largest_of_panels(self.norm), _largest_of_panels(self.residual)


class Panels:
    """The one-pass screens of blocks of rows with one W_enc."""

    def __init__(self, w: PackedEncoder, b_enc: Tensor | None, b_dec: Tensor | None, x_powers: Tensor | None):
        self.w, self.b_dec, self._x_powers = w, b_dec, x_powers
        self._more = -w.d_sae % _PANEL
        self.b_enc = self._padded(b_enc)
        self._most_bias = None if self.b_enc is None else _largest_of_panels(self.b_enc.abs())

    def _padded(self, of_latents: Tensor | None) -> Tensor | None:
        return None if of_latents is None else pad(of_latents, (0, self._more))

    def _arguments(self, x: Tensor, not_finite: Tensor) -> tuple[tuple, list[Tensor]]:
        """What the kernels take, and the tensors that must live as long."""
        w = self.w
        rows = _Packed(*x.shape, w.kind, self._x_powers, by_panels=False)
        rows.pack(x, self.b_dec, not_finite)
        residual = rows.residual_above()
        norm = (rows.norm + residual) * (1 + 1e-5)
        absolute = rows.true_norm * w.value_rounding + (2 * w.d + 16) * 2.0**-126
        of_x = [rows.packed, rows.scale, norm, residual, absolute]
        of_w = [w.packed, w.scale, w.offset, w.norm, w.residual]
        of_panels = [w.most_norm, w.most_residual, self._most_bias]
        # Three roundings on the way from an exact sum to its score, of 2⁻²⁴ each, and room to spare.
        score_rounding = 0.0 if w.kind is Kind.bfloat16 else 2.0**-21
        arguments = (
            int(w.kind), list(map(_address, of_x)), list(map(_address, of_w)), list(map(_address, of_panels)),
            score_rounding, len(x), w.bytes, w.d_sae, _address(self.b_enc),
        )  # fmt: skip
        return arguments, of_x

    def select(self, x: Tensor, k: int, scale: Tensor | None, state: _State) -> None:
        """Finds the candidates of a block of rows for their k largest."""
        arguments, alive = self._arguments(x, state.redo)
        scale = self._padded(scale)
        native.cpu.panel_screen(arguments, k, _address(scale), *state.arguments())
        del alive

    def survivors(self, x: Tensor, threshold: Tensor, indices: Tensor, counts: Tensor) -> None:
        """Finds, for each row of a block, the latents that may be above their thresholds.

        indices [n, capacity + 16] receives them and counts [n] how many they are: −1 where they do not fit, or where
        the row has an entry that is not finite.
        """
        not_finite = torch.zeros(len(x), dtype=torch.uint8)
        arguments, alive = self._arguments(x, not_finite)
        torch.mul(not_finite != 0, -1, out=counts)
        threshold = self._padded(threshold)
        native.cpu.panel_survivors(
            arguments, _address(threshold), _address(indices), indices.shape[1] - LANES, _address(counts)
        )
        del alive
