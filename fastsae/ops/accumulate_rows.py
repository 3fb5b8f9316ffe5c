"""accumulate_rows: Σ_n v_nf g_n for every latent f, the gradient of W_dec and of W_enc."""

import torch
from torch import Tensor

from fastsae.codes import SparseCodes
from fastsae.ops import _check
from fastsae.ops._library import define


def _fake(values, latent_offsets, tokens, entries, g, shift, row_scale):
    d_sae = latent_offsets.shape[0] - 1
    return g.new_empty(d_sae, g.shape[1]), g.new_empty(d_sae)


def _setup_context(ctx, inputs, output):
    ctx.save_for_backward(*inputs)


def _backward(ctx, grad_out, grad_sums):
    from fastsae.ops.decode import decode_op
    from fastsae.ops.sampled_dot import sampled_dot_op

    values, latent_offsets, tokens, entries, g, shift, row_scale = ctx.saved_tensors
    needs_values, _, _, _, needs_g, needs_shift, needs_scale = ctx.needs_input_grad
    latents = torch.arange(latent_offsets.numel() - 1, device=g.device, dtype=torch.int32)
    indices = torch.empty_like(tokens).index_copy(0, entries, latents.repeat_interleave(latent_offsets.diff()))
    counts = torch.bincount(tokens, minlength=g.shape[0])
    offsets = torch.cat([counts.new_zeros(1), counts.cumsum(0)])
    token_of = torch.empty_like(tokens).index_copy(0, entries, tokens).long()

    flat = values.reshape(-1)
    scale = None if row_scale is None else row_scale[token_of].to(flat.dtype)
    weights = flat if scale is None else flat * scale
    grad_values = grad_g = grad_shift = grad_scale = None
    if needs_values or needs_scale:
        unscaled = sampled_dot_op(g, indices, offsets, grad_out, None) + grad_sums[indices.long()]
        if shift is not None:
            unscaled = unscaled - (grad_out @ shift)[indices.long()]
        if needs_values:
            grad_values = (unscaled if scale is None else unscaled * scale).reshape(values.shape)
        if needs_scale:
            terms = (unscaled * flat).to(row_scale.dtype)
            grad_scale = torch.zeros_like(row_scale).index_add(0, token_of, terms)
    if needs_g or needs_shift:
        grad_g = decode_op(weights, indices, offsets, grad_out, None)
        if needs_shift:
            grad_shift = -grad_g.sum(dim=0)
    return grad_values, None, None, None, grad_g if needs_g else None, grad_shift, grad_scale


accumulate_rows_op = define(
    "accumulate_rows",
    "(Tensor values, Tensor latent_offsets, Tensor tokens, Tensor entries, Tensor g, Tensor? shift, "
    "Tensor? row_scale) -> (Tensor, Tensor)",
    by="g",
    fake=_fake,
    setup_context=_setup_context,
    backward=_backward,
)


def accumulate_rows(codes: SparseCodes, g: Tensor) -> Tensor:
    """The product codesᵀ g: out[f] = Σ_{n: f active} v_nf g_n.

    Args:
        codes: with their values.
        g: [..., d] with the leading dimensions of the codes, their dtype and device.

    Returns:
        [d_sae, d]; rows of latents without an entry are zero. Sums have a fixed order: the same bits on every run.

    Raises:
        TypeError, ValueError: dtypes, shapes or devices that do not fit, or an index outside [0, d_sae).
    """
    from fastsae.ops.transpose import transpose

    _check.codes(codes)
    _check.floating("g", g)
    _check.same_kind("codes", codes.values, "g", g)
    if g.dim() == 0 or g.shape[:-1] != codes.leading_shape:
        raise ValueError(
            f"g has shape {tuple(g.shape)}: expected {(*codes.leading_shape, 'd')}, the codes' tokens by d"
        )
    out, _ = accumulate_rows_op(codes.values, *transpose(codes), g.reshape(-1, g.shape[-1]), None, None)
    return out
