"""Checkpoints: a run goes on to the bit; a crash or a bad file harms nothing."""

import itertools
import json
import os
import random
import shutil

import numpy
import pytest
import torch
from safetensors.torch import load_file, save_file

import fastsae
from fastsae import durable
from fastsae.optim import FusedAdam
from fastsae.testing import assert_same_bits
from fastsae.training import TrainConfig, Trainer, checkpoint

from .conftest import D_IN, D_SAE, K
from .conftest import batches as training_batches

N_TOKENS = 32

FILES = ["config.json", "model.safetensors", "optimizer.safetensors", "random_state.json", "trainer.json"]


def config(steps=20, **settings):
    return TrainConfig(steps=steps, lr=3e-3, **{"progress": False, "warmup_steps": 15, "decay_steps": 5, **settings})


def new_sae():
    torch.manual_seed(7)
    # A latent is dead after three batches without firing, so AuxK is at work on both sides of a cut.
    return fastsae.TopKSAE(D_IN, D_SAE, K, dead_after_tokens=3 * N_TOKENS)


def batches(count, start=0):
    return training_batches(count, N_TOKENS, start)


def everything(trainer):
    """Every tensor of a run by name."""
    tensors = {name: tensor.clone() for name, tensor in trainer.sae.state_dict().items()}
    names = {id(parameter): name for name, parameter in trainer.sae.named_parameters()}
    for parameter, state in trainer.optimizer.state.items():
        tensors |= {f"{names[id(parameter)]}.{key}": value.clone() for key, value in state.items()}
    return tensors


def assert_same_run(a, b):
    left, right = everything(a), everything(b)
    assert left.keys() == right.keys()
    for name, tensor in left.items():
        assert_same_bits(tensor, right[name])
        assert tensor.stride() == right[name].stride(), name
    assert (a.step, a.tokens) == (b.step, b.tokens)
    assert a.optimizer.param_groups[0]["lr"] == b.optimizer.param_groups[0]["lr"]


