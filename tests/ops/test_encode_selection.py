"""Which latents encode_topk keeps, and their values, on hostile inputs.

Native code is held to the definition (`fastsae.testing.defined_encode_topk`) to the bit: every instruction set, both
precisions of the screen. The PyTorch backend is held to a stable sort of the pre-activations that it computes.
"""

import os
from dataclasses import dataclass
from unittest import mock

import hypothesis
import hypothesis.strategies as st
import pytest
import torch
from torch import Tensor

from fastsae.backends import torch as torch_backend
from fastsae.ops.encode import encode_topk_op
from fastsae.reference import encode_topk as reference_encode_topk
from fastsae.testing import assert_same_bits, backends, defined_encode_topk

NATIVE = [backend for backend in backends() if backend.isa]
SCREENS = ("float32", "bfloat16")


@dataclass
class Problem:
    """The arguments of the operator, in its order."""

    x: Tensor
    w_enc: Tensor
    b_enc: Tensor | None
    b_dec: Tensor | None
    k: int
    relu_first: bool

    @property
    def arguments(self):
        return self.x, self.w_enc, self.b_enc, self.b_dec, self.k, self.relu_first


def check_native(problem):
    """Every instruction set and screen gives the defined result to the bit."""
    values, indices = defined_encode_topk(*problem.arguments)
    for backend in NATIVE:
        for screen in SCREENS:
            with backend.active(), mock.patch.dict(os.environ, FASTSAE_SCREEN=screen):
                actual, actual_indices = encode_topk_op(*problem.arguments)
            wrong = (actual_indices != indices).nonzero()
            assert len(wrong) == 0, f"{backend}, {screen} screen: other latents, the first at {wrong[0].tolist()}"
            assert_same_bits(actual, values)


def check_torch(problem):
    expected, expected_indices = reference_encode_topk(*problem.arguments)
    values, indices = torch_backend.encode_topk(*problem.arguments)
    assert indices.equal(expected_indices)
    assert_same_bits(values, expected)


# What can be wrong with an activation: each spoils one row of x, or one column, or all.
def spoil_x(x: Tensor, how: str, at: int) -> None:
    row = x[at % len(x)]
    place = at % x.shape[1]
    if how == "nan":
        row[place] = torch.nan
    elif how == "inf":
        row[place] = torch.inf
    elif how == "both_infs":
        row[place], row[0] = -torch.inf, torch.inf
    elif how == "zero":
        row.zero_()
    elif how == "huge":
        row.mul_(1e30)
    elif how == "tiny":
        row.mul_(1e-30)
    elif how == "denormal":
        row.mul_(1e-39)
    elif how == "outlier_dimension":
        x[:, place] *= 1e4


def spoil_w(w: Tensor, how: str, at: int) -> None:
    f = at % len(w)
    if how == "nan":
        w[f, at % w.shape[1]] = torch.nan
    elif how == "inf":
        w[f, at % w.shape[1]] = -torch.inf
    elif how == "zero":
        w[f] = 0
    elif how == "huge":
        w[f] *= 1e30
    elif how == "tiny":
        w[f] *= 1e-30
    elif how == "duplicates":
        w[f:] = w[f].clone()
    elif how == "near_duplicates":
        # Spreads from far under to far over what a screen can tell apart.
        spread = 10.0 ** -(1 + at % 7)
        generator = torch.Generator(torch.get_default_device()).manual_seed(at)
        w[f:] = w[f] * (1 + spread * torch.rand(len(w) - f, 1, generator=generator)).to(w.dtype)
    elif how == "all_negative":
        w.abs_().neg_()


X_FAULTS = ("nan", "inf", "both_infs", "zero", "huge", "tiny", "denormal", "outlier_dimension")
W_FAULTS = ("nan", "inf", "zero", "huge", "tiny", "duplicates", "near_duplicates", "all_negative")


@st.composite
def problems(draw, dtypes):
    # Off every block: 16 lanes, 512 latents of a chunk, 256 latents under which nothing is screened.
    n_tokens = draw(st.sampled_from([1, 3, 37, 199]))
    d_in = draw(st.sampled_from([1, 3, 16, 17, 50]))
    widths = [1, 255, 256, 300] + ([512, 513, 700, 1100] if n_tokens <= 37 else [])
    d_sae = draw(st.sampled_from(widths))
    k = min(d_sae, draw(st.sampled_from([1, 2, 5, 8, 32, 70, d_sae])))
    dtype = draw(st.sampled_from(dtypes))
    generator = torch.Generator(torch.get_default_device()).manual_seed(draw(st.integers(0, 2**31)))
    if draw(st.integers(0, 2)):

        def tensor(*shape):
            return torch.randn(shape, generator=generator).to(dtype)
    else:
        # Small integers: sums are exact and most of them are tied.
        def tensor(*shape):
            return torch.randint(-2, 3, shape, generator=generator).to(dtype)

    x, w_enc = tensor(n_tokens, d_in), tensor(d_sae, d_in)
    relu_first = draw(st.booleans())
    for fault, at in draw(st.lists(st.tuples(st.sampled_from(X_FAULTS), st.integers(0, 5000)), max_size=3)):
        spoil_x(x, fault, at)
    for fault, at in draw(st.lists(st.tuples(st.sampled_from(W_FAULTS), st.integers(0, 5000)), max_size=3)):
        spoil_w(w_enc, fault, at)
    b_enc = tensor(d_sae) if draw(st.booleans()) else None
    b_dec = tensor(d_in) if draw(st.booleans()) else None
    return Problem(x, w_enc, b_enc, b_dec, k, relu_first)


@pytest.mark.skipif(not NATIVE, reason="no native code here")
@hypothesis.settings(max_examples=5 * hypothesis.settings.default.max_examples)
@hypothesis.given(problems([torch.float32, torch.bfloat16]))
def test_native_code_matches_the_definition_to_the_bit(problem):
    check_native(problem)


@hypothesis.given(problems([torch.float64, torch.float32, torch.bfloat16, torch.float16]))
def test_torch_backend_matches_the_sort(problem):
    check_torch(problem)


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
