"""One function chooses the backend of each call, one override changes it, one record tells what ran."""

import contextlib
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from types import ModuleType

import torch

from fastsae.backends import cpu as cpu_backend
from fastsae.backends import cuda as cuda_backend
from fastsae.backends import dense_products
from fastsae.backends import torch as torch_backend
from fastsae.backends import triton as triton_backend

BACKENDS: dict[str, ModuleType] = {
    "torch": torch_backend,
    "cpu": cpu_backend,
    "triton": triton_backend,
    "cuda": cuda_backend,
}


# Triton's interpreter and compiler have passed these kernels, a GPU has not.
_UNVERIFIED = "the GPU kernels have not been verified on a GPU yet: FASTSAE_BACKEND=triton (or cuda) asks for them"


@dataclass(frozen=True)
class Choice:
    """Which backend serves a call, and why."""

    backend: str
    reason: str


# Options of operators that a backend's kernel does not know.
_LACKING = {"cuda": {"fused_update": ("clip_value", "clip_row_norm", "gradient_scale", "lazy", "streams")}}

_override: str | None = None
_last: dict[str, Choice] = {}


def _check(name: str, source: str) -> str:
    if name not in BACKENDS:
        raise ValueError(f"{source}={name!r}: expected one of {', '.join(BACKENDS)}")
    return name


def _requested() -> tuple[str, str] | None:
    if _override is not None:
        return _override, "asked for by fastsae.backend"
    name = os.environ.get("FASTSAE_BACKEND")
    if name:
        return _check(name, "FASTSAE_BACKEND"), "asked for by FASTSAE_BACKEND"
    return None


def choose(op: str, device: torch.device, dtype: torch.dtype, options: Sequence[str] = ()) -> Choice:
    """The backend for `op` on tensors of this device and dtype, and the reason.

    `options` are those of the operator's optional arguments in use for which a backend may have no kernel.
    """
    requested = _requested()
    if requested is not None:
        name, reason = requested
        why_not = BACKENDS[name].why_not(op, device, dtype) or _why_not_with(name, op, options)
        if why_not:
            raise ValueError(f"backend {name!r} ({reason}) cannot run {op}: {why_not}")
        return Choice(name, reason)
    if device.type == "cpu":
        why_not = cpu_backend.why_not(op, device, dtype)
        return Choice("torch", why_not) if why_not else Choice("cpu", f"native kernels for {dtype} on a CPU")
    why_not = triton_backend.why_not(op, device, dtype)
    return Choice("torch", why_not or _UNVERIFIED)


def _why_not_with(name: str, op: str, options: Sequence[str]) -> str:
    lacking = [option for option in options if option in _LACKING.get(name, {}).get(op, ())]
    return f"its kernel has no {', '.join(lacking)}: leave the choice to fastsae, or ask for torch" if lacking else ""


def call(op: str, device: torch.device, dtype: torch.dtype, *args, options: Sequence[str] = ()):
    """Runs `op` on the chosen backend and remembers the choice for `fastsae.explain`."""
    choice = choose(op, device, dtype, options)
    _last[op] = choice
    kernel: Callable = getattr(BACKENDS[choice.backend], op)
    result = kernel(*args)
    if note := dense_products.taken(op):
        _last[op] = Choice(choice.backend, f"{choice.reason}; {note}")
    return result


class _Override(contextlib.AbstractContextManager):
    def __init__(self, previous: str | None):
        self._previous = previous

    def __exit__(self, *exc_info) -> None:
        global _override
        _override = self._previous


def backend(name: str | None) -> contextlib.AbstractContextManager:
    """Sends every operator to one backend, from now on or, as a context manager, for a while.

    `name` is "torch", "cpu", "triton" or "cuda"; None gives the choice back to fastsae. Raises ValueError for an
    unknown name; a call that the backend cannot serve raises ValueError then.
    """
    global _override
    if name is not None:
        _check(name, "name")
    restore = _Override(_override)
    _override = name
    return restore


def last_choices() -> Iterator[tuple[str, Choice]]:
    """Each operator that ran in this process, with the backend that served it last."""
    yield from _last.items()
