"""encode_threshold: every pre-activation above its latent's threshold, without a matrix of all of them."""

import torch
from torch import Tensor

from fastsae.codes import SparseCodes
from fastsae.ops import _check, _encoder
from fastsae.ops._library import define


def _fake(x, w_enc, b_enc, b_dec, threshold):
    nnz = torch.library.get_ctx().new_dynamic_size()
    return (
        x.new_empty(nnz),
        x.new_empty(nnz, dtype=torch.int32),
        x.new_empty(x.shape[0] + 1, dtype=torch.int64),
    )


def _setup_context(ctx, inputs, output):
    _, indices, offsets = output
    _encoder.save_for_backward(ctx, inputs, indices, offsets, None)


encode_threshold_op = define(
    "encode_threshold",
    "(Tensor x, Tensor w_enc, Tensor? b_enc, Tensor? b_dec, Tensor threshold) -> (Tensor, Tensor, Tensor)",
    by="x",
    fake=_fake,
    setup_context=_setup_context,
    backward=_encoder.backward,
)


def encode_threshold(
    x: Tensor,
    W_enc: Tensor,
    b_enc: Tensor | None,
    threshold: Tensor | float = 0.0,
    *,
    b_dec: Tensor | None = None,
) -> SparseCodes:
    """Every pre-activation above its latent's threshold: pre = (x - b_dec) W_enc + b_enc > threshold, strictly.

    With threshold 0 these are the active latents of a ReLU, with a trained one those of a JumpReLU. The values are the
    pre-activations themselves. NaN is kept, so that it reaches the output. Deterministic: on a CPU with the native
    library the same to the bit whatever the instruction set, threads and batch; no [n_tokens, d_sae] tensor is made
    there, and memory grows with what is kept.

    Args:
        x: activations [..., d_in], float16, bfloat16, float32 or float64.
        W_enc: [d_in, d_sae] of the same dtype and device; fastest when W_enc.T is contiguous.
        b_enc: [d_sae] or None.
        threshold: [d_sae], of any floating dtype, or one number; compared in float32 (float64 for float64), before
            values are rounded to x's dtype.
        b_dec: [d_in], subtracted from x, or None.

    Returns:
        SparseCodes in CSR, latents ascending within a token; differentiable in x, W_enc, b_enc and b_dec. No gradient
        reaches the threshold: its estimators belong to the architectures.

    Raises:
        TypeError: a dtype that is not floating, or dtypes that differ.
        ValueError: shapes or devices that do not fit.

    Source: Rajamanoharan et al. 2024, "Jumping Ahead: Improving Reconstruction Fidelity with JumpReLU Sparse
    Autoencoders".
    """
    d_sae = _encoder.check_encoder(x, W_enc, b_enc, b_dec)
    if isinstance(threshold, Tensor) and threshold.dim():
        _check.floating("threshold", threshold)
        _check.shape("threshold", threshold, (d_sae,), f"[{d_sae}]")
        _check.same_device("threshold", threshold, "x", x)
        threshold = threshold.detach()
    else:
        threshold = torch.full((d_sae,), float(threshold), dtype=torch.float64, device=x.device)
    threshold = threshold.to(torch.float64 if x.dtype == torch.float64 else torch.float32)
    values, indices, offsets = encode_threshold_op(x.reshape(-1, x.shape[-1]), W_enc.T, b_enc, b_dec, threshold)
    return SparseCodes._trusted(values, indices, offsets, d_sae, x.shape[:-1])
