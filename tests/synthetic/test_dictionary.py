"""SparseDictionary: its samples are what its formula says, their statistics are those asked for, and seeds rule."""

import math
from itertools import pairwise

import pytest
import torch

from fastsae.synthetic import SparseDictionary, zipf_probabilities
from fastsae.testing import assert_accurate, assert_same_bits

# Standard deviations that a statistic may lie from its mean: one in a billion for each, and seeds are fixed.
SIGMAS = 6


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def make(n_features=50, d=16, probability=0.1, **options):
    return SparseDictionary(n_features, d, probability=probability, **options)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("n", [1, 37, 199])
def test_activations_are_codes_times_features(n, dtype):
    source = make(offset_norm=2.0, dtype=dtype)
    x, codes = source.sample_with_codes(n, generator())
    assert x.shape == (n, 16)
    assert x.dtype == codes.dtype == dtype
    assert_accurate(x, lambda a, f, c: a @ f + c, codes.to_dense(), source.features, source.offset)
    assert not x.requires_grad
    assert not codes.values.requires_grad


def test_features_are_unit_directions_and_the_offset_has_its_norm():
    source = make(400, 30, offset_norm=3.0, dtype=torch.float64)
    assert source.features.shape == (400, 30)
    assert (source.features.norm(dim=1) - 1).abs().max() < 1e-6
    assert source.offset.norm().item() == pytest.approx(3.0, rel=1e-6)
    # Evenly on the sphere: a cosine of two directions has mean 0 and variance 1/d.
    cosines = (source.features @ source.features.T)[~torch.eye(400, dtype=torch.bool)]
    assert abs(cosines.square().mean() * 30 - 1) < 0.05
    assert source.features.mean(dim=0).norm() < SIGMAS / math.sqrt(400)


@pytest.mark.parametrize("probability", [0.001, 0.2, 0.95, "zipf"])
def test_features_fire_independently_with_their_chances(probability):
    if probability == "zipf":
        probability = zipf_probabilities(50, 5.0, exponent=0.8)
    source = make(probability=probability)
    n, p = 20_000, source.probability
    _, codes = source.sample_with_codes(n, generator())
    counts = codes.feature_counts()
    assert ((counts - n * p).abs() <= SIGMAS * (n * p * (1 - p)).sqrt() + 1).all()
    # The variance of a sum of independent ones; a fourth moment bounds its error.
    l0, variance = codes.l0().double(), (p * (1 - p)).sum()
    assert abs(l0.mean() - source.mean_l0) < SIGMAS * (variance / n).sqrt()
    assert abs(l0.var() - variance) < SIGMAS * ((l0 - l0.mean()).pow(4).mean() / n).sqrt()


def test_a_token_names_each_of_its_features_once_and_in_order():
    _, codes = make(probability=0.5).sample_with_codes(200, generator())
    for begin, end in pairwise(codes.offsets.tolist()):
        assert (codes.indices[begin:end].diff() > 0).all()


def test_a_feature_without_chance_never_fires():
    _, codes = make(3, 4, probability=torch.tensor([0.0, 0.5, 0.0])).sample_with_codes(199, generator())
    assert codes.feature_counts().bool().tolist() == [False, True, False]
    x, codes = make(3, 4, probability=0.0, offset_norm=1.0).sample_with_codes(5, generator())
    assert codes.nnz == 0
    assert torch.equal(x, make(3, 4, probability=0.0, offset_norm=1.0).offset.expand(5, 4))


@pytest.mark.parametrize(
    ("magnitudes", "low", "high", "mean", "variance"),
    [("shifted_exponential", 1, math.inf, 2, 1), ("uniform", 0, 1, 1 / 2, 1 / 12)],
)
def test_magnitudes(magnitudes, low, high, mean, variance):
    _, codes = make(magnitudes=magnitudes).sample_with_codes(10_000, generator())
    values = codes.values.double()
    assert low <= values.min()
    assert values.min() > 0
    assert values.max() <= high
    assert abs(values.mean() - mean) < SIGMAS * math.sqrt(variance / codes.nnz)
    assert abs(values.var() / variance - 1) < 0.1


