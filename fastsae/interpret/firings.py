"""Every place where a latent fires, by latent."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fastsae.activations import capture
from fastsae.saes import SAE

_WINDOWS_AT_ONCE = 32


@dataclass(frozen=True)
class Firings:
    """The non-zero activations of all latents over token windows, grouped by latent.

    windows: int64 [n_windows, length], the tokens.
    values: float32 [nnz], the activations (the SAE's codes), those of one latent side by side in order of place.
    places: int64 [nnz], position in the flattened windows.
    offsets: int64 [d_sae + 1]; latent f owns the entries offsets[f] up to offsets[f + 1].
    n_tokens: places that were encoded, which is windows.numel() less the skipped ones.
    """

    windows: Tensor
    values: Tensor
    places: Tensor
    offsets: Tensor
    n_tokens: int

    @property
    def d_sae(self) -> int:
        return len(self.offsets) - 1

    @property
    def density(self) -> Tensor:
        """Fraction of tokens on which each latent fires: float64 [d_sae]."""
        return self.counts.double() / self.n_tokens

    @property
    def counts(self) -> Tensor:
        """Places where each latent fires: int64 [d_sae]."""
        return self.offsets.diff()

    @property
    def latents(self) -> Tensor:
        """The latent of each entry: int64 [nnz]."""
        return torch.arange(self.d_sae).repeat_interleave(self.counts)

    def of(self, latent: int) -> tuple[Tensor, Tensor]:
        """(values, places) of one latent."""
        entries = slice(int(self.offsets[latent]), int(self.offsets[latent + 1]))
        return self.values[entries], self.places[entries]

    def maxima(self) -> Tensor:
        """The largest activation of each latent, 0 where it never fires: float32 [d_sae]."""
        return torch.zeros(self.d_sae).scatter_reduce(0, self.latents, self.values, "amax")


@torch.no_grad()
def record_firings(model: nn.Module, hook: str, sae: SAE, windows: Tensor, *, skip_positions: int = 1) -> Firings:
    """Encodes the outputs of module `hook` on token windows [n, length], but for the first `skip_positions` of each.

    Memory is proportional to the entries (L0 for each token), never to d_sae. Raises ValueError as
    `fastsae.activations.capture` does.
    """
    values, latents, places = [], [], []
    length = windows.shape[1]
    position = torch.arange(windows.numel()).view(windows.shape)[:, skip_positions:]
    for chosen in torch.arange(len(windows)).split(_WINDOWS_AT_ONCE):
        codes = sae.encode(capture(model, hook, windows[chosen])[:, skip_positions:])
        active = codes.values != 0
        values.append(codes.values[active].float().cpu())
        latents.append(codes.indices[active].cpu())
        places.append(position[chosen].reshape(-1)[codes.tokens()[active].cpu()])
    if not values:
        raise ValueError(f"windows has shape {tuple(windows.shape)}: expected [n, {length}] with n >= 1")
    latent = torch.cat(latents)
    order = latent.argsort(stable=True)
    counts = torch.bincount(latent, minlength=sae.d_sae)
    offsets = torch.cat([counts.new_zeros(1), counts.cumsum(0)])
    return Firings(windows.cpu(), torch.cat(values)[order], torch.cat(places)[order], offsets, position.numel())
