"""encode_topk: the k largest of pre[n, f] = <x_n - b_dec, w_f> + b_enc[f], exactly, and without an [N, F] tensor.

Chunks of latents, first to last. The first _SEED_LATENTS are scored into memory and give each row its k best so far
(selection.select_kernel). After that a chunk's scores stay in registers: a tile compares them with each row's k-th
best and appends the few that are above (gemm.survivors_kernel), and the k best move to the front once a chunk
(selection.merge_kernel). A chunk is as long as all latents before it, so about k latents a row survive it and a call
takes log2(F / seed) chunks. Candidates have room for three times that number or more; where latents come in an
order that beats it (the largest last, say), the row's count tells, and such rows are done again from scores in
memory by kernels that are always launched and end at once for other rows: the host never waits to learn of it.

Memory, at most: _SCORES float32 scores and `capacity` pairs of 8 bytes a row, for _MOST_ROWS rows: 128 MiB and, at
k = 64, 16 MiB. Traffic on top of the product, a row: k pairs written and read for each chunk, where scores in memory
would be 8 F bytes. Every result is a function of the scores alone and a score of its row and latent alone (no split
sums, no float atomics), so bits repeat.

With a scale the order is that of score times scale. All chunks are then scored into memory, and `select_kernel`
multiplies what it reads; the k values are computed anew from the places (sampled_dot, N k D products beside N F D),
since a pair holds what it is ranked by and has no room for the score.

No GPU has run this yet: tile sizes are reasoned (gemm.py), not measured.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import triton
from torch import Tensor

from fastsae.backends import torch as torch_backend
from fastsae.backends.triton import gemm, interpreted, selection
from fastsae.backends.triton._cases import WIDTHS, CompileCase, case
from fastsae.backends.triton._launch import TYPES, launch, power_of_two, rows_of, vector
from fastsae.backends.triton.sampled_dot import sampled_dot
from fastsae.reference.precision import widen

_MOST_K = 2048
# The product re-reads W_enc for each block of rows; from 8,192 on that is hidden behind the arithmetic.
_MOST_ROWS = 8192
_SCORES = 1 << 25
# At least _MOST_K, so that k latents have been seen when the first threshold is taken.
_SEED_LATENTS = 2048


def float32_products() -> str:
    """How float32 products are made: "ieee", or "tf32" where torch.set_float32_matmul_precision allows it."""
    return "ieee" if torch.get_float32_matmul_precision() == "highest" else "tf32"


@dataclass(frozen=True)
class _Tile:
    """Sizes of one program of the product."""

    rows: int
    latents: int
    depth: int
    warps: int
    stages: int
    appended_at_once: int

    @classmethod
    def of(cls, dtype: torch.dtype, n_rows: int, d_in: int, precision: str, widest: int) -> "_Tile":
        depth = max(16, min(64, power_of_two(d_in)))
        rows = max(16, min(128, power_of_two(n_rows)))
        if dtype.itemsize == 2:
            if rows < 128:
                return cls(rows, 128, depth, 4, 4, 32)
            return cls(rows, widest, depth, 8, 3, 16 if widest > 128 else 32)
        if precision == "tf32":
            return cls(rows, 128, min(32, depth), 8 if rows == 128 else 4, 3, 32)
        return cls(min(64, rows), 64, 16, 4, 2, 16)


def _widest_tile(device: torch.device) -> int:
    """Latents of the widest tile that keeps its sums and its survivors in registers."""
    return 128 if device.type == "cuda" and torch.cuda.get_device_capability(device) >= (10, 0) else 256


def _rows_of_selection(n_rows: int) -> int:
    """One row a program. The interpreter runs programs in turn, and numpy takes many rows as fast as one."""
    return min(64, power_of_two(n_rows)) if interpreted() else 1


def _warps(elements: int) -> int:
    """Eight 64-bit keys a thread."""
    return max(1, min(16, elements // 256))


def capacity_of(k: int) -> int:
    """Places for a row's candidates: its k best and at least as many again, three times as many where k <= 512."""
    padded = power_of_two(k)
    return max(128, 4 * padded) if padded <= 512 else max(2048, 2 * padded)


