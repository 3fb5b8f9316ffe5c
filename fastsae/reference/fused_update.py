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
    """w_enc, b_enc and w_dec are [parameter, first moment, second moment], updated in place, or these and a master.

    m ← m + (1 - β₁)(G - m), s ← β₂ s + (1 - β₂) G², p ← p - lr/(1 - β₁ᵗ) · m / (√s/√(1 - β₂ᵗ) + ε), as
    torch.optim.Adam has it (Kingma & Ba 2015); weight_decay adds weight_decay · p to G. A master is p in float32: it
    takes the step, and the parameter is what it rounds to.
    """
    codes = (latent_offsets, tokens, entries)
    grad_dec, _ = accumulate_rows(widen(values), *codes, widen(g), None, row_scale)
    grad_enc, grad_b = accumulate_rows(widen(grad_values), *codes, widen(x), widen(b_dec), None)
    weights = [slot[3] if len(slot) == 4 else slot[0] for slot in (w_enc, b_enc, w_dec)]
    if unit_norm:
        project_rows_(grad_dec, weights[2])
    slots = zip((grad_enc, grad_b, grad_dec), weights, (w_enc, b_enc, w_dec), strict=True)
    for gradient, weight, (_, first, second, *_) in slots:
        wide = widen(weight)
        gradient = gradient + weight_decay * wide
        m = torch.lerp(widen(first), gradient, 1 - beta1)
        s = beta2 * widen(second) + (1 - beta2) * gradient.square()
        denominator = s.sqrt() / (1 - beta2**step) ** 0.5 + eps
        weight.copy_(wide - lr / (1 - beta1**step) * m / denominator)
        first.copy_(m)
        second.copy_(s)
    if unit_norm:
        normalize_rows_(weights[2], 1e-12)
    for weight, (parameter, *_) in zip(weights, (w_enc, b_enc, w_dec), strict=True):
        if weight is not parameter:
            parameter.copy_(weight)
