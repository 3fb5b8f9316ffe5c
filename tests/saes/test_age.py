"""AgeBound: never below the truth, and asked for only when it may have been reached."""

import copy
import pickle

import pytest
import torch

import fastsae
from fastsae.saes import age
from fastsae.saes.age import AgeBound


@pytest.fixture
def asked(monkeypatch):
    """How often ages were read, as if that meant to wait for a GPU."""
    monkeypatch.setattr(age, "_asking_waits", lambda ages: True)
    counts = []
    monkeypatch.setattr(torch.Tensor, "max", lambda ages, real=torch.Tensor.max: counts.append(1) or real(ages))
    return counts


def grow(bound, ages, tokens):
    with bound.growing(ages, tokens):
        ages.add_(tokens)


def test_is_asked_once_until_it_may_be_reached(asked):
    bound, ages = AgeBound(), torch.zeros(5, dtype=torch.int64)
    for _ in range(9):
        assert not bound.reaches(ages, 100)
        grow(bound, ages, 10)
        ages_of_latent_0_reset = ages[0].item()
    assert len(asked) == 1
    assert ages_of_latent_0_reset == 90
    grow(bound, ages, 10)
    assert bound.reaches(ages, 100)
    assert len(asked) == 2


def test_is_asked_again_after_a_false_alarm(asked):
    bound, ages = AgeBound(), torch.zeros(5, dtype=torch.int64)
    assert not bound.reaches(ages, 100)
    grow(bound, ages, 100)
    with bound.growing(ages, 0):
        ages.zero_()
    assert not bound.reaches(ages, 100)
    assert not bound.reaches(ages, 100)
    assert len(asked) == 2


def test_changes_from_elsewhere_are_seen(asked):
    bound, ages = AgeBound(), torch.zeros(5, dtype=torch.int64)
    assert not bound.reaches(ages, 100)
    ages[3] = 100
    assert bound.reaches(ages, 100)
    other = torch.full((5,), 100)
    assert bound.reaches(other, 100)
    assert not bound.reaches(torch.zeros_like(ages), 100)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda sae: pickle.loads(pickle.dumps(sae))], ids=["copy", "pickle"])
def test_a_copy_starts_anew(asked, copied):
    sae = fastsae.TopKSAE(4, 8, 2, dead_after_tokens=100)
    x = torch.randn(3, 4)
    assert not sae.auxk_will_act(x)
    other = copied(sae)
    other.tokens_since_fired.data.fill_(100)
    assert other.auxk_will_act(x)


def test_a_training_run_asks_only_when_latents_come_of_age(asked):
    sae = fastsae.TopKSAE(8, 64, 1, dead_after_tokens=60)
    acted = []
    for _ in range(10):
        before = len(asked)
        auxk = sae.loss(torch.randn(10, 8)).auxk.item()
        acted.append((len(asked) - before, auxk > 0))
    # The first step asks, the next four know better; latents that never fired are 60 tokens old after the sixth.
    assert [asks for asks, _ in acted[:5]] == [1, 0, 0, 0, 0]
    assert [auxk for _, auxk in acted[:5]] == [False] * 5
    assert acted[6][1]
