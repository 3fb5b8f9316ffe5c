"""sampled_dot against the dense product read at the codes' places; on native code, against the defined dot product."""

import pytest
import torch

from fastsae import SparseCodes, ops
from fastsae.ops.sampled_dot import sampled_dot_op
from fastsae.testing import assert_accurate, assert_same_bits, defined_dot, gradients, random_codes

# Widths off and on the sixteen lanes; more than 64 entries a token is more than one block of the kernel.
SHAPES = [(1, 5, 1, 1), (37, 150, 5, 40), (5, 300, 130, 33), (19, 300, None, 64), (9, 20, None, 7)]


def dense(codes):
    """All of g W_decᵀ, then the places of the codes, each row times its scale."""
    tokens, latents = codes.tokens().reshape(-1), codes.indices.reshape(-1).long()

    def formula(g, W_dec, row_scale=None):
        product = g @ W_dec.T
        if row_scale is not None:
            product = product * row_scale[:, None]
        return product[tokens, latents].reshape(codes.indices.shape)

    return formula


def draw(shape, dtype):
    n_tokens, d_sae, k, d_out = shape
    codes = random_codes(n_tokens, d_sae, k, dtype=dtype)
    return codes, torch.randn(n_tokens, d_out).to(dtype), torch.randn(d_sae, d_out).to(dtype)


def scaled_op(codes):
    return lambda g, W_dec, row_scale: sampled_dot_op(g, codes.indices, codes.offsets, W_dec, row_scale)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_matches_the_dense_product(dtype, shape):
    codes, g, W_dec = draw(shape, dtype)
    actual = ops.sampled_dot(g, codes, W_dec)
    assert actual.dtype == dtype
    assert_accurate(actual, dense(codes), g, W_dec)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_native_values_to_the_bit(native, shape):
    for dtype in native.dtypes:
        codes, g, W_dec = draw(shape, dtype)
        everywhere = defined_dot(g, W_dec)
        expected = everywhere[codes.tokens().reshape(-1), codes.indices.reshape(-1).long()]
        actual = ops.sampled_dot(g, codes, W_dec)
        assert_same_bits(actual.reshape(-1), expected.to(dtype))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_row_scale_and_gradients(dtype, shape):
    """As squared_error's backward calls it: each token's dot products times one number."""
    codes, g, W_dec = draw(shape, dtype)
    row_scale = torch.randn(shape[0]).to(dtype)
    upstream = torch.randn(codes.indices.shape).to(dtype)
    inputs = g, W_dec, row_scale
    assert_accurate(scaled_op(codes)(*inputs), dense(codes), *inputs)
    actual = gradients(scaled_op(codes), inputs, upstream)
    assert_accurate(actual, lambda *inputs: gradients(dense(codes), inputs[:3], inputs[3]), *inputs, upstream)


@pytest.mark.parametrize("k", [3, None], ids=["fixed_k", "csr"])
def test_gradcheck(k):
    codes = random_codes(5, 8, k)
    inputs = [torch.randn(shape, dtype=torch.float64).requires_grad_() for shape in ((5, 4), (8, 4), (5,))]
    assert torch.autograd.gradcheck(scaled_op(codes), inputs)
    assert torch.autograd.gradgradcheck(scaled_op(codes), inputs)


@pytest.mark.parametrize("leading", [(), (0,), (2, 3, 2)], ids=str)
def test_leading_dimensions_and_strides(dtype, leading):
    n_tokens = torch.Size(leading).numel()
    codes, g, W_dec = draw((n_tokens, 20, 3, 18), dtype)
    shaped = SparseCodes(codes.values, codes.indices, 20, leading_shape=leading)
    expected = ops.sampled_dot(g, codes, W_dec)
    padded = torch.zeros(*leading, 30, dtype=dtype)
    padded[..., 5:23] = g.reshape(*leading, 18)
    actual = ops.sampled_dot(padded[..., 5:23], shaped, W_dec.T.contiguous().T)
    assert_same_bits(actual, expected)


def test_nan_stays_in_its_token(dtype):
    codes, g, W_dec = draw((6, 30, 4, 24), dtype)
    clean = ops.sampled_dot(g, codes, W_dec)
    g[3, 7] = torch.nan
    out = ops.sampled_dot(g, codes, W_dec)
    assert out[3].isnan().all()
    others = [0, 1, 2, 4, 5]
    assert_same_bits(out[others], clean[others])


def test_gradient_of_the_scale_keeps_tokens_apart(backend):
    """NaN of one token must not reach the scales of those after it."""
    codes, g, W_dec = draw((8, 30, None, 24), torch.float32)
    g[4, 0] = torch.nan
    upstream = torch.ones(codes.nnz)
    _, _, actual = gradients(scaled_op(codes), (g, W_dec, torch.ones(8)), upstream)
    assert actual.isnan().nonzero().flatten().tolist() == [4]
