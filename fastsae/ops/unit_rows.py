"""Rows of unit norm, and gradients without the part that would change a norm; both in place."""

import torch
from torch import Tensor

from fastsae.backends import dispatch
from fastsae.ops import _check


@torch.no_grad()
def normalize_rows_(rows: Tensor, eps: float = 1e-12) -> Tensor:
    """Scales every row to unit norm in place: rows[f] ← rows[f] / max(‖rows[f]‖, eps).

    rows [d_sae, d] of any floating dtype; norms are summed in float32 (float64 for float64). Returns `rows`.
    Raises TypeError or ValueError for another dtype or shape.
    """
    _check.floating("rows", rows)
    _check.shape("rows", rows, (None, None), "[d_sae, d]")
    dispatch.call("normalize_rows_", rows.device, rows.dtype, rows, eps)
    torch.autograd.graph.increment_version(rows)
    return rows


@torch.no_grad()
def project_rows_(grad: Tensor, rows: Tensor) -> Tensor:
    """Takes from every row of `grad` its part along the same row of `rows`, in place.

    grad[f] ← grad[f] - (<grad[f], rows[f]> / ‖rows[f]‖²) rows[f]; rows of zeros are left as they are. A step along
    the result changes no norm to first order (Bricken et al. 2023, "Towards Monosemanticity", appendix on training).
    Both [d_sae, d] of one dtype. Returns `grad`. Raises TypeError or ValueError where they do not fit.
    """
    _check.floating("grad", grad)
    _check.floating("rows", rows)
    _check.shape("rows", rows, tuple(grad.shape), f"{tuple(grad.shape)}, the shape of grad")
    _check.same_kind("grad", grad, "rows", rows)
    dispatch.call("project_rows_", grad.device, grad.dtype, grad, rows)
    torch.autograd.graph.increment_version(grad)
    return grad
