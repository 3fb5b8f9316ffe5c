"""Rows of unit norm, and gradients that keep them so."""

from torch import Tensor

from fastsae.reference.precision import widen


def normalize_rows_(rows: Tensor, eps: float) -> None:
    """rows[f] ← rows[f] / max(‖rows[f]‖, eps), in place."""
    wide = widen(rows)
    rows.copy_(wide / wide.norm(dim=1, keepdim=True).clamp_min(eps))


def project_rows_(grad: Tensor, rows: Tensor) -> None:
    """grad[f] ← grad[f] - (<grad[f], rows[f]> / ‖rows[f]‖²) rows[f], in place; rows of zeros are left."""
    g, w = widen(grad), widen(rows)
    squared = w.square().sum(dim=1, keepdim=True)
    along = (g * w).sum(dim=1, keepdim=True) / squared.where(squared > 0, 1)
    grad.copy_(g - along * w)
