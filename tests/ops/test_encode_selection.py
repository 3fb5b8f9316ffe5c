"""Which latents encode_topk keeps, and their values, on hostile inputs.

Native code is held to the definition (`fastsae.testing.defined_encode_topk`) to the bit: every instruction set, both
precisions of the screen. The PyTorch backend is held to a stable sort of the pre-activations that it computes.
"""

import os
from unittest import mock

import hypothesis
import hypothesis.strategies as st
import pytest
import torch
from hostile import W_FAULTS, X_FAULTS, Problem, problems, spoil_w, spoil_x

from fastsae.backends import torch as torch_backend
from fastsae.ops.encode import encode_topk_op
from fastsae.reference import encode_topk as reference_encode_topk
from fastsae.testing import assert_same_bits, backends, defined_encode_topk

NATIVE = [backend for backend in backends() if backend.isa]
SCREENS = ("float32", "bfloat16", "int8")


def check_native(problem, scale=None):
    """Every instruction set and screen gives the defined result to the bit."""
    values, indices = defined_encode_topk(*problem.arguments, scale)
    for backend in NATIVE:
        for screen in SCREENS:
            with backend.active(), mock.patch.dict(os.environ, FASTSAE_SCREEN=screen):
                actual, actual_indices = encode_topk_op(*problem.arguments, scale)
            wrong = (actual_indices != indices).nonzero()
            assert len(wrong) == 0, f"{backend}, {screen} screen: other latents, the first at {wrong[0].tolist()}"
            assert_same_bits(actual, values)


def check_torch(problem, scale=None):
    expected, expected_indices = reference_encode_topk(*problem.arguments, scale)
    values, indices = torch_backend.encode_topk(*problem.arguments, scale)
    assert indices.equal(expected_indices)
    assert_same_bits(values, expected)


@pytest.mark.skipif(not NATIVE, reason="no native code here")
@hypothesis.settings(max_examples=5 * hypothesis.settings.default.max_examples)
@hypothesis.given(problems([torch.float32, torch.bfloat16]))
def test_native_code_matches_the_definition_to_the_bit(problem):
    check_native(problem)


@hypothesis.given(problems([torch.float64, torch.float32, torch.bfloat16, torch.float16]))
def test_torch_backend_matches_the_sort(problem):
    check_torch(problem)


@st.composite
def scales(draw, d_sae):
    """All alike, near each other, or far apart; some so small that what they rank is denormal."""
    generator = torch.Generator(torch.get_default_device()).manual_seed(draw(st.integers(0, 2**31)))
    spread = draw(st.sampled_from([0.0, 1e-6, 1.0, 20.0]))
    scale = (spread * torch.randn(d_sae, generator=generator)).exp()
    return scale * draw(st.sampled_from([1.0, 1e-20, 1e20]))


@pytest.mark.skipif(not NATIVE, reason="no native code here")
@hypothesis.settings(max_examples=3 * hypothesis.settings.default.max_examples)
@hypothesis.given(st.data(), problems([torch.float32, torch.bfloat16]))
def test_scaled_ranking(data, problem):
    scale = data.draw(scales(len(problem.w_enc)))
    check_native(problem, scale)
    check_torch(problem, scale)


def normal(n_tokens, d_in, d_sae, dtype=torch.float32):
    return torch.randn(n_tokens, d_in).to(dtype), torch.randn(d_sae, d_in).to(dtype)


@pytest.mark.skipif(not NATIVE, reason="no native code here")
@pytest.mark.parametrize("fault", X_FAULTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_one_bad_row_of_x(dtype, fault):
    """The other rows' results are those without it."""
    x, w_enc = normal(9, 24, 600, dtype)
    clean = defined_encode_topk(x, w_enc, None, None, 8)
    spoil_x(x, fault, 4)
    check_native(Problem(x, w_enc, None, None, 8, False))
    if fault != "outlier_dimension":
        others = [0, 1, 2, 3, 5, 6, 7, 8]
        for backend in NATIVE:
            with backend.active():
                values, indices = encode_topk_op(x, w_enc, None, None, 8, False)
            assert_same_bits(values[others], clean[0][others])
            assert indices[others].equal(clean[1][others])


@pytest.mark.skipif(not NATIVE, reason="no native code here")
@pytest.mark.parametrize("fault", W_FAULTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_bad_rows_of_w(dtype, fault):
    x, w_enc = normal(9, 24, 600, dtype)
    x[2] = 0
    spoil_w(w_enc, fault, 17)
    check_native(Problem(x, w_enc, torch.randn(600).to(dtype), None, 8, False))


@pytest.mark.skipif(not NATIVE, reason="no native code here")
@pytest.mark.parametrize("bias", [-torch.inf, torch.inf, torch.nan])
def test_biases_that_are_not_finite(bias):
    """-inf switches latents off."""
    x, w_enc = normal(9, 24, 600)
    b_enc = torch.zeros(600)
    b_enc[100:500] = bias
    check_native(Problem(x, w_enc, b_enc, None, 8, False))
    b_dec = torch.zeros(24)
    b_dec[3] = bias
    check_native(Problem(x, w_enc, None, b_dec, 8, False))


def test_duplicates_by_the_thousand(backend):
    """3,000 latents in three groups of equal ones: a group's lowest indices win."""
    x = torch.randn(5, 24)
    w_enc = torch.randn(3, 24).repeat(1000, 1)
    _, indices = encode_topk_op(x, w_enc, None, None, 10, False)
    best = (x @ w_enc[:3].T).argmax(dim=1, keepdim=True)
    assert indices.equal((best + 3 * torch.arange(10)).int())


def test_nan_row_keeps_the_lowest_indices(backend):
    """NaN counts as largest, so all latents tie."""
    x, w_enc = normal(3, 24, 600)
    x[1, 5] = torch.nan
    values, indices = encode_topk_op(x, w_enc, None, None, 4, False)
    assert values[1].isnan().all()
    assert indices[1].tolist() == [0, 1, 2, 3]
    assert values[[0, 2]].isfinite().all()


def test_relu_first_fills_with_the_lowest_latents_that_are_not_positive(backend):
    """Latents 3 and 5 are positive: the other places go to zeros, lowest index first."""
    for d_sae in (8, 600):
        w_enc = -torch.ones(d_sae, 2)
        w_enc[3], w_enc[5] = 1.0, 2.0
        values, indices = encode_topk_op(torch.ones(2, 2), w_enc, None, None, 6, True)
        assert indices.tolist() == [[5, 3, 0, 1, 2, 4]] * 2
        assert values.tolist() == [[4.0, 2.0, 0.0, 0.0, 0.0, 0.0]] * 2


def test_raw_preactivations_are_kept_below_zero(backend):
    w_enc = -torch.arange(1.0, 601.0)[:, None]
    values, indices = encode_topk_op(torch.ones(1, 1), w_enc, None, None, 3, False)
    assert values.tolist() == [[-1.0, -2.0, -3.0]]
    assert indices.tolist() == [[0, 1, 2]]


@pytest.mark.parametrize("d_sae", [8, 600])
def test_negative_zero_ties_with_zero(backend, d_sae):
    """Products of -1e-60 vanish as -0; among equals the lower index wins all the same."""
    w_enc = torch.zeros(d_sae, 16)
    w_enc[::2] = -1e-30
    values, indices = encode_topk_op(torch.full((1, 16), 1e-30), w_enc, None, None, 4, False)
    assert indices.tolist() == [[0, 1, 2, 3]]
    assert (values == 0).all()
