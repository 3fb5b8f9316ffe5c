"""encode_groupmax: to the bit on native code, against the dense formula elsewhere; ties, zeros, gradients."""

import os
from unittest import mock

import hypothesis
import pytest
import torch
from hostile import W_FAULTS, X_FAULTS, problems, spoil_w, spoil_x

from fastsae import ops, reference
from fastsae.backends import dispatch
from fastsae.backends import torch as torch_backend
from fastsae.ops.encode_groupmax import encode_groupmax_op
from fastsae.testing import assert_accurate, assert_same_bits, backends, defined_encode_topk, gradients

NATIVE = [backend for backend in backends() if backend.isa]
SCREENS = ("float32", "bfloat16")


def serves(backend):
    why_not = dispatch.BACKENDS[backend.name].why_not
    return not why_not("encode_groupmax", torch.device(backend.device), torch.float32)


CASES = [(backend, dtype) for backend in filter(serves, backends()) for dtype in backend.dtypes]
each = pytest.mark.parametrize(("backend", "dtype"), CASES, ids=lambda case: str(case))


def defined(x, w_enc, b_enc, b_dec, k):
    """The one largest of each group, relu first."""
    size = len(w_enc) // k
    parts = []
    for first in range(0, k * size, size):
        bias = None if b_enc is None else b_enc[first : first + size]
        values, indices = defined_encode_topk(x, w_enc[first : first + size], bias, b_dec, 1, True)
        parts.append((values, indices + first))
    return tuple(torch.cat(columns, dim=1) for columns in zip(*parts, strict=True))


def check_native(*arguments):
    expected = defined(*arguments)
    for backend in NATIVE:
        for screen in SCREENS:
            with backend.active(), mock.patch.dict(os.environ, FASTSAE_SCREEN=screen):
                for found, right in zip(encode_groupmax_op(*arguments), expected, strict=True):
                    assert_same_bits(found, right)


def draw(n_tokens, d_in, d_sae, dtype=torch.float32):
    x, w_enc = torch.randn(n_tokens, d_in).to(dtype), torch.randn(d_sae, d_in).to(dtype)
    return x, w_enc, torch.randn(d_sae).to(dtype), torch.randn(d_in).to(dtype)


@pytest.mark.skipif(not NATIVE, reason="no native code here")
@hypothesis.given(problems([torch.float32, torch.bfloat16]), hypothesis.strategies.sampled_from([1, 2, 5]))
def test_native_code_matches_the_definition_to_the_bit(problem, groups):
    x, w_enc, b_enc, b_dec, _, _ = problem.arguments
    size = len(w_enc) // groups
    hypothesis.assume(size)
    check_native(x, w_enc[: groups * size], b_enc if b_enc is None else b_enc[: groups * size], b_dec, groups)


@pytest.mark.skipif(not NATIVE, reason="no native code here")
@pytest.mark.parametrize("fault", [*(f"x {f}" for f in X_FAULTS), *(f"w {f}" for f in W_FAULTS)])
def test_faults(fault):
    x, w_enc, b_enc, b_dec = draw(9, 24, 600)
    where, _, how = fault.partition(" ")
    spoil_x(x, how, 4) if where == "x" else spoil_w(w_enc, how, 17)
    check_native(x, w_enc, b_enc, b_dec, 2)


@each
def test_matches_the_dense_formula(backend, dtype):
    with backend.active():
        inputs = draw(37, 33, 200, dtype)
        codes = ops.encode_groupmax(inputs[0], inputs[1].T, inputs[2], 8, b_dec=inputs[3])
        _, indices = reference.encode_groupmax(*(t.double() for t in inputs), 8)
        assert codes.indices.equal(indices)
        assert (indices // 25).equal(torch.arange(8, dtype=torch.int32).expand(37, 8))

        def formula(x, w_enc, b_enc, b_dec):
            return ((x - b_dec) @ w_enc.T + b_enc).relu().gather(1, indices.long())

        assert_accurate(codes.values, formula, *inputs)


@each
def test_gradients(backend, dtype):
    """An entry of value 0 sends nothing back."""
    with backend.active():
        x, w_enc, b_enc, b_dec = draw(19, 20, 70, dtype)
        b_enc = b_enc - 8
        codes = ops.encode_groupmax(x, w_enc.T, b_enc, 35, b_dec=b_dec)
        assert 0.2 < (codes.values == 0).float().mean() < 1
        g, latents = torch.randn_like(codes.values), codes.indices.long()
        inputs = x, w_enc.T, b_enc, b_dec

        def ours(x, W_enc, b_enc, b_dec):
            return ops.encode_groupmax(x, W_enc, b_enc, 35, b_dec=b_dec).values

        def dense(x, W_enc, b_enc, b_dec):
            return ((x - b_dec) @ W_enc + b_enc).relu().gather(1, latents)

        actual = gradients(ours, inputs, g)
        assert_accurate(actual, lambda *inputs: gradients(dense, inputs[:4], inputs[4]), *inputs, g)


def test_opcheck():
    arguments = [t.requires_grad_() for t in draw(5, 4, 12)]
    torch.library.opcheck(encode_groupmax_op, (*arguments, 3))
    torch.library.opcheck(encode_groupmax_op, (*arguments[:2], None, None, 4))


@each
@pytest.mark.parametrize("leading", [(), (0,), (2, 3)], ids=str)
def test_zeros_ties_and_leading_dimensions(backend, dtype, leading):
    with backend.active():
        x = torch.ones(*leading, 1).to(dtype)
        W_enc = torch.tensor([[-1.0, -2, -1, 3, 3, 2]]).to(dtype)
        codes = ops.encode_groupmax(x, W_enc, None, 2)
        assert codes.shape == (*leading, 6)
        assert codes.indices.tolist() == [[0, 3]] * codes.n_tokens
        assert codes.values.tolist() == [[0.0, 3.0]] * codes.n_tokens


def test_blocks_of_the_torch_backend(monkeypatch):
    arguments = *draw(37, 5, 64), 4
    monkeypatch.setattr(torch_backend, "_BLOCK_ELEMENTS", 64 * 10)
    for found, right in zip(
        torch_backend.encode_groupmax(*arguments), reference.encode_groupmax(*arguments), strict=True
    ):
        assert_same_bits(found, right)


@pytest.mark.parametrize(("k", "message"), [(0, "k = 0"), (31, "k = 31"), (4, "k = 4: expected a number of groups")])
def test_bad_k_is_named(k, message):
    x, w_enc, b_enc, _ = draw(3, 8, 30)
    with pytest.raises(ValueError, match=message):
        ops.encode_groupmax(x, w_enc.T, b_enc, k)
