"""The sum that accumulate_rows and fused_update share: for a latent f and a slice of columns,

    total = Σ_{e of f} c_t v_e (rows[t] - shift),   weight = Σ_{e of f} c_t v_e,   t = tokens[e].

Access. Entries come sorted by latent. A program takes ENTRIES of its latent at a time, gathers their rows at once, and
adds the sum of the block to a float32 total in registers. A latent may own a third of all tokens: the sorted entries
are cut into windows of fixed size, a first kernel sums each window that lies within one latent into a buffer, and the
latent's own program adds those sums in their order to its entries outside of them (at both ends, fewer than two
windows). So no program walks more than 2 · window rows and nnz / window sums, and every sum is one fixed tree: the same
bits on every run, and an error that grows with window / ENTRIES + nnz / window terms, not with the entries. No atomics;
the size of the buffer follows from nnz alone, so the host waits for nothing.

A window has 128 entries, 16 blocks of 8, or more where that bounds the buffer: at most 8,192 windows, 128 MiB for
rows of 4,096. Most windows hold several latents and cost one binary search in latent_offsets. No GPU has run this yet.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastsae.backends.triton._cases import WIDTHS, case
from fastsae.backends.triton._launch import TYPES, device_function, launch, one_for_each, slice_width, slices_of

ENTRIES = 8
_LEAST_WINDOW_BITS = 7
_MOST_WINDOWS = 8192


@device_function
def _sum_entries(
    values, tokens, entries, row_scale, rows, row_stride, shift, columns, inside, begin, count, head, gap,
    nnz, n_tokens, ENTRIES: tl.constexpr,
):  # fmt: skip
    """`count` entries from `begin`; after `head` of them `gap` are left out. -> total [COLUMNS] and weight."""
    total = tl.full([columns.shape[0]], 0.0, tl.float32)
    weight_sum = tl.full([], 0.0, tl.float32)
    if shift is not None:
        shift_row = tl.load(shift + columns, mask=inside, other=0.0)
    for at in range(0, count, ENTRIES):
        place = at + tl.arange(0, ENTRIES)
        live = place < count
        sorted_place = begin + place + tl.where(place >= head, gap, 0)
        token = tl.load(tokens + sorted_place, mask=live, other=0)
        entry = tl.load(entries + sorted_place, mask=live, other=0)
        known = live & (token >= 0) & (token < n_tokens) & (entry >= 0) & (entry < nnz)
        weight = tl.load(values + entry, mask=known, other=0.0).to(tl.float32)
        if row_scale is not None:
            weight *= tl.load(row_scale + token, mask=known, other=0.0).to(tl.float32)
        weight = tl.where(known | (place >= count), weight, float("nan"))
        at_row = token.to(tl.int64)[:, None] * row_stride + columns[None, :]
        block = tl.load(rows + at_row, mask=known[:, None] & inside[None, :], other=0.0).to(tl.float32)
        if shift is not None:
            block = tl.where(known[:, None], block - shift_row.to(tl.float32)[None, :], 0.0)
        total += tl.sum(weight[:, None] * block, axis=0)
        weight_sum += tl.sum(weight, axis=0)
    return total, weight_sum


@triton.jit(do_not_specialize=["d_sae", "nnz", "n_tokens", "window_bits"])
def _sum_windows(
    values, latent_offsets, tokens, entries, row_scale, rows, row_stride, shift, sums, weight_sums,
    d, d_sae, nnz, n_tokens, window_bits, COLUMNS: tl.constexpr, ENTRIES: tl.constexpr,
):  # fmt: skip
    """One program: one window, one slice."""
    at = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    inside = columns < d
    window = 1 << window_bits
    begin = at << window_bits
    # The owner of the first entry: latent_offsets[low] <= begin < latent_offsets[high].
    low = begin * 0
    high = low + d_sae
    while high - low > 1:
        middle = (low + high) // 2
        before = tl.load(latent_offsets + middle) <= begin
        low = tl.where(before, middle, low)
        high = tl.where(before, high, middle)
    if tl.load(latent_offsets + high) >= begin + window:
        total, weight = _sum_entries(
            values, tokens, entries, row_scale, rows, row_stride, shift, columns, inside, begin, window, window, 0,
            nnz, n_tokens, ENTRIES,
        )  # fmt: skip
        tl.store(sums + at * d + columns, total, mask=inside)
        if tl.program_id(1) == 0:
            tl.store(weight_sums + at, weight)


@device_function
def sum_latent(
    values, latent_offsets, tokens, entries, row_scale, rows, row_stride, shift, sums, weight_sums,
    latent, columns, inside, d, nnz, n_tokens, window_bits, ENTRIES: tl.constexpr,
):  # fmt: skip
    """-> total [COLUMNS] and weight, float32, of one latent, with the sums of its whole windows from `sums`."""
    begin = tl.maximum(tl.load(latent_offsets + latent), 0)
    end = tl.minimum(tl.load(latent_offsets + latent + 1), nnz)
    first = (begin + (1 << window_bits) - 1) >> window_bits
    last = tl.maximum(end >> window_bits, first)
    gap = (last - first) << window_bits
    total, weight = _sum_entries(
        values, tokens, entries, row_scale, rows, row_stride, shift, columns, inside,
        begin, end - begin - gap, (first << window_bits) - begin, gap, nnz, n_tokens, ENTRIES,
    )  # fmt: skip
    for at in range(first, last):
        total += tl.load(sums + at * d + columns, mask=inside, other=0.0)
        weight += tl.load(weight_sums + at)
    return total, weight


class Windows(NamedTuple):
    """Sums of the windows that lie within one latent; the rows of the others hold nothing."""

    sums: Tensor  # float32 [windows, d]
    weight_sums: Tensor  # float32 [windows]
    window_bits: int  # a window has 2 ** window_bits entries


def sum_windows(
    values: Tensor,
    latent_offsets: Tensor,
    tokens: Tensor,
    entries: Tensor,
    row_scale: Tensor | None,
    rows: Tensor,
    shift: Tensor | None,
) -> Windows:
    """The first of the two phases; the second passes the result to `sum_latent`."""
    nnz, (n_tokens, d) = entries.numel(), rows.shape
    one_for_each("values", values.reshape(-1), nnz, "entry")
    one_for_each("tokens", tokens, nnz, "entry")
    one_for_each("row_scale", row_scale, n_tokens, "row")
    window_bits = max(_LEAST_WINDOW_BITS, (nnz // _MOST_WINDOWS).bit_length())
    windows = nnz >> window_bits
    sums = torch.empty(windows, d, dtype=torch.float32, device=rows.device)
    weight_sums = torch.empty(windows, dtype=torch.float32, device=rows.device)
    width = slice_width(d, rows.dtype)
    launch(
        _sum_windows, (windows, slices_of(d, width)), values, latent_offsets, tokens, entries, row_scale,
        rows, rows.stride(0), shift, sums, weight_sums, d, latent_offsets.numel() - 1, nnz, n_tokens, window_bits,
        COLUMNS=width, ENTRIES=ENTRIES, num_warps=1,
    )  # fmt: skip
    return Windows(sums, weight_sums, window_bits)


def _cases():
    for dtype, t in TYPES.items():
        for d in WIDTHS:
            yield case(
                f"sum_windows {t} {d}",
                _sum_windows,
                f"values *{t} latent_offsets *i64 tokens *i32 entries *i64 row_scale *fp32 rows *{t} row_stride i32 "
                f"shift *{t} sums *fp32 weight_sums *fp32 d i32 d_sae i32 nnz i32 n_tokens i32 window_bits i32",
                {"COLUMNS": slice_width(d, dtype), "ENTRIES": ENTRIES},
                num_warps=1,
            )


COMPILE_CASES = list(_cases())
