"""A whole training step stays under 5 % of one [n_tokens, d_sae] tensor, by the operating system's own count."""

import pytest

from fastsae.backends import native
from fastsae.bench.memory import Unmeasured, peak_memory
from fastsae.bench.shapes import Shape
from fastsae.bench.targets import STEP_MEMORY

# One [n_tokens, d_sae] tensor has 128 MiB, 5 % of it 6.4: more than everything else that a step makes here, and far
# less than any tensor of that shape, in whatever dtype.
SHAPE = Shape("memory", 64, 16_384, 16, 2_048, "tests")
DENSE = SHAPE.n_tokens * SHAPE.d_sae * 4


def peaks(implementation):
    try:
        return peak_memory(SHAPE, "float32", implementation)
    except Unmeasured as error:
        pytest.skip(str(error))


@pytest.mark.skipif(native.cpu is None, reason="plain PyTorch makes blocks of pre-activations")
@pytest.mark.parametrize("implementation", ["fastsae", "fastsae, FusedAdam"])
def test_no_dense_tensor_in_a_step(implementation):
    found = peaks(implementation)
    assert {phase: peak for phase, peak in found.items() if peak > STEP_MEMORY * DENSE} == {}
    assert "step" in found


def test_a_dense_step_is_seen():
    found = peaks("dense")
    assert found["step"] > 1.5 * DENSE
    assert found["encode"] > DENSE


def test_a_process_that_fails_is_told():
    with pytest.raises(Unmeasured, match=r"ended with 1: KeyError: 'no such implementation'"):
        peak_memory(SHAPE, "float32", "no such implementation")
