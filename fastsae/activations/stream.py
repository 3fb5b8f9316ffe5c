"""Activations streamed from a model while text runs through it."""

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from fastsae.activations.capture import capture
from fastsae.activations.shuffle import shuffled

_WINDOWS_AT_ONCE = 32


def activation_batches(
    model: nn.Module,
    hook: str,
    windows: Tensor,
    *,
    batch_size: int,
    capacity: int,
    skip_positions: int = 1,
    seed: int = 0,
) -> Iterator[Tensor]:
    """Endless shuffled batches [batch_size, d_in] of the outputs of module `hook` on token windows [n, length].

    Windows are drawn in a new random order on each pass over them. The first `skip_positions` of every window are
    left out: they have no context to speak of, and in many models activations there are of another magnitude.
    `capacity` rows are held to be mixed (see `shuffled`).
    """
    generator = torch.Generator().manual_seed(seed)
    blocks = _blocks(model, hook, windows, skip_positions, generator)
    return shuffled(blocks, capacity, batch_size, generator)


def _blocks(
    model: nn.Module, hook: str, windows: Tensor, skip_positions: int, generator: torch.Generator
) -> Iterator[Tensor]:
    if not 0 <= skip_positions < windows.shape[1]:
        raise ValueError(
            f"skip_positions = {skip_positions}: expected 0 <= skip_positions < length of a window = {windows.shape[1]}"
        )
    if len(windows) == 0:
        raise ValueError("windows has no rows: expected at least one window of tokens")
    while True:
        for chosen in torch.randperm(len(windows), generator=generator).split(_WINDOWS_AT_ONCE):
            activations = capture(model, hook, windows[chosen])
            yield activations[:, skip_positions:].flatten(0, 1)
