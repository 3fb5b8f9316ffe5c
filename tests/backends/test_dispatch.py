"""One function chooses the backend of each call; one override changes it; a record tells what ran."""

import pytest
import torch

import fastsae
from fastsae import ops
from fastsae.backends import cpu, dispatch, native
from fastsae.testing import random_codes

needs_native = pytest.mark.skipif(native.cpu is None, reason=native.why_not_cpu)


@pytest.fixture(autouse=True)
def _no_override(monkeypatch):
    monkeypatch.delenv("FASTSAE_BACKEND", raising=False)
    with dispatch.backend(None):
        yield


def ran(dtype=torch.float32):
    """The backend that decode ran on."""
    ops.decode(random_codes(3, 5, 2, dtype=dtype), torch.randn(5, 4).to(dtype))
    return dict(dispatch.last_choices())["decode"]


@needs_native
def test_native_code_where_it_can_and_torch_elsewhere():
    assert ran(torch.float32).backend == "cpu"
    assert ran(torch.bfloat16).backend == "cpu"
    assert ran(torch.float64).backend == "torch"
    assert "torch.float64" in ran(torch.float64).reason


def test_override_until_changed_and_for_a_while():
    with fastsae.backend("torch"):
        assert ran().backend == "torch"
    fastsae.backend("torch")
    assert ran().backend == "torch"
    fastsae.backend(None)
    expected = "torch" if native.cpu is None else "cpu"
    assert ran().backend == expected


def test_override_ends_with_an_error():
    with pytest.raises(KeyError), fastsae.backend("torch"):
        raise KeyError
    assert dispatch._override is None


def test_nested_overrides():
    with fastsae.backend("torch"):
        with fastsae.backend(None):
            assert ran().backend == ("torch" if native.cpu is None else "cpu")
        assert ran().backend == "torch"


def test_environment(monkeypatch):
    monkeypatch.setenv("FASTSAE_BACKEND", "torch")
    choice = ran()
    assert choice.backend == "torch"
    assert "FASTSAE_BACKEND" in choice.reason


@needs_native
def test_override_wins_over_the_environment(monkeypatch):
    monkeypatch.setenv("FASTSAE_BACKEND", "torch")
    with fastsae.backend("cpu"):
        assert ran().backend == "cpu"


def test_unknown_names(monkeypatch):
    with pytest.raises(ValueError, match=r"name='tpu': expected one of torch, cpu, triton"):
        fastsae.backend("tpu")
    monkeypatch.setenv("FASTSAE_BACKEND", "tpu")
    with pytest.raises(ValueError, match=r"FASTSAE_BACKEND='tpu': expected one of torch, cpu, triton"):
        ran()


@needs_native
def test_a_backend_that_cannot_says_why():
    with (
        fastsae.backend("cpu"),
        pytest.raises(ValueError, match=r"'cpu'.*cannot run decode.*float32 and bfloat16, not torch.float64"),
    ):
        ran(torch.float64)


def test_why_the_cpu_backend_does_not_serve_a_gpu():
    assert "cuda" in cpu.why_not("decode", torch.device("cuda"), torch.float32)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_triton_serves_a_gpu_when_asked(dtype):
    """Until a GPU has verified its kernels; choosing needs no GPU."""
    device = torch.device("cuda")
    choice = dispatch.choose("decode", device, dtype)
    assert choice.backend == "torch"
    with fastsae.backend("triton"):
        if dtype == torch.float64:
            with pytest.raises(ValueError, match=r"float32, bfloat16 and float16, not torch.float64"):
                dispatch.choose("decode", device, dtype)
        else:
            assert dispatch.choose("decode", device, dtype).backend == "triton"


def test_triton_serves_a_cpu_only_in_its_interpreter(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with fastsae.backend("triton"), pytest.raises(ValueError, match=r"run on a CUDA device, the tensors are on cpu"):
        dispatch.choose("decode", torch.device("cpu"), torch.float32)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with fastsae.backend("triton"), pytest.raises(ValueError, match=r"pip install triton"):
        dispatch.choose("decode", torch.device("cuda"), torch.float32)


def test_a_missing_library_is_named(monkeypatch):
    monkeypatch.setattr(native, "cpu", None)
    monkeypatch.setattr(native, "why_not_cpu", "no compiler was there")
    choice = ran()
    assert (choice.backend, choice.reason) == ("torch", "no compiler was there")


@needs_native
def test_each_operator_is_recorded():
    x, weight = torch.randn(6, 8), torch.randn(20, 8).requires_grad_()
    codes = ops.encode_topk(x, weight.T, None, 3)
    _, squared = ops.squared_error(codes, weight, None, x)
    squared.sum().backward()
    ops.normalize_rows_(weight)
    ops.project_rows_(weight.grad, weight)
    choices = dict(dispatch.last_choices())
    for op in ("encode_topk", "squared_error", "sampled_dot", "transpose", "accumulate_rows"):
        assert choices[op].backend == "cpu"
    for op in ("normalize_rows_", "project_rows_"):
        assert choices[op].backend == "cpu"
