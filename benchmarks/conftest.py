"""Fixtures of the single-operator benchmarks: `pytest benchmarks --benchmark-only --shape gpt2-small`."""

import pytest

from fastsae.bench import get_shape
from fastsae.bench.problem import DTYPES, INPUTS, Problem

# Small enough for a round of every file in a minute on two cores.
_SHAPE, _TOKENS = "pythia-160m-4k", 256


def pytest_addoption(parser):
    group = parser.getgroup("fastsae")
    group.addoption("--shape", default=_SHAPE, help=f"shape of fastsae.bench.SHAPES (default {_SHAPE})")
    group.addoption("--tokens", type=int, help=f"tokens of a batch (default: the shape's; {_TOKENS} for {_SHAPE})")
    group.addoption("--dtype", default="float32", choices=list(DTYPES))
    group.addoption("--inputs", default="mixture", choices=INPUTS)


@pytest.fixture(scope="session")
def problem(pytestconfig):
    """An SAE of the chosen shape and a batch for it; the same as `fastsae bench` makes."""
    name, tokens = pytestconfig.getoption("shape"), pytestconfig.getoption("tokens")
    shape = get_shape(name, n_tokens=_TOKENS if tokens is None and name == _SHAPE else tokens)
    return Problem(shape, DTYPES[pytestconfig.getoption("dtype")], pytestconfig.getoption("inputs"))


@pytest.fixture
def measure(benchmark, problem, request):
    """Times a function and notes what it ran on; the group is the file's operator."""

    def run(function, work=None):
        shape = problem.shape
        benchmark.group = request.module.__name__.rpartition("bench_")[2]
        benchmark.extra_info |= {
            "shape": str(shape),
            "dtype": str(problem.dtype).removeprefix("torch."),
            "inputs": problem.inputs,
            "nnz": shape.nnz,
        }
        result = benchmark(function)
        if work is not None and benchmark.stats is not None:
            median = benchmark.stats.stats.median
            benchmark.extra_info |= {"GFLOP/s": work.flops / median / 1e9, "GB/s": work.bytes / median / 1e9}
        return result

    return run
