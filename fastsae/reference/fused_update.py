"""Both weights' gradients from the codes, and one Adam step on them, written out."""

from collections.abc import Sequence

import torch
from torch import Tensor

from fastsae.reference.gradient_norm import latent_gradients
from fastsae.reference.precision import widen
from fastsae.reference.stochastic_rounding import stochastic_rounding
from fastsae.reference.unit_rows import normalize_rows_


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
    clip_value: float | None = None,
    clip_row_norm: float | None = None,
    gradient_scale: Tensor | None = None,
    lazy: bool = False,
    streams: Sequence[int] = (),
) -> None:
    """w_enc, b_enc and w_dec are [parameter, first moment, second moment], updated in place, or these and a master.

    m ← m + (1 - β₁)(G - m), s ← β₂ s + (1 - β₂) G², p ← p - lr/(1 - β₁ᵗ) · m / (√s/√(1 - β₂ᵗ) + ε), as
    torch.optim.Adam has it (Kingma & Ba 2015); weight_decay adds weight_decay · p to G. A master is p in float32: it
    takes the step, and the parameter is what it rounds to.

    G is that of `latent_gradients` times gradient_scale. `lazy` is torch.optim.SparseAdam: latents without an entry
    are left, and ε is divided by √(1 - β₂ᵗ) too. `streams`, two numbers for each of w_enc, b_enc and w_dec: the moments
    are bfloat16 and rounded at random.
    """
    slots = [w_enc, b_enc, w_dec]
    weights = [slot[3] if len(slot) == 4 else slot[0] for slot in slots]
    gradients = latent_gradients(
        values, grad_values, latent_offsets, tokens, entries, g, row_scale, x, b_dec, weights[2],
        unit_norm, clip_value, clip_row_norm,
    )  # fmt: skip
    untouched = (latent_offsets.diff() == 0) & lazy
    root = (1 - beta2**step) ** 0.5
    results = []
    for gradient, weight, (_, first, second, *_) in zip(gradients, weights, slots, strict=True):
        wide = widen(weight)
        gradient = (gradient if gradient_scale is None else gradient * gradient_scale) + weight_decay * wide
        m = torch.lerp(widen(first), gradient, 1 - beta1)
        s = beta2 * widen(second) + (1 - beta2) * gradient.square()
        denominator = s.sqrt() / root + (eps / root if lazy else eps)
        results.append([wide - lr / (1 - beta1**step) * m / denominator, m, s])
    if unit_norm:
        normalize_rows_(results[2][0], 1e-12)
    for i, (weight, slot, result) in enumerate(zip(weights, slots, results, strict=True)):
        if streams:
            stream = streams[2 * i], streams[2 * i + 1]
            result[1:] = [_rounded(moment, stream, which) for which, moment in enumerate(result[1:])]
        keep = untouched.reshape(-1, *[1] * (weight.dim() - 1))
        for to, new in zip((weight, *slot[1:3]), result, strict=True):
            to.copy_(to.where(keep, new.to(to.dtype)))
        if weight is not slot[0]:
            slot[0].copy_(weight)


def _rounded(moment: Tensor, stream: tuple[int, int], which: int) -> Tensor:
    rows = torch.arange(len(moment), device=moment.device)
    return stochastic_rounding(moment.reshape(len(moment), -1), rows, stream, which).reshape(moment.shape)