def chunk_ends(begin: int, d_sae: int, k: int) -> list[int]:
    """Ends of the chunks after the first `begin` latents: each grows by what its candidates have room for.

    A chunk r times as long as all latents before it has k r survivors in a row on average, with a variance of
    k r (1 + r) for latents in random order. r = 1 leaves 6 standard deviations or more to capacity_of(k) where that is
    4 k, r = 1/2 the same where it is 2 k.
    """
    ends = []
    while begin < d_sae:
        longer = begin if capacity_of(k) >= 4 * k else begin // 2
        begin = min(d_sae, begin + max(1, longer))
        ends.append(begin)
    return ends


class _Encoder:
    """One call's operands in the form the kernels take, and its launches."""

    def __init__(
        self,
        x: Tensor,
        w: Tensor,
        b_enc: Tensor | None,
        b_dec: Tensor | None,
        k: int,
        relu_first: bool,
        scale: Tensor | None = None,
    ):
        self.x, self.w, self.scale = rows_of(x), rows_of(w), vector(scale)
        self.k, self.d_sae, self.d_in = k, w.shape[0], w.shape[1]
        self.precision = float32_products()
        centre = b_dec is not None and x.dtype == torch.float32
        self.b_dec = vector(b_dec) if centre else None
        self.bias = vector(b_enc)
        if b_dec is not None and not centre:
            self.bias = self._folded(vector(b_dec))
        self.flags = {
            "CENTRE": centre,
            "BIAS": self.bias is not None,
            "RELU": relu_first,
            "PRECISION": self.precision,
            # The interpreter multiplies the bits of bfloat16 as if they were integers.
            "WIDEN": interpreted() and x.dtype == torch.bfloat16,
        }

    def _folded(self, b_dec: Tensor) -> Tensor:
        out = torch.empty(self.d_sae, dtype=torch.float32, device=self.w.device)
        b_enc = self.bias
        launch(
            gemm.bias_kernel, (triton.cdiv(self.d_sae, 16),),
            self.w, b_dec, out if b_enc is None else b_enc, out, self.d_sae, self.d_in, self.w.stride(0),
            BLOCK_F=16, BLOCK_K=max(16, min(128, power_of_two(self.d_in))), BIAS=b_enc is not None, num_warps=4,
        )  # fmt: skip
        return out

    def rows(self, first: int, end: int, values: Tensor, indices: Tensor) -> None:
        """Encodes rows `first` up to `end` of x into values and indices [end - first, k]."""
        _Rows(self, self.x[first:end]).encode(values, indices)


