"""Reconstructions by the first latents of a dictionary, for several widths at once."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastsae.codes import SparseCodes
from fastsae.ops.decode import decode_op
from fastsae.ops.nested_errors import _accumulate, _parts
from fastsae.ops.sampled_dot import sampled_dot_op
from fastsae.ops.transpose import transposed


class _PrefixDecodes(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, values: Tensor, W_dec: Tensor, b_dec: Tensor, codes: SparseCodes, widths: list[int]):
        ctx.codes, ctx.widths = codes, widths
        ctx.save_for_backward(values, W_dec)
        flat, decoded = values.reshape(-1), []
        for part in _parts(codes.indices, codes.offsets, widths):
            y = decode_op(flat[part.entries], part.indices, part.offsets, W_dec, None)
            decoded.append(y.add_(decoded[-1] if decoded else b_dec))
        return tuple(decoded)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        """What is decoded below one width is in the reconstructions of all wider ones: sums from the widest on."""
        values, W_dec = ctx.saved_tensors
        indices, offsets, widths = ctx.codes.indices, ctx.codes.offsets, ctx.widths
        flat = values.reshape(-1)
        grad_values, grad_w = torch.zeros_like(flat), torch.zeros_like(W_dec)
        parts = list(_parts(indices, offsets, widths))
        latent_major = transposed(indices, offsets, W_dec.shape[0])
        seen = torch.zeros_like(grads[0])
        for number in reversed(range(len(widths))):
            seen += grads[number]
            part = parts[number]
            grad_values[part.entries] = sampled_dot_op(seen, part.indices, part.offsets, W_dec, None)
            _accumulate(flat, latent_major, widths[number - 1] if number else 0, widths[number], seen, grad_w)
        return grad_values.reshape(values.shape), grad_w, seen.sum(dim=0), None, None


def prefix_decodes(codes: SparseCodes, W_dec: Tensor, b_dec: Tensor, widths: Sequence[int]) -> tuple[Tensor, ...]:
    """codes[:, :w] W_dec[:w] + b_dec for each width w, ascending: as many tensors [..., d_out]; each latent once."""
    if not widths:
        return ()
    decoded = _PrefixDecodes.apply(codes.values, W_dec, b_dec, codes.detach(), list(widths))
    return tuple(y.reshape(*codes.leading_shape, W_dec.shape[1]) for y in decoded)
