"""encode_topk: the k largest pre-activations of each row, without a matrix of all of them."""

import torch
from torch import Tensor

from fastsae.codes import SparseCodes
from fastsae.ops import _check
from fastsae.ops._library import define
from fastsae.ops.accumulate_rows import accumulate_rows_op
from fastsae.ops.decode import decode_op
from fastsae.ops.transpose import transposed


def _fake(x, w_enc, b_enc, b_dec, k, relu_first):
    return x.new_empty(x.shape[0], k), x.new_empty(x.shape[0], k, dtype=torch.int32)


def _setup_context(ctx, inputs, output):
    x, w_enc, b_enc, b_dec, _, relu_first = inputs
    values, indices = output
    ctx.has_b_enc, ctx.relu_first = b_enc is not None, relu_first
    ctx.save_for_backward(x, w_enc, b_dec, indices, values if relu_first else None)


def _backward(ctx, g, _):
    x, w_enc, b_dec, indices, values = ctx.saved_tensors
    if ctx.relu_first:
        g = g.where(~(values <= 0), 0)
    needs_x, needs_w, needs_b_enc, needs_b_dec = ctx.needs_input_grad[:4]
    grad_x = grad_w = grad_b_enc = grad_b_dec = None
    if needs_w or needs_b_enc or needs_b_dec:
        latent_major = transposed(indices, None, w_enc.shape[0])
        grad_w, grad_b_enc = accumulate_rows_op(g, *latent_major, x, b_dec, None)
    if needs_x:
        grad_x = decode_op(g, indices, None, w_enc, None)
    if needs_b_dec:
        # Σ_n of the gradient of (x - b_dec), regrouped by latent: no [n_tokens, d_in] tensor is made for it.
        grad_b_dec = -sum_of_rows(grad_b_enc, w_enc)
    return (
        grad_x,
        grad_w if needs_w else None,
        grad_b_enc if needs_b_enc and ctx.has_b_enc else None,
        grad_b_dec,
        None,
        None,
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


encode_topk_op = define(
    "encode_topk",
    "(Tensor x, Tensor w_enc, Tensor? b_enc, Tensor? b_dec, int k, bool relu_first) -> (Tensor, Tensor)",
    by="x",
    fake=_fake,
    setup_context=_setup_context,
    backward=_backward,
)


def encode_topk(
    x: Tensor,
    W_enc: Tensor,
    b_enc: Tensor | None,
    k: int,
    *,
    b_dec: Tensor | None = None,
    relu_first: bool = False,
    scale=None,
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

    Returns:
        SparseCodes with exactly k entries a token; differentiable in x, W_enc, b_enc and b_dec.

    Raises:
        TypeError: a dtype that is not floating, or dtypes that differ.
        ValueError: shapes or devices that do not fit, or k outside [1, d_sae].

    Source: Gao et al. 2024, "Scaling and evaluating sparse autoencoders" (TopK).
    """
    d_sae = check_encoder(x, W_enc, b_enc, b_dec)
    _check.k(k, d_sae)
    values, indices = encode_topk_op(x.reshape(-1, x.shape[-1]), W_enc.T, b_enc, b_dec, k, relu_first)
    return SparseCodes._trusted(values, indices, None, d_sae, x.shape[:-1])


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
