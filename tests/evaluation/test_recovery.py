"""Recovery of features that are known: dictionaries that hold them exactly, nearly, in part or not at all."""

import math

import pytest
import torch

import fastsae.evaluation.recovery
from fastsae import SparseCodes
from fastsae.evaluation import code_recovery, feature_recovery
from fastsae.synthetic import SparseDictionary
from fastsae.testing import assert_accurate, assert_same_bits, random_codes


@pytest.fixture
def features():
    return SparseDictionary(60, 24, probability=0.1).features


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_a_permuted_and_scaled_dictionary_is_recovered(features, dtype):
    order = torch.randperm(60)
    scales = torch.rand(60, 1) + 0.1
    found = feature_recovery(features.to(dtype), (features[order] * scales).to(dtype), threshold=0.99)
    assert found.recovered_fraction == found.matched_fraction == 1.0
    assert torch.equal(order[found.matched_latent], torch.arange(60))
    assert torch.equal(found.best_latent, found.matched_latent)
    assert 0.99 < found.mmcs <= 1 + 1e-6


def test_a_negated_dictionary_is_recovered_only_without_signs(features):
    negated = feature_recovery(features, -features)
    assert negated.recovered_fraction == negated.matched_fraction == 0.0
    assert (negated.matched_latent == -1).all()
    unsigned = feature_recovery(features, -features, signed=False)
    assert unsigned.matched_fraction == 1.0
    assert torch.equal(unsigned.matched_latent, torch.arange(60))


def test_cosines_are_the_dense_formula(features):
    dictionary = torch.randn(199, 24)

    def best(f, w):
        return (f / f.norm(dim=1, keepdim=True) @ (w / w.norm(dim=1, keepdim=True)).T).amax(dim=1)

    found = feature_recovery(features, dictionary)
    assert_accurate(found.best_cosine, best, features, dictionary)
    assert found.mmcs == pytest.approx(found.best_cosine.double().mean().item(), rel=1e-12)
    assert found.recovered.tolist() == [cosine >= 0.9 for cosine in found.best_cosine.tolist()]
    assert_same_bits(found.best_cosine, feature_recovery(features, dictionary * 4).best_cosine)


def test_two_features_with_one_latent_are_recovered_but_not_both_matched():
    angle = math.radians(10)
    features = torch.tensor([[math.cos(angle), math.sin(angle)], [math.cos(angle), -math.sin(angle)], [-1.0, 0.0]])
    found = feature_recovery(features, torch.tensor([[3.0, 0.0], [0.0, 1.0]]))
    assert found.recovered.tolist() == [True, True, False]
    assert found.recovered_fraction == pytest.approx(2 / 3)
    assert found.matched_fraction == pytest.approx(1 / 3)
    assert found.best_latent.tolist()[:2] == [0, 0]


def test_a_feature_yields_its_best_latent_where_that_serves_both():
    """Degrees: features at 0 and 20, latents at 5 and -20: the first feature leaves the latent at 5 to the second."""
    features, latents = (
        [(math.cos(math.radians(a)), math.sin(math.radians(a))) for a in angles] for angles in ((0, 20), (5, -20))
    )
    found = feature_recovery(torch.tensor(features), torch.tensor(latents))
    assert found.best_latent.tolist() == [0, 0]
    assert found.matched_latent.tolist() == [1, 0]


def test_latents_more_fewer_or_of_no_length(features):
    more = feature_recovery(features, torch.cat([torch.zeros(5, 24), features, features]))
    assert more.matched_fraction == 1.0
    assert (more.matched_latent >= 5).all()
    assert torch.equal(more.best_latent, torch.arange(60) + 5), "of two equal latents the lower"
    fewer = feature_recovery(features, features[:7])
    assert fewer.matched_latent.tolist() == [*range(7), *[-1] * 53]
    assert feature_recovery(features, torch.zeros(3, 24)).mmcs == 0.0
    assert feature_recovery(features[:1], features[:1]).matched_fraction == 1.0


