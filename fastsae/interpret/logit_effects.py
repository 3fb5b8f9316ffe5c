"""What a latent does to a model's output."""

import torch
from torch import Tensor, nn

from fastsae.activations import replace_output

# Logits held at once: 128 MiB in float32.
_MAX_LOGITS = 1 << 25


@torch.no_grad()
def logit_effects(model: nn.Module, hook: str, directions: Tensor, windows: Tensor) -> Tensor:
    """Mean change of the logits when a direction is added at a module: float32 [n_directions, vocabulary].

        effect[m, v] = mean over tokens of (logits_v(activation + directions[m]) - logits_v(activation))

    less its mean over v, which no probability depends on.

    Measured, not approximated: it counts everything between the module `hook` and the logits, on the tokens of
    `windows` [n, length]. `directions` [n_directions, d_in] are on the scale of the raw activations; an SAE's latent f
    at activation a has a · W_dec[f] / activation_scale.
    """
    plain = model(input_ids=windows).logits.float()
    at_once = max(1, _MAX_LOGITS // plain.numel())
    effects = []
    for some in directions.split(at_once):
        added = some.repeat_interleave(len(windows), dim=0)[:, None]
        with replace_output(model, hook, lambda activation, added=added: activation + added):
            logits = model(input_ids=windows.repeat(len(some), 1)).logits.float()
        change = logits.view(len(some), *plain.shape) - plain
        effects.append(change.mean(dim=(1, 2)))
    effect = torch.cat(effects)
    return effect - effect.mean(dim=1, keepdim=True)
