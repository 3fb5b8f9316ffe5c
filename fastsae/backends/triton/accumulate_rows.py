"""accumulate_rows: out[f] = Σ_{e of latent f} c_t v_e (g_t - shift), and Σ c_t v_e.

Access. One program is one warp, one latent and one slice of 512 bytes of its row of `out`, which is written once, with
zeros where nothing fired. Latents are the fast axis of the grid, so that one slice of every g_t, n_tokens · 512 bytes,
stays in L2 while all latents read it. Long latents, and why ENTRIES is 8: _segments.py. No GPU has run this yet.
"""

import triton
import triton.language as tl
from torch import Tensor

from fastsae.backends.triton import _segments
from fastsae.backends.triton._cases import WIDTHS, case
from fastsae.backends.triton._launch import TYPES, launch, narrow, rows_of, slice_width, slices_of, vector
from fastsae.backends.triton._segments import sum_latent, sum_windows


@triton.jit(do_not_specialize=["nnz", "n_tokens", "window_bits"])
def _accumulate_rows(
    values, latent_offsets, tokens, entries, row_scale, g, g_stride, shift, sums, weight_sums, out, value_sums,
    d, nnz, n_tokens, window_bits, COLUMNS: tl.constexpr, ENTRIES: tl.constexpr,
):  # fmt: skip
    latent = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    inside = columns < d
    total, weight = sum_latent(
        values, latent_offsets, tokens, entries, row_scale, g, g_stride, shift, sums, weight_sums,
        latent, columns, inside, d, nnz, n_tokens, window_bits, ENTRIES,
    )  # fmt: skip
    tl.store(out + latent * d + columns, narrow(total, out.dtype.element_ty), mask=inside)
    if tl.program_id(1) == 0:
        tl.store(value_sums + latent, narrow(weight, value_sums.dtype.element_ty))


def accumulate_rows(
    values: Tensor,
    latent_offsets: Tensor,
    tokens: Tensor,
    entries: Tensor,
    g: Tensor,
    shift: Tensor | None,
    row_scale: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """As reference.accumulate_rows; a latent with a token or an entry out of range is NaN."""
    values, g, shift, row_scale = values.contiguous(), rows_of(g), vector(shift), vector(row_scale)
    d_sae, (n_tokens, d) = latent_offsets.numel() - 1, g.shape
    out, value_sums = g.new_empty(d_sae, d), g.new_empty(d_sae)
    codes = (values, latent_offsets.contiguous(), tokens.contiguous(), entries.contiguous(), row_scale)
    windows = sum_windows(*codes, g, shift)
    width = slice_width(d, g.dtype)
    launch(
        _accumulate_rows, (d_sae, slices_of(d, width)), *codes, g, g.stride(0), shift,
        windows.sums, windows.weight_sums, out, value_sums, d, entries.numel(), n_tokens, windows.window_bits,
        COLUMNS=width, ENTRIES=_segments.ENTRIES, num_warps=1,
    )  # fmt: skip
    return out, value_sums


def _cases():
    for dtype, t in TYPES.items():
        for d in WIDTHS:
            for extras in (False, True):
                absent = {} if extras else {"shift": None, "row_scale": None}
                yield case(
                    f"accumulate_rows {t} {d} {'shift and scale' if extras else 'plain'}",
                    _accumulate_rows,
                    f"values *{t} latent_offsets *i64 tokens *i32 entries *i64 row_scale *fp32 g *{t} g_stride i32 "
                    f"shift *{t} sums *fp32 weight_sums *fp32 out *{t} value_sums *{t} d i32 nnz i32 n_tokens i32 "
                    "window_bits i32",
                    {**absent, "COLUMNS": slice_width(d, dtype), "ENTRIES": _segments.ENTRIES},
                    num_warps=1,
                )


COMPILE_CASES = list(_cases())