OPTIMIZERS = {
    "default": lambda sae: None,
    "AdamW": lambda sae: torch.optim.AdamW(sae.parameters(), lr=1e-3, amsgrad=True),
    "SGD": lambda sae: torch.optim.SGD(sae.parameters(), lr=0.1, momentum=0.9, nesterov=True),
    "Adafactor": lambda sae: torch.optim.Adafactor(sae.parameters(), lr=1e-2),
    "groups": lambda sae: torch.optim.Adam(
        [{"params": [sae.W_dec, sae.b_dec], "lr": 1e-3}, {"params": [sae.b_enc, sae.W_enc], "betas": (0.5, 0.9)}]
    ),
    "FusedAdam": FusedAdam,
    "FusedAdam, clipped": lambda sae: FusedAdam(sae, clip_norm=0.05, state_dtype=torch.bfloat16, seed=9),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_resumes_bit_for_bit(name, tmp_path):
    clip = None if name.startswith("FusedAdam") else 0.05
    whole_sae = new_sae()
    whole = Trainer(whole_sae, config(clip_grad_norm=clip), OPTIMIZERS[name](whole_sae))
    summary = whole.fit(batches(20))
    assert summary.loss["auxk"] > 0, "AuxK should be at work here"

    first_sae = new_sae()
    first = Trainer(first_sae, config(clip_grad_norm=clip), OPTIMIZERS[name](first_sae))
    with pytest.warns(RuntimeWarning, match="ended after 10"):
        first.fit(batches(10))
    assert (first.sae.tokens_since_fired >= 3 * N_TOKENS).any()
    first.save_checkpoint(tmp_path / "ten")

    resumed_sae = fastsae.load(tmp_path / "ten")
    resumed = Trainer.resume(tmp_path / "ten", resumed_sae, optimizer=OPTIMIZERS[name](resumed_sae))
    assert resumed.config == first.config
    assert_same_run(resumed, first)
    resumed.fit(batches(10, start=10))
    assert_same_run(resumed, whole)


def test_batches_that_draw_from_global_generators(tmp_path):
    def drawn():
        while True:
            yield torch.randn(64, D_IN) * random.random() + float(numpy.random.rand())

    whole = Trainer(new_sae(), config(8, warmup_steps=0))
    whole.fit(drawn())
    saved = Trainer(
        new_sae(), config(8, warmup_steps=0, checkpoint_dir=tmp_path, checkpoint_every=4, keep_checkpoints=0)
    )
    random.seed(3)
    numpy.random.seed(3)
    saved.fit(drawn())
    resumed = Trainer.resume(tmp_path / "step_00000004", config=config(8, warmup_steps=0))
    resumed.fit(drawn())
    assert_same_run(resumed, saved)


def test_load_checkpoint_into_a_used_trainer(tmp_path):
    trainer = Trainer(new_sae(), config())
    with pytest.warns(RuntimeWarning):
        trainer.fit(batches(5))
    trainer.save_checkpoint(tmp_path / "five")
    trainer.fit(batches(15, start=5))
    end = everything(trainer)
    trainer.load_checkpoint(tmp_path / "five")
    assert trainer.step == 5
    trainer.fit(batches(15, start=5))
    for name, tensor in everything(trainer).items():
        assert_same_bits(tensor, end[name])


def test_checkpoints_of_a_run(tmp_path):
    log = tmp_path / "log.jsonl"
    run = tmp_path / "run"
    settings = config(
        12, warmup_steps=0, log_every=4, log_path=log, checkpoint_dir=run, checkpoint_every=5, keep_checkpoints=2
    )
    with pytest.warns(RuntimeWarning):
        Trainer(new_sae(), settings).fit(batches(7))
    assert sorted(path.name for path in run.iterdir()) == ["step_00000005", "step_00000007"]
    assert sorted(path.name for path in (run / "step_00000005").iterdir()) == FILES
    assert fastsae.load(run / "step_00000005").k == K
    # Cut off between the two: the log has more than the checkpoint.
    shutil.rmtree(run / "step_00000007")
    resumed = Trainer.resume(run)
    assert resumed.step == 5
    resumed.fit(itertools.islice(batches(12), resumed.step, None))
    assert sorted(path.name for path in run.iterdir()) == ["step_00000010", "step_00000012"]
    records = [json.loads(line) for line in log.read_text().splitlines()]
    assert [record["step"] for record in records] == [1, 4, 5, 8, 10, 12]
    assert [record["seconds"] for record in records] == sorted(record["seconds"] for record in records)


def test_another_run_in_the_checkpoint_dir(tmp_path):
    settings = config(2, warmup_steps=0, decay_steps=0, checkpoint_dir=tmp_path)
    Trainer(new_sae(), settings).fit(batches(2))
    with pytest.raises(ValueError, match="holds step_00000002, beyond this run's step 0"):
        Trainer(new_sae(), settings).fit(batches(2))
    assert (tmp_path / "step_00000002").is_dir()


@pytest.fixture
def saved(tmp_path):
    """A trainer after three steps, and its checkpoint."""
    trainer = Trainer(new_sae(), config())
    with pytest.warns(RuntimeWarning):
        trainer.fit(batches(3))
    trainer.save_checkpoint(tmp_path / "run")
    return trainer, tmp_path / "run"


@pytest.mark.parametrize("when", ["weights", "optimizer", "sync", "first rename", "second rename"])
def test_crash_while_saving(saved, monkeypatch, when):
    trainer, folder = saved
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    at_three = everything(trainer)
    with pytest.warns(RuntimeWarning):
        trainer.fit(batches(2, start=3))

    rename, calls = os.rename, itertools.count(1)

    def crash(*args):
        if when == "second rename" and next(calls) != 2:
            return rename(*args)
        raise OSError("disk full")

    target = {
        "weights": (fastsae.TopKSAE, "save_pretrained"),
        "optimizer": (checkpoint, "save_file"),
        "sync": (durable, "sync"),
        "first rename": (durable.os, "rename"),
        "second rename": (durable.os, "rename"),
    }[when]
    with monkeypatch.context() as patch:
        patch.setattr(*target, crash)
        with pytest.raises(OSError, match="disk full"):
            trainer.save_checkpoint(folder)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    assert [path.name for path in folder.parent.iterdir()] == ["run"]
    trainer.load_checkpoint(folder)
    for name, tensor in everything(trainer).items():
        assert_same_bits(tensor, at_three[name])


def test_crash_between_the_two_renames(saved):
    _, folder = saved
    os.rename(folder, durable.previous_folder(folder))
    assert Trainer.resume(folder).step == 3
    assert folder.is_dir()


def test_saving_over_a_checkpoint(saved):
    trainer, folder = saved
    with pytest.warns(RuntimeWarning):
        trainer.fit(batches(1, start=3))
    trainer.save_checkpoint(folder)
    assert_same_run(Trainer.resume(folder), trainer)
    assert [path.name for path in folder.parent.iterdir()] == ["run"]


def test_saving_over_something_else(saved, tmp_path):
    trainer, _ = saved
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "thesis.tex").write_text("text")
    with pytest.raises(ValueError, match="holds something other than a checkpoint"):
        trainer.save_checkpoint(tmp_path / "home")
    (tmp_path / "empty").mkdir()
    trainer.save_checkpoint(tmp_path / "empty")
    assert Trainer.resume(tmp_path / "empty").step == 3


