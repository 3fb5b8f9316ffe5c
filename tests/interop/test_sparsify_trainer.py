"""sparsify's Trainer before and after fastsae.accelerate, and the step of its default optimizer."""

import pytest
import torch
from interop.installed import sparsify
from interop.test_sparsify import served_by_fastsae
from schedulefree import ScheduleFreeWrapper
from sparsify.sign_sgd import SignSGD

import fastsae
from fastsae.interop import schedule_free
from fastsae.interop.record import record_of
from fastsae.testing import assert_same_bits


def trained(accelerated, tmp_path, optimizer="adam", lr=1e-3, **options):
    """The weights that the library's Trainer ends with, on a small model and random tokens, and the trainer."""
    from datasets import Dataset
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(n_layer=1, n_embd=32, n_head=2, vocab_size=64, n_positions=16)).eval()
    tokens = torch.randint(0, 64, (24, 16))
    config = sparsify.TrainConfig(
        sparsify.SaeConfig(num_latents=320, k=4, **options),
        batch_size=4,
        optimizer=optimizer,
        lr=lr,
        lr_warmup_steps=2,
        auxk_alpha=1 / 32,
        dead_feature_threshold=100,
        k_decay_steps=3,
        log_to_wandb=False,
        save_dir=str(tmp_path),
        hookpoints=["h.0"],
    )
    trainer = sparsify.Trainer(config, Dataset.from_dict({"input_ids": tokens.tolist()}).with_format("torch"), model)
    # Of more latents than are positive the library takes any for firing.
    trainer.initial_k = 12
    if accelerated:
        fastsae.accelerate(trainer)
    trainer.fit()
    return trainer


@pytest.mark.parametrize("options", [{}, {"multi_topk": True}, {"activation": "groupmax"}], ids=str)
def test_trainer(options, tmp_path, monkeypatch):
    """Six steps, with k annealed from 12 and latents that die."""
    monkeypatch.setattr(torch, "set_float32_matmul_precision", lambda _: None)
    if options.get("activation") == "groupmax":
        monkeypatch.setattr(sparsify.Trainer, "get_current_k", lambda self: 4)
    before, after = (trained(accelerated, tmp_path / str(accelerated), **options) for accelerated in (False, True))
    (coder,) = after.saes.values()
    assert served_by_fastsae(coder)
    assert_same_bits(after.num_tokens_since_fired["h.0"], before.num_tokens_since_fired["h.0"])
    for name, parameter in before.saes["h.0"].named_parameters():
        torch.testing.assert_close(coder.get_parameter(name), parameter)
    assert (tmp_path / "True" / "unnamed" / "h.0" / "sae.safetensors").exists()


def signum(parameters):
    optimizer = ScheduleFreeWrapper(SignSGD(parameters, lr=5e-3), momentum=0.95)
    optimizer.train()
    return optimizer


def test_signum_steps_to_the_same_bits():
    """Blocks of rows, a bias, a parameter without a gradient, and state and counts as the wrapper keeps them."""
    shapes = (199, 7), (199,), (3, 3)
    optimizers = [signum([torch.nn.Parameter(torch.randn(*shape)) for shape in shapes]) for _ in range(2)]
    theirs, ours = ([*optimizer.param_groups[0]["params"]] for optimizer in optimizers)
    for one, other in zip(theirs, ours, strict=True):
        other.data = one.data.clone()
    for _ in range(4):
        for one, other in zip(theirs[:2], ours[:2], strict=True):
            one.grad = torch.randn_like(one).relu()
            other.grad = one.grad.clone()
        optimizers[0].step()
        schedule_free.step(optimizers[1])
        for one, other in zip(theirs, ours, strict=True):
            assert_same_bits(other, one)
            assert ("z" in optimizers[1].state[other]) == ("z" in optimizers[0].state[one])
        assert_same_bits(optimizers[1].state[ours[0]]["z"], optimizers[0].state[theirs[0]]["z"])
        counts = [
            {name: value for name, value in optimizer.param_groups[0].items() if name != "params"}
            for optimizer in optimizers
        ]
        assert counts[0] == counts[1]
    optimizers[1].eval()
    with pytest.raises(Exception, match="not in train mode"):
        schedule_free.step(optimizers[1])


@pytest.mark.parametrize("name", ["signum", "adam", "muon"])
def test_a_trainer_with_each_optimizer(name, tmp_path, monkeypatch):
    monkeypatch.setattr(torch, "set_float32_matmul_precision", lambda _: None)
    before, after = (trained(accelerated, tmp_path, optimizer=name, lr=1e-4) for accelerated in (False, True))
    for name_of, parameter in before.saes["h.0"].named_parameters():
        torch.testing.assert_close(after.saes["h.0"].get_parameter(name_of), parameter)
    calls = record_of(after).calls
    paths = {"signum": {"fastsae"}, "adam": set(), "muon": {"sparsify"}}
    assert {path for _, path, _ in calls} == paths[name]
    assert any(group.get("fused") for o in after.optimizers for group in o.param_groups) == (name != "signum")
    fastsae.restore(after)
    assert not any("step" in vars(o) and name == "signum" for o in after.optimizers)
    assert not any(group.get("fused") for o in after.optimizers for group in o.param_groups)
    assert set(vars(after)) == set(vars(before))
