"""Resampling of dead latents: they start anew on tokens that are reconstructed badly."""

import torch
from torch import Tensor
from torch.optim import Optimizer

from fastsae.saes import SAE

# Of the alive encoder rows' mean norm.
_ENCODER_SHARE = 0.2


@torch.no_grad()
def resample_dead_(sae: SAE, x: Tensor, target: Tensor | None = None, optimizer: Optimizer | None = None) -> int:
    """Gives every dead latent a new start on a token of the batch x [..., d_in]; returns how many were dead.

    A token is drawn for each with a probability proportional to its squared loss. The token (less b_dec where that is
    subtracted), scaled to unit norm, becomes the decoder row; scaled to a fifth of the mean norm of the living encoder
    rows, the encoder row. Biases become 0, the optimizer's state of these latents too, and they count as having fired.
    A transcoder takes the decoder row from the token's target.

    Draws come from torch's global generator. Source: Bricken et al. 2023, "Towards Monosemanticity", appendix "Neuron
    Resampling".
    """
    dead = sae.dead_latents()
    if not len(dead):
        return 0
    was_training = sae.training
    sae.eval()
    inputs, outputs = sae._batch(x, target)
    reconstruction = sae._reconstruct(sae._activate(inputs, sae._weights()), inputs, outputs, sae._weights())
    sae.train(was_training)
    losses = reconstruction.residual.float().square().sum(dim=1)
    chance = losses.square().nan_to_num(0.0)
    if not chance.sum() > 0:
        chance = torch.ones_like(chance)
    tokens = torch.multinomial(chance, len(dead), replacement=True)
    directions = inputs[tokens] - sae.b_dec if sae.apply_b_dec_to_input else inputs[tokens]
    written = directions if outputs is inputs else outputs[tokens]
    alive = torch.ones(sae.d_sae, dtype=torch.bool, device=dead.device).index_fill(0, dead, False)
    rows = sae.W_enc.T
    norm = rows[alive].float().norm(dim=1).mean() if alive.any() else rows.new_ones((), dtype=torch.float32)
    rows[dead] = (_ENCODER_SHARE * norm * _unit(directions)).to(rows.dtype)
    sae.W_dec[dead] = _unit(written).to(sae.W_dec.dtype)
    for name in ("b_enc", "b_gate", "b_mag", "r_mag"):
        if getattr(sae, name, None) is not None:
            getattr(sae, name)[dead] = 0
    sae.tokens_since_fired[dead] = 0
    if optimizer is not None:
        _forget(optimizer, sae, dead)
    return len(dead)


def _unit(rows: Tensor) -> Tensor:
    return rows.float() / rows.float().norm(dim=1, keepdim=True).clamp_min(1e-12)


def _forget(optimizer: Optimizer, sae: SAE, latents: Tensor) -> None:
    """Sets the optimizer's state of these latents to 0; masters of half-precision weights to the weights."""
    for name in ("W_enc", "W_dec", "b_enc", "b_gate", "b_mag", "r_mag"):
        parameter = getattr(sae, name, None)
        if parameter is None:
            continue
        for key, value in optimizer.state.get(parameter, {}).items():
            if isinstance(value, Tensor) and value.shape == parameter.shape and key != "master":
                (value.T if name == "W_enc" else value)[latents] = 0
