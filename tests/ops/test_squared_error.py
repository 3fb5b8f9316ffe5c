"""squared_error against the dense reconstruction and its difference from the target; its gradients."""

import pytest
import torch

from fastsae import SparseCodes, ops
from fastsae.ops.squared_error import squared_error_op
from fastsae.testing import assert_accurate, assert_same_bits, gradients, random_codes

SHAPES = [(1, 5, 1, 1), (37, 150, 5, 40), (19, 300, 33, 64), (33, 70, None, 40), (9, 20, None, 7)]


def dense(codes):
    def formula(values, W_dec, b_dec, target):
        y = codes.with_values(values).to_dense() @ W_dec
        residual = (y if b_dec is None else y + b_dec) - target
        return residual, residual.square().sum(dim=-1)

    return formula


def fused(codes):
    return lambda values, W_dec, b_dec, target: ops.squared_error(codes.with_values(values), W_dec, b_dec, target)


def draw(shape, dtype, with_bias=True):
    n_tokens, d_sae, k, d_out = shape
    codes = random_codes(n_tokens, d_sae, k, dtype=dtype)
    b_dec = torch.randn(d_out).to(dtype) if with_bias else None
    return codes, (
        codes.values,
        torch.randn(d_sae, d_out).to(dtype),
        b_dec,
        torch.randn(n_tokens, d_out).to(dtype),
    )


@pytest.mark.parametrize("with_bias", [True, False], ids=["bias", "no_bias"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_matches_the_dense_formula(dtype, shape, with_bias):
    codes, inputs = draw(shape, dtype, with_bias)
    residual, squared = fused(codes)(*inputs)
    assert residual.dtype == dtype
    assert squared.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert_accurate((residual, squared), dense(codes), *inputs)


# Through the norms alone a row scale goes into the kernels; through the residual too, one tensor is made.
@pytest.mark.parametrize("through", ["norms", "residual", "both"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_gradients(dtype, shape, through):
    codes, inputs = draw(shape, dtype)
    chosen = {"norms": slice(1, 2), "residual": slice(0, 1), "both": slice(0, 2)}[through]
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    upstream = (torch.randn(shape[0], shape[3]).to(dtype), torch.randn(shape[0], dtype=wide))[chosen]

    def backward(formula):
        return lambda *inputs: gradients(lambda *a: formula(codes)(*a)[chosen], inputs[:4], *inputs[4:])

    assert_accurate(backward(fused)(*inputs, *upstream), backward(dense), *inputs, *upstream)


@pytest.mark.parametrize("missing", range(4))
def test_gradients_of_some_inputs_only(backend, missing):
    """What one input's gradient is does not hang on whether another's is wanted."""
    codes, inputs = draw((9, 20, 3, 12), torch.float32)
    leaves = [t.clone().requires_grad_(i != missing) for i, t in enumerate(inputs)]
    _, squared = fused(codes)(*leaves)
    squared.mean().backward()
    expected = list(gradients(lambda *a: fused(codes)(*a)[1].mean(), inputs, torch.ones(())))
    for i, leaf in enumerate(leaves):
        if i == missing:
            assert leaf.grad is None
        else:
            assert_same_bits(leaf.grad, expected[i])


@pytest.mark.parametrize("k", [3, None], ids=["fixed_k", "csr"])
def test_gradcheck(k):
    codes, inputs = draw((5, 8, k, 4), torch.float64)
    inputs = [t.clone().requires_grad_() for t in inputs]

    def function(values, *rest):
        return squared_error_op(values, codes.indices, codes.offsets, *rest)

    assert torch.autograd.gradcheck(function, inputs)
    assert torch.autograd.gradgradcheck(function, inputs)


@pytest.mark.parametrize("leading", [(), (0,), (2, 3, 2)], ids=str)
def test_leading_dimensions_and_strides(dtype, leading):
    n_tokens = torch.Size(leading).numel()
    codes, (values, W_dec, b_dec, target) = draw((n_tokens, 20, 3, 18), dtype)
    expected = ops.squared_error(codes, W_dec, b_dec, target)
    shaped = SparseCodes(values, codes.indices, 20, leading_shape=leading)
    padded = torch.zeros(*leading, 30, dtype=dtype)
    padded[..., 5:23] = target.reshape(*leading, 18)
    residual, squared = ops.squared_error(shaped, W_dec.T.contiguous().T, b_dec, padded[..., 5:23])
    assert residual.shape == (*leading, 18)
    assert squared.shape == leading
    assert_same_bits(residual.reshape(-1, 18), expected[0])
    assert_same_bits(squared.reshape(-1), expected[1])


def test_agrees_with_decode(dtype):
    """The residual is decode's result less the target, rounded once."""
    codes, (_, W_dec, b_dec, target) = draw((19, 60, 7, 33), dtype)
    residual, _ = ops.squared_error(codes, W_dec, b_dec, torch.zeros_like(target))
    assert_same_bits(residual, ops.decode(codes, W_dec, b_dec))


def test_nan_stays_in_its_token(dtype):
    codes, (values, W_dec, b_dec, target) = draw((6, 30, 4, 24), dtype)
    clean = ops.squared_error(codes, W_dec, b_dec, target)
    target[1, 3] = torch.inf
    values[4, 0] = torch.nan
    residual, squared = ops.squared_error(codes, W_dec, b_dec, target)
    assert squared[1] == torch.inf
    assert squared[4].isnan()
    others = [0, 2, 3, 5]
    assert_same_bits(residual[others], clean[0][others])
    assert_same_bits(squared[others], clean[1][others])
