"""The learning rate: a linear rise, a plateau, and a fall to zero at the end."""

import math
from typing import TYPE_CHECKING

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

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
