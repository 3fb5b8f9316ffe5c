"""encode_topk on native code never allocates [n_tokens, d_sae], measured by the peak of a process's memory."""

import os
import subprocess
import sys

import pytest

from fastsae.backends import native

pytestmark = [
    pytest.mark.skipif(native.cpu is None, reason=native.why_not_cpu),
    pytest.mark.skipif(not os.path.exists("/proc/self/clear_refs"), reason="peak memory is read from Linux's /proc"),
]

# Every large allocation is a mapping of its own, so that the peak falls back when a tensor is freed; writing 5
# to clear_refs sets the peak (VmHWM) to the present size.
MEASURE = """
import sys, torch, fastsae
N, D, F, K = 1024, 16, 32768, 8
x, weight, b_enc = torch.randn(N, D), torch.randn(F, D), torch.zeros(F)
def peak_of(function):
    function()
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")
    before = status("VmRSS")
    function()
    return status("VmHWM") - before
def status(field):
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith(field + ":"))
def encode():
    fastsae.ops.encode_topk(x, weight.T, b_enc, K)
def train():
    leaf = weight.clone().requires_grad_()
    fastsae.ops.encode_topk(x, leaf.T, b_enc, K).values.sum().backward()
def dense():
    x @ weight.T
print(peak_of(encode), peak_of(train), peak_of(dense))
"""


@pytest.mark.parametrize("screen", ["float32", "bfloat16", "int8", "int16"])
def test_no_dense_tensor_is_made(screen):
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536", "FASTSAE_SCREEN": screen, "FASTSAE_BACKEND": "cpu"}
    result = subprocess.run([sys.executable, "-c", MEASURE], capture_output=True, text=True, env=environment)
    assert result.returncode == 0, result.stderr
    encode, train, dense = map(int, result.stdout.split())
    a_byte_each = 1024 * 32768
    # The measure must see what it looks for.
    assert dense > 3 * a_byte_each
    assert encode < a_byte_each / 4
    # Weight, gradient and their transposition: a few times d_sae x d_in, not d_sae x n_tokens.
    assert train < a_byte_each / 2
