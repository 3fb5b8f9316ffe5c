"""Importing fastsae: cheap, silent, and possible without any native code."""

import json
import os
import subprocess
import sys

from fastsae.backends import native


def python(code, **environment):
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env={**os.environ, **environment}
    )
    assert result.returncode == 0, result.stderr
    return result


USE = """
import json, torch, fastsae
from fastsae.backends import native
codes = fastsae.ops.encode_topk(torch.randn(4, 8), torch.randn(8, 300), None, 3)
y = fastsae.ops.decode(codes, torch.randn(300, 8))
choice = dict(fastsae.backends.dispatch.last_choices())["encode_topk"]
try:
    fastsae.backend("cpu")
    fastsae.ops.decode(codes, torch.randn(300, 8))
    error = ""
except ValueError as failure:
    error = str(failure)
print(json.dumps({"shape": y.shape, "backend": choice.backend, "reason": choice.reason, "error": error}))
"""


def test_without_the_native_library():
    """Plain PyTorch serves, and whoever asks for native code learns why there is none."""
    result = json.loads(python(USE, FASTSAE_NO_NATIVE="1", FASTSAE_BACKEND="").stdout)
    assert result["shape"] == [4, 8]
    assert result["backend"] == "torch"
    assert result["reason"] == "FASTSAE_NO_NATIVE=1 is set"
    assert "FASTSAE_NO_NATIVE=1 is set" in result["error"]


def test_with_a_native_library_that_does_not_load():
    missing = "import sys; sys.modules['fastsae._cpu'] = None\n"
    result = json.loads(python(missing + USE, FASTSAE_NO_NATIVE="0", FASTSAE_BACKEND="").stdout)
    assert result["backend"] == "torch"
    for said in (result["reason"], result["error"]):
        assert "pip install" in said


def test_import_is_silent_light_and_leaves_torch_alone():
    """No GPU is touched, no setting of torch changes, nothing is imported that only some commands need."""
    code = """
import sys, torch
def settings():
    return (torch.get_num_threads(), torch.get_default_dtype(), torch.is_grad_enabled(),
            torch.get_float32_matmul_precision(), torch.are_deterministic_algorithms_enabled(),
            torch.random.get_rng_state().sum().item())
before, loaded = settings(), set(sys.modules)
import fastsae
assert settings() == before
assert not torch.cuda.is_initialized()
heavy = {"transformers", "matplotlib", "triton", "datasets", "pytest", "IPython"} & (set(sys.modules) - loaded)
assert not heavy, heavy
"""
    result = python(code)
    assert result.stdout == result.stderr == ""


def test_the_widest_instruction_set_is_the_default():
    code = "from fastsae.backends import native; print(native.cpu and native.cpu.isa())"
    runnable = [name for name, _, runs_here in native.cpu.isas() if runs_here] if native.cpu else ["None"]
    assert python(code, FASTSAE_ISA="").stdout.strip() == runnable[-1]
