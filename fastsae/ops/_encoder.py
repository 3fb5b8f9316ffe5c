"""What every encoder shares: checks of its arguments, and the backward from kept values to its weights."""

from typing import Any

import torch
from torch import Tensor

from fastsae.ops import _check
from fastsae.ops.accumulate_rows import accumulate_rows_op
from fastsae.ops.decode import decode_op
from fastsae.ops.transpose import transposed


def save_for_backward(ctx: Any, inputs: tuple, indices: Tensor, offsets: Tensor | None, values: Tensor | None) -> None:
    """`values` only where ReLU came first: what it cut gets no gradient. Weights are the first four inputs."""
    x, w_enc, b_enc, b_dec = inputs[:4]
    ctx.has_b_enc, ctx.arguments = b_enc is not None, len(inputs)
    ctx.save_for_backward(x, w_enc, b_dec, indices, offsets, values)


def backward(ctx: Any, g: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
    """From the gradient of the kept values; docs/maths.md, "encode"."""
    x, w_enc, b_dec, indices, offsets, values = ctx.saved_tensors
    if values is not None:
        g = g.where(~(values <= 0), 0)
    needs_x, needs_w, needs_b_enc, needs_b_dec = ctx.needs_input_grad[:4]
    grad_x = grad_w = grad_b_enc = grad_b_dec = None
    if needs_w or needs_b_enc or needs_b_dec:
        latent_major = transposed(indices, offsets, w_enc.shape[0])
        # The sums of the values alone need no more than a column.
        columns, shift = (x, b_dec) if needs_w else (x[:, :1], None)
        grad_w, grad_b_enc = accumulate_rows_op(g, *latent_major, columns, shift, None)
    if needs_x:
        grad_x = decode_op(g, indices, offsets, w_enc, None)
    if needs_b_dec:
        # Σ_n of the gradient of (x - b_dec), regrouped by latent: no [n_tokens, d_in] tensor is made for it.
        grad_b_dec = -sum_of_rows(grad_b_enc, w_enc)
    return (
        grad_x,
        grad_w if needs_w else None,
        grad_b_enc if needs_b_enc and ctx.has_b_enc else None,
        grad_b_dec,
        *(None,) * (ctx.arguments - 4),
    )


def sum_of_rows(weights: Tensor, rows: Tensor) -> Tensor:
    """weights [d_sae] @ rows [d_sae, d_in], in blocks of 64 latents whose sums are then added.

    A vector times a matrix is one chain of d_sae additions in most libraries: at 24,576 latents and in float32 ten
    times the error of this, in the same time. Half precision is better left to a chain in float32.
    """
    if rows.dtype.itemsize < 4:
        return weights @ rows
    blocks = weights.shape[0] // 64
    whole = 64 * blocks
    sums = torch.bmm(weights[:whole].view(blocks, 1, 64), rows[:whole].view(blocks, 64, rows.shape[1]))
    return sums.sum(dim=(0, 1)) + weights[whole:] @ rows[whole:]


def check_encoder(x: Tensor, W_enc: Tensor, b_enc: Tensor | None, b_dec: Tensor | None) -> int:
    """Raises for arguments of an encoder that do not fit; returns d_sae."""
    _check.floating("x", x)
    _check.floating("W_enc", W_enc)
    d_in = x.shape[-1] if x.dim() else None
    if W_enc.dim() != 2 or x.dim() == 0 or W_enc.shape[0] != d_in:
        raise ValueError(
            f"x has shape {tuple(x.shape)} and W_enc {tuple(W_enc.shape)}: expected [..., d_in] and [d_in, d_sae]"
        )
    d_sae = W_enc.shape[1]
    _check.same_kind("x", x, "W_enc", W_enc)
    for name, bias, size in (("b_enc", b_enc, d_sae), ("b_dec", b_dec, d_in)):
        if bias is not None:
            _check.floating(name, bias)
            _check.shape(name, bias, (size,), f"[{size}]")
            _check.same_kind(name, bias, "W_enc", W_enc)
    return d_sae


def rank_scale(scale: Tensor | None, x: Tensor, d_sae: int) -> Tensor | None:
    """`scale` as kernels take it: outside autograd's graph, float32 (float64 for float64). Raises if it is wrong."""
    if scale is None:
        return None
    _check.floating("scale", scale)
    _check.shape("scale", scale, (d_sae,), f"[{d_sae}]")
    _check.same_device("scale", scale, "x", x)
    return scale.detach().to(torch.float64 if x.dtype == torch.float64 else torch.float32)
