"""encode_threshold: every pre[n, f] = <x_n - b_dec, w_f> + b_enc[f] above threshold[f], without an [N, F] tensor.

One launch of the product of gemm.py. A tile stays in registers, is compared there with the thresholds of its latents,
and appends what passes to a list of each row (_append.py), 8 bytes an entry. A sort by row and latent puts the lists in
order, so bits repeat. How long they are only the device knows: the host reads their total and the longest once, when
all is done, as it must to make results of that size.

A list has room for _USUAL_L0 entries, 8 MiB for 8,192 rows: that holds the codes of a trained SAE. Where a row had
more, the counts are exact all the same, and a second launch finds lists of exactly that length: one row that is NaN
costs its own F entries and no other's, and an untrained SAE, with half of its latents active, pays the product twice.

Traffic on top of the product: an entry is written once and sorted, nothing is moved for a score that does not pass.
Tiles are those that encode_topk appends from on sm_100, 128 latents wide and 32 at a time, on every architecture: 134
to 224 registers and no spill. No GPU has run this yet.
"""

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastsae.backends.triton import encode, interpreted
from fastsae.backends.triton._append import append, halves, halves_of_vector
from fastsae.backends.triton._cases import WIDTHS, CompileCase, case
from fastsae.backends.triton._launch import TYPES, launch
from fastsae.backends.triton.gemm import _tile, _tile_of_program

_USUAL_L0 = 128


@triton.jit
def _append_above(found, latents, thresholds, first, inside, starts, counts, pairs, d_sae, SLICE: tl.constexpr):
    """What is above its latent's threshold, SLICE columns after SLICE columns."""
    if found.shape[1] <= SLICE:
        known = latents < d_sae
        threshold = tl.load(thresholds + latents, mask=known, other=0.0)
        # Not "above": NaN is kept.
        passes = ((found <= threshold[None, :]) == 0) & known[None, :] & inside[:, None]
        append(found, latents, passes, first, inside, starts, counts, pairs)
    else:
        left, right = halves(found)
        low, high = halves_of_vector(latents)
        _append_above(left, low, thresholds, first, inside, starts, counts, pairs, d_sae, SLICE)
        _append_above(right, high, thresholds, first, inside, starts, counts, pairs, d_sae, SLICE)


@triton.jit(do_not_specialize=["n_rows", "d_sae"])
def _above_threshold(
    x, w, b_dec, bias, thresholds, starts, counts, pairs, n_rows, d_sae, d_in, x_stride, w_stride,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    EVEN_K: tl.constexpr, CENTRE: tl.constexpr, BIAS: tl.constexpr, RELU: tl.constexpr,
    PRECISION: tl.constexpr, WIDEN: tl.constexpr, SLICE: tl.constexpr,
):  # fmt: skip
    row_block, latent_block = _tile_of_program(n_rows, d_sae, BLOCK_M, BLOCK_N)
    rows = row_block * BLOCK_M + tl.arange(0, BLOCK_M)
    latents = latent_block * BLOCK_N + tl.arange(0, BLOCK_N)
    found = _tile(
        x, w, b_dec, bias, rows, latents, n_rows, d_sae, d_in, x_stride, w_stride,
        BLOCK_M, BLOCK_N, BLOCK_K, EVEN_K, CENTRE, BIAS, RELU, PRECISION, WIDEN,
    )  # fmt: skip
    first = row_block.to(tl.int64) * BLOCK_M
    _append_above(found, latents, thresholds, first, rows < n_rows, starts, counts, pairs, d_sae, SLICE)


class _Lists:
    """Room for the entries of each row, and the number of those that wanted a place."""

    def __init__(self, starts: Tensor, capacity: int):
        self.starts = starts
        self.pairs = torch.empty(capacity, dtype=torch.int64, device=starts.device)
        self.counts = torch.zeros(starts.numel() - 1, dtype=torch.int32, device=starts.device)

    def sorted(self, nnz: int, d_sae: int) -> tuple[Tensor, Tensor]:
        """-> values float32 and latents int32 [nnz] by row, then latent; of lists that all had room."""
        latents, bits = self.pairs.view(torch.int32).unflatten(0, (-1, 2)).unbind(1)
        places = torch.arange(len(latents), device=latents.device)
        rows = torch.searchsorted(self.starts, places, right=True) - 1
        filled = places - self.starts[rows] < self.counts[rows]
        # Places without an entry sort behind those with one.
        keys = torch.where(filled, rows * d_sae + latents, torch.iinfo(torch.int64).max)
        keys, order = keys.sort()
        return bits[order[:nnz]].view(torch.float32), (keys[:nnz] % d_sae).int()