def test_noise_has_its_deviation_in_every_dimension():
    source = make(noise=0.5, dtype=torch.float64)
    x, codes = source.sample_with_codes(10_000, generator())
    noise = x - codes.to_dense() @ source.features
    assert ((noise.std(dim=0) / 0.5 - 1).abs() < SIGMAS / math.sqrt(2 * 10_000)).all()
    assert (noise.mean(dim=0).abs() < SIGMAS * 0.5 / 100).all()


def test_many_features_need_no_dense_codes():
    """A [4096, 2^20] tensor would be 16 GiB."""
    source = make(2**20, 2, probability=8 / 2**20)
    _, codes = source.sample_with_codes(4096, generator())
    assert abs(codes.nnz / 4096 - 8) < SIGMAS * math.sqrt(8 / 4096)
    assert codes.indices.max() > 2**19


def test_a_sample_depends_on_the_generator_alone():
    before = torch.get_rng_state()
    source = make(noise=0.1)
    first = source.sample(37, generator(3))
    assert_same_bits(make(noise=0.1).sample(37, generator(3)), first)
    assert not torch.equal(source.sample(37, generator(4)), first)
    assert not torch.equal(make(seed=1).features, make(seed=0).features)
    assert torch.equal(torch.get_rng_state(), before)


def test_features_are_not_what_an_sae_of_the_same_seed_starts_at():
    torch.manual_seed(0)
    drawn = torch.nn.functional.normalize(torch.randn(50, 16), dim=1)
    assert (drawn @ make(seed=0).features.T).max() < 0.95


def test_batches_start_again_and_end_where_they_should():
    source = make()
    sizes = [len(batch) for batch in source.batches(100, 37)]
    assert sizes == [37, 37, 26]
    first, again = (torch.cat(list(source.batches(100, 37, seed=5))) for _ in range(2))
    assert_same_bits(again, first)
    assert not torch.equal(torch.cat(list(source.batches(100, 37, seed=6))), first)
    assert first.unique(dim=0).shape[0] > 90, "fresh activations, not the same again"
    assert list(source.batches(0)) == []


def test_no_token():
    x, codes = make(noise=1.0).sample_with_codes(0, generator())
    assert x.shape == (0, 16)
    assert codes.shape == (0, 50)


def test_zipf_probabilities():
    p = zipf_probabilities(100, 3.0, exponent=0.7)
    assert p.dtype == torch.float64
    assert p.sum().item() == pytest.approx(3.0, rel=1e-12)
    assert (p[0] / p[9]).item() == pytest.approx(10**0.7, rel=1e-12)
    assert torch.equal(zipf_probabilities(8, 1.0, exponent=0.0), torch.full((8,), 1 / 8, dtype=torch.float64))


@pytest.mark.parametrize(
    ("build", "said"),
    [
        (lambda: make(n_features=0), "n_features = 0"),
        (lambda: make(d=2.0), "d = 2.0"),
        (lambda: make(probability=1.0), "probability = 1"),
        (lambda: make(probability=-0.1), "probability = -0.1"),
        (lambda: make(probability=math.nan), "probability = nan"),
        (lambda: make(probability=torch.full((49,), 0.1)), r"probability has shape \(49,\)"),
        (lambda: make(probability=torch.linspace(0, 2, 50)), "probability = from 0 to 2"),
        (lambda: make(magnitudes="normal"), "magnitudes = 'normal'"),
        (lambda: make(noise=-1), "noise = -1"),
        (lambda: make(offset_norm=math.inf), "offset_norm = inf"),
        (lambda: make().sample(-1, generator()), "n = -1"),
        (lambda: make().batches(-1), "n_tokens = -1"),
        (lambda: make().batches(10, 0), "batch_size = 0"),
        (lambda: zipf_probabilities(0, 1.0), "n_features = 0"),
        (lambda: zipf_probabilities(10, 5.0, exponent=2.0), "most frequent a chance of"),
        (lambda: zipf_probabilities(10, 1.0, exponent=-1), "exponent = -1"),
        (lambda: zipf_probabilities(10, 0.0), "mean_l0 = 0"),
    ],
)
def test_bad_input_is_named(build, said):
    with pytest.raises(ValueError, match=said):
        build()
