"""How often latents fire, as a histogram."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Bar:
    """Latents whose density (fraction of tokens in which they fire) is in [low, high), or [low, high] for the last."""

    low: float
    high: float
    n_latents: int


def density_histogram(density: Tensor, n_tokens: int, per_decade: int = 4) -> list[Bar]:
    """Bars of equal width in log10(density), from once in n_tokens to 1, for latents that fire at all.

    `density` is [d_sae], as `SAEMetrics.density`. Empty bars before the first and behind the last filled are left out.
    """
    alive = density[density > 0].double()
    lowest = -max(1, math.ceil(math.log10(n_tokens) * per_decade))
    # The small shift keeps a density on an edge, 0.1 say, in the bar that the edge opens.
    bins = (alive.log10() * per_decade + 1e-9).floor().clamp(lowest, -1).long() - lowest
    counts = torch.bincount(bins, minlength=-lowest).tolist()
    filled = [i for i, n in enumerate(counts) if n]
    if not filled:
        return []
    edges = [10 ** ((lowest + i) / per_decade) for i in range(len(counts) + 1)]
    return [Bar(edges[i], edges[i + 1], counts[i]) for i in range(filled[0], filled[-1] + 1)]
