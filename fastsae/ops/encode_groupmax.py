"""encode_groupmax: the largest pre-activation of each of k groups of latents, without a matrix of all of them."""

import torch
from torch import Tensor

from fastsae.codes import SparseCodes
from fastsae.ops import _check, _encoder
from fastsae.ops._library import define


def _fake(x, w_enc, b_enc, b_dec, k):
    return x.new_empty(x.shape[0], k), x.new_empty(x.shape[0], k, dtype=torch.int32)


def _setup_context(ctx, inputs, output):
    values, indices = output
    _encoder.save_for_backward(ctx, inputs, indices, None, values)


encode_groupmax_op = define(
    "encode_groupmax",
    "(Tensor x, Tensor w_enc, Tensor? b_enc, Tensor? b_dec, int k) -> (Tensor, Tensor)",
    by="x",
    fake=_fake,
    setup_context=_setup_context,
    backward=_encoder.backward,
)


def encode_groupmax(
    x: Tensor, W_enc: Tensor, b_enc: Tensor | None, k: int, *, b_dec: Tensor | None = None
) -> SparseCodes:
    """The largest of relu(pre) in each of k contiguous groups of d_sae / k latents: pre = (x - b_dec) W_enc + b_enc.

    Selection is exact and deterministic: larger value first, then the lower index; NaN counts as largest. A group
    without a positive pre-activation names its first latent, with value 0. No [n_tokens, d_sae] tensor is made on a
    CPU with the native library.

    Args:
        x: activations [..., d_in], float16, bfloat16, float32 or float64.
        W_enc: [d_in, d_sae] of the same dtype and device; fastest when W_enc.T is contiguous.
        b_enc: [d_sae] or None.
        k: number of groups; it divides d_sae.
        b_dec: [d_in], subtracted from x, or None.

    Returns:
        SparseCodes with one entry for each group, in their order; differentiable in x, W_enc, b_enc and b_dec. An entry
        of value 0 gets no gradient.

    Raises:
        TypeError: a dtype that is not floating, or dtypes that differ.
        ValueError: shapes or devices that do not fit, or a k that does not divide d_sae.

    Source: EleutherAI's sparsify (activation="groupmax").
    """
    d_sae = _encoder.check_encoder(x, W_enc, b_enc, b_dec)
    _check.k(k, d_sae)
    if d_sae % k:
        raise ValueError(f"k = {k}: expected a number of groups that divides d_sae = {d_sae}")
    values, indices = encode_groupmax_op(x.reshape(-1, x.shape[-1]), W_enc.T, b_enc, b_dec, k)
    return SparseCodes._trusted(values, indices, None, d_sae, x.shape[:-1])
