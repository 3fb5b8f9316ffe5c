"""What is recorded of a step."""

import math
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from fastsae.saes import SAE, SAELoss


@dataclass(frozen=True)
class Record:
    """One step.

    step, tokens: steps finished with this one, tokens seen with this one's.
    lr: learning rate of the step (of the optimizer's first group).
    loss: the parts of its loss by name ("total", "fvu", ...).
    l0: mean number of active latents of a token.
    dead_fraction: latents that have not fired for the SAE's `dead_after_tokens` tokens, of all.
    grad_norm: norm of its gradients before clipping; None where the optimizer makes no gradients.
    seconds: wall-clock time of the run up to the end of the step.
    """

    step: int
    tokens: int
    lr: float
    loss: dict[str, float]
    l0: float
    dead_fraction: float
    grad_norm: float | None
    seconds: float

    def as_json(self) -> dict[str, Any]:
        """One flat JSON object; the parts of the loss under their own names."""
        values = asdict(self)
        loss = values.pop("loss")
        return {"step": values.pop("step"), "tokens": values.pop("tokens"), "lr": values.pop("lr"), **loss, **values}


@torch.no_grad()
def measure(
    sae: SAE, loss: SAELoss, grad_norm: Tensor | None, *, step: int, tokens: int, lr: float, seconds: float
) -> Record:
    """The record of a step just done; one synchronisation with the device.

    Raises FloatingPointError if its loss or its gradient norm is not finite.
    """
    parts = loss.parts()
    dead = sae.tokens_since_fired >= sae.dead_after_tokens
    scalars = [*parts.values(), loss.codes.l0().float().mean(), dead.float().mean()]
    if grad_norm is not None:
        scalars.append(grad_norm)
    values = torch.stack([scalar.float() for scalar in scalars]).tolist()
    losses = dict(zip(parts, values, strict=False))
    l0, dead_fraction, *norm = values[len(parts) :]
    named = {**losses, **({"grad_norm": norm[0]} if norm else {})}
    for name, value in named.items():
        if not math.isfinite(value):
            raise FloatingPointError(
                f"{name} = {value} at step {step}: expected a finite number; look for NaN or infinite activations, "
                "lower the learning rate or lengthen its warm-up, and resume from an earlier checkpoint"
            )
    return Record(step, tokens, float(lr), losses, l0, dead_fraction, norm[0] if norm else None, seconds)
