"""What a language model's loss becomes when an SAE stands in for the activations it reconstructs."""

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from fastsae.activations import replace_output
from fastsae.saes import SAE

_WINDOWS_AT_ONCE = 16


@dataclass(frozen=True)
class LossRecovered:
    """Mean next-token cross-entropy, nats per token, of a model three times over.

    ce_original: as it is. ce_sae: with the SAE's reconstruction in place of the hooked
    output. ce_zero: with zeros there.
    """

    ce_original: float
    ce_sae: float
    ce_zero: float

    @property
    def fraction(self) -> float:
        """(ce_zero - ce_sae) / (ce_zero - ce_original): 1 loses nothing, 0 is no better than zeros; NaN for 0/0."""
        gap = self.ce_zero - self.ce_original
        return (self.ce_zero - self.ce_sae) / gap if gap else float("nan")


@torch.no_grad()
def loss_recovered(model: nn.Module, hook: str, sae: SAE, windows: Tensor, *, skip_positions: int = 1) -> LossRecovered:
    """Splices an SAE into a causal language model at module `hook`, on token windows [n, length].

    The first `skip_positions` of every window keep the model's own activation in all three runs, and every position
    that has a successor is scored. Cross-entropies are of float32 logits. Raises ValueError as
    `fastsae.activations.replace_output` does. Source of the measure: Bricken et al. 2023, "Towards Monosemanticity".
    """

    def spliced(activation: Tensor) -> Tensor:
        return torch.cat([activation[:, :skip_positions], sae(activation[:, skip_positions:]).sae_out], dim=1)

    def zeroed(activation: Tensor) -> Tensor:
        return torch.cat([activation[:, :skip_positions], torch.zeros_like(activation[:, skip_positions:])], dim=1)

    return LossRecovered(
        ce_original=_cross_entropy(model, windows),
        ce_sae=_cross_entropy(model, windows, hook, spliced),
        ce_zero=_cross_entropy(model, windows, hook, zeroed),
    )


def _cross_entropy(
    model: nn.Module, windows: Tensor, hook: str = "", function: Callable[[Tensor], Tensor] | None = None
) -> float:
    total, n_scored = 0.0, 0
    with replace_output(model, hook, function) if function else nullcontext():
        for chosen in windows.split(_WINDOWS_AT_ONCE):
            logits = model(input_ids=chosen).logits[:, :-1].float()
            targets = chosen[:, 1:].reshape(-1)
            total += functional.cross_entropy(logits.flatten(0, 1), targets, reduction="sum").item()
            n_scored += targets.numel()
    if n_scored == 0:
        raise ValueError(f"windows has shape {tuple(windows.shape)}: expected [n, length] with n >= 1 and length >= 2")
    return total / n_scored
