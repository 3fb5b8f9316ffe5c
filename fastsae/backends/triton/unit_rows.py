"""normalize_rows_: w_f <- w_f / max(|w_f|, eps).   project_rows_: g_f <- g_f - (<g_f, w_f> / <w_f, w_f>) w_f.

Access. One program is one row, in place, and walks it twice in blocks of COLUMNS: the first pass sums (a chain for each
column of the block, then a tree), the second reads again, from the cache that the first has filled (a row of 4,096
float32 is 16 KiB), and writes. So memory sees each row read once and written once, whatever its width, and registers
hold one block. COLUMNS is 1,024 with 4 warps: 8 numbers a lane, one or two loads of 16 bytes. Left to itself, ptxas
spills one register in half precision on sm_100 to end at 32; told that 40 are there it spills nothing anywhere, and 48
warps fit a multiprocessor. No GPU has run this yet.
"""

import triton
import triton.language as tl
from torch import Tensor

from fastsae.backends.triton._cases import WIDTHS, case
from fastsae.backends.triton._launch import TYPES, device_function, launch, narrow, power_of_two, rows_of

_COLUMNS = 1024
_MOST_REGISTERS = 40


@triton.jit
def _normalize_rows(rows, stride, d, eps, COLUMNS: tl.constexpr):
    row = rows + tl.program_id(0).to(tl.int64) * stride
    squares = tl.full([COLUMNS], 0.0, tl.float32)
    for start in range(0, d, COLUMNS):
        column = start + tl.arange(0, COLUMNS)
        w = tl.load(row + column, mask=column < d, other=0.0).to(tl.float32)
        squares += w * w
    norm = tl.sqrt_rn(tl.sum(squares, axis=0))
    norm = tl.where(norm < eps, eps, norm)
    for start in range(0, d, COLUMNS):
        column = start + tl.arange(0, COLUMNS)
        w = tl.load(row + column, mask=column < d, other=0.0).to(tl.float32)
        tl.store(row + column, narrow(tl.div_rn(w, norm), rows.dtype.element_ty), mask=column < d)


@triton.jit
def _project_rows(grad, grad_stride, rows, row_stride, d, COLUMNS: tl.constexpr):
    g_row = grad + tl.program_id(0).to(tl.int64) * grad_stride
    w_row = rows + tl.program_id(0).to(tl.int64) * row_stride
    squares = tl.full([COLUMNS], 0.0, tl.float32)
    products = tl.full([COLUMNS], 0.0, tl.float32)
    for start in range(0, d, COLUMNS):
        column = start + tl.arange(0, COLUMNS)
        g = tl.load(g_row + column, mask=column < d, other=0.0).to(tl.float32)
        w = tl.load(w_row + column, mask=column < d, other=0.0).to(tl.float32)
        squares += w * w
        products += g * w
    along = share_along(tl.sum(products, axis=0), tl.sum(squares, axis=0))
    for start in range(0, d, COLUMNS):
        column = start + tl.arange(0, COLUMNS)
        g = tl.load(g_row + column, mask=column < d, other=0.0).to(tl.float32)
        w = tl.load(w_row + column, mask=column < d, other=0.0).to(tl.float32)
        tl.store(g_row + column, narrow(g - along * w, grad.dtype.element_ty), mask=column < d)


@device_function
def share_along(product, squared):
    """<g, w> / <w, w>, and <g, w>, which is 0, for a row of zeros."""
    return tl.div_rn(product, tl.where(squared > 0, squared, 1.0))


def normalize_rows_(rows: Tensor, eps: float) -> None:
    """As reference.normalize_rows_."""
    target = rows_of(rows)
    launch(_normalize_rows, (rows.shape[0],), target, target.stride(0), rows.shape[1], float(eps), **_options(rows))
    if target is not rows:
        rows.copy_(target)


def project_rows_(grad: Tensor, rows: Tensor) -> None:
    """As reference.project_rows_."""
    rows, target = rows_of(rows), rows_of(grad)
    launch(
        _project_rows, (grad.shape[0],), target, target.stride(0), rows, rows.stride(0), rows.shape[1],
        **_options(rows),
    )  # fmt: skip
    if target is not grad:
        grad.copy_(target)


def _options(rows: Tensor) -> dict[str, int]:
    width = min(_COLUMNS, max(16, power_of_two(rows.shape[1])))
    return {"COLUMNS": width, "num_warps": max(1, width // 256), "maxnreg": _MOST_REGISTERS}


def _cases():
    for t in TYPES.values():
        for d in WIDTHS:
            constexprs = {"COLUMNS": _COLUMNS}
            yield case(
                f"normalize_rows {t} {d}", _normalize_rows, f"rows *{t} stride i32 d i32 eps fp32", constexprs,
                num_warps=4, maxnreg=_MOST_REGISTERS,
            )  # fmt: skip
            yield case(
                f"project_rows {t} {d}", _project_rows,
                f"grad *{t} grad_stride i32 rows *{t} row_stride i32 d i32", constexprs,
                num_warps=4, maxnreg=_MOST_REGISTERS,
            )  # fmt: skip


COMPILE_CASES = list(_cases())
