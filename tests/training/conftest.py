"""A synthetic dictionary to learn, as every test of training uses it."""

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

import fastsae

D_IN, D_SAE, K = 16, 64, 3


def batches(count: int, n_tokens: int = 256, start: int = 0) -> Iterator[Tensor]:
    """The same sequence each time: tokens that are sums of 3 of 32 fixed unit directions, weighted from 0.5 to 1.5."""
    directions = torch.nn.functional.normalize(torch.randn(32, D_IN, generator=torch.Generator().manual_seed(1)), dim=1)
    for step in range(start, start + count):
        generator = torch.Generator().manual_seed(100 + step)
        active = torch.rand(n_tokens, 32, generator=generator).topk(3).indices
        weights = torch.rand(n_tokens, 3, 1, generator=generator) + 0.5
        yield (directions[active] * weights).sum(dim=1)


@pytest.fixture
def sae() -> fastsae.TopKSAE:
    return fastsae.TopKSAE(D_IN, D_SAE, K)
