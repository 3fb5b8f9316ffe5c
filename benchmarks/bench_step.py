"""A whole training step of every implementation that `fastsae bench` compares."""

import pytest
import torch

from fastsae.bench import gate
from fastsae.bench.baselines import contestants

NAMES = [implementation.name for implementation in contestants(torch.float32)]


@pytest.mark.parametrize("name", NAMES, ids=lambda name: name.replace(" ", "_"))
def bench_step(measure, problem, name):
    by_name = {implementation.name: implementation for implementation in contestants(problem.dtype)}
    if name not in by_name:
        pytest.skip(f"{name} is no implementation for {problem.dtype}")
    implementation = by_name[name]
    for check in gate.checks_of(problem, implementation).values():
        check(problem, implementation)
    counted = implementation.work(problem.shape, problem.x.element_size())["step"]
    measure(lambda: list(implementation.step(problem)), counted)
