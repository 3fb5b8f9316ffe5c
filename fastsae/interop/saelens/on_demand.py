"""Dense tensors that exist only if somebody looks: what SAELens passes around as activations and pre-activations.

Its trainer counts firing latents, its loops hand activations on, and hardly anyone reads the [n_tokens, d_sae] numbers.
A `DenseOnDemand` is a torch.Tensor of that shape, dtype, device and autograd history. What the trainer asks of it is
answered from the sparse codes; any other operation makes the dense tensor first, once, and works on it.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from fastsae.codes import SparseCodes

_aten = torch.ops.aten


class _Source:
    """Where the elements come from; tensors that alias each other share one."""

    __slots__ = ("codes", "counts", "dense", "make", "noted")

    def __init__(
        self, make: Callable[[], Tensor], codes: SparseCodes | None, counts: bool, noted: Callable[[str], None]
    ):
        self.make, self.codes, self.counts, self.noted = make, codes, counts, noted
        self.dense: Tensor | None = None

    def get(self, asked_by: str) -> Tensor:
        if self.dense is None:
            self.noted(asked_by)
            self.dense = self.make()
            # It may be written to from now on, and the codes would not know.
            self.codes = None
        return self.dense


class DenseOnDemand(torch.Tensor):
    """A tensor whose elements are computed when they are first needed.

    Attributes:
        chosen: what fastsae's decoder takes in its place; None where there is no such thing.
    """

    source: _Source
    chosen: Any

    @staticmethod
    def __new__(cls, shape: torch.Size, dtype: torch.dtype, device: torch.device, source: _Source):
        tensor = torch.Tensor._make_wrapper_subclass(cls, shape, dtype=dtype, device=device)
        tensor.source, tensor.chosen = source, None
        return tensor

    def codes(self) -> SparseCodes | None:
        """The sparse form, outside autograd's graph; None once the dense one exists."""
        return self.source.codes

    @classmethod
    def __torch_function__(cls, func: Callable, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        with torch._C.DisableTorchFunctionSubclass():
            if func in _NEEDS_MEMORY:
                args = pytree.tree_map_only(cls, lambda t: t.source.get(func.__name__), args)
            return func(*args, **kwargs)

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        first = args[0] if args else None
        if isinstance(first, cls) and func in _ANSWERED:
            answer = _ANSWERED[func](func, *args, **kwargs)
            if answer is not None:
                return answer
        dense_args, dense_kwargs = pytree.tree_map_only(cls, lambda t: t.source.get(str(func)), (args, kwargs))
        result = func(*dense_args, **dense_kwargs)
        # What was written in place is returned as the tensor it was asked of.
        return first if isinstance(first, cls) and result is dense_args[0] else result


_NEEDS_MEMORY = {
    torch.Tensor.numpy,
    torch.Tensor.tolist,
    torch.Tensor.__array__,
    torch.Tensor.__reduce_ex__,
    torch.Tensor.__deepcopy__,
    torch.Tensor.__repr__,
    torch.Tensor.data_ptr,
    torch.Tensor.untyped_storage,
}


def _alias(func: Any, tensor: DenseOnDemand) -> DenseOnDemand:
    return DenseOnDemand(tensor.shape, tensor.dtype, tensor.device, tensor.source)


def _derived(tensor: DenseOnDemand, func: Callable[[Tensor], Tensor], counts: bool) -> DenseOnDemand:
    """`func` of every element, for one that leaves zero at zero."""
    source = tensor.source
    codes = source.codes.with_values(func(source.codes.values))
    derived = _Source(codes.to_dense, codes, counts, source.noted)
    return DenseOnDemand(tensor.shape, codes.dtype, tensor.device, derived)


def _to_copy(func: Any, tensor: DenseOnDemand, **kwargs: Any) -> DenseOnDemand | None:
    """Another dtype; NaN is True."""
    dtype, codes = kwargs.get("dtype"), tensor.source.codes
    others = {key: value for key, value in kwargs.items() if key != "dtype" and value not in (None, False)}
    if codes is None or dtype is None or others:
        return None
    return _derived(tensor, lambda values: values.to(dtype), tensor.source.counts or dtype == torch.bool)


def _compare(func: Any, tensor: DenseOnDemand, other: Any) -> DenseOnDemand | None:
    """`> 0` and `!= 0`: False where there is no entry."""
    if tensor.source.codes is None or other != 0:
        return None
    return _derived(tensor, lambda values: func(values, 0), True)


def _sum(
    func: Any, tensor: DenseOnDemand, dim: Any = None, keepdim: bool = False, *, dtype: Any = None
) -> Tensor | None:
    """Of zeros and ones: integers, in any order the same. For each latent or for each token."""
    source = tensor.source
    if source.codes is None or not source.counts or keepdim or not dim:
        return None
    dims = {axis % tensor.dim() for axis in dim}
    if dims == {tensor.dim() - 1}:
        sums = source.codes.l0()
    elif dims == set(range(tensor.dim() - 1)):
        sums = source.codes.feature_counts()
    else:
        return None
    return sums.to(dtype or (tensor.dtype if tensor.dtype.is_floating_point else torch.int64))


_ANSWERED = {
    _aten.detach.default: _alias,
    _aten.alias.default: _alias,
    _aten._to_copy.default: _to_copy,
    _aten.gt.Scalar: _compare,
    _aten.ne.Scalar: _compare,
    _aten.sum.dim_IntList: _sum,
}


class _OfCodes(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, values: Tensor, codes: SparseCodes, noted: Callable[[str], None]) -> Tensor:
        ctx.places = codes
        source = _Source(codes.to_dense, codes, False, noted)
        return DenseOnDemand(codes.shape, values.dtype, values.device, source)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        places = ctx.places
        flat = grad.reshape(places.n_tokens, places.d_sae)
        return flat[places.tokens(), places.indices.long()], None, None


def of_codes(codes: SparseCodes, noted: Callable[[str], None]) -> DenseOnDemand:
    """`codes.to_dense()` on demand, differentiable in the values; `noted(name)` is told what needed the dense one."""
    return _OfCodes.apply(codes.values, codes.detach(), noted)


class _OfFormula(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, formula: Callable, shape: torch.Size, noted: Callable[[str], None], *inputs: Tensor
    ) -> Tensor:
        ctx.formula = formula
        ctx.save_for_backward(*inputs)
        parameters = [(t, t._version) for t in inputs[1:]]

        def make() -> Tensor:
            if any(t._version != version for t, version in parameters):
                raise RuntimeError(
                    "the pre-activations of a training step are read after its weights have changed: fastsae computes "
                    "them only when they are read. Read them before optimizer.step(), or fastsae.restore(sae)"
                )
            return formula(*(t.detach() for t in inputs))

        return DenseOnDemand(shape, inputs[1].dtype, inputs[1].device, _Source(make, None, False, noted))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        inputs = [
            t.detach().requires_grad_(needed)
            for t, needed in zip(ctx.saved_tensors, ctx.needs_input_grad[3:], strict=True)
        ]
        with torch.enable_grad():
            result = ctx.formula(*inputs)
        wanted = [t for t in inputs if t.requires_grad]
        found = iter(torch.autograd.grad(result, wanted, grad))
        return None, None, None, *(next(found) if t.requires_grad else None for t in inputs)


def of_formula(
    formula: Callable[..., Tensor], shape: torch.Size, noted: Callable[[str], None], x: Tensor, *parameters: Tensor
) -> DenseOnDemand:
    """formula(x, *parameters) on demand, differentiable in all of them; an error once a parameter has changed."""
    return _OfFormula.apply(formula, shape, noted, x, *parameters)
