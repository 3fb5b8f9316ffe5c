"""Activations: a dense tensor [..., d_sae] that is held as sparse codes, and the functions that codes answer."""

from collections.abc import Callable, Sequence
from itertools import accumulate, pairwise
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from fastsae.codes import SparseCodes
from fastsae.interop.deferred import Deferred
from fastsae.interop.served import as_autocast
from fastsae.ops.decode import decode_op
from fastsae.saes.ragged import at_entries, latent_sums, token_sums


class Activations(Deferred):
    """Codes in the shape of the dense activations they stand for; everything else is zero, or `elsewhere`.

    What dictionary_learning's losses and log ask of activations is answered from the codes, differentiably: products
    with a dictionary, sums over latents or tokens, norms, powers, factors of latents, comparisons with zero, prefixes.
    """

    codes: SparseCodes

    @staticmethod
    def __new__(
        cls, codes: SparseCodes, noted: Callable[[str], None] | None = None, elsewhere: bool = False
    ) -> "Activations":
        def make() -> Tensor:
            if codes.dtype != torch.bool:
                return codes.to_dense()
            tokens, latents = codes.tokens().reshape(-1), codes.indices.reshape(-1).long()
            dense = torch.full((codes.n_tokens, codes.d_sae), elsewhere, device=codes.device)
            return dense.index_put_((tokens, latents), codes.values.reshape(-1)).reshape(codes.shape)

        self = Deferred.__new__(cls, make, codes.shape, dtype=codes.dtype, device=codes.device, noted=noted)
        self.codes, self._elsewhere = codes, elsewhere
        return self

    @classmethod
    def nowhere(
        cls, shape: Sequence[int], dtype: torch.dtype, device: torch.device, noted: Callable[[str], None] | None
    ) -> "Activations":
        """Zeros."""
        tokens = torch.Size(shape[:-1])
        values = torch.zeros(tokens.numel(), 0, dtype=dtype, device=device)
        return cls(SparseCodes._trusted(values, values.int(), None, shape[-1], tokens), noted)

    def _like(self, values: Tensor, elsewhere: bool = False) -> "Activations":
        return Activations(self.codes.with_values(values), self._noted, elsewhere)


def _numbers(f: Any) -> bool:
    """Whether f is activations whose codes still hold what its dense form does."""
    return isinstance(f, Activations) and f.is_untouched and f.codes.dtype != torch.bool


def _is_last(f: Activations, dim: Any) -> bool:
    return dim in (-1, len(f.codes.leading_shape))


def _over_latents(f: Activations, values: Tensor) -> Tensor:
    return token_sums(values, f.codes).reshape(f.codes.leading_shape)


def _sum(f: Any, dim: Any = None, keepdim: bool = False, *, dtype: torch.dtype | None = None) -> Any:
    if not _numbers(f) or keepdim or dtype is not None or isinstance(dim, tuple | list):
        return NotImplemented
    if dim is None:
        return f.codes.values.sum()
    if _is_last(f, dim):
        return _over_latents(f, f.codes.values)
    if dim in (0, -2) and len(f.codes.leading_shape) == 1:
        return latent_sums(f.codes.values, f.codes)
    return NotImplemented


def _norm(f: Any, p: Any = "fro", dim: Any = None, keepdim: bool = False, dtype: torch.dtype | None = None) -> Any:
    if not _numbers(f) or keepdim or dtype is not None or p != 1 or not _is_last(f, dim):
        return NotImplemented
    return _over_latents(f, f.codes.values.abs())


def _linalg_norm(f: Any, ord: Any = None, dim: Any = None, keepdim: bool = False, **options: Any) -> Any:
    return NotImplemented if options else _norm(f, ord, dim, keepdim)


def _pow(f: Any, exponent: Any) -> Any:
    # 0^p is 0 for positive p alone.
    if not _numbers(f) or isinstance(exponent, Tensor) or not exponent > 0:
        return NotImplemented
    return f._like(f.codes.values.pow(exponent))


def _times(f: Any, factor: Any, divides: bool = False) -> Any:
    if not isinstance(f, Activations):
        f, factor = factor, f
    if not _numbers(f) or isinstance(factor, Deferred):
        return NotImplemented
    values = f.codes.values
    if isinstance(factor, Tensor) and factor.dim():
        latents = [torch.Size((*(1,) * n, f.codes.d_sae)) for n in range(1 + len(f.codes.leading_shape))]
        if factor.shape not in latents or factor.device != values.device or factor.dtype != values.dtype:
            return NotImplemented
        factor = at_entries(factor.reshape(-1), f.codes)
    result = values / factor if divides else values * factor
    return f._like(result)


def _divided(f: Any, factor: Any) -> Any:
    return _times(f, factor, divides=True) if isinstance(f, Activations) else NotImplemented


def _compare(relation: Callable) -> Callable:
    def compare(f: Any, other: Any) -> Any:
        if not _numbers(f) or isinstance(other, Tensor) or other != 0:
            return NotImplemented
        return f._like(relation(f.codes.values.detach(), 0), elsewhere=relation is torch.eq)

    return compare


def _to(f: Any, dtype: Any = None) -> Any:
    if not isinstance(f, Activations) or not f.is_untouched or f._elsewhere or not isinstance(dtype, torch.dtype):
        return NotImplemented
    return f._like(f.codes.values.to(dtype)) if dtype.is_floating_point else NotImplemented


