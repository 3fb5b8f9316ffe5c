"""k annealing and the warm-up of sparsity coefficients, and that a run leaves the SAE its own."""

import pytest

import fastsae
from fastsae.training import TrainConfig, Trainer
from fastsae.training.schedule import annealed_k, sparsity_scale

from .conftest import D_IN, D_SAE, batches


def config(**settings):
    return TrainConfig(steps=6, progress=False, clip_grad_norm=None, **settings)


def test_k_falls_linearly_to_its_own():
    ks = [annealed_k(step, config(k_start=9, k_decay_steps=4), 3) for step in range(6)]
    assert ks == [9, 8, 6, 4, 3, 3]
    assert annealed_k(1, config(k_start=2, k_decay_steps=4), 4.0) == 2.5
    assert annealed_k(0, config(), 3) == 3


def test_sparsity_rises_linearly_to_one():
    assert [sparsity_scale(step, config(sparsity_warmup_steps=4)) for step in range(6)] == [0.25, 0.5, 0.75, 1, 1, 1]
    assert sparsity_scale(0, config()) == 1


def test_a_run_uses_k_and_leaves_it(tmp_path):
    sae, seen = fastsae.TopKSAE(D_IN, D_SAE, 3), []
    original = sae.loss
    sae.loss = lambda x, target=None: (seen.append(sae.k), original(x, target))[1]
    settings = {"k_start": 9, "k_decay_steps": 4, "checkpoint_dir": tmp_path, "checkpoint_every": 2}
    Trainer(sae, config(**settings)).fit(batches(6))
    assert seen == [9, 8, 6, 4, 3, 3]
    assert sae.k == 3
    assert fastsae.load(tmp_path / "step_00000006").k == 3


def test_sparsity_warms_up():
    sae, seen = fastsae.ReLUSAE(D_IN, D_SAE, l1_coefficient=2.0), []
    original = sae.loss

    def loss(x, target=None):
        found = original(x, target)
        seen.append(((found.total - found.mse) / found.l1).item())
        return found

    sae.loss = loss
    Trainer(sae, config(sparsity_warmup_steps=4)).fit(batches(6))
    assert seen == pytest.approx([0.5, 1.0, 1.5, 2.0, 2.0, 2.0], rel=1e-3)
    assert sae.sparsity_scale == 1.0


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"k_start": 9}, "k_start = 9 and k_decay_steps = 0"),
        ({"k_decay_steps": 3}, "k_start = None and k_decay_steps = 3"),
        ({"k_start": 9, "k_decay_steps": 7}, "steps = 6"),
        ({"k_start": -1, "k_decay_steps": 3}, "k_start = -1"),
        ({"sparsity_warmup_steps": -1}, "sparsity_warmup_steps = -1"),
        ({"resample_every": 0.5}, "resample_every = 0.5"),
    ],
    ids=str,
)
def test_bad_settings_are_named(settings, message):
    with pytest.raises(ValueError, match=message):
        config(**settings)


def test_k_start_wants_an_sae_with_a_k():
    with pytest.raises(ValueError, match="k_start = 9 for a ReLUSAE"):
        Trainer(fastsae.ReLUSAE(D_IN, D_SAE), config(k_start=9, k_decay_steps=2))
