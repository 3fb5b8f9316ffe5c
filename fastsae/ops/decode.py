"""decode: y_n = Σ_j v_nj W_dec[i_nj] + b_dec, one gather of rows."""

from torch import Tensor

from fastsae.codes import SparseCodes
from fastsae.ops import _check
from fastsae.ops._library import define
from fastsae.ops.accumulate_rows import accumulate_rows_op
from fastsae.ops.sampled_dot import sampled_dot_op
from fastsae.ops.transpose import transposed


def _n_tokens(indices, offsets):
    return indices.shape[0] if offsets is None else offsets.shape[0] - 1


def _fake(values, indices, offsets, w_dec, b_dec):
    return w_dec.new_empty(_n_tokens(indices, offsets), w_dec.shape[1])


def _setup_context(ctx, inputs, output):
    values, indices, offsets, w_dec, _ = inputs
    ctx.save_for_backward(values, indices, offsets, w_dec)


def _backward(ctx, g):
    values, indices, offsets, w_dec = ctx.saved_tensors
    needs_values, _, _, needs_w, needs_b = ctx.needs_input_grad
    grad_values = grad_w = grad_b = None
    if needs_values:
        grad_values = sampled_dot_op(g, indices, offsets, w_dec, None)
    if needs_w:
        latent_major = transposed(indices, offsets, w_dec.shape[0])
        grad_w, _ = accumulate_rows_op(values, *latent_major, g, None, None)
    if needs_b:
        grad_b = g.sum(dim=0)
    return grad_values, None, None, grad_w, grad_b


decode_op = define(
    "decode",
    "(Tensor values, Tensor indices, Tensor? offsets, Tensor w_dec, Tensor? b_dec) -> Tensor",
    by="w_dec",
    fake=_fake,
    setup_context=_setup_context,
    backward=_backward,
)


def check_decoder(codes: SparseCodes, W_dec: Tensor, b_dec: Tensor | None) -> None:
    """What every product of codes with W_dec asks of its arguments."""
    _check.codes(codes)
    _check.floating("W_dec", W_dec)
    _check.shape("W_dec", W_dec, (codes.d_sae, None), f"[d_sae, d_out] with the codes' d_sae = {codes.d_sae}")
    _check.same_kind("codes", codes.values, "W_dec", W_dec)
    if b_dec is not None:
        _check.floating("b_dec", b_dec)
        _check.shape("b_dec", b_dec, (W_dec.shape[1],), f"[{W_dec.shape[1]}]")
        _check.same_kind("b_dec", b_dec, "W_dec", W_dec)


def decode(codes: SparseCodes, W_dec: Tensor, b_dec: Tensor | None = None) -> Tensor:
    """Sparse codes times a dense dictionary: y_n = Σ_j v_nj W_dec[i_nj] + b_dec.

    Args:
        codes: of any number of tokens, with d_sae latents.
        W_dec: [d_sae, d_out], the dtype and device of the codes; rows contiguous, or it is copied once a call.
        b_dec: [d_out] or None.

    Returns:
        [..., d_out] with the leading dimensions of the codes; differentiable in the values, W_dec and b_dec.

    Raises:
        TypeError: codes that are not SparseCodes, or a dtype that differs.
        ValueError: shapes or devices that do not fit, or an index outside [0, d_sae).
    """
    check_decoder(codes, W_dec, b_dec)
    y = decode_op(codes.values, codes.indices, codes.offsets, W_dec, b_dec)
    return y.reshape(*codes.leading_shape, W_dec.shape[1])
