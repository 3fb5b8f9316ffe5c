"""decode and squared_error: y_n = b_dec + Σ_j v_nj W_dec[i_nj]; r_n = y_n - target_n and ‖r_n‖².

Access. One program is one token and one slice of 512 bytes of its row: one warp, 16 bytes a lane. It walks the token's
entries ENTRIES at a time, so that many gathered rows are in flight, and adds each block's sum to a float32 total in
registers. Tokens are the fast axis of the grid: while it works through one slice of every row, only that slice of
W_dec is live, d_sae · 512 bytes, which fits the 50 MB L2 of a Hopper GPU up to 98,304 latents where the whole W_dec
does not, and the nnz / d_sae tokens that name one latent find it there. The price is that indices and values are read
once a slice: 8 bytes beside 512. Slices also feed the GPU where tokens are few. squared_error leaves one partial
‖r‖² a slice, added by torch in one fixed order.

ENTRIES is 8: 8 loads of 16 bytes a lane, 32 registers. At 68 registers (compiled for sm_90) a multiprocessor holds 28
such warps with 112 KiB of loads under way, where 4.3 TB/s at a latency of 0.8 µs ask for 26. No GPU has run this yet.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastsae.backends.triton._cases import WIDTHS, case
from fastsae.backends.triton._launch import (
    TYPES,
    device_function,
    launch,
    narrow,
    one_for_each,
    rows_of,
    slice_width,
    vector,
)

_ENTRIES = 8


@device_function
def token_bounds(offsets, token, k, nnz):
    """The entries of a token, k where offsets is None; end < begin says that its offsets do not fit."""
    if offsets is None:
        begin = token * k
        end = begin + k
    else:
        begin = tl.load(offsets + token)
        end = tl.load(offsets + token + 1)
        end = tl.where((begin >= 0) & (end <= nnz), end, begin - 1)
    return begin, end


@device_function
def _reconstruct(
    values, indices, offsets, w_dec, w_stride, b_dec, token, columns, inside, k, nnz, d_sae, ENTRIES: tl.constexpr
):
    """The columns of y of one token, float32."""
    begin, end = token_bounds(offsets, token, k, nnz)
    y = tl.full([columns.shape[0]], 0.0, tl.float32)
    for at in range(begin, end, ENTRIES):
        entry = at + tl.arange(0, ENTRIES)
        live = entry < end
        latent = tl.load(indices + entry, mask=live, other=0)
        known = live & (latent >= 0) & (latent < d_sae)
        weight = tl.load(values + entry, mask=known, other=0.0).to(tl.float32)
        weight = tl.where(known | (entry >= end), weight, float("nan"))
        place = latent.to(tl.int64)[:, None] * w_stride + columns[None, :]
        rows = tl.load(w_dec + place, mask=known[:, None] & inside[None, :], other=0.0).to(tl.float32)
        y += tl.sum(weight[:, None] * rows, axis=0)
    if b_dec is not None:
        y += tl.load(b_dec + columns, mask=inside, other=0.0).to(tl.float32)
    return tl.where(begin <= end, y, float("nan"))


@triton.jit(do_not_specialize=["k", "nnz", "d_sae"])
def _decode(
    values, indices, offsets, w_dec, w_stride, b_dec, y, d, k, nnz, d_sae, COLUMNS: tl.constexpr, ENTRIES: tl.constexpr
):
    token = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    inside = columns < d
    row = _reconstruct(
        values, indices, offsets, w_dec, w_stride, b_dec, token, columns, inside, k, nnz, d_sae, ENTRIES
    )  # fmt: skip
    tl.store(y + token * d + columns, narrow(row, y.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["n_tokens", "k", "nnz", "d_sae"])
def _squared_error(
    values, indices, offsets, w_dec, w_stride, b_dec, target, target_stride, residual, squared,
    d, n_tokens, k, nnz, d_sae, COLUMNS: tl.constexpr, ENTRIES: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    inside = columns < d
    row = _reconstruct(
        values, indices, offsets, w_dec, w_stride, b_dec, token, columns, inside, k, nnz, d_sae, ENTRIES
    )  # fmt: skip
    row -= tl.load(target + token * target_stride + columns, mask=inside, other=0.0).to(tl.float32)
    tl.store(residual + token * d + columns, narrow(row, residual.dtype.element_ty), mask=inside)
    # Columns past the last are not zero where the row is NaN for its indices.
    row = tl.where(inside, row, 0.0)
    tl.store(squared + tl.program_id(1).to(tl.int64) * n_tokens + token, tl.sum(row * row, axis=0))


def sizes_of(indices: Tensor, offsets: Tensor | None) -> tuple[int, int]:
    """n_tokens and k (0 where tokens own as many entries as `offsets` says)."""
    return (indices.shape[0], indices.shape[1]) if offsets is None else (offsets.numel() - 1, 0)


def decode(values: Tensor, indices: Tensor, offsets: Tensor | None, w_dec: Tensor, b_dec: Tensor | None) -> Tensor:
    """As reference.decode; a token with an index outside [0, d_sae) or offsets that do not fit is NaN."""
    w_dec, d = rows_of(w_dec), w_dec.shape[1]
    n_tokens, k = sizes_of(indices, offsets)
    one_for_each("values", values.reshape(-1), indices.numel(), "index")
    y = w_dec.new_empty(n_tokens, d)
    width = slice_width(d, w_dec.dtype)
    launch(
        _decode, (n_tokens, triton.cdiv(d, width)), values.contiguous(), indices.contiguous(), vector(offsets),
        w_dec, w_dec.stride(0), vector(b_dec), y, d, k, indices.numel(), w_dec.shape[0],
        COLUMNS=width, ENTRIES=_ENTRIES, num_warps=1,
    )  # fmt: skip
    return y


def squared_error(
    values: Tensor,
    indices: Tensor,
    offsets: Tensor | None,
    w_dec: Tensor,
    b_dec: Tensor | None,
    target: Tensor,
) -> tuple[Tensor, Tensor]:
    """As reference.squared_error; a token with an index outside [0, d_sae) or offsets that do not fit is NaN."""
    w_dec, target, d = rows_of(w_dec), rows_of(target), w_dec.shape[1]
    n_tokens, k = sizes_of(indices, offsets)
    one_for_each("values", values.reshape(-1), indices.numel(), "index")
    one_for_each("target", target, n_tokens, "token of the codes")
    residual = target.new_empty(n_tokens, d)
    width = slice_width(d, w_dec.dtype)
    slices = triton.cdiv(d, width)
    squared = torch.empty(slices, n_tokens, dtype=torch.float32, device=target.device)
    launch(
        _squared_error, (n_tokens, slices), values.contiguous(), indices.contiguous(), vector(offsets),
        w_dec, w_dec.stride(0), vector(b_dec), target, target.stride(0), residual, squared,
        d, n_tokens, k, indices.numel(), w_dec.shape[0],
        COLUMNS=width, ENTRIES=_ENTRIES, num_warps=1,
    )  # fmt: skip
    return residual, squared[0] if slices == 1 else squared.sum(dim=0)


def _cases():
    for dtype, t in TYPES.items():
        for d in WIDTHS:
            # Fixed k without a bias, and CSR with one.
            for offsets, b_dec in (("constexpr", "constexpr"), ("*i64", f"*{t}")):
                absent = {"offsets": None, "b_dec": None} if offsets == "constexpr" else {}
                constexprs = {**absent, "COLUMNS": slice_width(d, dtype), "ENTRIES": _ENTRIES}
                codes = f"values *{t} indices *i32 offsets {offsets} w_dec *{t} w_stride i32 b_dec {b_dec}"
                tail = "d i32 k i32 nnz i32 d_sae i32"
                name = f"{t} {d} {'fixed k' if absent else 'csr'}"
                yield case(f"decode {name}", _decode, f"{codes} y *{t} {tail}", constexprs, num_warps=1)
                yield case(
                    f"squared_error {name}", _squared_error,
                    f"{codes} target *{t} target_stride i32 residual *{t} squared *fp32 n_tokens i32 {tail}",
                    constexprs, num_warps=1,
                )  # fmt: skip


COMPILE_CASES = list(_cases())