class _Rows:
    """The state of a block of rows, and the steps that bring it forward."""

    def __init__(self, encoder: _Encoder, x: Tensor):
        self.encoder, self.x, self.n_rows = encoder, x, x.shape[0]
        self.capacity = capacity_of(encoder.k)
        self.width = min(_round_up(encoder.d_sae, 16), max(_SEED_LATENTS, _SCORES // self.n_rows // 16 * 16))
        self.pairs = torch.empty(self.n_rows, self.capacity, dtype=torch.int64, device=x.device)
        self.counts = torch.empty(self.n_rows, dtype=torch.int32, device=x.device)
        self.thresholds = torch.empty(self.n_rows, dtype=torch.float32, device=x.device)
        self.scores = torch.empty(self.n_rows, self.width, dtype=torch.float32, device=x.device)
        shape = x.dtype, self.n_rows, encoder.d_in, encoder.precision
        self.written = _Tile.of(*shape, widest=128)
        self.appended = _Tile.of(*shape, widest=_widest_tile(x.device))
        self.block = power_of_two(encoder.k)

    def encode(self, values: Tensor, indices: Tensor) -> None:
        encoder = self.encoder
        seed = min(encoder.d_sae, _SEED_LATENTS)
        self._select(0, seed, redo=False)
        if _fuses(encoder.d_sae) and encoder.scale is None:
            begin = seed
            for end in chunk_ends(seed, encoder.d_sae, encoder.k):
                self._append_survivors(begin, end)
                begin = end
            for begin in range(0, encoder.d_sae, self.width):
                self._select(begin, min(encoder.d_sae, begin + self.width), redo=True)
        else:
            for begin in range(seed, encoder.d_sae, self.width):
                self._select(begin, min(encoder.d_sae, begin + self.width), redo=False)
        latents, bits = self.pairs[:, : encoder.k].contiguous().view(torch.int32).unflatten(1, (-1, 2)).unbind(2)
        values.copy_(bits.view(torch.float32))
        indices.copy_(latents)

    def _product(self, kernel, tile: _Tile, operands: tuple, begin: int, end: int, **flags) -> None:
        encoder, unused = self.encoder, self.counts
        programs = triton.cdiv(self.n_rows, tile.rows) * triton.cdiv(end - begin, tile.latents)
        launch(
            kernel, (programs,), self.x, encoder.w,
            unused if encoder.b_dec is None else encoder.b_dec, unused if encoder.bias is None else encoder.bias,
            *operands, self.capacity, self.n_rows, begin, end - begin,
            encoder.d_in, self.x.stride(0), encoder.w.stride(0),
            BLOCK_M=tile.rows, BLOCK_N=tile.latents, BLOCK_K=tile.depth, EVEN_K=encoder.d_in % tile.depth == 0,
            num_warps=tile.warps, num_stages=tile.stages, **encoder.flags, **flags,
        )  # fmt: skip

    def _select(self, begin: int, end: int, redo: bool) -> None:
        k, scale = self.encoder.k, self.encoder.scale
        operands = self.scores, self.counts, self.width
        self._product(gemm.scores_kernel, self.written, operands, begin, end, REDO=redo)
        rows, block = _rows_of_selection(self.n_rows), max(256, self.block)
        launch(
            selection.select_kernel, (triton.cdiv(self.n_rows, rows),),
            self.scores, self.scores if scale is None else scale, self.pairs, self.counts, self.thresholds,
            self.n_rows, begin, end - begin, self.width, k, self.capacity,
            FIRST=begin == 0, REDO=redo, SCALE=scale is not None, ROWS=rows, BLOCK=block, K=self.block,
            num_warps=_warps(rows * max(block, 2 * self.block)),
        )  # fmt: skip

    def _append_survivors(self, begin: int, end: int) -> None:
        operands = self.pairs, self.counts, self.thresholds
        tile = self.appended
        self._product(gemm.survivors_kernel, tile, operands, begin, end, SLICE=tile.appended_at_once)
        rows = _rows_of_selection(self.n_rows)
        launch(
            selection.merge_kernel, (triton.cdiv(self.n_rows, rows),),
            self.pairs, self.counts, self.thresholds, self.n_rows, self.encoder.k, self.capacity,
            ROWS=rows, CAPACITY=self.capacity, K=self.block, num_warps=_warps(rows * self.capacity),
        )  # fmt: skip


def _round_up(number: int, multiple: int) -> int:
    return (number + multiple - 1) // multiple * multiple


def _fuses(d_sae: int) -> bool:
    """Whether candidates are appended by the product itself: not worth its launches for one more chunk of scores."""
    return d_sae > 2 * _SEED_LATENTS


def _values_at(
    x: Tensor,
    w: Tensor,
    b_enc: Tensor | None,
    b_dec: Tensor | None,
    scale: Tensor,
    indices: Tensor,
    relu_first: bool,
) -> Tensor:
    """The pre-activations at `indices` in the dtype of x; zero where `relu_first` and the rank is not positive."""
    centred = widen(x) if b_dec is None else widen(x) - widen(b_dec)
    pre = sampled_dot(centred, indices, None, w, None)
    if b_enc is not None:
        pre += widen(b_enc)[indices.long()]
    if relu_first:
        # Not "positive": NaN stays.
        pre = pre.where(~(pre * scale[indices.long()] <= 0), 0)
    return pre.to(x.dtype)


def encode_topk(
    x: Tensor,
    w_enc: Tensor,
    b_enc: Tensor | None,
    b_dec: Tensor | None,
    k: int,
    relu_first: bool,
    scale: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """As reference.encode_topk, chosen among float32 pre-activations whatever the dtype of x."""
    if k > _MOST_K:
        return torch_backend.encode_topk(x, w_enc, b_enc, b_dec, k, relu_first, scale)
    n_tokens = x.shape[0]
    values = x.new_empty(n_tokens, k)
    indices = torch.empty(n_tokens, k, dtype=torch.int32, device=x.device)
    if n_tokens:
        encoder = _Encoder(x, w_enc, b_enc, b_dec, k, relu_first, scale)
        for first in range(0, n_tokens, _MOST_ROWS):
            end = min(n_tokens, first + _MOST_ROWS)
            encoder.rows(first, end, values[first:end], indices[first:end])
        if scale is not None:
            values = _values_at(x, w_enc, b_enc, b_dec, scale, indices, relu_first)
    return values, indices


def _cases() -> Iterator[CompileCase]:
    numbers = "capacity i32 n_rows i32 f_begin i32 f_count i32 d_in i32 x_stride i32 w_stride i32"
    for dtype, precision in (
        (torch.float32, "ieee"), (torch.float32, "tf32"), (torch.bfloat16, "ieee"), (torch.float16, "ieee"),
    ):  # fmt: skip
        t, half = TYPES[dtype], dtype.itemsize == 2
        operands = f"x *{t} w *{t} b_dec *{t} bias *fp32"
        # Whole steps of depth at every width: one case serves them all.
        for widest in (256, 128) if half else (128,):
            tile = _Tile.of(dtype, _MOST_ROWS, WIDTHS[0], precision, widest)
            assert all(width % tile.depth == 0 for width in WIDTHS)
            sizes = {
                "BLOCK_M": tile.rows, "BLOCK_N": tile.latents, "BLOCK_K": tile.depth, "EVEN_K": True, "WIDEN": False,
                "CENTRE": not half, "BIAS": True, "RELU": False, "PRECISION": precision,
            }  # fmt: skip
            options = {"num_warps": tile.warps, "num_stages": tile.stages}
            name = f"{t} {precision}, {tile.rows} x {tile.latents} x {tile.depth}"
            state = "pairs *i64 counts *i32 thresholds *fp32"
            yield case(
                f"survivors {name} by {tile.appended_at_once}", gemm.survivors_kernel, f"{operands} {state} {numbers}",
                {**sizes, "SLICE": tile.appended_at_once}, archs=("80", "90") if widest > 128 else (), **options,
            )  # fmt: skip
        scores = f"{operands} scores *fp32 counts *i32 width i32 {numbers}"
        yield case(f"scores {name}", gemm.scores_kernel, scores, {**sizes, "REDO": True}, **options)
        if half:
            yield case(
                f"folded bias {t}", gemm.bias_kernel,
                f"w *{t} b_dec *{t} b_enc *{t} out *fp32 d_sae i32 d_in i32 w_stride i32",
                {"BLOCK_F": 16, "BLOCK_K": 128, "BIAS": True}, num_warps=4,
            )  # fmt: skip
    state = "pairs *i64 counts *i32 thresholds *fp32 n_rows i32"
    for k in (32, 64, 512):
        block, widest, capacity = power_of_two(k), max(256, 2 * power_of_two(k)), capacity_of(k)
        for scaled in (False, True):
            yield case(
                f"select k={k}{' scaled' * scaled}", selection.select_kernel,
                f"scores *fp32 scale *fp32 {state} f_begin i32 f_count i32 width i32 k i32 capacity i32",
                {
                    "FIRST": False, "REDO": not scaled, "SCALE": scaled,
                    "ROWS": 1, "BLOCK": max(256, block), "K": block,
                },
                num_warps=_warps(widest),
            )  # fmt: skip
        yield case(
            f"merge k={k}", selection.merge_kernel, f"{state} k i32 capacity i32",
            {"ROWS": 1, "CAPACITY": capacity, "K": block}, num_warps=_warps(capacity),
        )  # fmt: skip


COMPILE_CASES = list(_cases())
