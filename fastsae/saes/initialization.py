"""Where training starts."""

import math

import torch
from torch import Tensor

SCHEMES = ("openai", "anthropic")


@torch.no_grad()
def initialize(W_enc: Tensor, W_dec: Tensor, scheme: str, tied: bool = True) -> None:
    """Random decoder directions, and the encoder as their transpose; biases stay zero.

    Not `tied`, where encoder and decoder work on different activations, the encoder starts at directions of its own.

    `openai`: rows of W_dec of unit norm, W_enc = W_decᵀ (Gao et al. 2024, appendix A.1).
    `anthropic`: rows of W_dec of norm 0.1, W_enc = W_decᵀ (Anthropic, April 2024, "Update on how we train SAEs").
    """
    _draw(W_dec, scheme)
    if tied:
        W_enc.copy_(W_dec.T)
    else:
        _draw(W_enc.T, scheme)


def _draw(rows: Tensor, scheme: str) -> None:
    torch.nn.init.normal_(rows)
    rows /= rows.float().norm(dim=1, keepdim=True).clamp_min(1e-12).to(rows.dtype)
    if scheme == "anthropic":
        rows *= 0.1


@torch.no_grad()
def geometric_median(x: Tensor, max_iterations: int = 100, tolerance: float = 1e-6) -> Tensor:
    """The point with the least summed distance to the rows of x [n, d], by Weiszfeld's iteration; float32 [d].

    OpenAI and Anthropic start b_dec there (Bricken et al. 2023). Raises ValueError for an empty x.
    """
    if x.shape[0] == 0:
        raise ValueError("x has no rows: expected at least one activation")
    points = x.float()
    median = points.mean(dim=0)
    for _ in range(max_iterations):
        weights = 1 / (points - median).norm(dim=1).clamp_min(1e-8)
        moved = (weights / weights.sum()) @ points
        distance = (moved - median).norm().item()
        median = moved
        if distance <= tolerance * max(median.norm().item(), math.ulp(1.0)):
            break
    return median
