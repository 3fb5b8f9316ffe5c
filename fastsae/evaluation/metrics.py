"""Sparsity, reconstruction and dead latents over any number of activations, in one pass and in float64."""

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from fastsae.saes import SAE

Batch = Tensor | tuple[Tensor, Tensor]
Activations = Batch | Iterable[Batch]


@dataclass(frozen=True)
class SAEMetrics:
    """What `evaluate` returns.

    n_tokens: activations seen.
    l0: mean over tokens of the number of non-zero latents.
    explained_variance: 1 - Σ‖x̂ - x‖² / Σ‖x - mean(x)‖² over all tokens, on the activations' own scale.
    feature_counts: tokens in which each latent is non-zero, int64 [d_sae].
    """

    n_tokens: int
    l0: float
    explained_variance: float
    feature_counts: Tensor

    @property
    def density(self) -> Tensor:
        """Fraction of tokens in which each latent is non-zero: float64 [d_sae]."""
        return self.feature_counts.double() / self.n_tokens

    @property
    def dead(self) -> Tensor:
        """Latents that never fired: int64, ascending."""
        return (self.feature_counts == 0).nonzero()[:, 0]

    @property
    def dead_fraction(self) -> float:
        """Fraction of latents that never fired."""
        return len(self.dead) / len(self.feature_counts)


@torch.no_grad()
def evaluate(sae: SAE, activations: Activations) -> SAEMetrics:
    """Every metric of an SAE on raw activations: one tensor [..., d_in], or an iterable of them.

    A transcoder wants pairs (activations, targets), and what it explains is the targets' variance. The SAE is in
    evaluation mode meanwhile.

    Sums are float64. A NaN or infinite activation makes `explained_variance` NaN; it is NaN as well where the
    activations do not vary. Raises ValueError when there is no activation.
    """
    sums, was_training = _Sums(sae), sae.training
    sae.eval()
    try:
        one = isinstance(activations, Tensor) or (sae.is_transcoder and isinstance(activations, tuple))
        for batch in [activations] if one else activations:
            sums.add(*([batch] if isinstance(batch, Tensor) else batch))
    finally:
        sae.train(was_training)
    return sums.result()


def l0(sae: SAE, activations: Activations) -> float:
    """Mean over tokens of the number of non-zero latents; raw activations as in `evaluate`."""
    return evaluate(sae, activations).l0


def explained_variance(sae: SAE, activations: Activations) -> float:
    """1 - Σ‖x̂ - x‖² / Σ‖x - mean(x)‖² over all tokens; raw activations as in `evaluate`."""
    return evaluate(sae, activations).explained_variance


def dead_latents(sae: SAE, activations: Activations) -> Tensor:
    """The latents that are zero in every token, int64 ascending; raw activations as in `evaluate`."""
    return evaluate(sae, activations).dead


class _Sums:
    """Running sums. Activations are shifted by the first batch's mean, so that the variance is no small difference."""

    def __init__(self, sae: SAE):
        self.sae = sae
        self.n_tokens = 0
        self.squared_error = torch.zeros((), dtype=torch.float64, device=sae.device)
        self.squared = torch.zeros_like(self.squared_error)
        self.sum = torch.zeros(sae.W_dec.shape[1], dtype=torch.float64, device=sae.device)
        self.shift: Tensor | None = None
        self.feature_counts = torch.zeros(sae.d_sae, dtype=torch.int64, device=sae.device)

    def add(self, x: Tensor, target: Tensor | None = None) -> None:
        if self.sae.is_transcoder != (target is not None):
            wanted = "pairs (activations, targets)" if target is None else "activations alone"
            raise ValueError(
                f"activations of a {type(self.sae).__name__} with d_out = {self.sae.d_out}: expected {wanted}"
            )
        if x.numel() == 0:
            return
        out = self.sae(x)
        reconstruction, exact = (
            t.double().reshape(-1, self.sum.numel()) for t in (out.sae_out, x if target is None else target)
        )
        if self.shift is None:
            self.shift = exact.mean(dim=0)
        shifted = exact - self.shift
        self.n_tokens += len(exact)
        self.squared_error += (reconstruction - exact).square().sum()
        self.squared += shifted.square().sum()
        self.sum += shifted.sum(dim=0)
        self.feature_counts += out.codes.feature_counts()

    def result(self) -> SAEMetrics:
        if self.n_tokens == 0:
            raise ValueError("activations hold no token: expected at least one")
        variance = self.squared - self.sum.square().sum() / self.n_tokens
        unexplained = self.squared_error / variance if variance > 0 else variance * torch.nan
        return SAEMetrics(
            n_tokens=self.n_tokens,
            l0=int(self.feature_counts.sum()) / self.n_tokens,
            explained_variance=1 - unexplained.item(),
            feature_counts=self.feature_counts.cpu(),
        )
