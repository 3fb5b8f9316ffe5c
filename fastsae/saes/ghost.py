"""Ghost gradients: dead latents learn to reconstruct the residual, through an activation that is never zero."""

from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from fastsae.saes.loss import zero_of

if TYPE_CHECKING:
    from fastsae.saes.base import SAE, Weights

# Activations of the dead latents at one time: they are dense, so tokens come in blocks and are computed anew backward.
_BLOCK_ELEMENTS = 1 << 20
_EPS = 1e-6


def ghost_loss(sae: "SAE", x: Tensor, residual: Tensor, weights: "Weights") -> Tensor:
    """mean_n c_n ‖a_n g_n - r_n‖² with r the residual x - x̂, and g = exp(pre) W_dec over the dead latents alone.

    a_n = ‖r_n‖ / (10⁻⁶ + 2 ‖g_n‖) gives the ghosts half the residual's norm, c_n = ‖r_n‖² / (10⁻⁶ + ‖a_n g_n - r_n‖²)
    the term the size of the reconstruction error; both are constants to the gradient. 0 where no latent is dead.

    `residual` is x̂ - x. Memory grows with the dead latents and a block of tokens. Source: Jermyn and Templeton,
    Anthropic, January 2024, "Ghost Grads: An improvement on resampling", as SAELens 3 computed it.
    """
    dead = sae._dead_in_training()
    if dead is None or not x.shape[0]:
        return zero_of(residual)
    w_enc = functional.embedding(dead, weights.encoder_rows, sparse=True)
    w_dec = functional.embedding(dead, sae.W_dec, sparse=True)
    b_enc = sae.b_enc[dead]
    b_dec = sae._b_dec_of_input
    rows = max(1, _BLOCK_ELEMENTS // len(dead))
    total = sum(
        checkpoint(_block, x[at : at + rows], residual[at : at + rows], w_enc, b_enc, w_dec, b_dec, use_reentrant=False)
        for at in range(0, x.shape[0], rows)
    )
    return total / x.shape[0]


def _block(x: Tensor, residual: Tensor, w_enc: Tensor, b_enc: Tensor, w_dec: Tensor, b_dec: Tensor | None) -> Tensor:
    """The sum of the term over a block of tokens."""
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    pre = (x if b_dec is None else x - b_dec) @ w_enc.T + b_enc
    ghosts = (pre.exp() @ w_dec).to(wide)
    left = -residual.to(wide)
    size = left.norm(dim=1, keepdim=True)
    scale = (size / (_EPS + 2 * ghosts.norm(dim=1, keepdim=True))).detach()
    errors = (scale * ghosts - left).square().sum(dim=1)
    return (errors * (size[:, 0].square() / (_EPS + errors)).detach()).sum()
