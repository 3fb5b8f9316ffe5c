"""encode_batch_topk: the k_total largest relu(pre[n, f]) of a whole batch, pre[n, f] = <x_n - b_dec, w_f> + b_enc[f].

Chunks of latents, first to last. A tile of the product (gemm.py) stays in registers and is compared there with one
number, the k_total-th best of all chunks before; what is not below it goes to a list of each row (_append.py). After a
chunk the lists and what was kept so far are joined and the k_total best stay: one radix selection (torch.topk) over
keys of 63 bits, the bits of a positive float32 above the complement of n · F + f, which no two candidates share. So the
choice is exact, ties go to the lower row and then the lower latent, bits repeat, and the host waits for nothing until
all chunks are done. Keys fit while n_tokens · d_sae <= 2^32; a larger batch is PyTorch's.

A chunk is as long as all latents before it: of latents in random order about k_total candidates survive it, k a row.
Lists have room for 4 k of them, at least _LEAST_ROOM: rows differ. The first chunk is as long as a list and cannot fill
it. Where a row's list was too short, the counts tell when all is done, and the call is repeated in chunks as long as a
list: slow, exact, and in the same memory.

NaN and +inf are kept and do not count: tiles mark the rows that hold one, and where any does they are what
encode_threshold finds above the largest finite number.

Memory: 8 bytes a place of the lists and some 40 while they are joined, for n_tokens · 4 k places: about 100 MiB for
8,192 tokens and k = 64. The tile is that of encode_threshold, in 128 to 243 registers without a spill. No GPU has run
this yet.
"""

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastsae.backends import torch as torch_backend
from fastsae.backends.triton import encode, interpreted
from fastsae.backends.triton._append import append, halves, halves_of_vector
from fastsae.backends.triton._cases import WIDTHS, CompileCase, case
from fastsae.backends.triton._launch import TYPES, launch, vector
from fastsae.backends.triton.encode_threshold import above
from fastsae.backends.triton.gemm import _tile, _tile_of_program

_LEAST_ROOM = 256
_MOST_PLACES = 1 << 32


@triton.jit
def _append_candidates(found, latents, scale, least, first, inside, starts, counts, pairs, f_end, SLICE: tl.constexpr):
    """Positive scores that do not rank below `least`, SLICE columns after SLICE columns."""
    if found.shape[1] <= SLICE:
        known = (latents < f_end)[None, :] & inside[:, None]
        ranks = found
        if scale is not None:
            ranks = found * tl.load(scale + latents, mask=latents < f_end, other=0.0)[None, :]
        passes = known & (found > 0.0) & (found < float("inf")) & (ranks >= least)
        append(found, latents, passes, first, inside, starts, counts, pairs)
    else:
        left, right = halves(found)
        low, high = halves_of_vector(latents)
        _append_candidates(left, low, scale, least, first, inside, starts, counts, pairs, f_end, SLICE)
        _append_candidates(right, high, scale, least, first, inside, starts, counts, pairs, f_end, SLICE)


@triton.jit(do_not_specialize=["n_rows", "f_begin", "f_count"])
def _candidates(
    x, w, b_dec, bias, scale, least, starts, counts, pairs, not_finite,
    n_rows, f_begin, f_count, d_in, x_stride, w_stride,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    EVEN_K: tl.constexpr, CENTRE: tl.constexpr, BIAS: tl.constexpr, RELU: tl.constexpr,
    PRECISION: tl.constexpr, WIDEN: tl.constexpr, SLICE: tl.constexpr,
):  # fmt: skip
    row_block, latent_block = _tile_of_program(n_rows, f_count, BLOCK_M, BLOCK_N)
    rows = row_block * BLOCK_M + tl.arange(0, BLOCK_M)
    latents = f_begin + latent_block * BLOCK_N + tl.arange(0, BLOCK_N)
    found = _tile(
        x, w, b_dec, bias, rows, latents, n_rows, f_begin + f_count, d_in, x_stride, w_stride,
        BLOCK_M, BLOCK_N, BLOCK_K, EVEN_K, CENTRE, BIAS, RELU, PRECISION, WIDEN,
    )  # fmt: skip
    # Rows and latents past the end repeat the last one: what they show is so.
    strange = tl.max(((found < float("inf")) == 0).to(tl.int32), axis=1)
    tl.store(not_finite + rows, strange, mask=(rows < n_rows) & (strange > 0))
    _append_candidates(
        found, latents, scale, tl.load(least), row_block.to(tl.int64) * BLOCK_M, rows < n_rows,
        starts, counts, pairs, f_begin + f_count, SLICE,
    )  # fmt: skip


