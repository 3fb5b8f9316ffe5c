"""The step of a trainer's Adam on fastsae's memory order, in one pass over the weights."""

import contextlib
from collections.abc import Callable
from typing import Any

import torch
from dictionary_learning.trainers.trainer import ConstrainedAdam
from torch import Tensor, nn

from fastsae.interop.directions import normalize_, project_
from fastsae.training.update import row_major

_BEFORE = "_fastsae_before"


def take_over(optimizer: torch.optim.Adam, transposed: list[nn.Parameter]) -> None:
    """Makes `optimizer.step` one pass over parameters and state on a CPU (torch's fused Adam), in any memory order.

    `transposed` are the parameters whose transposes are contiguous. A ConstrainedAdam's projection and renormalisation
    of the columns of its constrained parameters go with them. Learning rates, state and schedulers stay what they are.
    """
    before = {"step": optimizer.__dict__.get("step"), "fused": [group.get("fused") for group in optimizer.param_groups]}
    optimizer.__dict__[_BEFORE] = before
    for group in optimizer.param_groups:
        if all(p.device.type == "cpu" for p in group["params"]) and not (group["foreach"] or group["differentiable"]):
            group["fused"] = True

    def step(closure: Callable | None = None) -> Any:
        # As the schedulers' own wrapper notes: a step was made.
        optimizer._opt_called = True
        _same_order(optimizer)
        constrained = optimizer.constrained_params if isinstance(optimizer, ConstrainedAdam) else []
        if any(not p.T.is_contiguous() for p in constrained):
            return type(optimizer).step(optimizer, closure)
        for p in constrained:
            project_(p.grad.T, p.detach().T, eps=0.0)
        with contextlib.ExitStack() as stack:
            for parameter in transposed:
                stack.enter_context(row_major(optimizer, parameter))
            loss = torch.optim.Adam.step(optimizer, closure)
        for p in constrained:
            normalize_(p.detach().T, eps=0.0)
        return loss

    step._wrapped_by_lr_sched = True
    optimizer.step = step


def give_back(optimizer: torch.optim.Adam) -> None:
    """Undoes `take_over`."""
    before = optimizer.__dict__.pop(_BEFORE)
    optimizer.__dict__.pop("step")
    if before["step"] is not None:
        optimizer.step = before["step"]
    for group, fused in zip(optimizer.param_groups, before["fused"], strict=True):
        group["fused"] = fused


def is_taken_over(optimizer: torch.optim.Optimizer) -> bool:
    return _BEFORE in optimizer.__dict__


def _same_order(optimizer: torch.optim.Optimizer) -> None:
    """Gives state the memory order of its parameter, which may have changed: a fused step goes by addresses."""
    for parameter, state in optimizer.state.items():
        for name, value in state.items():
            other = isinstance(value, Tensor) and value.shape == parameter.shape and value.dim() > 1
            if other and value.stride() != parameter.stride():
                state[name] = torch.empty_like(parameter, dtype=value.dtype).copy_(value)
