"""What changes over a run: the learning rate, the sparsity coefficients and k."""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from fastsae.saes import SAE

if TYPE_CHECKING:
    from fastsae.training.config import TrainConfig

SHAPES = ("linear", "cosine")


def factor(step: int, config: "TrainConfig") -> float:
    """What the peak learning rate is multiplied by in the step that follows `step` finished ones.

        rise:  (step + 1) / warmup_steps                       in the first warmup_steps steps
        fall:  r = (steps - step) / decay_steps, or (1 - cos πr) / 2 with decay="cosine"    in the last decay_steps
        1 between them

    The first step is not lost to a rate of zero, and zero would be reached in the step after the last.
    """
    if step < config.warmup_steps:
        return (step + 1) / config.warmup_steps
    left = config.steps - step
    if left >= config.decay_steps:
        return 1.0
    fraction = max(left, 0) / config.decay_steps
    return fraction if config.decay == "linear" else (1 - math.cos(math.pi * fraction)) / 2


def warmup_and_decay(optimizer: Optimizer, config: "TrainConfig", step: int = 0) -> LambdaLR:
    """A torch scheduler of `factor` for any optimizer, from finished step number `step` on.

    The rate depends on the step and each group's `initial_lr` alone, so a resumed run needs no state of the scheduler.
    """
    for group in optimizer.param_groups:
        group.setdefault("initial_lr", group["lr"])
    return LambdaLR(optimizer, lambda finished: factor(finished, config), last_epoch=step - 1)


def sparsity_scale(step: int, config: "TrainConfig") -> float:
    """What sparsity coefficients are multiplied by after `step` finished steps: a linear rise to 1."""
    return min(1.0, (step + 1) / config.sparsity_warmup_steps) if config.sparsity_warmup_steps else 1.0


def annealed_k(step: int, config: "TrainConfig", k: float) -> float:
    """k in the step that follows `step` finished ones: from k_start to `k`, rounded where `k` is whole."""
    if config.k_start is None or step >= config.k_decay_steps:
        return k
    now = config.k_start + (k - config.k_start) * step / config.k_decay_steps
    return round(now) if isinstance(k, int) else now


@contextmanager
def scheduled(sae: SAE, step: int, config: "TrainConfig") -> Iterator[None]:
    """The SAE as it is in that step; afterwards it has its own k and coefficients again, so that files hold those."""
    scale, k = sae.sparsity_scale, getattr(sae, "k", None)
    sae.sparsity_scale = scale * sparsity_scale(step, config)
    if k is not None:
        sae.k = annealed_k(step, config, k)
    try:
        yield
    finally:
        sae.sparsity_scale = scale
        if k is not None:
            sae.k = k
