"""The screen of encode_topk on a CPU: products of any precision, and what they may be trusted for.

Scores only decide which latents could still be among the winners; `csrc/cpu/encode.cpp` keeps those, by the bound of
docs/maths.md ("Certified selection"), and computes each kept value anew by the one defined dot product. The result is
the same to the bit whichever screen ran:

    one pass (`screen_panels`)   bfloat16, int8 or int16, compared as they are made: the fastest on x86
    chunks of latents            PyTorch's own product, float32: elsewhere, and for rows that overflow the others
"""

import os
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from fastsae.backends import native
from fastsae.backends.packed_encoders import packed_encoder, rest, resting
from fastsae.backends.screen_common import _DTYPES, _address, _gamma, _State
from fastsae.backends.screen_panels import Kind, Panels, powers_of_two

# Scores of one chunk: 1,024 rows x 512 latents are 1 MiB in bfloat16 and stay in the second-level cache between
# the GEMM and the selection; halves of either cost the GEMM more in packing.
_ROWS = 1024
_LATENTS = 512
# Below this many latents, or this many a pick, screening saves nothing: every value is computed.
_FEWEST_LATENTS = 256
_FEWEST_LATENTS_PER_PICK = 4
# A float32 screen reads all of W_enc once more; computing every value of one row costs about an eighth of that.
_FEWEST_ROWS_TO_RESCREEN = 8

# The one-pass screen that measured fastest on each instruction set: D = 768, F = 24,576, k = 32, N = 2,048 on two cores
# of Sapphire Rapids, milliseconds of encode_topk in bfloat16 / int8 / int16: 91 / 130 / - by tile registers, 537 / 142
# / 148 by AVX-512 with VNNI (its instruction for bfloat16 is slower by far); by float32 products 400 to 470.
_FASTEST = {
    "avx512_amx": torch.bfloat16,
    "avx512_bf16": torch.int8,
    "avx512": torch.int16,
    "avx2": torch.int16,
}
# Values of a row's `redo` flag, as csrc/include/fastsae/abi.h names them.
_EXHAUSTIVE, _OVERFLOWED, _LEFT_OUT = 1, 2, 3
_PATHS = {0: "screened", 1: "every value computed", 2: "every value computed", 3: "overflowed"}
# With more rows than this share overflowing, the coarse screen has cost more than it saved.
_MOST_OVERFLOWING = 0.25

# Rows of encode_topk in this process, by the dtype of a screen and what became of them there; `explain` shows them.
served: Counter[tuple[str, str]] = Counter()


def _float32_matmul_is_reduced() -> bool:
    """Whether torch has been told it may round float32 factors of a product (to tf32 or bfloat16)."""
    settings = [torch.get_float32_matmul_precision()]
    for place in (torch.backends, torch.backends.mkldnn, getattr(torch.backends.mkldnn, "matmul", None)):
        settings.append(getattr(place, "fp32_precision", "none"))
    return any(setting not in ("highest", "ieee", "none") for setting in settings)


def screen_dtype() -> torch.dtype:
    """That of encode_topk's screen: what FASTSAE_SCREEN names, or the fastest of the instruction set in use."""
    name = os.environ.get("FASTSAE_SCREEN")
    if name is None:
        return _FASTEST.get(native.cpu and native.cpu.isa(), product_dtype())
    if name not in ("float32", *Kind.__members__):
        raise ValueError(f"FASTSAE_SCREEN={name!r}: expected float32, {', '.join(Kind.__members__)}")
    return getattr(torch, name)


def product_dtype() -> torch.dtype:
    """That of screens by PyTorch's products: bfloat16 where the processor has instructions for it, else float32."""
    name = os.environ.get("FASTSAE_SCREEN")
    if name in ("float32", "bfloat16"):
        return getattr(torch, name)
    native_bfloat16 = getattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)()
    return torch.bfloat16 if native_bfloat16 and torch.backends.mkldnn.is_available() else torch.float32


@dataclass
class _Packed:
    """Rows as the GEMM takes them, with upper bounds of ‖row‖ and ‖row - packed row‖."""

    rows: Tensor
    norm: Tensor
    residual: Tensor
    not_finite: Tensor | None


