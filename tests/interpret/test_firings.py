"""Recorded firings against the dense codes of the same tokens."""

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

import fastsae
from fastsae.activations import capture
from fastsae.interpret import record_firings

HOOK = "transformer.h.0.mlp.act"


@pytest.fixture
def recorded():
    config = GPT2Config(vocab_size=50, n_positions=16, n_embd=8, n_layer=1, n_head=2, n_inner=24)
    model = GPT2LMHeadModel(config).eval()
    sae = fastsae.TopKSAE(24, 96, 5).eval()
    # More windows than are encoded at once, the last part short.
    windows = torch.randint(0, 50, (70, 12))
    codes = sae.encode(torch.cat([capture(model, HOOK, window[None]) for window in windows]))
    return record_firings(model, HOOK, sae, windows), codes.to_dense().detach()


def test_every_latent_has_its_firings_in_order_of_place(recorded):
    firings, dense = recorded
    dense[:, 0] = 0
    flat = dense.flatten(0, 1)
    for latent in range(firings.d_sae):
        values, places = firings.of(latent)
        assert torch.equal(places, flat[:, latent].nonzero()[:, 0])
        torch.testing.assert_close(values, flat[places, latent])


def test_counts_density_and_maxima(recorded):
    firings, dense = recorded
    kept = dense[:, 1:].flatten(0, 1)
    assert firings.n_tokens == len(kept)
    assert torch.equal(firings.counts, (kept != 0).sum(dim=0))
    assert torch.equal(firings.density, (kept != 0).double().mean(dim=0))
    torch.testing.assert_close(firings.maxima(), kept.amax(dim=0))
