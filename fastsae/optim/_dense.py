"""Adam on gradients that exist: what FusedAdam does where autograd has made them."""

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.optim.adam import adam

from fastsae.codes import SparseCodes
from fastsae.ops import Slot, normalize_rows_
from fastsae.ops._random import round_moments_, rounding_stream
from fastsae.saes import SAE

# What has no row for each latent.
_SHARED = ("b_dec", "W_skip")
# The order of fused_update's random streams; other parameters follow.
_NUMBERED = ("W_enc", "b_enc", "W_dec")
# Rows are widened this many elements at a time: 16 MiB a tensor in float32.
_BLOCK_ELEMENTS = 1 << 22


class Rows(NamedTuple):
    """One parameter's step: matrices [n, d] with contiguous rows, those of latents where it has any."""

    weight: Tensor
    first: Tensor
    second: Tensor
    gradient: Tensor
    number: int
    by_latent: bool


def rows_of(name: str, slot: Slot, gradient: Tensor, names: list[str]) -> Rows:
    """The rows of a parameter, one for a vector that all latents share."""
    weight = slot.parameter if slot.master is None else slot.master
    tensors = [weight, slot.first_moment, slot.second_moment, gradient.to(weight.dtype)]
    if name == "W_enc":
        tensors = [tensor.T for tensor in tensors]
    if weight.dim() == 1:
        tensors = [tensor[None] if name in _SHARED else tensor[:, None] for tensor in tensors]
    order = [*_NUMBERED, *(other for other in names if other not in _NUMBERED)]
    return Rows(*tensors, order.index(name), name not in _SHARED)


@torch.no_grad()
def adam_(rows: Rows, group: dict[str, Any], step: int, touched: Tensor | None) -> None:
    """Step `step` of torch.optim.Adam, in place; of torch.optim.SparseAdam on the latents `touched` if that is given.

    Moments in bfloat16 beside wider weights are rounded at random by the group's seed.
    """
    lazy = touched is not None and rows.by_latent
    if lazy and group["weight_decay"]:
        raise ValueError(f"weight_decay = {group['weight_decay']} with lazy=True: expected 0, as SparseAdam has none")
    stochastic = rows.first.dtype != rows.weight.dtype
    eps = group["eps"] / (1 - group["betas"][1] ** step) ** 0.5 if lazy else group["eps"]
    if not (lazy or stochastic):
        _adam(rows.weight, rows.gradient, rows.first, rows.second, group, step, eps)
        return
    places = touched if lazy else torch.arange(len(rows.weight), device=rows.weight.device)
    for block in places.split(max(1, _BLOCK_ELEMENTS // max(1, rows.weight.shape[1]))):
        weight, moments = rows.weight[block], (rows.first[block], rows.second[block])
        wide = moments[0].to(weight.dtype), moments[1].to(weight.dtype)
        _adam(weight, rows.gradient[block], *wide, group, step, eps)
        rows.weight[block] = weight
        if stochastic:
            stream = rounding_stream(group["seed"], step, rows.number)
            round_moments_((rows.first, rows.second), wide, block, stream)
        else:
            rows.first[block], rows.second[block] = wide


def _adam(
    weight: Tensor, gradient: Tensor, first: Tensor, second: Tensor, group: dict[str, Any], step: int, eps: float
) -> None:
    adam(
        [weight],
        [gradient],
        [first],
        [second],
        [],
        # torch's function counts the step itself.
        [torch.tensor(step - 1.0)],
        # On other devices it would want the step counts there.
        fused=weight.device.type == "cpu",
        amsgrad=False,
        beta1=group["betas"][0],
        beta2=group["betas"][1],
        lr=float(group["lr"]),
        weight_decay=group["weight_decay"],
        eps=eps,
        maximize=False,
    )


@torch.no_grad()
def clip_(gradients: dict[str, Tensor], group: dict[str, Any]) -> Tensor | None:
    """Clips gradients in place, by value, by row, by their norm; -> that norm before it was clipped, if it was."""
    if group["clip_value"] is not None:
        for gradient in gradients.values():
            gradient.clamp_(-group["clip_value"], group["clip_value"])
    if group["clip_row_norm"] is not None:
        for rows in [gradients[name].T if name == "W_enc" else gradients[name] for name in ("W_enc", "W_dec")]:
            norms = torch.linalg.vector_norm(rows, dim=1, keepdim=True, dtype=wide(rows))
            rows.mul_(share(norms, group["clip_row_norm"]))
    if group["clip_norm"] is None:
        return None
    norms = [torch.linalg.vector_norm(gradient, dtype=wide(gradient)) for gradient in gradients.values()]
    norm = torch.stack([part.double() for part in norms]).norm()
    for gradient in gradients.values():
        gradient.mul_(share(norm, group["clip_norm"]))
    return norm


def wide(tensor: Tensor) -> torch.dtype:
    """The dtype of its norms."""
    return torch.promote_types(tensor.dtype, torch.float32)


def share(norm: Tensor, most: float) -> Tensor:
    """What clipping to a norm of `most` leaves, as torch.nn.utils.clip_grad_norm_ has it."""
    return (most / (norm + 1e-6)).clamp(max=1)


@torch.no_grad()
def normalize_(W_dec: Tensor, touched: Tensor | None) -> None:
    """Rows to unit norm: all, or those `touched`."""
    if touched is None:
        normalize_rows_(W_dec)
    else:
        W_dec[touched] = normalize_rows_(W_dec[touched])


def has_entry(codes: SparseCodes) -> Tensor:
    """Which latents a batch names, if only with a zero: bool [d_sae]."""
    named = torch.zeros(codes.d_sae, dtype=torch.bool, device=codes.device)
    return named.index_fill_(0, codes.indices.reshape(-1).long(), True)


@torch.no_grad()
def has_gradient(sae: SAE, gradients: dict[str, Tensor]) -> Tensor:
    """Which latents have a gradient that is not zero, bool [d_sae]."""
    touched = torch.zeros(sae.d_sae, dtype=torch.bool, device=sae.device)
    for name, gradient in gradients.items():
        if name not in _SHARED:
            rows = gradient.T if name == "W_enc" else gradient
            touched |= (rows != 0).reshape(sae.d_sae, -1).any(dim=1)
    return touched
