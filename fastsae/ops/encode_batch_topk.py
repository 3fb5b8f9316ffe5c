"""encode_batch_topk: the largest pre-activations of a whole batch, without a matrix of all of them."""

import math

import torch
from torch import Tensor

from fastsae.codes import SparseCodes
from fastsae.ops import _encoder
from fastsae.ops._library import define


def _fake(x, w_enc, b_enc, b_dec, k_total, scale):
    nnz = torch.library.get_ctx().new_dynamic_size()
    return (
        x.new_empty(nnz),
        x.new_empty(nnz, dtype=torch.int32),
        x.new_empty(x.shape[0] + 1, dtype=torch.int64),
    )


def _setup_context(ctx, inputs, output):
    _, indices, offsets = output
    _encoder.save_for_backward(ctx, inputs, indices, offsets, None)


encode_batch_topk_op = define(
    "encode_batch_topk",
    "(Tensor x, Tensor w_enc, Tensor? b_enc, Tensor? b_dec, int k_total, Tensor? scale) -> (Tensor, Tensor, Tensor)",
    by="x",
    fake=_fake,
    setup_context=_setup_context,
    backward=_encoder.backward,
)


def encode_batch_topk(
    x: Tensor,
    W_enc: Tensor,
    b_enc: Tensor | None,
    k: float,
    *,
    b_dec: Tensor | None = None,
    scale: Tensor | None = None,
) -> SparseCodes:
    """The int(k · n_tokens) largest of relu(pre) over the batch: pre = (x - b_dec) W_enc + b_enc.

    Selection is exact and deterministic: larger value first, then the lower token, then the lower latent. Only what is
    positive is kept, so there may be fewer. A pre-activation that is NaN or +inf is kept and not counted: a bad token
    takes nothing from the others. No [n_tokens, d_sae] tensor is made on a CPU with the native library.

    Args:
        x: activations [..., d_in], float16, bfloat16, float32 or float64.
        W_enc: [d_in, d_sae] of the same dtype and device; fastest when W_enc.T is contiguous.
        b_enc: [d_sae] or None.
        k: latents a token on average, 0 < k <= d_sae; may be fractional.
        b_dec: [d_in], subtracted from x, or None.
        scale: [d_sae], positive, or None: rank by pre · scale, as SAELens does by the norms of decoder rows; rounded
            once to float32 (float64 for float64). The values stay those of pre.

    Returns:
        SparseCodes in CSR, latents ascending within a token; differentiable in x, W_enc, b_enc and b_dec.

    Raises:
        TypeError: a dtype that is not floating, or dtypes that differ.
        ValueError: shapes or devices that do not fit, or k outside (0, d_sae].

    Source: Bussmann, Leask, Nanda 2024, "BatchTopK Sparse Autoencoders".
    """
    d_sae = _encoder.check_encoder(x, W_enc, b_enc, b_dec)
    if isinstance(k, bool) or not isinstance(k, (int, float)):
        raise TypeError(f"k is {k!r}: expected a number")
    if not 0 < k <= d_sae:
        raise ValueError(f"k = {k}: expected 0 < k <= d_sae = {d_sae}")
    scale = _encoder.rank_scale(scale, x, d_sae)
    k_total = int(k * math.prod(x.shape[:-1]))
    values, indices, offsets = encode_batch_topk_op(x.reshape(-1, x.shape[-1]), W_enc.T, b_enc, b_dec, k_total, scale)
    return SparseCodes._trusted(values, indices, offsets, d_sae, x.shape[:-1])
