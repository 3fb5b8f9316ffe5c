"""Metrics against their dense float64 formulas, however the activations arrive."""

import pytest
import torch

import fastsae
from fastsae.evaluation import dead_latents, evaluate, explained_variance, l0


@pytest.fixture
def sae():
    sae = fastsae.TopKSAE(16, 200, 4, normalize_activations="scalar", dtype=torch.float64).eval()
    sae.set_activation_scale(0.5)
    return sae


def activations(n=300):
    return torch.randn(n, 16, dtype=torch.float64) + 3


def test_explained_variance_is_the_dense_formula(sae):
    x = activations()
    out = sae(x).sae_out
    expected = 1 - (out - x).square().sum() / (x - x.mean(dim=0)).square().sum()
    assert explained_variance(sae, x) == pytest.approx(expected.item(), rel=1e-12)


def test_counts_are_those_of_the_dense_codes(sae):
    x = activations()
    active = sae.encode(x).to_dense() != 0
    metrics = evaluate(sae, x)
    assert metrics.n_tokens == 300
    assert metrics.l0 == active.sum().item() / 300 == l0(sae, x)
    assert torch.equal(metrics.feature_counts, active.sum(dim=0))
    assert torch.equal(metrics.density, active.double().mean(dim=0))
    assert torch.equal(dead_latents(sae, x), (~active.any(dim=0)).nonzero()[:, 0])
    assert metrics.dead_fraction == (~active.any(dim=0)).double().mean().item()


def test_batches_change_nothing(sae):
    x = activations()
    whole, parts = evaluate(sae, x), evaluate(sae, iter([x[:1], x[1:1], x[1:200].reshape(1, 199, 16), x[200:]]))
    assert torch.equal(whole.feature_counts, parts.feature_counts)
    assert parts.explained_variance == pytest.approx(whole.explained_variance, rel=1e-12)


def test_no_activation_is_an_error(sae):
    with pytest.raises(ValueError, match="hold no token"):
        evaluate(sae, [])


def test_a_constant_activation_has_no_variance_to_explain(sae):
    assert explained_variance(sae, torch.ones(5, 16, dtype=torch.float64)) != explained_variance(sae, activations())
    assert torch.tensor(explained_variance(sae, torch.ones(5, 16, dtype=torch.float64))).isnan()


def test_transcoders_and_crosscoders():
    """A transcoder explains its targets; a crosscoder all its sites together."""
    transcoder = fastsae.TopKSAE(16, 200, 4, d_out=5, skip=True, dtype=torch.float64)
    x, target = activations(), torch.randn(300, 5, dtype=torch.float64) - 2
    out = transcoder(x).sae_out
    expected = 1 - (out - target).square().sum() / (target - target.mean(dim=0)).square().sum()
    assert evaluate(transcoder, (x, target)).explained_variance == pytest.approx(expected.item(), rel=1e-12)
    parts = evaluate(transcoder, [(x[:100], target[:100]), (x[100:], target[100:])])
    assert parts.explained_variance == pytest.approx(expected.item(), rel=1e-12)
    with pytest.raises(ValueError, match="expected pairs"):
        evaluate(transcoder, x)
    crosscoder = fastsae.ReLUSAE(8, 200, sites=2, dtype=torch.float64)
    x = activations().reshape(300, 2, 8)
    out = crosscoder(x).sae_out
    expected = 1 - (out - x).square().sum() / (x - x.mean(dim=0)).square().sum()
    found = evaluate(crosscoder, x)
    assert found.n_tokens == 300
    assert found.explained_variance == pytest.approx(expected.item(), rel=1e-12)


def test_evaluation_is_in_evaluation_mode():
    """A BatchTopK SAE keeps what is above its threshold, however tokens are batched."""
    sae = fastsae.BatchTopKSAE(16, 200, 4, dtype=torch.float64)
    x = activations()
    sae.loss(x)
    assert evaluate(sae, x).l0 == evaluate(sae, x.split(7)).l0
    assert sae.training
