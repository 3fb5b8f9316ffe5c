"""decode against the dense product, on every backend, instruction set and dtype; its gradients."""

import pytest
import torch

from fastsae import SparseCodes, ops
from fastsae.ops.decode import decode_op
from fastsae.testing import assert_accurate, assert_same_bits, gradients, random_codes

# Fixed k and CSR; widths off and on the sixteen lanes, token counts off the four rows that are gathered at once.
SHAPES = [(1, 5, 1, 1), (37, 150, 5, 40), (19, 300, 33, 64), (33, 70, None, 40), (9, 20, None, 7)]


def dense(codes):
    def formula(values, W_dec, b_dec):
        y = codes.with_values(values).to_dense() @ W_dec
        return y if b_dec is None else y + b_dec

    return formula


def draw(shape, dtype, with_bias=True):
    n_tokens, d_sae, k, d_out = shape
    codes = random_codes(n_tokens, d_sae, k, dtype=dtype)
    b_dec = torch.randn(d_out).to(dtype) if with_bias else None
    return codes, torch.randn(d_sae, d_out).to(dtype), b_dec


@pytest.mark.parametrize("with_bias", [True, False], ids=["bias", "no_bias"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_matches_the_dense_product(dtype, shape, with_bias):
    codes, W_dec, b_dec = draw(shape, dtype, with_bias)
    actual = ops.decode(codes, W_dec, b_dec)
    assert actual.dtype == dtype
    assert_accurate(actual, dense(codes), codes.values, W_dec, b_dec)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_gradients(dtype, shape):
    codes, W_dec, b_dec = draw(shape, dtype)
    g = torch.randn(shape[0], shape[3]).to(dtype)
    inputs = codes.values, W_dec, b_dec
    actual = gradients(lambda values, W, b: ops.decode(codes.with_values(values), W, b), inputs, g)
    assert_accurate(actual, lambda *inputs: gradients(dense(codes), inputs[:3], inputs[3]), *inputs, g)


@pytest.mark.parametrize("k", [3, None], ids=["fixed_k", "csr"])
def test_gradcheck(k):
    codes = random_codes(5, 8, k, dtype=torch.float64)
    inputs = [codes.values, torch.randn(8, 3, dtype=torch.float64), torch.randn(3, dtype=torch.float64)]
    inputs = [t.requires_grad_() for t in inputs]

    def function(values, W_dec, b_dec):
        return decode_op(values, codes.indices, codes.offsets, W_dec, b_dec)

    assert torch.autograd.gradcheck(function, inputs)
    assert torch.autograd.gradgradcheck(function, inputs)


def test_codes_that_share_indices_but_not_offsets(backend):
    """The transposition that the backward keeps is that of these offsets, not of the last ones."""
    values, indices = torch.randn(6), torch.tensor([0, 1, 2, 1, 0, 2], dtype=torch.int32)
    W_dec = torch.zeros(3, 4, requires_grad=True)
    g = torch.arange(8.0).reshape(2, 4)
    for split in (1, 3, 5):
        codes = SparseCodes(values, indices, 3, offsets=torch.tensor([0, split, 6]))
        (actual,) = torch.autograd.grad(ops.decode(codes, W_dec), W_dec, g)
        torch.testing.assert_close(actual, codes.to_dense().T @ g)


def test_indices_changed_in_place(backend):
    """A new version of the same memory is transposed anew."""
    codes = random_codes(4, 6, 2)
    W_dec = torch.zeros(6, 3, requires_grad=True)
    g = torch.randn(4, 3)
    for _ in range(2):
        (actual,) = torch.autograd.grad(ops.decode(codes, W_dec), W_dec, g)
        torch.testing.assert_close(actual, codes.to_dense().T @ g)
        codes.indices.copy_((codes.indices + 1) % 6)


def test_an_entry_stored_twice_counts_twice(dtype):
    codes = SparseCodes(torch.tensor([[2.0, 3.0, 1.0]]).to(dtype), torch.tensor([[1, 1, 0]]), 2)
    W_dec = torch.tensor([[1.0, 10.0], [100.0, 1000.0]]).to(dtype)
    assert_same_bits(ops.decode(codes, W_dec), torch.tensor([[501.0, 5010.0]]).to(dtype))


def test_strides(dtype):
    """Row-major, transposed, sliced and expanded weights give one result."""
    codes, W_dec, b_dec = draw((13, 30, 4, 24), dtype)
    expected = ops.decode(codes, W_dec, b_dec)
    padded = torch.zeros(30, 50, dtype=dtype)
    padded[:, 10:34] = W_dec
    for same in (W_dec.T.contiguous().T, padded[:, 10:34], W_dec.repeat_interleave(2, dim=1)[:, ::2]):
        assert_same_bits(ops.decode(codes, same, b_dec), expected)
    one_row = W_dec[:1].expand(30, 24)
    assert_same_bits(ops.decode(codes, one_row, b_dec), ops.decode(codes, one_row.contiguous(), b_dec))
    strided = codes.values.T.contiguous().T
    assert_same_bits(ops.decode(codes.with_values(strided), W_dec, b_dec), expected)


@pytest.mark.parametrize("leading", [(), (0,), (2, 0, 3), (1,), (2, 3, 2)], ids=str)
def test_leading_dimensions(dtype, leading):
    n_tokens = torch.Size(leading).numel()
    codes = random_codes(n_tokens, 20, 3, dtype=dtype)
    shaped = SparseCodes(codes.values, codes.indices, 20, leading_shape=leading)
    W_dec = torch.randn(20, 5).to(dtype)
    y = ops.decode(shaped, W_dec)
    assert y.shape == (*leading, 5)
    assert_same_bits(y.reshape(-1, 5), ops.decode(codes, W_dec).reshape(-1, 5))


def test_tokens_without_entries_are_the_bias(dtype):
    codes = SparseCodes(torch.ones(1, dtype=dtype), torch.tensor([3]), 5, offsets=torch.tensor([0, 0, 1, 1, 1]))
    W_dec, b_dec = torch.randn(5, 20).to(dtype), torch.randn(20).to(dtype)
    y = ops.decode(codes, W_dec, b_dec)
    assert_same_bits(y[[0, 2, 3]], b_dec.expand(3, 20))


def test_nan_stays_in_its_token(dtype):
    codes, W_dec, _ = draw((6, 30, 4, 24), dtype)
    clean = ops.decode(codes, W_dec)
    values = codes.values.clone()
    values[2, 1], values[4, 0] = torch.nan, torch.inf
    y = ops.decode(codes.with_values(values), W_dec)
    assert y[2].isnan().all()
    assert not y[4].isfinite().any()
    assert_same_bits(y[[0, 1, 3, 5]], clean[[0, 1, 3, 5]])
