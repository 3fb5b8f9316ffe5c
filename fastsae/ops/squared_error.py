"""squared_error: ‖decode(codes) - target‖² of each token, with one [n_tokens, d_out] tensor in all."""

import torch
from torch import Tensor

from fastsae.codes import SparseCodes
from fastsae.ops import _check
from fastsae.ops._library import define
from fastsae.ops.accumulate_rows import accumulate_rows_op
from fastsae.ops.decode import check_decoder
from fastsae.ops.sampled_dot import sampled_dot_op
from fastsae.ops.transpose import transposed


def _fake(values, indices, offsets, w_dec, b_dec, target):
    wide = torch.float64 if target.dtype == torch.float64 else torch.float32
    return torch.empty_like(target, memory_format=torch.contiguous_format), target.new_empty(
        target.shape[0], dtype=wide
    )


def _setup_context(ctx, inputs, output):
    values, indices, offsets, w_dec, _, _ = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(values, indices, offsets, w_dec, output[0])


def _backward(ctx, grad_residual, grad_squared):
    values, indices, offsets, w_dec, residual = ctx.saved_tensors
    needs_values, _, _, needs_w, needs_b, needs_target = ctx.needs_input_grad
    if grad_residual is None and grad_squared is None:
        return None, None, None, None, None, None
    scale = None if grad_squared is None else 2 * grad_squared
    if grad_residual is None:
        # The gradient of y is the residual with each row scaled. The kernels scale; the tensor is never made.
        g = residual
    else:
        g, scale = _combine(grad_residual, residual, scale), None
    grad_values = grad_w = grad_b = grad_target = None
    if needs_values:
        grad_values = sampled_dot_op(g, indices, offsets, w_dec, scale)
    if needs_w:
        latent_major = transposed(indices, offsets, w_dec.shape[0])
        grad_w, _ = accumulate_rows_op(values, *latent_major, g, None, scale)
    if needs_b:
        grad_b = g.sum(dim=0) if scale is None else scale.to(g.dtype) @ g
    if needs_target:
        grad_target = -(g if scale is None else scale[:, None].to(g.dtype) * g)
    return grad_values, None, None, grad_w, grad_b, grad_target


def _combine(grad_residual: Tensor, residual: Tensor, scale: Tensor | None) -> Tensor:
    if scale is None:
        return grad_residual
    return grad_residual + scale[:, None].to(residual.dtype) * residual


squared_error_op = define(
    "squared_error",
    "(Tensor values, Tensor indices, Tensor? offsets, Tensor w_dec, Tensor? b_dec, Tensor target) -> (Tensor, Tensor)",
    by="target",
    fake=_fake,
    setup_context=_setup_context,
    backward=_backward,
)


def squared_error(codes: SparseCodes, W_dec: Tensor, b_dec: Tensor | None, target: Tensor) -> tuple[Tensor, Tensor]:
    """The error of a reconstruction: r = decode(codes, W_dec, b_dec) - target, and ‖r_n‖² for each token.

    Decoding, the difference and the norm are one pass; the backward through the norms reads the residual that the
    forward kept, so a training step holds one [n_tokens, d_out] tensor where autograd would hold three.

    Args:
        codes: of the tokens of `target`.
        W_dec: [d_sae, d_out].
        b_dec: [d_out] or None.
        target: [..., d_out].

    Returns:
        r [..., d_out] in target's dtype, and ‖r_n‖² [...] in float32 (float64 for float64); both differentiable in
        the values, W_dec, b_dec and target.

    Raises:
        TypeError, ValueError: dtypes, shapes or devices that do not fit, or an index outside [0, d_sae).
    """
    check_decoder(codes, W_dec, b_dec)
    _check.floating("target", target)
    _check.same_kind("target", target, "W_dec", W_dec)
    if target.shape != (*codes.leading_shape, W_dec.shape[1]):
        expected = (*codes.leading_shape, W_dec.shape[1])
        raise ValueError(f"target has shape {tuple(target.shape)}: expected {expected}, the codes' tokens by d_out")
    residual, squared = squared_error_op(
        codes.values, codes.indices, codes.offsets, W_dec, b_dec, target.reshape(-1, W_dec.shape[1])
    )
    return residual.reshape(target.shape), squared.reshape(target.shape[:-1])
