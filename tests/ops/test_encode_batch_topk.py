"""encode_batch_topk: to the bit on native code, against the dense formula elsewhere; ties, bad tokens, gradients."""

import os
from unittest import mock

import hypothesis
import pytest
import torch
from hostile import W_FAULTS, X_FAULTS, problems, spoil_w, spoil_x

from fastsae import ops, reference
from fastsae.backends import dispatch, largest, screen_batch
from fastsae.backends import torch as torch_backend
from fastsae.ops.encode_batch_topk import encode_batch_topk_op
from fastsae.testing import assert_accurate, assert_same_bits, backends, defined_encode_batch_topk, gradients

NATIVE = [backend for backend in backends() if backend.isa]
SCREENS = ("float32", "bfloat16")


def serves(backend):
    why_not = dispatch.BACKENDS[backend.name].why_not
    return not why_not("encode_batch_topk", torch.device(backend.device), torch.float32)


CASES = [(backend, dtype) for backend in filter(serves, backends()) for dtype in backend.dtypes]
each = pytest.mark.parametrize(("backend", "dtype"), CASES, ids=lambda case: str(case))


def assert_same(actual, expected):
    for found, right in zip(actual, expected, strict=True):
        assert_same_bits(found, right)


def check_native(*arguments):
    expected = defined_encode_batch_topk(*arguments)
    for backend in NATIVE:
        for screen in SCREENS:
            with backend.active(), mock.patch.dict(os.environ, FASTSAE_SCREEN=screen):
                assert_same(encode_batch_topk_op(*arguments), expected)


def draw(n_tokens, d_in, d_sae, dtype=torch.float32):
    x, w_enc = torch.randn(n_tokens, d_in).to(dtype), torch.randn(d_sae, d_in).to(dtype)
    return x, w_enc, torch.randn(d_sae).to(dtype), torch.randn(d_in).to(dtype)


@pytest.fixture
def small_steps(monkeypatch):
    """Cuts and guesses at sizes that a test can afford."""
    monkeypatch.setattr(largest, "_LEAST_SLACK", 16)
    monkeypatch.setattr(screen_batch, "_SAMPLE_TOKENS", 4)


