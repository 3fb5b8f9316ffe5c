"""ToySuperposition: training keeps more features than neurons, and its activations are what its columns say."""

import math

import pytest
import torch

from fastsae.synthetic import ToySuperposition
from fastsae.testing import assert_accurate, assert_same_bits

STEPS = 400


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.fixture(scope="module")
def trained():
    """20 features of falling importance in 5 neurons; the last losses are in the attribute `loss`."""
    toy = ToySuperposition(20, 5, sparsity=0.95, importance=0.7 ** torch.arange(20.0))
    toy.loss = toy.train(STEPS)
    return toy


def model_loss(toy, n=20_000):
    x = toy._draw_features(n, generator(1))
    reconstructed = (x @ toy.W.T @ toy.W + toy.b).relu()
    return (toy.importance * (x - reconstructed).square()).sum(dim=1).mean().item()


def test_training_lowers_the_loss_it_reports(trained):
    start = model_loss(ToySuperposition(20, 5, sparsity=0.95, importance=0.7 ** torch.arange(20.0)))
    assert model_loss(trained) < start / 2
    assert trained.loss < start / 2


def test_it_keeps_more_features_than_neurons_and_those_that_matter(trained):
    kept = trained.represented
    assert 5 < kept.sum() < 20
    assert kept[:6].all()
    assert not kept[-4:].any()
    assert torch.equal(kept, trained.norms > 0.5)


def test_dense_features_are_not_superposed():
    """The paper's first result: without sparsity a linear model's answer, as many features as neurons."""
    toy = ToySuperposition(10, 3, sparsity=0.0, importance=0.5 ** torch.arange(10.0))
    toy.train(1000, lr=3e-2)
    assert toy.represented.tolist() == [True] * 3 + [False] * 7
    kept = toy.features[:3]
    assert (kept @ kept.T - torch.eye(3)).abs().max() < 0.01


def test_activations_are_codes_times_unit_features(trained):
    h, codes = trained.sample_with_codes(199, generator())
    assert_accurate(h, lambda a, f: a @ f, codes.to_dense(), trained.features)
    assert (trained.features[trained.represented].norm(dim=1) - 1).abs().max() < 1e-6
    assert (codes.values > 0).all()
    assert not h.requires_grad
    assert not trained.features.requires_grad
    assert not codes.values.requires_grad


def test_features_are_uniform_and_as_rare_as_asked():
    toy = ToySuperposition(50, 5, sparsity=0.9)
    _, codes = toy.sample_with_codes(10_000, generator())
    rate = codes.nnz / (10_000 * 50)
    assert abs(rate - 0.1) < 6 * math.sqrt(0.09 / 500_000)
    values = (codes.values / toy.norms[codes.indices]).double()
    assert values.min() > 0
    assert values.max() <= 1 + 1e-6
    assert abs(values.mean() - 1 / 2) < 6 * math.sqrt(1 / 12 / codes.nnz)
    assert abs(values.var() * 12 - 1) < 0.05


def test_the_seed_decides_everything():
    before = torch.get_rng_state()
    first, again, other = (ToySuperposition(12, 3, seed=seed) for seed in (1, 1, 2))
    for toy in (first, again, other):
        toy.train(20)
    assert_same_bits(again.W, first.W)
    assert_same_bits(again.b, first.b)
    assert not torch.equal(other.W, first.W)
    assert_same_bits(again.sample(37, generator(3)), first.sample(37, generator(3)))
    assert torch.equal(torch.get_rng_state(), before)


def test_training_may_go_on():
    toy = ToySuperposition(12, 3)
    toy.train(20)
    before = toy.W.clone()
    toy.train(20)
    assert not torch.equal(toy.W, before)


def test_no_token_and_batches():
    toy = ToySuperposition(12, 3)
    assert toy.sample(0, generator()).shape == (0, 3)
    assert [batch.shape for batch in toy.batches(5, 3)] == [(3, 3), (2, 3)]
    assert (toy.n_features, toy.d) == (12, 3)


def test_a_column_of_zeros_gives_no_nan():
    toy = ToySuperposition(4, 2)
    toy.W[:, 1] = 0
    assert toy.features.isfinite().all()
    assert toy.represented.tolist() == [True, False, True, True]


@pytest.mark.parametrize(
    ("build", "said"),
    [
        (lambda: ToySuperposition(0), "n_features = 0"),
        (lambda: ToySuperposition(4, -1), "d = -1"),
        (lambda: ToySuperposition(sparsity=1.0), "sparsity = 1.0"),
        (lambda: ToySuperposition(sparsity=-0.5), "sparsity = -0.5"),
        (lambda: ToySuperposition(4, 2, importance=torch.ones(3)), r"importance is \(3,\)"),
        (lambda: ToySuperposition(4, 2, importance=[1, 1, 1, 1]), "importance is list"),
        (lambda: ToySuperposition(4, 2, importance=torch.tensor([1, 1, 1, -1.0])), "importance runs from -1"),
        (lambda: ToySuperposition(4, 2).train(0), "steps = 0"),
        (lambda: ToySuperposition(4, 2).train(1, lr=0), "lr = 0"),
        (lambda: ToySuperposition(4, 2).sample(-1, generator()), "n = -1"),
    ],
)
def test_bad_input_is_named(build, said):
    with pytest.raises(ValueError, match=said):
        build()