def _fill(lists: _Lists, operands: encode._Encoder, threshold: Tensor) -> None:
    n_rows, unused = operands.x.shape[0], threshold
    tile = encode._Tile.of(operands.x.dtype, n_rows, operands.d_in, operands.precision, widest=128)
    programs = triton.cdiv(n_rows, tile.rows) * triton.cdiv(operands.d_sae, tile.latents)
    launch(
        _above_threshold, (programs,), operands.x, operands.w,
        unused if operands.b_dec is None else operands.b_dec, unused if operands.bias is None else operands.bias,
        threshold, lists.starts, lists.counts, lists.pairs, n_rows, operands.d_sae,
        operands.d_in, operands.x.stride(0), operands.w.stride(0),
        BLOCK_M=tile.rows, BLOCK_N=tile.latents, BLOCK_K=tile.depth, EVEN_K=operands.d_in % tile.depth == 0,
        # The interpreter has registers for a whole tile.
        SLICE=tile.latents if interpreted() else tile.appended_at_once,
        num_warps=tile.warps, num_stages=tile.stages, **operands.flags,
    )  # fmt: skip


def above(operands: encode._Encoder, threshold: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """-> values float32 [nnz], indices and offsets of what is above `threshold`."""
    n_tokens, d_sae, device = operands.x.shape[0], operands.d_sae, threshold.device
    usual = min(d_sae, _USUAL_L0)
    lists = _Lists(torch.arange(n_tokens + 1, device=device) * usual, n_tokens * usual)
    _fill(lists, operands, threshold)
    offsets = torch.zeros(n_tokens + 1, dtype=torch.int64, device=device)
    torch.cumsum(lists.counts, 0, out=offsets[1:])
    most = lists.counts.amax() if n_tokens else offsets[0]
    nnz, most = torch.stack([offsets[-1], most]).tolist()
    if most > usual:
        lists = _Lists(offsets, nnz)
        _fill(lists, operands, threshold)
    return *lists.sorted(nnz, d_sae), offsets


def encode_threshold(
    x: Tensor, w_enc: Tensor, b_enc: Tensor | None, b_dec: Tensor | None, threshold: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """As reference.encode_threshold, of float32 pre-activations whatever the dtype of x."""
    operands = encode._Encoder(x, w_enc, b_enc, b_dec, 0, False)
    values, indices, offsets = above(operands, threshold.contiguous())
    return values.to(x.dtype), indices, offsets


def _cases() -> Iterator[CompileCase]:
    numbers = "n_rows i32 d_sae i32 d_in i32 x_stride i32 w_stride i32"
    for dtype, precision in (
        (torch.float32, "ieee"), (torch.float32, "tf32"), (torch.bfloat16, "ieee"), (torch.float16, "ieee"),
    ):  # fmt: skip
        t, half = TYPES[dtype], dtype.itemsize == 2
        tile = encode._Tile.of(dtype, encode._MOST_ROWS, WIDTHS[0], precision, widest=128)
        state = "thresholds *fp32 starts *i64 counts *i32 pairs *i64"
        yield case(
            f"above_threshold {t} {precision}, {tile.rows} x {tile.latents} x {tile.depth}", _above_threshold,
            f"x *{t} w *{t} b_dec *{t} bias *fp32 {state} {numbers}",
            {
                "BLOCK_M": tile.rows, "BLOCK_N": tile.latents, "BLOCK_K": tile.depth, "EVEN_K": True, "WIDEN": False,
                "CENTRE": not half, "BIAS": True, "RELU": False, "PRECISION": precision,
                "SLICE": tile.appended_at_once,
            },
            num_warps=tile.warps, num_stages=tile.stages,
        )  # fmt: skip


COMPILE_CASES = list(_cases())
