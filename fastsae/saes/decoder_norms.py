"""Norms of decoder rows in a loss, without a second gradient of the decoder's size."""

from typing import Any

import torch
from torch import Tensor


def decoder_norms(W_dec: Tensor, sites: int = 1) -> Tensor:
    """‖W_dec[f]‖ for each latent: [d_sae]; with several sites the sum of the norms at each of them.

    The sum over sites is the weight of a crosscoder's sparsity penalty (Lindsey et al. 2024, "Sparse Crosscoders for
    Cross-Layer Features and Model Diffing"). Half precision is summed in float32.
    """
    return _site_norms(W_dec, sites).sum(dim=1)


def with_norms(W_dec: Tensor, sites: int = 1) -> tuple[Tensor, Tensor]:
    """W_dec as it is, and `decoder_norms` of it; gradients of both reach W_dec in the memory of the first.

    The gradient of a norm is a multiple of its row. Autograd would make a [d_sae, d_out] tensor of these multiples
    and add it to the gradient from the decoder; here they are added in place.
    """
    if torch.compiler.is_compiling():
        return W_dec, decoder_norms(W_dec, sites)
    return _WithNorms.apply(W_dec, sites)


def _site_norms(W_dec: Tensor, sites: int) -> Tensor:
    """[d_sae, sites]; in blocks of latents, since half precision is widened."""
    rows = W_dec.unflatten(1, (sites, -1))
    dtype = W_dec.dtype if W_dec.dtype.itemsize >= 4 else torch.float32
    return torch.linalg.vector_norm(rows, dim=2, dtype=dtype)


class _WithNorms(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, W_dec: Tensor, sites: int) -> tuple[Tensor, Tensor]:
        norms = _site_norms(W_dec, sites)
        ctx.save_for_backward(W_dec, norms)
        return W_dec.view_as(W_dec), norms.sum(dim=1)

    @staticmethod
    def backward(ctx: Any, grad_W: Tensor, grad_norms: Tensor) -> tuple[Tensor, None]:
        W_dec, norms = ctx.saved_tensors
        # A row of zeros has no direction: torch gives its norm no gradient either.
        multiples = (grad_norms[:, None] / norms).masked_fill(norms == 0, 0).to(W_dec.dtype)[..., None]
        rows, grad_rows = (t.unflatten(1, (norms.shape[1], -1)) for t in (W_dec, grad_W))
        if torch.is_grad_enabled():
            return (grad_rows + rows * multiples).flatten(1), None
        # The gradient comes from the products of this package's decoder, which keep no other use of it.
        grad_rows.addcmul_(rows, multiples)
        return grad_W, None
