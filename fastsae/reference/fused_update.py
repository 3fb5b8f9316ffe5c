"""Both weights' gradients from the codes, and one Adam step on them, written out."""

import torch
from torch import Tensor

from fastsae.reference.accumulate_rows import accumulate_rows
from fastsae.reference.precision import widen
from fastsae.reference.unit_rows import normalize_rows_, project_rows_


def fused_update(
    values: Tensor,
    grad_values: Tensor,
    latent_offsets: Tensor,
    tokens: Tensor,
    entries: Tensor,
    g: Tensor,
    row_scale: Tensor | None,
    x: Tensor,
    b_dec: Tensor | None,
    w_enc: list[Tensor],
    b_enc: list[Tensor],
    w_dec: list[Tensor],
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    step: int,
    unit_norm: bool,
) -> None:
    """w_enc, b_enc and w_dec are [parameter, first moment, second moment], updated in place.

    m ← m + (1 - β₁)(G - m), s ← β₂ s + (1 - β₂) G², p ← p - lr/(1 - β₁ᵗ) · m / (√s/√(1 - β₂ᵗ) + ε), as
    torch.optim.Adam has it (Kingma & Ba 2015); weight_decay adds weight_decay · p to G.
    """
    codes = (latent_offsets, tokens, entries)
    grad_dec, _ = accumulate_rows(widen(values), *codes, widen(g), None, row_scale)
    grad_enc, grad_b = accumulate_rows(widen(grad_values), *codes, widen(x), widen(b_dec), None)
    if unit_norm:
        project_rows_(grad_dec, w_dec[0])
    for gradient, (parameter, first, second) in ((grad_enc, w_enc), (grad_b, b_enc), (grad_dec, w_dec)):
        wide = widen(parameter)
        gradient = gradient + weight_decay * wide
        m = torch.lerp(widen(first), gradient, 1 - beta1)
        s = beta2 * widen(second) + (1 - beta2) * gradient.square()
        denominator = s.sqrt() / (1 - beta2**step) ** 0.5 + eps
        parameter.copy_(wide - lr / (1 - beta1**step) * m / denominator)
        first.copy_(m)
        second.copy_(s)
    if unit_norm:
        normalize_rows_(w_dec[0], 1e-12)