def _with_not_finite(operands: encode._Encoder, places: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
    """NaN and +inf of the whole batch among `places` and `values`, in the order of places."""
    largest = torch.full((operands.d_sae,), torch.finfo(torch.float32).max, device=places.device)
    more, latents, offsets = above(operands, largest)
    rows = torch.repeat_interleave(offsets.diff(), output_size=len(more))
    places, order = torch.cat([places, rows * operands.d_sae + latents]).sort()
    return places, torch.cat([values, more])[order]


class _Search:
    """The k_total best so far, and the lists in which a chunk's candidates arrive."""

    def __init__(self, operands: encode._Encoder, k_total: int, scale: Tensor | None):
        self.operands, self.k_total, self.scale = operands, k_total, scale
        self.n_rows, self.d_sae, device = operands.x.shape[0], operands.d_sae, operands.x.device
        self.room = min(self.d_sae, max(_LEAST_ROOM, 4 * triton.cdiv(k_total, self.n_rows)))
        self.starts = torch.arange(self.n_rows + 1, device=device) * self.room
        self.pairs = torch.empty(self.n_rows, self.room, dtype=torch.int64, device=device)
        self.counts = torch.zeros(self.n_rows, dtype=torch.int32, device=device)
        self.not_finite = torch.zeros(self.n_rows, dtype=torch.int32, device=device)
        self.longest = torch.zeros((), dtype=torch.int32, device=device)
        # A place without a candidate has the key -1.
        self.keys = torch.full((k_total,), -1, device=device)
        self.values = torch.zeros(k_total, device=device)
        self.least = torch.zeros(1, device=device)

    def run(self, doubling: bool) -> None:
        begin = 0
        while begin < self.d_sae:
            end = min(self.d_sae, begin + (max(begin, self.room) if doubling else self.room))
            self._append(begin, end)
            self._keep_best()
            begin = end

    def _append(self, begin: int, end: int) -> None:
        operands, unused = self.operands, self.least
        tile = encode._Tile.of(operands.x.dtype, self.n_rows, operands.d_in, operands.precision, widest=128)
        programs = triton.cdiv(self.n_rows, tile.rows) * triton.cdiv(end - begin, tile.latents)
        launch(
            _candidates, (programs,), operands.x, operands.w,
            unused if operands.b_dec is None else operands.b_dec, unused if operands.bias is None else operands.bias,
            self.scale, self.least, self.starts, self.counts, self.pairs, self.not_finite,
            self.n_rows, begin, end - begin, operands.d_in, operands.x.stride(0), operands.w.stride(0),
            BLOCK_M=tile.rows, BLOCK_N=tile.latents, BLOCK_K=tile.depth, EVEN_K=operands.d_in % tile.depth == 0,
            # The interpreter has registers for a whole tile.
            SLICE=tile.latents if interpreted() else tile.appended_at_once,
            num_warps=tile.warps, num_stages=tile.stages, **operands.flags,
        )  # fmt: skip

    def _keep_best(self) -> None:
        torch.maximum(self.longest, self.counts.amax(), out=self.longest)
        filled = torch.arange(self.room, device=self.pairs.device) < self.counts[:, None]
        latents, bits = self.pairs.view(torch.int32).unflatten(1, (-1, 2)).unbind(2)
        latents, values = torch.where(filled, latents, 0), bits.view(torch.float32)
        ranks = values if self.scale is None else values * self.scale[latents]
        places = torch.arange(self.n_rows, device=latents.device)[:, None] * self.d_sae + latents
        keys = (ranks.contiguous().view(torch.int32).long() << 32) | (_MOST_PLACES - 1 - places)
        keys = torch.cat([self.keys, torch.where(filled, keys, -1).flatten()])
        self.keys, kept = keys.topk(self.k_total, sorted=False)
        self.values = torch.cat([self.values, values.flatten()])[kept]
        # Until there are k_total candidates anything positive is one.
        self.least = (self.keys.amin().clamp(min=0) >> 32).int().view(torch.float32).reshape(1)
        self.counts.zero_()

    def found(self) -> tuple[int, bool, bool]:
        """How many candidates were kept, whether a list was too short, and whether some score is NaN or +inf."""
        strange = self.not_finite.amax()
        kept, longest, strange = torch.stack([(self.keys >= 0).sum(), self.longest, strange]).tolist()
        return kept, longest > self.room, strange > 0


def encode_batch_topk(
    x: Tensor, w_enc: Tensor, b_enc: Tensor | None, b_dec: Tensor | None, k_total: int, scale: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """As reference.encode_batch_topk, chosen among float32 pre-activations whatever the dtype of x."""
    n_tokens, d_sae = x.shape[0], w_enc.shape[0]
    if n_tokens * d_sae > _MOST_PLACES:
        return torch_backend.encode_batch_topk(x, w_enc, b_enc, b_dec, k_total, scale)
    if n_tokens == 0:
        return x.new_empty(0), x.new_empty(0, dtype=torch.int32), torch.zeros(1, dtype=torch.int64, device=x.device)
    operands = encode._Encoder(x, w_enc, b_enc, b_dec, 0, False)
    scale = None if scale is None else vector(scale.float())
    for doubling in (True, False):
        search = _Search(operands, min(k_total, n_tokens * d_sae), scale)
        search.run(doubling)
        kept, too_short, strange = search.found()
        if not too_short:
            break
    places = torch.where(search.keys < 0, _MOST_PLACES, _MOST_PLACES - 1 - (search.keys & (_MOST_PLACES - 1)))
    places, order = places.sort()
    places, values = places[:kept], search.values[order[:kept]]
    if strange:
        places, values = _with_not_finite(operands, places, values)
    bounds = torch.arange(n_tokens + 1, device=x.device) * d_sae
    return values.to(x.dtype), (places % d_sae).int(), torch.searchsorted(places, bounds)


def _cases() -> Iterator[CompileCase]:
    numbers = "n_rows i32 f_begin i32 f_count i32 d_in i32 x_stride i32 w_stride i32"
    state = "least *fp32 starts *i64 counts *i32 pairs *i64 not_finite *i32"
    for dtype, precision in (
        (torch.float32, "ieee"), (torch.float32, "tf32"), (torch.bfloat16, "ieee"), (torch.float16, "ieee"),
    ):  # fmt: skip
        t, half = TYPES[dtype], dtype.itemsize == 2
        tile = encode._Tile.of(dtype, encode._MOST_ROWS, WIDTHS[0], precision, widest=128)
        yield case(
            f"candidates {t} {precision}, {tile.rows} x {tile.latents} x {tile.depth}", _candidates,
            f"x *{t} w *{t} b_dec *{t} bias *fp32 scale *fp32 {state} {numbers}",
            {
                "BLOCK_M": tile.rows, "BLOCK_N": tile.latents, "BLOCK_K": tile.depth, "EVEN_K": True, "WIDEN": False,
                "CENTRE": not half, "BIAS": True, "RELU": False, "PRECISION": precision,
                "SLICE": tile.appended_at_once,
            },
            num_warps=tile.warps, num_stages=tile.stages,
        )  # fmt: skip


COMPILE_CASES = list(_cases())
