"""sampled_dot: out_nj = c_n <g_n, W_dec[i_nj]>.

Access. One program is one warp, one token and every `split`-th block of ENTRIES of its entries. A block walks the rows
in slices of 512 bytes, 16 bytes a lane, and multiplies them with the slice of g_n, which comes from the first-level
cache after the first block. Each lane keeps a sum for each entry and each of its columns; the sum over lanes comes
once at the end, so a dot product is a tree over chains of d / 256 (float32: d / 128) products. The programs of a token
are neighbours in the grid and share its g_n in L2.

ENTRIES is 8: 8 loads of 16 bytes a lane under way, and 64 sums in registers (32 in float32). Left to itself, ptxas
spills two of them in bfloat16 on sm_90 to end at 128 registers; told that 144 are there it finds a form with 115 to
119 and no spill, on every architecture. 16 warps then fit a multiprocessor and ask for 64 KiB at once, twice what its
share of memory bandwidth takes (decode.py). `split` gives
every block its own program where k is known, and as many programs as the mean count of entries asks for otherwise: a
lone token of 64 entries then keeps 8 warps busy, not one. No result depends on it. No GPU has run this yet.
"""

import triton
import triton.language as tl
from torch import Tensor

from fastsae.backends.triton._cases import WIDTHS, case
from fastsae.backends.triton._launch import TYPES, launch, narrow, one_for_each, rows_of, slice_width, vector
from fastsae.backends.triton.decode import sizes_of, token_bounds

_ENTRIES = 8
_MOST_REGISTERS = 144
# Blocks of a longer token follow each other within its programs.
_MOST_SPLIT = 64


@triton.jit(do_not_specialize=["k", "nnz", "d_sae", "split"])
def _sampled_dot(
    g, g_stride, indices, offsets, w_dec, w_stride, row_scale, out, d, k, nnz, d_sae, split,
    COLUMNS: tl.constexpr, ENTRIES: tl.constexpr,
):  # fmt: skip
    token = (tl.program_id(0) // split).to(tl.int64)
    part = tl.program_id(0) % split
    begin, end = token_bounds(offsets, token, k, nnz)
    for at in range(begin + part * ENTRIES, end, split * ENTRIES):
        entry = at + tl.arange(0, ENTRIES)
        live = entry < end
        latent = tl.load(indices + entry, mask=live, other=0)
        known = live & (latent >= 0) & (latent < d_sae)
        row = w_dec + latent.to(tl.int64)[:, None] * w_stride
        sums = tl.full([ENTRIES, COLUMNS], 0.0, tl.float32)
        for start in range(0, d, COLUMNS):
            column = start + tl.arange(0, COLUMNS)
            inside = column < d
            own = tl.load(g + token * g_stride + column, mask=inside, other=0.0).to(tl.float32)
            rows = tl.load(row + column[None, :], mask=known[:, None] & inside[None, :], other=0.0).to(tl.float32)
            sums += own[None, :] * rows
        dots = tl.sum(sums, axis=1)
        if row_scale is not None:
            dots *= tl.load(row_scale + token).to(tl.float32)
        dots = tl.where(known, dots, float("nan"))
        tl.store(out + entry, narrow(dots, out.dtype.element_ty), mask=live)


def sampled_dot(g: Tensor, indices: Tensor, offsets: Tensor | None, w_dec: Tensor, row_scale: Tensor | None) -> Tensor:
    """As reference.sampled_dot; an index outside [0, d_sae) gives NaN, entries of no token stay as allocated."""
    g, w_dec, indices = rows_of(g), rows_of(w_dec), indices.contiguous()
    n_tokens, k = sizes_of(indices, offsets)
    one_for_each("g", g, n_tokens, "token of the codes")
    one_for_each("row_scale", row_scale, n_tokens, "token of the codes")
    out = g.new_empty(indices.shape)
    nnz = indices.numel()
    split = min(_MOST_SPLIT, triton.cdiv(nnz, max(1, n_tokens) * _ENTRIES))
    launch(
        _sampled_dot, (n_tokens * split,), g, g.stride(0), indices, vector(offsets), w_dec, w_dec.stride(0),
        vector(row_scale), out, g.shape[1], k, nnz, w_dec.shape[0], split,
        COLUMNS=slice_width(g.shape[1], g.dtype), ENTRIES=_ENTRIES, num_warps=1, maxnreg=_MOST_REGISTERS,
    )  # fmt: skip
    return out


def _cases():
    for dtype, t in TYPES.items():
        for d in WIDTHS:
            for offsets, row_scale in (("constexpr", "constexpr"), ("*i64", "*fp32")):
                absent = {"offsets": None, "row_scale": None} if offsets == "constexpr" else {}
                yield case(
                    f"sampled_dot {t} {d} {'fixed k' if absent else 'csr'}",
                    _sampled_dot,
                    f"g *{t} g_stride i32 indices *i32 offsets {offsets} w_dec *{t} w_stride i32 row_scale {row_scale} "
                    f"out *{t} d i32 k i32 nnz i32 d_sae i32 split i32",
                    {**absent, "COLUMNS": slice_width(d, dtype), "ENTRIES": _ENTRIES},
                    num_warps=1,
                    maxnreg=_MOST_REGISTERS,
                )


COMPILE_CASES = list(_cases())
