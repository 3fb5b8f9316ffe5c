"""What sources of activations with known features share: samples, their true codes, and batches."""

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Iterator

import torch
from torch import Tensor

from fastsae.codes import SparseCodes


class KnownFeatures(ABC):
    """Activations that are sparse non-negative combinations of known unit directions.

        x_n = Σ_j v_nj features[i_nj] + what the source adds (an offset, noise)

    features: [n_features, d], rows of unit norm.
    """

    features: Tensor

    @property
    def n_features(self) -> int:
        return self.features.shape[0]

    @property
    def d(self) -> int:
        """Width of an activation."""
        return self.features.shape[1]

    @abstractmethod
    def sample_with_codes(self, n: int, generator: torch.Generator) -> tuple[Tensor, SparseCodes]:
        """n activations [n, d] and the codes over `features` that made them, latents of a token ascending.

        `generator` is one of the device of `features`; the sample depends on its state alone. Raises ValueError for
        n < 0.
        """

    def sample(self, n: int, generator: torch.Generator) -> Tensor:
        """n activations [n, d], those of `sample_with_codes`."""
        return self.sample_with_codes(n, generator)[0]

    def batches(self, n_tokens: int, batch_size: int = 1024, *, seed: int = 0) -> Iterator[Tensor]:
        """n_tokens fresh activations in batches [batch_size, d], the last of them maybe shorter.

        The same at every call with the same seed. Raises ValueError for n_tokens < 0 or batch_size < 1.
        """
        if n_tokens < 0 or batch_size < 1:
            raise ValueError(
                f"n_tokens = {n_tokens}, batch_size = {batch_size}: expected n_tokens >= 0, batch_size >= 1"
            )
        return self._batches(n_tokens, batch_size, seeded(seed, "batches", self.features.device))

    def _batches(self, n_tokens: int, batch_size: int, generator: torch.Generator) -> Iterator[Tensor]:
        for begin in range(0, n_tokens, batch_size):
            yield self.sample(min(batch_size, n_tokens - begin), generator)


def seeded(seed: int, purpose: str, device: torch.device | str | None) -> torch.Generator:
    """A generator of its own; its numbers are those of no other purpose, nor of torch.manual_seed(seed).

    With the same numbers, an SAE initialised after torch.manual_seed(0) would start at the features of seed 0.
    """
    digest = hashlib.sha256(f"{purpose} {seed}".encode()).digest()
    return torch.Generator(device or "cpu").manual_seed(int.from_bytes(digest[:8], "little") >> 1)


def random_directions(n: int, d: int, generator: torch.Generator) -> Tensor:
    """n points [n, d] drawn evenly from the unit sphere: normal vectors over their norms."""
    drawn = torch.randn(n, d, generator=generator, device=generator.device)
    return drawn / drawn.norm(dim=1, keepdim=True)


def checked_count(n: int) -> int:
    """n, a number of tokens."""
    if n < 0:
        raise ValueError(f"n = {n}: expected at least 0")
    return n


def checked_sizes(**sizes: int) -> None:
    """Raises ValueError for a size that is no int of at least 1."""
    for name, size in sizes.items():
        if isinstance(size, bool) or not isinstance(size, int) or size < 1:
            raise ValueError(f"{name} = {size!r}: expected an int of at least 1")
