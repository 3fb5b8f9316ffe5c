"""The dense formulas that results are held to, restricted to few tokens and to the latents those tokens use."""

import torch
from torch import Tensor

from fastsae.saes import TopKSAE

# Latents taken at once: float64 copies of so many encoder rows fit a laptop at every registered width.
_LATENTS = 8_192


@torch.no_grad()
def preactivations(sae: TopKSAE, x: Tensor, dtype: torch.dtype) -> Tensor:
    """(x - b_dec) W_enc + b_enc of x [n, d_in] as plain PyTorch makes it in `dtype`, [n, d_sae] in float64."""

    def dense(latents: slice) -> Tensor:
        centred = x.to(dtype) - sae.b_dec.to(dtype)
        return (centred @ sae.W_enc[:, latents].to(dtype) + sae.b_enc[latents].to(dtype)).double()

    return torch.cat([dense(slice(start, start + _LATENTS)) for start in range(0, sae.d_sae, _LATENTS)], dim=1)


def encode(x: Tensor, W_enc: Tensor, b_enc: Tensor, b_dec: Tensor, places: Tensor) -> Tensor:
    """Pre-activations at `places` [n, k] of x [n, d_in]; W_enc [latents, d_in]."""
    return ((x - b_dec) @ W_enc.T + b_enc).gather(1, places)


def decode(values: Tensor, W_dec: Tensor, b_dec: Tensor, places: Tensor) -> Tensor:
    """Values [n, k] at rows `places` [n, k] of W_dec, as a dense product."""
    codes = values.new_zeros(values.shape[0], W_dec.shape[0]).scatter_add_(1, places, values)
    return codes @ W_dec + b_dec


def squared_error(values: Tensor, W_dec: Tensor, b_dec: Tensor, x: Tensor, places: Tensor) -> tuple[Tensor, Tensor]:
    """Residuals, and their squared norms."""
    residual = decode(values, W_dec, b_dec, places) - x
    return residual, residual.square().sum(dim=1)


def sampled_dot(g: Tensor, W_dec: Tensor, places: Tensor) -> Tensor:
    return (g @ W_dec.T).gather(1, places)


def accumulate_rows(weights: Tensor, g: Tensor) -> Tensor:
    """Dense codes [n, latents], transposed, times g [n, d_in]."""
    return weights.T @ g


def project_rows(grad: Tensor, rows: Tensor) -> Tensor:
    along = (grad * rows).sum(dim=1, keepdim=True) / rows.square().sum(dim=1, keepdim=True)
    return grad - along * rows


def normalize_rows(rows: Tensor) -> Tensor:
    return rows / rows.norm(dim=1, keepdim=True)


def gradients(
    x: Tensor, W_enc: Tensor, b_enc: Tensor, W_dec: Tensor, b_dec: Tensor, places: Tensor
) -> tuple[Tensor, ...]:
    """Gradients of the loss to W_enc, b_enc, W_dec (a row for each latent) and b_dec, by autograd, the picks given.

    What b_dec gets through x - b_dec is regrouped by latent, as OpenAI's train.py has it: minus the gradient of b_enc
    times W_enc.
    """
    leaves = [leaf.detach().requires_grad_() for leaf in (W_enc, b_enc, W_dec, b_dec)]
    pre = (x - b_dec) @ leaves[0].T + leaves[1]
    kept = torch.zeros_like(pre, dtype=torch.bool).scatter_(1, places, True)
    y = pre.relu().where(kept, 0) @ leaves[2] + leaves[3]
    loss = (y - x).square().sum(dim=1).mean() / x.var(dim=0, unbiased=False).sum()
    grad_W_enc, grad_b_enc, grad_W_dec, grad_b_dec = torch.autograd.grad(loss, leaves)
    return grad_W_enc, grad_b_enc, grad_W_dec, grad_b_dec - grad_b_enc @ W_enc