@pytest.mark.skipif(not NATIVE, reason="no native code here")
@hypothesis.settings(suppress_health_check=[hypothesis.HealthCheck.function_scoped_fixture])
@hypothesis.given(problems([torch.float32, torch.bfloat16]), hypothesis.strategies.booleans())
def test_native_code_matches_the_definition_to_the_bit(small_steps, problem, scaled):
    x, w_enc, b_enc, b_dec, k, _ = problem.arguments
    scale = torch.linspace(0.25, 3, len(w_enc)) if scaled else None
    check_native(x, w_enc, b_enc, b_dec, k * len(x) // 2 + 1, scale)


@pytest.mark.skipif(not NATIVE, reason="no native code here")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("fault", [*(f"x {f}" for f in X_FAULTS), *(f"w {f}" for f in W_FAULTS)])
def test_faults(small_steps, fault, dtype):
    x, w_enc, b_enc, b_dec = draw(9, 24, 600, dtype)
    where, _, how = fault.partition(" ")
    spoil_x(x, how, 4) if where == "x" else spoil_w(w_enc, how, 17)
    check_native(x, w_enc, b_enc, b_dec, 55, None)
    check_native(x, w_enc, b_enc, b_dec, 55, torch.rand(600) + 0.5)


@pytest.mark.skipif(not NATIVE, reason="no native code here")
@pytest.mark.parametrize("n_tokens", [0, 1, 1024, 1025])
@pytest.mark.parametrize("k_total", [0, 1, 3000])
def test_blocks_of_rows(n_tokens, k_total):
    check_native(*draw(n_tokens, 5, 600), k_total, None)


@pytest.mark.skipif(not NATIVE, reason="no native code here")
def test_a_guess_too_high_is_mended(small_steps):
    """The sampled tokens are far larger than the others, which are wanted too."""
    x, *weights = draw(40, 8, 300)
    x[torch.linspace(0, 39, 4).long()] *= 100
    check_native(x, *weights, 2000, None)


def test_tied_entries_are_not_hoarded(small_steps):
    """All equal: the first latents of the first tokens win, and no more than a few times k_total are ever held."""
    found = largest.LargestOfBatch(10)
    held = []
    for start in range(0, 1000, 20):
        places = torch.arange(start, start + 20)
        found.add(places // 7, (places % 7).int(), torch.ones(20), torch.ones(20))
        held.append(found._held)
    assert max(held) <= 10 + 16 + 20
    _, latents, offsets = found.result(torch.empty(200, 1))
    assert latents.tolist() == [0, 1, 2, 3, 4, 5, 6, 0, 1, 2]
    assert offsets[:4].tolist() == [0, 7, 10, 10]


@each
@pytest.mark.parametrize("scaled", [False, True], ids=["plain", "scaled"])
def test_matches_the_dense_formula(backend, dtype, scaled):
    with backend.active():
        inputs = draw(37, 33, 199, dtype)
        scale = torch.rand(199) + 0.5 if scaled else None
        codes = ops.encode_batch_topk(inputs[0], inputs[1].T, inputs[2], 3.7, b_dec=inputs[3], scale=scale)
        exact = (t.double() for t in inputs)
        _, indices, offsets = reference.encode_batch_topk(*exact, int(37 * 3.7), scale)
        # Rounding may decide at the last place itself: no random draw lies there.
        assert codes.offsets.equal(offsets)
        assert codes.indices.equal(indices)
        assert codes.nnz == int(37 * 3.7)
        assert codes.dtype == dtype
        tokens = codes.tokens()

        def formula(x, w_enc, b_enc, b_dec):
            return ((x - b_dec) @ w_enc.T + b_enc)[tokens, indices.long()]

        assert_accurate(codes.values, formula, *inputs)


@each
def test_gradients(backend, dtype):
    with backend.active():
        x, w_enc, b_enc, b_dec = draw(19, 20, 70, dtype)
        codes = ops.encode_batch_topk(x, w_enc.T, b_enc, 4, b_dec=b_dec)
        g, tokens, latents = torch.randn_like(codes.values), codes.tokens(), codes.indices.long()
        inputs = x, w_enc.T, b_enc, b_dec

        def ours(x, W_enc, b_enc, b_dec):
            return ops.encode_batch_topk(x, W_enc, b_enc, 4, b_dec=b_dec).values

        def dense(x, W_enc, b_enc, b_dec):
            return ((x - b_dec) @ W_enc + b_enc)[tokens, latents]

        actual = gradients(ours, inputs, g)
        assert_accurate(actual, lambda *inputs: gradients(dense, inputs[:4], inputs[4]), *inputs, g)


def test_gradcheck_and_opcheck():
    inputs = [t.double().requires_grad_() for t in draw(5, 4, 9)]
    assert torch.autograd.gradcheck(lambda *inputs: encode_batch_topk_op(*inputs, 11, None)[0], inputs)
    arguments = [t.requires_grad_() for t in draw(5, 4, 9)]
    torch.library.opcheck(encode_batch_topk_op, (*arguments, 11, torch.rand(9) + 0.5))
    torch.library.opcheck(encode_batch_topk_op, (*arguments[:2], None, None, 11, None))


@each
def test_only_the_positive_are_kept(backend, dtype):
    with backend.active():
        x = torch.tensor([[1.0], [-1.0], [2.0]]).to(dtype)
        codes = ops.encode_batch_topk(x, torch.ones(1, 6).to(dtype), None, 5)
        assert codes.offsets.tolist() == [0, 6, 6, 12]
        assert codes.indices.tolist() == [*range(6)] * 2
        assert ops.encode_batch_topk(-x.abs(), torch.ones(1, 6).to(dtype), None, 5).nnz == 0
        # Three of the twelve tie at 1: the lowest latents of the lower token.
        codes = ops.encode_batch_topk(x, torch.ones(1, 6).to(dtype), None, 3)
        assert codes.offsets.tolist() == [0, 3, 3, 9]
        assert codes.indices.tolist() == [0, 1, 2, *range(6)]


@each
def test_a_bad_token_takes_nothing_from_the_others(backend, dtype):
    with backend.active():
        x, w_enc, b_enc, _ = draw(6, 8, 300, dtype)
        others = torch.tensor([0, 1, 3, 5])
        x[2, 3], x[4, 1] = torch.nan, torch.inf
        codes = ops.encode_batch_topk(x, w_enc.T, b_enc, 5)
        assert codes.rows(2).values.isnan().all()
        assert codes.rows(2).nnz == 300
        assert not codes.rows(4).values.isfinite().any()
        alone = ops.encode_batch_topk(x[others], w_enc.T, b_enc, 7.5)
        assert codes.rows(others).nnz == alone.nnz == 30
        assert_same_bits(codes.rows(others).indices, alone.indices)


@each
@pytest.mark.parametrize("leading", [(), (0,), (2, 0, 3), (2, 3)], ids=str)
def test_leading_dimensions_and_strides(backend, dtype, leading):
    with backend.active():
        _, w_enc, b_enc, b_dec = draw(1, 8, 300, dtype)
        x = torch.randn(*leading, 8).to(dtype)
        codes = ops.encode_batch_topk(x, w_enc.T, b_enc, 4, b_dec=b_dec)
        assert codes.shape == (*leading, 300)
        assert codes.nnz == 4 * x.numel() // 8
        strided = torch.stack([x, x], dim=-1)[..., 0]
        same = ops.encode_batch_topk(strided, w_enc.T.contiguous(), b_enc, 4, b_dec=b_dec)
        assert same.indices.equal(codes.indices)
        assert same.offsets.equal(codes.offsets)


def test_same_bits_with_any_number_of_threads(native):
    arguments = *draw(199, 24, 700), 1500, None
    threads = torch.get_num_threads()
    try:
        results = []
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            results.append(encode_batch_topk_op(*arguments))
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        assert_same(other, results[0])


def test_blocks_of_the_torch_backend(monkeypatch, small_steps):
    arguments = *draw(37, 5, 64), 100, None
    monkeypatch.setattr(torch_backend, "_BLOCK_ELEMENTS", 64 * 10)
    assert_same(torch_backend.encode_batch_topk(*arguments), reference.encode_batch_topk(*arguments))


@pytest.mark.parametrize("k", [0, -1, 31, float("nan"), float("inf")])
def test_bad_k_is_named(k):
    x, w_enc, b_enc, _ = draw(3, 8, 30)
    with pytest.raises(ValueError, match="expected 0 < k <= d_sae = 30"):
        ops.encode_batch_topk(x, w_enc.T, b_enc, k)


def test_bad_input():
    x, w_enc, b_enc, _ = draw(3, 8, 30)
    with pytest.raises(TypeError, match="k is '3': expected a number"):
        ops.encode_batch_topk(x, w_enc.T, b_enc, "3")
    with pytest.raises(ValueError, match=r"scale has shape \(29,\): expected \[30\]"):
        ops.encode_batch_topk(x, w_enc.T, b_enc, 3, scale=torch.ones(29))
    with pytest.raises(TypeError, match=r"scale has dtype torch.int64"):
        ops.encode_batch_topk(x, w_enc.T, b_enc, 3, scale=torch.ones(30, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"x has shape \(3, 8\) and W_enc \(7, 30\)"):
        ops.encode_batch_topk(x, w_enc.T[:7], b_enc, 3)
