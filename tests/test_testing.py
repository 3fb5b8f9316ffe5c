"""The tools of the other tests: a tolerance that can fail, and an emulated dot product that is right."""

import math
from fractions import Fraction

import hypothesis
import hypothesis.strategies as st
import numpy as np
import pytest
import torch

from fastsae import testing
from fastsae.testing import assert_accurate, assert_same_bits, defined_dot, defined_encode_topk, fma, random_codes

float32 = st.floats(width=32, allow_nan=False, allow_infinity=False)
# Close in size, so that a sum cancels or its rounding is decided by bits far below the last.
near = st.builds(math.ldexp, st.integers(-(2**24), 2**24), st.integers(-30, 4))


def rounded(exact: Fraction) -> float:
    """The float32 nearest to a rational number, ties to even; overflow to infinity, denormals as they are."""
    if exact == 0:
        return 0.0
    # The exponent e with 2^e <= |exact| < 2^(e + 1), kept where denormals begin.
    e = exact.numerator.bit_length() - exact.denominator.bit_length()
    if abs(exact) < Fraction(2) ** e:
        e -= 1
    unit = Fraction(2) ** (max(e, -126) - 23)
    # round() of a Fraction goes to the even neighbour of a tie.
    result = round(exact / unit) * unit
    return float(result) if abs(result) < Fraction(2) ** 128 else math.copysign(math.inf, result)


@hypothesis.settings(max_examples=500)
@hypothesis.given(st.one_of(st.tuples(float32, float32, float32), st.tuples(near, near, near)))
def test_fma_rounds_once(numbers):
    exact = [np.float32(number) for number in numbers]
    a, b, c = (Fraction(float(number)) for number in exact)
    actual = fma(*(np.array([number]) for number in exact))[0]
    assert actual == rounded(a * b + c)


def test_fma_where_two_roundings_would_differ():
    """c + 2^-24 - 2^-70 lies just under a tie; float64 cannot tell, and a tie would go up to the even neighbour."""
    a, b, c = (
        np.array([number], dtype=np.float32) for number in ((1 + 2.0**-23) * 2.0**-24, 1 - 2.0**-23, 1 + 2.0**-23)
    )
    naive = (a.astype(np.float64) * b + c).astype(np.float32)
    assert naive == 1 + 2.0**-22
    assert fma(a, b, c) == c
    assert fma(-a, b, -c) == -c


def test_defined_dot_is_sixteen_chains_and_a_tree():
    """By hand for 35 places: three steps of 16 lanes, the last padded."""
    x, w = torch.randn(35), torch.randn(35)
    lanes = [0.0] * 16
    for i in range(35):
        lanes[i % 16] = rounded(Fraction(x[i].item()) * Fraction(w[i].item()) + Fraction(lanes[i % 16]))
    for width in (8, 4, 2, 1):
        lanes = [rounded(Fraction(lanes[i]) + Fraction(lanes[i + width])) for i in range(width)]
    assert defined_dot(x[None], w[None]).item() == lanes[0]


def test_defined_encode_topk_orders_by_value_then_index():
    x, w_enc = torch.ones(1, 1), torch.tensor([[2.0], [3.0], [-1.0], [3.0], [math.nan]])
    values, indices = defined_encode_topk(x, w_enc, None, None, 5)
    assert indices.tolist() == [[4, 1, 3, 0, 2]]
    assert values[0, 1:].tolist() == [3.0, 3.0, 2.0, -1.0]
    assert defined_encode_topk(x, w_enc, None, None, 5, relu_first=True)[0][0, 4] == 0


def square(x):
    return x @ x.T


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_assert_accurate_measures(dtype):
    x = torch.randn(20, 30).to(dtype)
    exact = x.double() @ x.double().T
    assert_accurate(exact.to(dtype), square, x)
    assert_accurate((x @ x.T, exact.to(dtype)), lambda x: (square(x), square(x)), x)
    for wrong in (
        exact.to(dtype) * (1 + 50 * torch.finfo(dtype).eps),
        torch.zeros_like(x @ x.T),
        torch.full_like(x @ x.T, math.nan),
        torch.full_like(x @ x.T, math.inf),
        (x @ x.T)[:19],
    ):
        with pytest.raises(AssertionError):
            assert_accurate(wrong, square, x)
    one_wrong = exact.to(dtype)
    one_wrong[3, 7] = math.nan
    with pytest.raises(AssertionError):
        assert_accurate(one_wrong, square, x)


def test_assert_accurate_finds_float32_sums_of_float64():
    x = torch.randn(20, 30).double()
    with pytest.raises(AssertionError):
        assert_accurate(square(x.float()).double(), square, x)


def test_assert_accurate_holds_infinities_to_their_places():
    x = torch.tensor([[math.inf, 1.0], [2.0, 3.0]])
    assert_accurate(2 * x, lambda x: 2 * x, x)
    for wrong in (-2 * x, torch.tensor([[1.0, 2.0], [4.0, 6.0]])):
        with pytest.raises(AssertionError):
            assert_accurate(wrong, lambda x: 2 * x, x)


def test_assert_same_bits():
    x = torch.tensor([1.0, math.nan, math.inf])
    assert_same_bits(x, x.clone())
    for other in (x.double(), x[:2], torch.tensor([1.0, math.nan, -math.inf]), torch.tensor([1.0, 2.0, math.inf])):
        with pytest.raises(AssertionError):
            assert_same_bits(x, other)


@pytest.mark.parametrize("k", [3, None])
def test_random_codes_store_a_place_once(k):
    codes = random_codes(20, 30, k)
    places = codes.tokens().reshape(-1) * 30 + codes.indices.reshape(-1)
    assert len(places.unique()) == codes.nnz
    if k is None:
        counts = codes.offsets.diff()
        assert counts.min() == 0
        assert counts.max() > 5


def test_backends_by_name(monkeypatch):
    monkeypatch.setenv("FASTSAE_TEST_BACKENDS", "torch")
    assert list(map(str, testing.backends())) == ["torch"]
    monkeypatch.setenv("FASTSAE_TEST_BACKENDS", "torch, cuda-sm_1")
    with pytest.raises(ValueError, match=r"FASTSAE_TEST_BACKENDS names 'cuda-sm_1': this machine has torch"):
        testing.backends()
    monkeypatch.setenv("FASTSAE_TEST_BACKENDS", "")
    assert testing.backend_dtypes()[0] == (testing.Backend("torch"), torch.float64)


def test_the_interpreter_is_spared_unless_it_is_named(monkeypatch):
    interpreter = testing.Backend("triton")
    for names, spared in (("", True), ("torch", True), ("torch, triton", False)):
        monkeypatch.setenv("FASTSAE_TEST_BACKENDS", names)
        assert interpreter.spared == spared
        assert (torch.float16 in interpreter.dtypes) != spared
    monkeypatch.setenv("FASTSAE_TEST_BACKENDS", "")
    for other in (testing.Backend("torch"), testing.Backend("triton", device="cuda")):
        assert not other.spared
        assert torch.float16 in other.dtypes


def test_poisoned_memory(backend):
    """tests/conftest.py fills what fastsae allocates, and nobody else's memory."""
    from fastsae.backends import torch as module

    made = eval("[torch.empty(3), torch.empty_like(x), x.new_empty(2)]", vars(module), {"x": torch.zeros(2)})
    assert all(tensor.isnan().all() for tensor in made)
    integers = eval("torch.empty(3, dtype=torch.int32)", vars(module))
    assert (integers == 2**30 - 1).all()
