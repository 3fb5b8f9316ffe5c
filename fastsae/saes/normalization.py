"""What is done to an activation before it is encoded, and undone after it is decoded."""

from typing import NamedTuple

import torch
from torch import Tensor

MODES = ("none", "scalar", "layer_norm")
_EPS = 1e-5


class Normalized(NamedTuple):
    x: Tensor
    statistics: tuple[Tensor, Tensor] | None  # mean and standard deviation [..., 1], layer_norm only


def normalize(x: Tensor, mode: str, scale: Tensor) -> Normalized:
    """`none`: x. `scalar`: scale · x. `layer_norm`: (x - mean) / (std + 1e-5), std with D - 1 in its denominator.

    `scalar` follows Anthropic (April 2024 update: a constant that makes E‖x‖ = √d_in), `layer_norm` OpenAI's
    sparse_autoencoder/model.py.
    """
    if mode == "none":
        return Normalized(x, None)
    if mode == "scalar":
        return Normalized(x * scale.to(x.dtype), None)
    mean = x.mean(dim=-1, keepdim=True)
    centred = x - mean
    std = centred.std(dim=-1, keepdim=True)
    return Normalized(centred / (std + _EPS), (mean, std))


def denormalize(y: Tensor, mode: str, scale: Tensor, statistics: tuple[Tensor, Tensor] | None) -> Tensor:
    """The way back: y / scale, or y · std + mean."""
    if mode == "none":
        return y
    if mode == "scalar":
        return y / scale.to(y.dtype)
    if statistics is None:
        raise ValueError(
            "codes carry no input_statistics: with normalize_activations='layer_norm', decode codes that this SAE "
            "encoded, or set codes.input_statistics = (mean, std)"
        )
    mean, std = statistics
    return y * std + mean


@torch.no_grad()
def scales_of(x: Tensor, sites: int | None) -> Tensor:
    """√d_in / mean‖x‖: what gives activations an average norm of √d_in; a scalar, or [sites] of x [..., sites, d_in].

    Raises ValueError if x has no rows, or is zero or not finite everywhere.
    """
    rows = x.reshape(-1, sites or 1, x.shape[-1]).float()
    norms = rows.norm(dim=2).mean(dim=0) if x.numel() else torch.zeros(sites or 1)
    if not bool(((norms > 0) & (norms < torch.inf)).all()):
        raise ValueError(f"x has mean norm {norms.min().item()}: expected activations with a finite norm above 0")
    scales = x.shape[-1] ** 0.5 / norms
    return scales[0] if sites is None else scales
