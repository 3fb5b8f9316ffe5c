"""The loop: that it learns, with any optimizer, and does in a step what its docstring says."""

import json
import math

import pytest
import torch
from torch.nn.utils import clip_grad_norm_

import fastsae
from fastsae.optim import FusedAdam
from fastsae.testing import assert_same_bits
from fastsae.training import TrainConfig, Trainer

from .conftest import D_IN, D_SAE, K, batches


def config(steps, **settings):
    return TrainConfig(steps=steps, **{"lr": 3e-3, "progress": False, **settings})


def explained_variance(sae):
    sae.eval()
    x = torch.cat(list(batches(4, start=10_000)))
    return 1 - sae.loss(x).fvu.item()


def test_learns_a_sparse_dictionary(sae):
    before = explained_variance(sae)
    summary = Trainer(sae, config(300, lr=1e-2, warmup_steps=20, decay_steps=60)).fit(batches(300))
    assert explained_variance(sae) > 0.88
    assert before < 0.5
    assert (summary.steps, summary.tokens) == (300, 300 * 256)
    assert set(summary.loss) == {"total", "mse", "fvu", "auxk"}
    assert summary.loss["fvu"] < 0.12
    assert summary.l0 == pytest.approx(K, abs=0.2)
    assert summary.dead_fraction == 0
    assert 0 < summary.seconds_per_step < summary.seconds
    assert sae.W_dec.norm(dim=1).sub(1).abs().max() < 1e-6


@pytest.mark.parametrize(
    ("build", "settings"),
    [
        (lambda parameters: torch.optim.SGD(parameters, lr=0.3, momentum=0.9), {}),
        (lambda parameters: torch.optim.AdamW(parameters, lr=3e-3), {}),
        (lambda parameters: torch.optim.Adafactor(parameters, lr=3e-2), {}),
        (lambda parameters: torch.optim.RMSprop(parameters, lr=1e-3), {"clip_grad_norm": None}),
    ],
    ids=["SGD", "AdamW", "Adafactor", "RMSprop"],
)
def test_any_optimizer(sae, build, settings):
    before = explained_variance(sae)
    summary = Trainer(sae, config(60, **settings), build(sae.parameters())).fit(batches(60))
    assert explained_variance(sae) > before + 0.1
    assert summary.steps == 60


def test_fused_adam_is_adam(sae):
    other = fastsae.TopKSAE(D_IN, D_SAE, K)
    other.load_state_dict(sae.state_dict())
    settings = config(10, clip_grad_norm=None, warmup_steps=5)
    Trainer(sae, settings, FusedAdam(sae, lr=1e-3)).fit(batches(10))
    Trainer(other, settings, torch.optim.Adam(other.parameters(), lr=1e-3)).fit(batches(10))
    torch.testing.assert_close(sae.state_dict(), other.state_dict())
    with pytest.raises(
        ValueError, match=r"with FusedAdam.*expected clip_grad_norm=None and FusedAdam\(sae, clip_norm="
    ):
        Trainer(sae, config(1), FusedAdam(sae))


def test_fused_adam_clips_as_the_trainer_does(sae, tmp_path):
    """The same run, and the same norms in its log."""
    other = fastsae.TopKSAE(D_IN, D_SAE, K)
    other.load_state_dict(sae.state_dict())
    settings = {"log_every": 1, "warmup_steps": 5}
    norms = []
    for name, trained, clip, optimizer in (
        ("fused", sae, None, FusedAdam(sae, lr=1e-3, eps=1e-4, clip_norm=0.05)),
        ("torch", other, 0.05, torch.optim.Adam(other.parameters(), lr=1e-3, eps=1e-4)),
    ):
        log = tmp_path / f"{name}.jsonl"
        Trainer(trained, config(10, clip_grad_norm=clip, log_path=log, **settings), optimizer).fit(batches(10))
        norms.append([json.loads(line)["grad_norm"] for line in log.read_text().splitlines()])
    assert min(norms[0]) > 0.05
    torch.testing.assert_close(torch.tensor(norms[0]), torch.tensor(norms[1]))
    torch.testing.assert_close(sae.state_dict(), other.state_dict())