def _all(f: Any, dim: Any = None, keepdim: bool = False) -> Any:
    """For f == 0: a latent is always 0 if no entry of its is another number."""
    if not isinstance(f, Activations) or not f._elsewhere or keepdim or dim != 0 or len(f.codes.leading_shape) != 1:
        return NotImplemented
    others = torch.zeros(f.codes.d_sae, dtype=torch.bool, device=f.codes.device)
    others[f.codes.indices[~f.codes.values].long()] = True
    return ~others


def _getitem(f: Any, mask: Any) -> Any:
    """f[f > 0] and its like: the entries of the mask, token by token, latents ascending."""
    if not _numbers(f) or not isinstance(mask, Activations) or mask._elsewhere or not mask.is_untouched:
        return NotImplemented
    if mask.codes.dtype != torch.bool or mask.codes.indices is not f.codes.indices:
        return NotImplemented
    codes, kept = f.codes, mask.codes.values.reshape(-1)
    places = (codes.tokens() * codes.d_sae + codes.indices).reshape(-1)[kept]
    return codes.values.reshape(-1)[kept][places.argsort()]


def _product(f: Any, matrix: Any) -> Any:
    """f [..., d_sae] times a matrix [d_sae, d]."""
    if not _numbers(f) or isinstance(matrix, Deferred) or not isinstance(matrix, Tensor) or matrix.dim() != 2:
        return NotImplemented
    codes, autocast = f.codes, torch.is_autocast_enabled(f.codes.device.type)
    if matrix.shape[0] != codes.d_sae or matrix.device != codes.device or not matrix.is_floating_point():
        return NotImplemented
    if matrix.dtype != codes.dtype and not autocast:
        return NotImplemented
    y = decode_op(codes.values.to(matrix.dtype), codes.indices, codes.offsets, matrix, None)
    return as_autocast(y).reshape(*codes.leading_shape, matrix.shape[1])


def _linear(f: Any, weight: Any, bias: Any = None) -> Any:
    if not isinstance(weight, Tensor) or isinstance(weight, Deferred):
        return NotImplemented
    y = _product(f, weight.T)
    return y if y is NotImplemented or bias is None else y + as_autocast(bias)


def _split(f: Any, sizes: Any, dim: int = 0) -> Any:
    """Ranges of latents."""
    if not _numbers(f) or not _is_last(f, dim) or isinstance(sizes, int) or sum(sizes) != f.codes.d_sae:
        return NotImplemented
    codes, tokens = f.codes, f.codes.tokens().reshape(-1)
    indices, values = codes.indices.reshape(-1), codes.values.reshape(-1)
    parts = []
    for begin, end in pairwise(accumulate(sizes, initial=0)):
        entries = ((indices >= begin) & (indices < end)).nonzero()[:, 0]
        counts = torch.bincount(tokens[entries], minlength=codes.n_tokens)
        offsets = torch.cat([counts.new_zeros(1), counts.cumsum(0)])
        part = SparseCodes._trusted(
            values[entries], indices[entries] - begin, offsets, end - begin, codes.leading_shape
        )
        parts.append(Activations(part, f._noted))
    return tuple(parts)


def _scatter(f: Any, dim: Any = None, index: Any = None, src: Any = None, **options: Any) -> Any:
    """Zeros with `src` at `index`: the places of one token differ, as those of a selection do."""
    if options or not isinstance(f, Activations) or f.codes.nnz or not f.is_untouched or not _is_last(f, dim):
        return NotImplemented
    if not isinstance(src, Tensor) or isinstance(src, Deferred) or src.shape != index.shape:
        return NotImplemented
    if src.dtype != f.codes.dtype or src.shape[:-1] != f.codes.leading_shape:
        return NotImplemented
    values, indices = src.reshape(-1, src.shape[-1]), index.reshape(-1, src.shape[-1]).int()
    f.codes = SparseCodes._trusted(values, indices, None, f.codes.d_sae, f.codes.leading_shape)
    f._make = f.codes.to_dense
    return f


def _requires_grad(f: Any) -> Any:
    return f.codes.values.requires_grad if isinstance(f, Activations) and f.is_untouched else NotImplemented


def _detach(f: Any) -> Any:
    return f._like(f.codes.values.detach()) if _numbers(f) else NotImplemented


Activations.answers = {
    Tensor.sum: _sum,
    torch.sum: _sum,
    Tensor.norm: _norm,
    torch.norm: _norm,
    torch.linalg.norm: _linalg_norm,
    **dict.fromkeys((Tensor.pow, Tensor.__pow__, torch.pow), _pow),
    **dict.fromkeys((Tensor.mul, Tensor.__mul__, Tensor.__rmul__, torch.mul), _times),
    **dict.fromkeys((Tensor.div, Tensor.__truediv__, Tensor.true_divide, torch.div), _divided),
    **dict.fromkeys((Tensor.gt, Tensor.__gt__, torch.gt), _compare(torch.gt)),
    **dict.fromkeys((Tensor.ne, Tensor.__ne__, torch.ne), _compare(torch.ne)),
    **dict.fromkeys((Tensor.eq, Tensor.__eq__, torch.eq), _compare(torch.eq)),
    Tensor.to: _to,
    Tensor.float: lambda f: _to(f, torch.float32),
    **dict.fromkeys((Tensor.all, torch.all), _all),
    Tensor.__getitem__: _getitem,
    **dict.fromkeys((Tensor.matmul, Tensor.__matmul__, torch.matmul), _product),
    functional.linear: _linear,
    **dict.fromkeys((Tensor.split, torch.split, torch.functional.split), _split),
    Tensor.scatter_: _scatter,
    Tensor.requires_grad.__get__: _requires_grad,
    Tensor.detach: _detach,
}
