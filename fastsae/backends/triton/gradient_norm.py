"""gradient_norm: the norm of the gradients of W_enc, b_enc and W_dec together, none of which is kept.

  G_dec = Σ_e c_t v_e g_t          G_enc = Σ_e u_e (x_t - b_dec)          G_b = Σ_e u_e
  G_dec -= (<G_dec, w> / <w, w>) w       where the decoder keeps unit norm
  G = min(max(G, -clip_value), clip_value)

and for each latent the squared norms of its rows, from which the share that clipping leaves of each follows.

Access. One program is one latent and walks its row by slices: a pass that sums, and where the row is projected a pass
before it that takes the two dot products, so that its rows are gathered twice, the second time from L2. A latent
without an entry writes a zero and is done. Sums over latents are torch's, in float64: the same on every run.
No GPU has run this yet.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastsae.backends.triton import _segments
from fastsae.backends.triton._cases import WIDTHS, case
from fastsae.backends.triton._launch import TYPES, device_function, launch, rows_of, slice_width, vector
from fastsae.backends.triton._segments import sum_latent, sum_windows
from fastsae.backends.triton.unit_rows import share_along

# With the 112 of fused_update's slices ptxas spills up to nine in half precision.
_MOST_REGISTERS = 128


@device_function
def clamped(x, most):
    """A NaN stays one."""
    x = tl.where(x > most, most, x)
    return tl.where(x < -most, -most, x)


@triton.jit(do_not_specialize=["nnz", "n_tokens", "window_bits"])
def _square_rows(
    values, latent_offsets, tokens, entries, row_scale, rows, row_stride, shift, sums, weight_sums,
    w, w_stride, squares, weight_squares, d, nnz, n_tokens, window_bits, clip_value,
    COLUMNS: tl.constexpr, ENTRIES: tl.constexpr,
):  # fmt: skip
    """One program: one latent. w is what rows are projected off, or None; weight_squares may be None."""
    latent = tl.program_id(0).to(tl.int64)
    used = tl.load(latent_offsets + latent) < tl.load(latent_offsets + latent + 1)
    width = tl.where(used, d, 0)
    along = tl.full([], 0.0, tl.float32)
    if w is not None:
        products = tl.full([COLUMNS], 0.0, tl.float32)
        norms = tl.full([COLUMNS], 0.0, tl.float32)
        for start in range(0, width, COLUMNS):
            columns = start + tl.arange(0, COLUMNS)
            inside = columns < d
            gradient, _ = sum_latent(
                values, latent_offsets, tokens, entries, row_scale, rows, row_stride, shift, sums, weight_sums,
                latent, columns, inside, d, nnz, n_tokens, window_bits, ENTRIES,
            )  # fmt: skip
            row = tl.load(w + latent * w_stride + columns, mask=inside, other=0.0).to(tl.float32)
            products += gradient * row
            norms += row * row
        along = share_along(tl.sum(products, axis=0), tl.sum(norms, axis=0))
    total = tl.full([COLUMNS], 0.0, tl.float32)
    for start in range(0, width, COLUMNS):
        columns = start + tl.arange(0, COLUMNS)
        inside = columns < d
        gradient, _ = sum_latent(
            values, latent_offsets, tokens, entries, row_scale, rows, row_stride, shift, sums, weight_sums,
            latent, columns, inside, d, nnz, n_tokens, window_bits, ENTRIES,
        )  # fmt: skip
        if w is not None:
            gradient -= along * tl.load(w + latent * w_stride + columns, mask=inside, other=0.0).to(tl.float32)
        if clip_value is not None:
            gradient = clamped(gradient, clip_value)
        total += tl.where(inside, gradient * gradient, 0.0)
    tl.store(squares + latent, tl.sum(total, axis=0))
    if weight_squares is not None:
        columns = tl.arange(0, COLUMNS)
        _, weight = sum_latent(
            values, latent_offsets, tokens, entries, row_scale, rows, row_stride, shift, sums, weight_sums,
            latent, columns, columns < 0, d, nnz, n_tokens, window_bits, ENTRIES,
        )  # fmt: skip
        if clip_value is not None:
            weight = clamped(weight, clip_value)
        tl.store(weight_squares + latent, weight * weight)


def row_squares(
    codes: tuple, rows: Tensor, shift: Tensor | None, w: Tensor | None, with_weights: bool, clip_value: float | None
) -> tuple[Tensor, Tensor | None]:
    """The squared norm of each latent's row, and with_weights that of the sum of its values; float32 [d_sae].

    `codes` are values, latent_offsets, tokens, entries and row_scale.
    """
    windows = sum_windows(*codes, rows, shift)
    d_sae, d = codes[1].numel() - 1, rows.shape[1]
    squares = torch.empty(d_sae, dtype=torch.float32, device=rows.device)
    weight_squares = torch.empty_like(squares) if with_weights else None
    launch(
        _square_rows, (d_sae,), *codes, rows, rows.stride(0), shift, windows.sums, windows.weight_sums,
        w, 0 if w is None else w.stride(0), squares, weight_squares, d, codes[3].numel(), rows.shape[0],
        windows.window_bits, clip_value,
        COLUMNS=slice_width(d, rows.dtype), ENTRIES=_segments.ENTRIES, num_warps=1, maxnreg=_MOST_REGISTERS,
    )  # fmt: skip
    return squares, weight_squares


def row_shares(squares: Tensor, most: float) -> Tensor:
    """What clipping to a norm leaves of each row, as torch.nn.utils.clip_grad_norm_ has it."""
    return (most / (squares.sqrt() + 1e-6)).clamp(max=1)


def gradient_norm(
    values: Tensor,
    grad_values: Tensor,
    latent_offsets: Tensor,
    tokens: Tensor,
    entries: Tensor,
    g: Tensor,
    row_scale: Tensor | None,
    x: Tensor,
    b_dec: Tensor | None,
    w_dec: Tensor,
    unit_norm: bool,
    clip_value: float | None,
    clip_row_norm: float | None,
) -> Tensor:
    """As reference.gradient_norm; a token or an entry out of range makes it NaN."""
    places = latent_offsets.contiguous(), tokens.contiguous(), entries.contiguous()
    decoder, _ = row_squares(
        (values.contiguous(), *places, vector(row_scale)), rows_of(g), None, rows_of(w_dec) if unit_norm else None,
        False, clip_value,
    )  # fmt: skip
    encoder, bias = row_squares(
        (grad_values.contiguous(), *places, None), rows_of(x), vector(b_dec), None, True, clip_value
    )  # fmt: skip
    if clip_row_norm is not None:
        decoder, encoder = (part * row_shares(part, clip_row_norm).square() for part in (decoder, encoder))
    return torch.stack([part.double().sum() for part in (decoder, encoder, bias)]).sum().sqrt()


def _cases():
    for dtype, t in TYPES.items():
        for d in WIDTHS:
            for what, absent in (("decoder", ["shift", "weight_squares"]), ("encoder", ["row_scale", "w"])):
                yield case(
                    f"square_rows {what} {t} {d}",
                    _square_rows,
                    f"values *{t} latent_offsets *i64 tokens *i32 entries *i64 row_scale *fp32 rows *{t} "
                    f"row_stride i32 shift *{t} sums *fp32 weight_sums *fp32 w *{t} w_stride i32 squares *fp32 "
                    "weight_squares *fp32 d i32 nnz i32 n_tokens i32 window_bits i32 clip_value fp32",
                    {**dict.fromkeys(absent), "COLUMNS": slice_width(d, dtype), "ENTRIES": _segments.ENTRIES},
                    num_warps=1,
                    maxnreg=_MOST_REGISTERS,
                )


COMPILE_CASES = list(_cases())