def test_steps_are_those_of_the_docstring(sae):
    """Against the same steps written out: projection, then clipping, then Adam, then unit rows."""
    other = fastsae.TopKSAE(D_IN, D_SAE, K)
    other.load_state_dict(sae.state_dict())
    optimizer = torch.optim.Adam(other.parameters(), lr=3e-3, eps=6.25e-10, fused=True)
    norms = []
    for x in batches(5):
        optimizer.zero_grad()
        other.loss(x).total.backward()
        other.project_decoder_grad_()
        norms.append(clip_grad_norm_(other.parameters(), 0.01).item())
        optimizer.step()
        other.normalize_decoder_()
    Trainer(sae, config(5, clip_grad_norm=0.01)).fit(batches(5))
    assert min(norms) > 0.01
    for name, tensor in other.state_dict().items():
        assert_same_bits(sae.state_dict()[name], tensor)


def test_strides_survive_training(sae):
    trainer = Trainer(sae, config(3))
    trainer.fit(batches(3))
    assert sae.W_enc.T.is_contiguous()
    for state in (trainer.optimizer.state[sae.W_enc], trainer.optimizer.state[sae.W_dec]):
        assert state["exp_avg"].stride() == state["exp_avg_sq"].stride()
    assert trainer.optimizer.state[sae.W_enc]["exp_avg"].T.is_contiguous()


def test_default_learning_rate():
    rates = [Trainer(fastsae.TopKSAE(4, d_sae, 1), TrainConfig(steps=1)).scheduler.base_lrs for d_sae in (64, 256)]
    assert rates == [[2e-4 * 16], [2e-4 * 8]]


def test_batches_of_any_size_and_shape(sae):
    taken = iter([torch.randn(7, D_IN), torch.randn(2, 5, D_IN), torch.randn(300, D_IN).double(), torch.randn(2, D_IN)])
    summary = Trainer(sae, config(3)).fit(taken)
    assert summary.tokens == 7 + 10 + 300
    assert len(list(taken)) == 1, "one batch more was taken than used"


def test_batches_that_end_early(sae, tmp_path):
    trainer = Trainer(sae, config(10, log_path=tmp_path / "log.jsonl", log_every=100))
    with pytest.warns(RuntimeWarning, match="ended after 4, at step 4 of 10: call fit"):
        summary = trainer.fit(batches(4))
    assert summary.steps == 4
    assert math.isfinite(summary.loss["total"])
    with pytest.raises(ValueError, match="expected 6 for the steps up to 10"):
        trainer.fit([])
    assert trainer.fit(batches(6, start=4)).steps == 10
    recorded = [json.loads(line)["step"] for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert recorded == [1, 4, 10]
    done = trainer.fit([])
    assert (done.steps, done.loss) == (10, {})


def test_bad_batches(sae):
    with pytest.raises(TypeError, match="the batch of step 1 is a list"):
        Trainer(sae, config(1)).fit([[torch.zeros(2, D_IN)]])
    with pytest.raises(ValueError, match=r"the batch of step 2 has shape \(1, 16\): expected at least two tokens"):
        Trainer(sae, config(2)).fit([torch.randn(5, D_IN), torch.randn(1, D_IN)])
    with pytest.raises(ValueError, match="d_in = 16"):
        Trainer(sae, config(1)).fit([torch.randn(5, D_IN + 1)])


def test_loss_that_is_not_finite(sae, tmp_path):
    bad = torch.randn(8, D_IN)
    bad[3, 2] = math.nan
    settings = config(9, log_every=5, checkpoint_dir=tmp_path, checkpoint_every=3)
    with pytest.raises(FloatingPointError, match="total = nan at step 5"):
        Trainer(sae, settings).fit([*batches(3), bad, *batches(5)])
    assert [path.name for path in tmp_path.iterdir()] == ["step_00000003"]


def test_optimizer_of_something_else(sae):
    with pytest.raises(ValueError, match="not of this SAE"):
        Trainer(sae, config(1), torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0))
