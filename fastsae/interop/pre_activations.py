"""PreActivations: relu(pre) of every latent, computed only where somebody looks."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from fastsae.interop.activations import Activations
from fastsae.interop.deferred import Deferred
from fastsae.interop.places import values_at
from fastsae.interop.served import as_autocast
from fastsae.ops.encode import encode_topk_op


class PreActivations(Deferred):
    """relu((x - b_dec) rowsᵀ + b_enc) [..., d_sae], as a library hands it on for its auxiliary losses.

    These want the k largest of some latents: `torch.where(mask, pre, -inf).topk(k)`, or `pre.topk(k)`. Both are
    answered by fastsae's selection, the first among the latents of the mask alone.

    Args:
        x: [..., d_in] in the dtype of the weights.
        rows: [d_sae, d_in]; b_enc: [d_sae]; b_dec: [d_in] or None.
        learns: whether gradients reach the encoder through it.
        noted: as for Deferred.
        selected: (values, indices) [n_tokens, k] of the k largest, where they are known.
    """

    @staticmethod
    def __new__(
        cls,
        x: Tensor,
        rows: Tensor,
        b_enc: Tensor,
        b_dec: Tensor | None,
        *,
        learns: bool = True,
        noted: Callable[[str], None] | None = None,
        selected: tuple[Tensor, Tensor] | None = None,
        among: Tensor | None = None,
    ) -> "PreActivations":
        def make() -> Tensor:
            pre = functional.linear(x if b_dec is None else x - b_dec, rows, b_enc).relu()
            pre = pre if learns else pre.detach()
            return pre if among is None else torch.where(among, pre, -torch.inf)

        sources = [t for t in (x, rows, b_enc, b_dec) if t is not None]
        dtype = as_autocast(rows[:0]).dtype
        shape = (*x.shape[:-1], rows.shape[0])
        self = Deferred.__new__(cls, make, shape, dtype=dtype, device=x.device, noted=noted, sources=sources)
        self._parts = x, rows, b_enc, b_dec
        self._learns, self._selected, self._among = learns, selected, among
        return self


def _where(condition: Any, pre: Any, other: Any) -> Any:
    only_pre = isinstance(pre, PreActivations) and pre.is_untouched and pre._among is None
    if not only_pre or isinstance(other, Tensor) or other != -torch.inf or not isinstance(condition, Tensor):
        return NotImplemented
    if isinstance(condition, Deferred) or condition.dtype != torch.bool or condition.shape not in _of_latents(pre):
        return NotImplemented
    noted = pre._noted
    return PreActivations(*pre._parts, learns=pre._learns, noted=noted, among=condition.reshape(-1))


def _of_latents(pre: PreActivations) -> set[torch.Size]:
    d_sae = pre._parts[1].shape[0]
    return {torch.Size((*(1,) * n, d_sae)) for n in range(pre._parts[0].dim())}


def _topk(pre: Any, k: Any, dim: int = -1, largest: bool = True, sorted: bool = True) -> Any:
    if not isinstance(pre, PreActivations) or not pre.is_untouched or not largest or isinstance(k, Deferred):
        return NotImplemented
    x, rows, b_enc, b_dec = pre._parts
    latents = None if pre._among is None else pre._among.nonzero()[:, 0]
    count, k = rows.shape[0] if latents is None else len(latents), int(k)
    if dim not in (-1, x.dim() - 1) or not 1 <= k <= count:
        return NotImplemented
    flat = x.reshape(-1, x.shape[-1])
    if pre._selected is not None and latents is None and pre._selected[0].shape[1] == k:
        values, indices = pre._selected
    else:
        with torch.no_grad():
            few = (rows, b_enc) if latents is None else (rows[latents], b_enc[latents])
            values, indices = encode_topk_op(flat, *few, b_dec, k, True)
            if latents is not None:
                indices = latents[indices].int()
    if pre._learns and torch.is_grad_enabled():
        values = values_at(flat, rows, b_enc, b_dec, values, indices, masks_zeros=True)
    shape = (*x.shape[:-1], k)
    return torch.return_types.topk((as_autocast(values).reshape(shape), indices.long().reshape(shape)))


def _zeros_like(pre: Any, **options: Any) -> Any:
    """What a library scatters its activations into."""
    if options or not isinstance(pre, PreActivations):
        return NotImplemented
    with torch._C.DisableTorchFunctionSubclass():
        return Activations.nowhere(pre.shape, pre.dtype, pre.device, pre._noted)


PreActivations.answers = {
    torch.where: _where,
    torch.topk: _topk,
    torch.Tensor.topk: _topk,
    torch.zeros_like: _zeros_like,
}
