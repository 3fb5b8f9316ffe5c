"""resample_dead_: who starts anew, where, and what the optimizer forgets."""

import pytest
import torch

import fastsae
from fastsae.training import TrainConfig, Trainer, resample_dead_

D_IN, D_SAE = 16, 64
DEAD = torch.tensor([3, 17, 40])


@pytest.fixture
def trained():
    sae = fastsae.ReLUSAE(D_IN, D_SAE, l1_weight="none")
    optimizer = torch.optim.Adam(sae.parameters())
    sae.loss(torch.randn(37, D_IN)).total.backward()
    optimizer.step()
    with torch.no_grad():
        sae.b_dec.normal_()
        sae.b_enc[DEAD] = -100.0
    sae.tokens_since_fired[DEAD] = sae.dead_after_tokens
    return sae, optimizer


def test_dead_latents_point_to_bad_tokens(trained):
    sae, optimizer = trained
    before = {name: p.detach().clone() for name, p in sae.named_parameters()}
    # One token is far worse than all others: all three are drawn from it.
    x = 1e-3 * torch.randn(37, D_IN) + sae.b_dec.detach()
    x[11] += 1e4 * torch.randn(D_IN)
    assert resample_dead_(sae, x, optimizer=optimizer) == 3
    direction = torch.nn.functional.normalize(x[11] - sae.b_dec.detach(), dim=0)
    torch.testing.assert_close(sae.W_dec[DEAD].detach(), direction.expand(3, -1))
    alive = torch.ones(D_SAE, dtype=torch.bool).index_fill(0, DEAD, False)
    norm = 0.2 * before["W_enc"].T[alive].norm(dim=1).mean()
    torch.testing.assert_close(sae.W_enc.T[DEAD].detach(), norm * direction.expand(3, -1))
    assert not sae.b_enc[DEAD].any()
    assert not sae.tokens_since_fired[DEAD].any()
    living = alive.nonzero()[:, 0]
    for name, dim in (("W_enc", 1), ("W_dec", 0), ("b_enc", 0)):
        parameter = getattr(sae, name)
        assert torch.equal(parameter.index_select(dim, living), before[name].index_select(dim, living))
        for key in ("exp_avg", "exp_avg_sq"):
            state = optimizer.state[parameter][key]
            assert not state.index_select(dim, DEAD).any()
            assert state.any()
    assert sae.training


def test_nobody_dead_nothing_changes(trained):
    sae, _ = trained
    sae.tokens_since_fired.zero_()
    before = sae.state_dict()["W_dec"].clone()
    assert resample_dead_(sae, torch.randn(5, D_IN)) == 0
    assert torch.equal(sae.W_dec, before)


@pytest.mark.parametrize("name", ["GatedSAE", "JumpReLUSAE", "TopKSAE"])
def test_transcoders_write_their_targets(name):
    sae = getattr(fastsae, name)(D_IN, D_SAE, **({"k": 3} if name == "TopKSAE" else {}), d_out=5)
    sae.tokens_since_fired[DEAD] = sae.dead_after_tokens
    x, target = torch.randn(4, D_IN), torch.randn(1, 5).expand(4, 5)
    assert resample_dead_(sae, x, target) == 3
    torch.testing.assert_close(sae.W_dec[DEAD].detach(), torch.nn.functional.normalize(target[:3], dim=1))


def test_a_perfect_batch_is_no_trouble():
    sae = fastsae.ReLUSAE(D_IN, D_SAE)
    sae.tokens_since_fired[DEAD] = sae.dead_after_tokens
    resample_dead_(sae, torch.zeros(4, D_IN))
    assert all(p.isfinite().all() for p in sae.parameters())


def test_training_resamples_when_due():
    sae = fastsae.ReLUSAE(D_IN, D_SAE, dead_after_tokens=1)
    with torch.no_grad():
        sae.b_enc[DEAD] = -100.0
    config = TrainConfig(steps=4, progress=False, resample_every=2)
    Trainer(sae, config).fit(torch.randn(4, 37, D_IN))
    assert (sae.b_enc[DEAD] > -1).all()


def test_a_transcoder_trains_on_pairs():
    sae = fastsae.TopKSAE(D_IN, D_SAE, 3, d_out=5, skip=True)
    x = torch.randn(30, 64, D_IN)
    target = x @ torch.randn(D_IN, 5)
    first = sae.loss(x[0], target[0]).fvu.item()
    summary = Trainer(sae, TrainConfig(steps=30, lr=1e-2, progress=False)).fit(zip(x, target, strict=True))
    assert summary.loss["fvu"] < first
    with pytest.raises(TypeError, match="expected a pair"):
        Trainer(sae, TrainConfig(steps=1, progress=False)).fit([x[0]])
