"""The gradients of W_enc, b_enc and W_dec as an optimizer takes them (summed, projected, clipped), and their norm."""

import torch
from torch import Tensor

from fastsae.reference.accumulate_rows import accumulate_rows
from fastsae.reference.precision import widen
from fastsae.reference.unit_rows import project_rows_


def latent_gradients(
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
) -> tuple[Tensor, Tensor, Tensor]:
    """-> [d_sae, d_in], [d_sae], [d_sae, d_out]: projected off w_dec, entries clamped, rows scaled, in this order."""
    codes = (latent_offsets, tokens, entries)
    grad_dec, _ = accumulate_rows(widen(values), *codes, widen(g), None, row_scale)
    grad_enc, grad_b = accumulate_rows(widen(grad_values), *codes, widen(x), widen(b_dec), None)
    if unit_norm:
        project_rows_(grad_dec, w_dec)
    if clip_value is not None:
        grad_enc, grad_b, grad_dec = (grad.clamp(-clip_value, clip_value) for grad in (grad_enc, grad_b, grad_dec))
    if clip_row_norm is not None:
        grad_enc, grad_dec = (grad * _share(grad, clip_row_norm) for grad in (grad_enc, grad_dec))
    return grad_enc, grad_b, grad_dec


def _share(grad: Tensor, most: float) -> Tensor:
    """What torch.nn.utils.clip_grad_norm_ multiplies by, for each row alone."""
    return (most / (grad.norm(dim=1, keepdim=True) + 1e-6)).clamp(max=1)


def gradient_norm(*args) -> Tensor:
    """The norm of all that `latent_gradients` returns, one float64."""
    return torch.stack([grad.double().square().sum() for grad in latent_gradients(*args)]).sum().sqrt()