def test_blocks_change_nothing(monkeypatch):
    """With coordinates of few bits every product is exact, so blocks can be compared to the bit."""
    features = torch.eye(16).repeat(3, 1) * torch.tensor([1.0, 2.0, -1.0]).repeat_interleave(16)[:, None]
    dictionary = torch.eye(16).flip(0)
    whole = feature_recovery(features, dictionary)
    monkeypatch.setattr(fastsae.evaluation.recovery, "_COSINES_AT_ONCE", 16 * 5)
    blocks = feature_recovery(features, dictionary)
    assert_same_bits(blocks.best_cosine, whole.best_cosine)
    assert torch.equal(blocks.best_latent, whole.best_latent)
    assert torch.equal(blocks.matched_latent, whole.matched_latent)
    assert (whole.matched_latent >= 0).sum() == 16


def test_nothing_has_a_gradient(features):
    found = feature_recovery(features.requires_grad_(), torch.nn.Parameter(torch.randn(9, 24)))
    assert not found.best_cosine.requires_grad


@pytest.mark.parametrize(
    ("arguments", "error", "said"),
    [
        (([[1.0]], torch.ones(1, 1)), TypeError, "features is list"),
        ((torch.ones(1, 1), torch.ones(1, 1).long()), TypeError, "dictionary is torch.int64"),
        ((torch.ones(3), torch.ones(1, 3)), ValueError, r"features has shape \(3,\)"),
        ((torch.ones(0, 3), torch.ones(1, 3)), ValueError, r"features has shape \(0, 3\)"),
        ((torch.ones(2, 3), torch.ones(0, 3)), ValueError, r"dictionary has shape \(0, 3\)"),
        ((torch.ones(2, 3), torch.ones(2, 4)), ValueError, "width 3 and the dictionary of 4"),
        ((torch.ones(2, 3), torch.full((2, 3), math.nan)), ValueError, "dictionary holds NaN"),
        ((torch.ones(2, 3), torch.ones(2, 3), 0.0), ValueError, "threshold = 0.0"),
        ((torch.ones(2, 3), torch.ones(2, 3), 1.5), ValueError, "threshold = 1.5"),
        ((torch.ones(2, 3), torch.ones(2, 3), math.nan), ValueError, "threshold = nan"),
    ],
)
def test_bad_input_is_named(arguments, error, said):
    with pytest.raises(error, match=said):
        feature_recovery(*arguments)


def test_codes_of_a_permuted_dictionary_are_recovered(features):
    source = SparseDictionary(60, 24, probability=0.1)
    _, true = source.sample_with_codes(199, torch.Generator().manual_seed(0))
    order = torch.randperm(60)
    recovery = feature_recovery(features, features[order])
    renamed = SparseCodes(true.values, recovery.matched_latent[true.indices], 60, offsets=true.offsets)
    found = code_recovery(recovery, true, renamed)
    assert torch.equal(found.present, true.feature_counts())
    assert torch.equal(found.fired, found.present)
    assert (found.precision == 1).all()
    assert (found.recall == 1).all()


@pytest.mark.parametrize("k", [5, None], ids=["k", "csr"])
def test_code_counts_are_those_of_the_dense_codes(features, k):
    true, learned = random_codes(37, 60, k, seed=1), random_codes(37, 80, k, seed=2).relu()
    recovery = feature_recovery(features, torch.cat([features[10:50], torch.randn(40, 24)]))
    found = code_recovery(recovery, true, learned)
    present, fired = true.to_dense() != 0, torch.zeros(37, 60, dtype=torch.bool)
    fired[:, 10:50] = learned.to_dense()[:, :40] != 0
    assert torch.equal(found.present, present.sum(dim=0))
    assert torch.equal(found.fired, fired.sum(dim=0))
    assert torch.equal(found.both, (present & fired).sum(dim=0))
    assert found.precision[:10].isnan().all()
    assert (found.recall[:10][found.present[:10] > 0] == 0).all()


def test_codes_that_do_not_belong_together_are_refused(features):
    recovery = feature_recovery(features, features)
    with pytest.raises(ValueError, match="true has 4 tokens and learned 5"):
        code_recovery(recovery, random_codes(4, 60, 2), random_codes(5, 60, 2))
    with pytest.raises(ValueError, match="true is over 61 features"):
        code_recovery(recovery, random_codes(4, 61, 2), random_codes(4, 60, 2))
    with pytest.raises(ValueError, match="learned over 59 latents"):
        code_recovery(recovery, random_codes(4, 60, 2), random_codes(4, 59, 2))
