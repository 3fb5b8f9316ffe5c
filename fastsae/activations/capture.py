"""Reading and replacing the output of one module of a model while it runs."""

import difflib
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

_SUGGESTIONS = 6
_LEAST_LIKENESS = 0.5


class _Captured(Exception):
    """Ends a forward pass once its only purpose, the hooked output, is there."""


def hook_module(model: nn.Module, name: str) -> nn.Module:
    """The submodule of `model` called `name`, as in `model.named_modules()`.

    Raises ValueError that lists the nearest names when there is none of that name.
    """
    modules = dict(model.named_modules())
    if name and name in modules:
        return modules[name]
    near = near_modules(model, name)
    raise ValueError(
        f"hook = {name!r}: {type(model).__name__} has no module of that name; "
        + (f"the nearest are {', '.join(near)}" if near else "model.named_modules() lists its modules")
    )


def near_modules(model: nn.Module, name: str) -> list[str]:
    """Up to six names of submodules spelled like `name`, or that end in something spelled like it, nearest first."""
    parts = name.count(".") + 1

    def likeness(candidate: str) -> float:
        end = ".".join(candidate.split(".")[-parts:])
        return max(difflib.SequenceMatcher(None, name, part).ratio() for part in (candidate, end))

    scored = [(likeness(candidate), candidate) for candidate, _ in model.named_modules() if candidate]
    near = sorted((pair for pair in scored if pair[0] >= _LEAST_LIKENESS), key=lambda pair: -pair[0])
    return [candidate for _, candidate in near[:_SUGGESTIONS]]


def _activation(output: object, hook: str) -> Tensor:
    """The hooked tensor: the output itself, or the first of a tuple, as attention and block modules return."""
    tensor = output[0] if isinstance(output, tuple) and output else output
    if not isinstance(tensor, Tensor) or not tensor.is_floating_point() or tensor.dim() != 3:
        found = tuple(tensor.shape) if isinstance(tensor, Tensor) else type(tensor).__name__
        raise ValueError(
            f"hook = {hook!r}: the module returns {found}: expected a floating tensor [batch, length, d_in]"
        )
    return tensor


@torch.no_grad()
def capture(model: nn.Module, hook: str, input_ids: Tensor) -> Tensor:
    """Output of the module `hook` for tokens [batch, length]: [batch, length, d_in], without a graph.

    The forward pass ends there: layers above the module are not run. Of a module that runs several times in one pass
    the first output is taken.

    Raises ValueError for an unknown module, one that does not run, or one that returns no [batch, length, d_in].
    """
    found: list[Tensor] = []

    def read(_module: nn.Module, _args: object, output: object) -> None:
        found.append(_activation(output, hook))
        raise _Captured

    handle = hook_module(model, hook).register_forward_hook(read)
    try:
        model(input_ids=input_ids)
    except _Captured:
        return found[0]
    finally:
        handle.remove()
    raise ValueError(f"hook = {hook!r}: the module exists but does not run in a forward pass: name one that does")


@contextmanager
def replace_output(model: nn.Module, hook: str, function: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """While active, the module `hook` returns function(output) [batch, length, d_in] in place of its output.

    The result is cast to the output's dtype. Raises ValueError as `capture` does, and for a result of another shape.
    """

    def replace(_module: nn.Module, _args: object, output: object) -> object:
        activation = _activation(output, hook)
        new = function(activation).to(activation.dtype)
        if new.shape != activation.shape:
            raise ValueError(f"function returned {tuple(new.shape)} at {hook!r}: expected {tuple(activation.shape)}")
        return (new, *output[1:]) if isinstance(output, tuple) else new

    handle = hook_module(model, hook).register_forward_hook(replace)
    try:
        yield
    finally:
        handle.remove()