class _Packer:
    """Reusable memory for packed rows: in the screen's dtype, less a shift where there is one."""

    def __init__(self, most_rows: int, like: Tensor, dtype: torch.dtype, shift: Tensor | None):
        d = like.shape[1]
        self._as_is = like.dtype == dtype and shift is None
        self._memory = None if self._as_is else torch.empty(most_rows, d, dtype=dtype)
        self._dtype, self._shift = dtype, shift
        self._norm, self._residual = torch.empty(most_rows), torch.empty(most_rows)

    def __call__(self, rows: Tensor, not_finite: Tensor | None) -> _Packed:
        n, d = rows.shape
        norm, residual = self._norm[:n], self._residual[:n]
        native.cpu.pack_rows(
            _address(rows), rows.stride(0), _DTYPES[rows.dtype], _address(self._shift), n, d,
            _address(self._memory), _DTYPES[self._dtype], _address(norm), _address(residual),
            _address(not_finite),
        )  # fmt: skip
        packed = rows if self._as_is else self._memory[:n]
        # Denormals may be flushed before a product: each hides at most 2⁻¹²⁶ of an entry.
        flushed = torch.where(norm > 0, d**0.5 * 2.0**-126, 0.0)
        return _Packed(packed, norm, residual.add_(flushed), not_finite)


@dataclass
class Chunk:
    """Scores [n, count] of the latents from `first` on, and what bounds their errors."""

    first: int
    count: int
    scores: Tensor
    row_residual: Tensor
    row_norm: Tensor
    latent_norm: Tensor
    latent_residual: Tensor
    score_rounding: float
    absolute: float

    def bounds(self) -> tuple[int | float, ...]:
        """As the kernels take them."""
        vectors = (self.row_residual, self.row_norm, self.latent_norm, self.latent_residual)
        return (*map(_address, vectors), self.score_rounding, self.absolute)


