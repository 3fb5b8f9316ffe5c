"""sampled_dot: <g_n, W_dec[i_nj]> at the places of the codes, the backward of decode to its values."""

from torch import Tensor

from fastsae.codes import SparseCodes
from fastsae.ops import _check
from fastsae.ops._library import define
from fastsae.ops.accumulate_rows import accumulate_rows_op
from fastsae.ops.transpose import transposed


def _fake(g, indices, offsets, w_dec, row_scale):
    return g.new_empty(indices.shape)


def _setup_context(ctx, inputs, output):
    ctx.save_for_backward(*inputs)


def _backward(ctx, grad):
    from fastsae.ops.decode import decode_op

    g, indices, offsets, w_dec, row_scale = ctx.saved_tensors
    needs_g, _, _, needs_w, needs_scale = ctx.needs_input_grad
    grad_g = grad_w = grad_scale = None
    if needs_g:
        grad_g = decode_op(grad, indices, offsets, w_dec, None)
        if row_scale is not None:
            grad_g = grad_g * row_scale[:, None].to(grad_g.dtype)
    if needs_w:
        latent_major = transposed(indices, offsets, w_dec.shape[0])
        grad_w, _ = accumulate_rows_op(grad, *latent_major, g, None, row_scale)
    if needs_scale:
        terms = (grad * sampled_dot_op(g, indices, offsets, w_dec, None)).to(row_scale.dtype)
        # The sum of each token's terms: they are codes, decoded with a dictionary of one column of ones.
        grad_scale = decode_op(terms, indices, offsets, terms.new_ones(w_dec.shape[0], 1), None)[:, 0]
    return grad_g, None, None, grad_w, grad_scale


sampled_dot_op = define(
    "sampled_dot",
    "(Tensor g, Tensor indices, Tensor? offsets, Tensor w_dec, Tensor? row_scale) -> Tensor",
    by="g",
    fake=_fake,
    setup_context=_setup_context,
    backward=_backward,
)


def sampled_dot(g: Tensor, codes: SparseCodes, W_dec: Tensor) -> Tensor:
    """The dense product g W_decᵀ at the places where the codes have entries: out_nj = <g_n, W_dec[i_nj]>.

    Args:
        g: [..., d_out] with the leading dimensions of the codes.
        codes: whose places are read; their values are not.
        W_dec: [d_sae, d_out], the dtype and device of g.

    Returns:
        The shape of `codes.values`; differentiable in g and W_dec.

    Raises:
        TypeError, ValueError: dtypes, shapes or devices that do not fit, or an index outside [0, d_sae).
    """
    _check.codes(codes)
    _check.floating("g", g)
    _check.floating("W_dec", W_dec)
    _check.shape("W_dec", W_dec, (codes.d_sae, None), f"[d_sae, d_out] with the codes' d_sae = {codes.d_sae}")
    _check.same_kind("g", g, "W_dec", W_dec)
    _check.same_device("codes", codes.indices, "g", g)
    if g.shape != (*codes.leading_shape, W_dec.shape[1]):
        expected = (*codes.leading_shape, W_dec.shape[1])
        raise ValueError(f"g has shape {tuple(g.shape)}: expected {expected}, the codes' tokens by d_out")
    flat = g.reshape(-1, W_dec.shape[1])
    return sampled_dot_op(flat, codes.indices, codes.offsets, W_dec, None)
