"""The memory of W_enc [d_in, d_sae]: a row for each latent, as kernels read it, or SAELens' plain layout.

A gradient or a moment that lies otherwise than its parameter is slow to every optimizer, and wrong to torch's fused
Adam on a CPU: it goes through the memory of all of them in one order. So they follow the parameter, gradients at once
and an optimizer's state before its next step.
"""

from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import Optimizer, register_optimizer_step_pre_hook

_MARK = "_fastsae_laid_out"


def feature_major_(weight: Tensor) -> None:
    """The same tensor with the same numbers, and its transpose contiguous."""
    _lay_out(weight, weight.data.T.contiguous().T)


def row_major_(weight: Tensor) -> None:
    """The same tensor with the same numbers, contiguous."""
    _lay_out(weight, weight.data.contiguous())


def _lay_out(weight: Tensor, data: Tensor) -> None:
    weight.data = data
    setattr(weight, _MARK, True)
    _follow(weight.grad, weight)
    _watch_optimizers()


@cache
def _watch_optimizers() -> None:
    register_optimizer_step_pre_hook(_before_step)


def _before_step(optimizer: Optimizer, *_: Any) -> None:
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            if getattr(parameter, _MARK, False):
                for value in (parameter.grad, *optimizer.state.get(parameter, {}).values()):
                    _follow(value, parameter)


@torch.no_grad()
def _follow(value: Any, parameter: Tensor) -> None:
    """Gives a tensor the strides of its parameter; it stays the same object."""
    if not isinstance(value, Tensor) or value.layout != torch.strided:
        return
    if value.shape == parameter.shape and value.stride() != parameter.stride():
        value.data = torch.empty_like(parameter, dtype=value.dtype, device=value.device).copy_(value)