def scored_chunks(rows: _Packed, w_enc: Tensor, pack_w: _Packer, scores: Tensor, dtype: torch.dtype) -> Iterator[Chunk]:
    """The screen's products with a block of rows, a chunk of latents at a time, in the memory of `scores`."""
    n, d = rows.rows.shape
    row_norm = rows.norm + rows.residual
    # Two factors rounded to bfloat16, the coarsest that torch may choose: (1 + 2⁻⁸)² - 1 is just above 2⁻⁷.
    reduced = 2.0**-6 if dtype == torch.float32 and _float32_matmul_is_reduced() else 0.0
    product, value = _gamma(d + 2) + reduced, _gamma(d // 16 + 8)
    # A float32 score is stored as it was summed; a bfloat16 one is rounded to 8 bits, by 2⁻⁸ of the exact score.
    score_rounding = 0.0 if dtype == torch.float32 else 1.01 * 2.0**-8
    for first in range(0, w_enc.shape[0], _LATENTS):
        latents = pack_w(w_enc[first : first + _LATENTS], None)
        count = latents.rows.shape[0]
        # The sums below are of a few float32 operations each: 1e-5 covers their own rounding.
        latent_norm = latents.norm * (1 + 1e-5)
        latent_residual = (latents.residual + (latents.norm + latents.residual) * product + latents.norm * value) * (
            1 + 1e-5
        )
        chunk = scores[: n * count].view(n, count)
        torch.mm(rows.rows, latents.rows.T, out=chunk)
        yield Chunk(
            first, count, chunk, rows.residual, row_norm, latent_norm, latent_residual, score_rounding,
            (2 * d + 16) * 2.0**-126,
        )  # fmt: skip


class Screen:
    """encode_topk of x [n_tokens, d_in] with w_enc [d_sae, d_in]: float32 or bfloat16, rows contiguous."""

    def __init__(
        self,
        x: Tensor,
        w_enc: Tensor,
        b_enc: Tensor | None,
        b_dec: Tensor | None,
        k: int,
        relu_first: bool = False,
        scale: Tensor | None = None,
        dtype: torch.dtype | None = None,
    ):
        self.x, self.w_enc, self.b_enc, self.b_dec = x, w_enc, b_enc, b_dec
        self.k, self.relu_first, self.scale = k, relu_first, scale
        self.dtype = dtype or screen_dtype()
        self.d_sae = w_enc.shape[0]
        self.exhaustive = self.d_sae < max(_FEWEST_LATENTS, _FEWEST_LATENTS_PER_PICK * k)
        # Asked for a second time, of rows that overflowed a coarser screen, the dtype is named.
        if self.dtype == torch.int8 and dtype is None and not self.exhaustive and resting(w_enc, Kind.int8):
            self.dtype = torch.int16
        self.kind = Kind.__members__.get(str(self.dtype).removeprefix("torch."))

    def run(self, values: Tensor, indices: Tensor) -> None:
        """Writes the selection of every row into values [n_tokens, k] and int32 indices [n_tokens, k]."""
        if self.exhaustive:
            select = self._select_nothing
            rows, capacity = _ROWS, 0
        elif self.kind is not None:
            select, rows, capacity = self._panels(), self.kind.rows, self.kind.capacity(self.k)
        else:
            select, rows, capacity = self._products(), _ROWS, 4 * self.k + 128
        state = _State(min(rows, self.x.shape[0]), capacity)
        for start in range(0, self.x.shape[0], rows):
            block = slice(start, min(start + rows, self.x.shape[0]))
            x = self.x[block]
            state.reset()
            select(x, state)
            overflowed = self._overflowed(state, x.shape[0])
            self._count(state, x.shape[0])
            if self.kind is Kind.int8 and overflowed is not None and len(overflowed) > _MOST_OVERFLOWING * len(x):
                rest(self.w_enc, Kind.int8)
            self._finish(x, state, values[block], indices[block])
            if overflowed is None:
                continue
            again = Screen(
                x[overflowed], self.w_enc, self.b_enc, self.b_dec, self.k, self.relu_first, self.scale, self._finer()
            )
            better = values.new_empty(len(overflowed), self.k), indices.new_empty(len(overflowed), self.k)
            again.run(*better)
            values[block][overflowed], indices[block][overflowed] = better

    def _finer(self) -> torch.dtype:
        return torch.int16 if self.kind is Kind.int8 else torch.float32

    def _overflowed(self, state: _State, n: int) -> Tensor | None:
        """The rows for which a finer screen is cheaper than computing every value; `_finish` leaves them out."""
        if self.dtype == torch.float32:
            return None
        overflowed = (state.redo[:n] == _OVERFLOWED).nonzero()[:, 0]
        if len(overflowed) < _FEWEST_ROWS_TO_RESCREEN:
            return None
        state.redo[overflowed] = _LEFT_OUT
        return overflowed

    def _count(self, state: _State, n: int) -> None:
        paths = state.redo[:n].bincount(minlength=4).tolist()
        for path, name in _PATHS.items():
            if paths[path]:
                served[str(self.dtype).removeprefix("torch."), name] += paths[path]

    def _select_nothing(self, x: Tensor, state: _State) -> None:
        state.redo.fill_(_EXHAUSTIVE)

    def _panels(self) -> Callable[[Tensor, _State], None]:
        """The one-pass screen of a block of rows."""
        x_powers, w_powers = None, None
        if self.kind is Kind.int8 and len(self.x):
            x_powers, w_powers = powers_of_two(self.x, self.b_dec, self.w_enc) or (None, None)
        panels = Panels(packed_encoder(self.w_enc, self.kind, w_powers), self.b_enc, self.b_dec, x_powers)
        return lambda x, state: panels.select(x, self.k, self.scale, state)

    def _products(self) -> Callable[[Tensor, _State], None]:
        """The screen of a block of rows by PyTorch's products."""
        rows, latents = min(_ROWS, self.x.shape[0]), min(_LATENTS, self.d_sae)
        pack_x = _Packer(rows, self.x, self.dtype, self.b_dec)
        pack_w = _Packer(latents, self.w_enc, self.dtype, None)
        scores = torch.empty(rows * latents, dtype=self.dtype)
        return lambda x, state: self._select(x, pack_x(x, state.redo), pack_w, scores, state)

    def _select(self, x: Tensor, rows: _Packed, pack_w: _Packer, scores: Tensor, state: _State) -> None:
        for chunk in scored_chunks(rows, self.w_enc, pack_w, scores, self.dtype):
            native.cpu.select_chunk(
                _address(chunk.scores), chunk.count, _DTYPES[self.dtype], x.shape[0], chunk.first, chunk.count,
                _address(self.b_enc), _address(self.scale), *chunk.bounds(), self.k, *state.arguments(),
            )  # fmt: skip

    def _finish(self, x: Tensor, state: _State, values: Tensor, indices: Tensor) -> None:
        native.cpu.select_finish(
            _address(x), x.stride(0), _DTYPES[x.dtype], _address(self.b_dec), _address(self.w_enc),
            self.w_enc.stride(0), _address(self.b_enc), _address(self.scale), x.shape[0], x.shape[1], self.d_sae,
            self.k, self.relu_first, *state.arguments(), _address(values), _address(indices),
        )  # fmt: skip
