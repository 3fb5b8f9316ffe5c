"""Latent densities in bars."""

import torch
from hypothesis import given
from hypothesis import strategies as st

from fastsae.interpret import density_histogram


def test_bars_are_fractions_of_a_decade():
    bars = density_histogram(torch.tensor([0.0, 0.1, 0.1, 0.5, 1.0]), 100, per_decade=1)
    assert [(bar.low, bar.high, bar.n_latents) for bar in bars] == [(0.1, 1.0, 4)]
    assert [bar.n_latents for bar in density_histogram(torch.tensor([0.01, 0.2, 0.3]), 100, per_decade=1)] == [1, 2]


def test_none_alive_none_shown():
    assert density_histogram(torch.zeros(5), 100) == []


@given(st.integers(1, 10**6), st.data())
def test_every_living_latent_is_in_the_bar_of_its_density(n_tokens, data):
    counts = data.draw(st.lists(st.integers(0, n_tokens), min_size=1, max_size=20))
    density = torch.tensor(counts, dtype=torch.float64) / n_tokens
    bars = density_histogram(density, n_tokens)
    assert sum(bar.n_latents for bar in bars) == sum(count > 0 for count in counts)
    for bar in bars:
        inside = ((density >= bar.low * (1 - 1e-8)) & (density <= bar.high * (1 + 1e-8))).sum()
        assert inside >= bar.n_latents