def assert_refused(trainer, folder, error, message):
    """Loading fails with that message, and leaves the trainer and the random generators as they were."""
    with pytest.warns(RuntimeWarning):
        trainer.fit(batches(1, start=3))
    before, generator = everything(trainer), torch.get_rng_state()
    with pytest.raises(error, match=message):
        trainer.load_checkpoint(folder)
    for name, tensor in everything(trainer).items():
        assert_same_bits(tensor, before[name])
    assert trainer.step == 4
    assert torch.equal(torch.get_rng_state(), generator)


@pytest.mark.parametrize("kept", [0.0, 0.5, 0.99])
@pytest.mark.parametrize("name", FILES)
def test_truncated_file(saved, name, kept):
    trainer, folder = saved
    content = (folder / name).read_bytes()
    (folder / name).write_bytes(content[: int(len(content) * kept)])
    assert_refused(trainer, folder, ValueError, name)


@pytest.mark.parametrize("name", FILES)
def test_missing_file(saved, name):
    trainer, folder = saved
    (folder / name).unlink()
    assert_refused(trainer, folder, FileNotFoundError, name)


@pytest.mark.parametrize("content", ["{}", "[]", '{"format": 1}', '{"format": 2}'])
@pytest.mark.parametrize("name", ["trainer.json", "random_state.json"])
def test_foreign_json(saved, name, content):
    trainer, folder = saved
    (folder / name).write_text(content)
    assert_refused(trainer, folder, ValueError, name)


def test_optimizer_file_with_other_tensors(saved):
    trainer, folder = saved
    path = folder / "optimizer.safetensors"
    tensors = load_file(path)
    whole = dict(tensors)
    del tensors["b_enc.exp_avg"]
    save_file(tensors, path)
    assert_refused(trainer, folder, ValueError, r"optimizer.safetensors: missing tensors \['b_enc.exp_avg'\]")
    save_file({**whole, "b_enc.exp_avg": torch.zeros(3)}, path)
    with pytest.raises(ValueError, match=r"b_enc.exp_avg is float32 \[3\]: expected float32 \[64\]"):
        trainer.load_checkpoint(folder)


def test_checkpoint_of_another_sae(saved):
    _, folder = saved
    wider = fastsae.TopKSAE(D_IN, 2 * D_SAE, K)
    with pytest.raises(ValueError, match=r"W_enc is torch.float32 \(16, 64\): expected torch.float32 \(16, 128\)"):
        Trainer(wider, config()).load_checkpoint(folder)
    other_k = fastsae.TopKSAE(D_IN, D_SAE, K + 1, dead_after_tokens=3 * N_TOKENS)
    with pytest.raises(ValueError, match=r"config.json: k = 3: expected 4"):
        Trainer(other_k, config()).load_checkpoint(folder)


def test_checkpoint_of_another_optimizer_or_rate(saved):
    trainer, folder = saved
    sgd = torch.optim.SGD(trainer.sae.parameters(), lr=0.1)
    with pytest.raises(ValueError, match=r"the state of Adam: expected that of SGD"):
        Trainer(trainer.sae, config(), sgd).load_checkpoint(folder)
    with pytest.raises(ValueError, match=r"lr = 1.0 and .* was trained with 0.003"):
        Trainer(trainer.sae, TrainConfig(steps=20, lr=1.0)).load_checkpoint(folder)


def test_optimizer_state_that_is_no_plain_data(sae, tmp_path):
    optimizer = torch.optim.SGD(sae.parameters(), lr=0.1)
    trainer = Trainer(sae, config(1, warmup_steps=0, decay_steps=0), optimizer)
    trainer.fit(batches(1))
    optimizer.state[sae.b_dec]["history"] = [torch.zeros(1)]
    with pytest.raises(TypeError, match=r"state b_dec.history of the optimizer is a list"):
        trainer.save_checkpoint(tmp_path / "run")
    assert not list(tmp_path.iterdir())


def test_longer_schedule_on_resume(saved):
    _, folder = saved
    longer = Trainer.resume(folder, config=config(40, warmup_steps=4, decay_steps=0))
    assert longer.optimizer.param_groups[0]["lr"] == 3e-3
    assert longer.fit(batches(37, start=3)).steps == 40
