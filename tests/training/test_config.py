"""TrainConfig checks itself, and the schedule is the one it describes."""

import math
from dataclasses import asdict
from pathlib import Path

import pytest
import torch

from fastsae.training import TrainConfig, warmup_and_decay


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"steps": 0}, "steps = 0: expected an int of at least 1"),
        ({"steps": True}, "steps = True"),
        ({"lr": -1.0}, "lr = -1.0: expected None or a finite number above 0"),
        ({"lr": math.nan}, "lr = nan"),
        ({"warmup_steps": -1}, "warmup_steps = -1"),
        ({"warmup_steps": 6, "decay_steps": 5}, "expected at most steps = 10 together"),
        ({"decay": "step"}, "decay = 'step': expected one of 'linear', 'cosine'"),
        ({"clip_grad_norm": 0}, "clip_grad_norm = 0"),
        ({"log_every": 0}, "log_every = 0"),
        ({"checkpoint_every": 5}, "checkpoint_every = 5 without checkpoint_dir"),
    ],
    ids=str,
)
def test_bad_settings(setting, message):
    with pytest.raises(ValueError, match=message):
        TrainConfig(**{"steps": 10, **setting})


def test_round_trip():
    config = TrainConfig(steps=10, log_path=Path("a/b.jsonl"), checkpoint_dir=Path("c"))
    assert TrainConfig.from_dict(asdict(config)) == config
    assert config.log_path == "a/b.jsonl"
    with pytest.raises(ValueError, match="stepps"):
        TrainConfig.from_dict({"stepps": 10})


def rates(optimizer, config, start=0):
    """The learning rates of a run's steps, each in the order the loop makes them."""
    scheduler = warmup_and_decay(optimizer, config, start)
    used = []
    for _ in range(start, config.steps):
        used.append([group["lr"] for group in optimizer.param_groups])
        optimizer.step()
        scheduler.step()
    return used


def sgd(*peaks):
    return torch.optim.SGD([{"params": [torch.zeros(1, requires_grad=True)], "lr": peak} for peak in peaks])


def test_schedule():
    config = TrainConfig(steps=10, warmup_steps=4, decay_steps=4)
    expected = [0.25, 0.5, 0.75, 1, 1, 1, 1, 0.75, 0.5, 0.25]
    assert rates(sgd(1.0, 8.0), config) == [[factor, 8 * factor] for factor in expected]


def test_cosine():
    config = TrainConfig(steps=6, decay_steps=4, decay="cosine")
    used = [rate for (rate,) in rates(sgd(1.0), config)]
    assert used == pytest.approx([1, 1, 1, (1 + math.cos(math.pi / 4)) / 2, 0.5, (1 - math.cos(math.pi / 4)) / 2])


def test_constant():
    assert rates(sgd(0.5), TrainConfig(steps=3)) == [[0.5]] * 3


def test_schedule_goes_on_from_any_step():
    config = TrainConfig(steps=10, warmup_steps=4, decay_steps=4, decay="cosine")
    whole = rates(sgd(0.3), config)
    for step in range(10):
        assert rates(sgd(0.3), config, step) == whole[step:]
