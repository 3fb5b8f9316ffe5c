"""encode_topk: the k largest pre-activations of each row, without a matrix of all of them."""

import torch
from torch import Tensor

from fastsae.codes import SparseCodes
from fastsae.ops import _check, _encoder
from fastsae.ops._library import define


def _fake(x, w_enc, b_enc, b_dec, k, relu_first, scale=None):
    return x.new_empty(x.shape[0], k), x.new_empty(x.shape[0], k, dtype=torch.int32)


def _setup_context(ctx, inputs, output):
    values, indices = output
    _encoder.save_for_backward(ctx, inputs, indices, None, values if inputs[5] else None)


encode_topk_op = define(
    "encode_topk",
    "(Tensor x, Tensor w_enc, Tensor? b_enc, Tensor? b_dec, int k, bool relu_first, Tensor? scale=None) "
    "-> (Tensor, Tensor)",
    by="x",
    fake=_fake,
    setup_context=_setup_context,
    backward=_encoder.backward,
)


def encode_topk(
    x: Tensor,
    W_enc: Tensor,
    b_enc: Tensor | None,
    k: int,
    *,
    b_dec: Tensor | None = None,
    relu_first: bool = False,
    scale: Tensor | None = None,
) -> SparseCodes:
    """The k largest pre-activations of each token: pre = (x - b_dec) W_enc + b_enc.

    Selection is exact and deterministic: larger value first, then the lower index; NaN counts as largest. The
    values are the raw pre-activations at the kept places (apply `.relu()` to the codes), or with `relu_first`
    the k largest of relu(pre). No [n_tokens, d_sae] tensor is made on a CPU with the native library.

    Args:
        x: activations [..., d_in], float16, bfloat16, float32 or float64.
        W_enc: [d_in, d_sae] of the same dtype and device; fastest when W_enc.T is contiguous (the modules of
            fastsae keep it so), otherwise it is copied once a call.
        b_enc: [d_sae] or None.
        k: latents kept for each token, 1 <= k <= d_sae.
        b_dec: [d_in], subtracted from x, or None.
        relu_first: select among relu(pre), as sparsify and dictionary_learning do.
        scale: [d_sae], positive, or None: rank by pre · scale, as SAELens does by the norms of decoder rows; rounded
            once to float32 (float64 for float64). The values stay those of pre.

    Returns:
        SparseCodes with exactly k entries a token; differentiable in x, W_enc, b_enc and b_dec.

    Raises:
        TypeError: a dtype that is not floating, or dtypes that differ.
        ValueError: shapes or devices that do not fit, or k outside [1, d_sae].

    Source: Gao et al. 2024, "Scaling and evaluating sparse autoencoders" (TopK).
    """
    d_sae = _encoder.check_encoder(x, W_enc, b_enc, b_dec)
    _check.k(k, d_sae)
    scale = _encoder.rank_scale(scale, x, d_sae)
    values, indices = encode_topk_op(x.reshape(-1, x.shape[-1]), W_enc.T, b_enc, b_dec, k, relu_first, scale)
    return SparseCodes._trusted(values, indices, None, d_sae, x.shape[:-1])
