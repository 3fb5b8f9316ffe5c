"""The loss of dictionary_learning's JumpReluTrainer, whose formula stands in the trainer and not in its dictionary."""

from typing import NamedTuple

import torch
from torch import Tensor

from fastsae.codes import SparseCodes
from fastsae.interop.activations import Activations
from fastsae.ops import encode_threshold
from fastsae.saes.ragged import at_entries


class JumpReLU(NamedTuple):
    """A batch as JumpReluTrainer.loss encodes it."""

    f: Activations  # pre · 1[pre > θ], with the estimator's gradient to θ
    l0: Tensor  # mean over tokens of Σ_f 1[f > θ], with the estimator's gradient to θ


def encode(x: Tensor, W_enc: Tensor, b_enc: Tensor, threshold: Tensor, bandwidth: float) -> JumpReLU:
    """x [n_tokens, d_in], W_enc [d_in, d_sae], threshold [d_sae]; float32.

        ∂f/∂θ = -(θ/ε) 1[|pre - θ| < ε/2],   ∂1[f > θ]/∂θ = -(1/ε) 1[|f - θ| < ε/2]

    The step function is one of the activations f, as the library (0.1.0) has it, not of the pre-activations as in
    Rajamanoharan et al. 2024. What its threshold cuts off is then 0 to the estimator: of a latent with |θ| < ε/2 every
    token that it is silent in counts, and of one with θ < 0 each is a firing. Those are counted, not computed.
    """
    places = encode_threshold(x, W_enc, b_enc, threshold.detach() - bandwidth / 2)
    pre, theta = places.values, at_entries(threshold, places)
    # Zero, with the gradient 1.
    moved = theta - theta.detach()
    kept = pre.where(~(pre <= theta), 0)
    jump = (theta.detach() / bandwidth).where(_in_window(pre, theta, bandwidth), 0)
    activations = kept - jump * moved

    steps = (kept > theta).to(pre.dtype) - (1 / bandwidth) * moved.where(_in_window(kept, theta, bandwidth), 0)
    silent = x.shape[0] - torch.bincount(places.indices, minlength=places.d_sae)
    fires = silent * (threshold < 0)
    estimated = silent * _in_window(torch.zeros_like(threshold), threshold, bandwidth)
    elsewhere = fires.sum() - (1 / bandwidth) * ((threshold - threshold.detach()) * estimated).sum()
    return JumpReLU(_activations(places, activations), (steps.sum() + elsewhere) / x.shape[0])


def _activations(places: SparseCodes, values: Tensor) -> Activations:
    return Activations(places.with_values(values))


@torch.no_grad()
def _in_window(x: Tensor, theta: Tensor, bandwidth: float) -> Tensor:
    distance = (x - theta) / bandwidth
    return (distance > -0.5) & (distance < 0.5)
