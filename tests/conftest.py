"""Shared by every test: seeds, hypothesis profiles, poisoned memory, and the backend under test."""

import os
import sys
from functools import wraps

import hypothesis
import pytest
import torch

# Triton reads it when a kernel is defined, so before any is.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

from cheap_interpreter import make_cheap

from fastsae.backends import recycled
from fastsae.testing import backend_dtypes, backends

# The same examples on every run, so that a failure belongs to a change; HYPOTHESIS_PROFILE=explore looks for new ones.
hypothesis.settings.register_profile("ci", derandomize=True, deadline=None, database=None, max_examples=60)
hypothesis.settings.register_profile("explore", deadline=None, max_examples=500, print_blob=True)
hypothesis.settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "ci"))


def pytest_collection_modifyitems(config, items):
    """Leaves what is marked `costly` out for Triton's interpreter; `make test-triton` runs it."""
    spared = {str(backend) for backend in backends() if backend.spared}

    def left_out(item):
        names = item.callspec.id.split("-") if hasattr(item, "callspec") else []
        return item.get_closest_marker("costly") is not None and not spared.isdisjoint(names)

    config.hook.pytest_deselected(items=[item for item in items if left_out(item)])
    items[:] = [item for item in items if not left_out(item)]


def _poisoned(allocate):
    """`allocate`, but what fastsae itself allocates holds NaN (large numbers for integers) until it is written."""

    @wraps(allocate)
    def poisoned(*args, **kwargs):
        tensor = allocate(*args, **kwargs)
        if torch.compiler.is_compiling():
            return tensor
        caller = sys._getframe(1).f_globals.get("__name__", "")
        # Traced and fake tensors (other types than Tensor) have no memory to poison.
        if caller.startswith("fastsae") and type(tensor) is torch.Tensor and tensor.device.type != "meta":
            if tensor.is_floating_point():
                tensor.fill_(torch.nan)
            elif tensor.dtype != torch.bool:
                tensor.fill_(torch.iinfo(tensor.dtype).max // 2)
        return tensor

    return poisoned


@pytest.fixture(scope="session", autouse=True)
def _poisoned_allocations():
    """A kernel that leaves a part of its result unwritten, or reads scratch memory first, is found out."""
    with pytest.MonkeyPatch.context() as patch:
        allocators = (torch, "empty"), (torch, "empty_like"), (torch.Tensor, "new_empty"), (recycled, "empty")
        for owner, name in allocators:
            patch.setattr(owner, name, _poisoned(getattr(owner, name)))
        yield


@pytest.fixture(scope="session", autouse=True)
def _cheap_interpreter():
    if any(backend.interpreted for backend in backends()):
        make_cheap()


@pytest.fixture(scope="session", autouse=True)
def _one_thread():
    """Tensors of these tests are small: on a busy machine a team of threads waits ten times longer than it works.

    OMP_NUM_THREADS overrules; tests/backends/test_determinism.py runs every operator with 1, 2 and 3 threads.
    """
    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


@pytest.fixture(params=backends(), ids=str)
def backend(request):
    """Every way to run an operator on this machine, active during the test."""
    with request.param.active():
        yield request.param


@pytest.fixture(params=[backend for backend in backends() if backend.isa], ids=str)
def native(request):
    """Every instruction set of the native code, active during the test."""
    with request.param.active():
        yield request.param


@pytest.fixture(params=backend_dtypes(), ids=lambda case: f"{case[0]}-{str(case[1])[6:]}")
def dtype(request):
    """Every dtype of every way to run an operator; that way is active during the test."""
    backend, dtype = request.param
    with backend.active():
        yield dtype


@pytest.fixture(params=["float32", "bfloat16", "int8", "int16"])
def screen(request, monkeypatch):
    """Each precision of encode_topk's screen on a CPU, in force during the test."""
    monkeypatch.setenv("FASTSAE_SCREEN", request.param)
    return request.param


@pytest.fixture(params=[False, True], ids=["eager", "compiled"])
def use_compile(request):
    """Whether a function is called as it is or through torch.compile(fullgraph=True)."""
    if request.param:
        torch.compiler.reset()
    return request.param
