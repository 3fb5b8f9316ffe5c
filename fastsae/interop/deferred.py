"""Deferred: a dense tensor that is computed only if something asks for its entries."""

from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

# What is known of a tensor without its entries.
_KNOWN = {
    *(getattr(Tensor, name).__get__ for name in ("shape", "dtype", "device", "layout", "ndim", "is_cuda", "is_sparse")),
    Tensor.size,
    Tensor.dim,
    Tensor.numel,
    Tensor.ndimension,
    Tensor.__len__,
    Tensor.is_floating_point,
    torch.is_floating_point,
    torch.numel,
}


class Deferred(torch.Tensor):
    """A tensor by its shape, dtype and device; `make()` computes its entries when a torch function first needs them.

    Where a library hands on dense activations that hardly anyone reads, one of these is handed on instead. Subclasses
    answer some functions without the entries: `answers` maps a torch function to what takes its arguments and returns
    a result, or NotImplemented. Every other function gets the dense tensor, with the autograd history that `make` gave
    it under the gradient and autocast modes of the moment this was made.

    Args:
        make: called once at most.
        shape, dtype, device: of what `make` returns.
        noted: called with the name of the function that needed the entries.
        sources: tensors that `make` reads. If one was changed in between, there is no right answer left.

    Raises RuntimeError when entries are asked for after a source has changed, and where an autograd.Function is given
    this tensor and differentiated: it goes past torch functions.
    """

    answers: ClassVar[dict[Callable, Callable]] = {}

    @staticmethod
    def __new__(
        cls,
        make: Callable[[], Tensor],
        shape: Sequence[int],
        *,
        dtype: torch.dtype,
        device: torch.device,
        noted: Callable[[str], None] | None = None,
        sources: Sequence[Tensor] = (),
    ) -> "Deferred":
        self = Tensor._make_wrapper_subclass(cls, tuple(shape), dtype=dtype, device=device)
        autocast = torch.is_autocast_enabled(device.type)
        fields = {
            "_make": make,
            "_dense": None,
            "_version_made": None,
            "_noted": noted,
            "_modes": (torch.is_grad_enabled(), autocast, torch.get_autocast_dtype(device.type)),
            "_sources": [(t, t._version, t.data_ptr()) for t in sources if not t.is_inference()],
        }
        self.__dict__.update(fields)
        if torch.is_grad_enabled() and dtype.is_floating_point:
            with torch._C.DisableTorchFunctionSubclass():
                self.requires_grad_().register_hook(_refuse)
        return self

    def dense(self, asked_by: str = "dense") -> Tensor:
        """The tensor itself."""
        fields = self.__dict__
        if fields["_dense"] is None:
            if any(t._version != version or t.data_ptr() != address for t, version, address in fields["_sources"]):
                raise RuntimeError(
                    f"{asked_by} asks for a dense tensor that nobody had asked for before, and what it is computed "
                    "from (the input or a weight) has changed since: ask for it before the optimizer steps, or undo "
                    "fastsae.accelerate with fastsae.restore"
                )
            if fields["_noted"] is not None:
                fields["_noted"](asked_by)
            gradients, autocast, autocast_dtype = fields["_modes"]
            device = self.device.type
            with torch.set_grad_enabled(gradients), torch.autocast(device, dtype=autocast_dtype, enabled=autocast):
                fields["_dense"] = fields["_make"]()
            fields["_version_made"] = _version(fields["_dense"])
        return fields["_dense"]

    @property
    def is_untouched(self) -> bool:
        """Whether the entries are still what `make` gives: nobody has written to the dense tensor."""
        dense, made = self.__dict__["_dense"], self.__dict__["_version_made"]
        # Of a tensor of inference mode nobody counts the writes.
        return dense is None or (made is not None and _version(dense) == made)

    @classmethod
    def __torch_function__(cls, func: Callable, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        if func in _KNOWN:
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **kwargs)
        found = [t for t in pytree.arg_tree_leaves(*args, **kwargs) if isinstance(t, Deferred)]
        with torch._C.DisableTorchFunctionSubclass():
            if any(t.grad_fn is not None for t in found):
                _refuse()
        for kind in {type(t) for t in found}:
            answer = kind.answers.get(func)
            if answer is not None:
                result = answer(*args, **kwargs)
                if result is not NotImplemented:
                    return result
        name = getattr(func, "__name__", str(func))
        args, kwargs = pytree.tree_map_only(Deferred, lambda t: Deferred.dense(t, name), (args, kwargs))
        return func(*args, **kwargs)

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        args, kwargs = pytree.tree_map_only(Deferred, lambda t: Deferred.dense(t, str(func)), (args, kwargs or {}))
        return func(*args, **kwargs)


def _version(tensor: Tensor) -> int | None:
    return None if tensor.is_inference() else tensor._version


def _refuse(*_: Tensor) -> None:
    raise RuntimeError(
        "fastsae's stand-in for dense activations went through an autograd.Function, and its gradient would be lost: "
        "give your autograd.Function `activations + 0`, or undo fastsae.accelerate with fastsae.restore"
    )
