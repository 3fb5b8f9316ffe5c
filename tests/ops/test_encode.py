"""encode_topk: values and gradients against the dense formula, on every backend, instruction set and dtype.

Which latents are selected, to the bit and on hostile inputs, is in test_encode_selection.py.
"""

import pytest
import torch

from fastsae import ops, reference
from fastsae.ops.encode import encode_topk_op
from fastsae.testing import assert_accurate, assert_same_bits, gradients

# (n_tokens, d_in, d_sae, k): sizes off every block, k = 1 and k = d_sae; from 256 latents on, native code screens.
SHAPES = [(1, 1, 1, 1), (37, 16, 300, 5), (19, 33, 600, 1), (5, 20, 40, 40), (33, 7, 513, 64)]
COSTLY = pytest.param(SHAPES[-1], marks=pytest.mark.costly)
BIASES = {"no_bias": (), "b_enc": ("b_enc",), "b_dec": ("b_dec",), "both": ("b_enc", "b_dec")}


def draw(shape, dtype, biases=("b_enc", "b_dec")):
    n_tokens, d_in, d_sae, _ = shape
    return (
        torch.randn(n_tokens, d_in).to(dtype),
        torch.randn(d_sae, d_in).to(dtype).T,
        torch.randn(d_sae).to(dtype) if "b_enc" in biases else None,
        torch.randn(d_in).to(dtype) if "b_dec" in biases else None,
    )


def encode(k, **options):
    return lambda x, W_enc, b_enc, b_dec: ops.encode_topk(x, W_enc, b_enc, k, b_dec=b_dec, **options).values


def dense(indices):
    """The dense pre-activations at the places that were selected."""

    def formula(x, W_enc, b_enc, b_dec):
        pre = (x if b_dec is None else x - b_dec) @ W_enc
        return (pre if b_enc is None else pre + b_enc).gather(1, indices.long())

    return formula


@pytest.mark.parametrize("biases", BIASES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_values_are_the_dense_preactivations(dtype, shape, biases):
    inputs = draw(shape, dtype, BIASES[biases])
    codes = ops.encode_topk(*inputs[:3], shape[3], b_dec=inputs[3])
    assert codes.values.shape == codes.indices.shape == (shape[0], shape[3])
    assert codes.values.dtype == dtype
    assert codes.indices.dtype == torch.int32
    assert codes.d_sae == shape[2]
    assert_accurate(codes.values, dense(codes.indices), *inputs)


@pytest.mark.parametrize("relu_first", [False, True])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_selects_as_the_reference_does_where_sums_are_exact(dtype, shape, relu_first):
    """Small integers: no product or sum rounds, ties are everywhere, so indices must agree one for one."""
    n_tokens, d_in, d_sae, k = shape
    x, w_enc = torch.randint(-3, 4, (n_tokens, d_in)), torch.randint(-1, 2, (d_sae, d_in))
    b_enc, b_dec = torch.randint(-2, 3, (d_sae,)), torch.randint(-1, 2, (d_in,))
    inputs = [t.to(dtype) for t in (x, w_enc, b_enc, b_dec)]
    values, indices = encode_topk_op(*inputs, k, relu_first)
    expected, expected_indices = reference.encode_topk(*(t.double() for t in inputs), k, relu_first)
    assert_same_bits(values, expected.to(dtype))
    assert indices.equal(expected_indices)


@pytest.mark.parametrize("biases", BIASES)
@pytest.mark.parametrize("shape", [*SHAPES[1:-1], COSTLY], ids=str)
def test_gradients(dtype, shape, biases):
    inputs = draw(shape, dtype, BIASES[biases])
    codes = ops.encode_topk(*inputs[:3], shape[3], b_dec=inputs[3])
    upstream = torch.randn(shape[0], shape[3]).to(dtype)
    actual = gradients(encode(shape[3]), inputs, upstream)

    def backward(*inputs):
        return gradients(dense(codes.indices), inputs[:4], inputs[4])

    assert_accurate(actual, backward, *inputs, upstream)


@pytest.mark.parametrize("missing", range(4))
def test_gradients_of_some_inputs_only(backend, missing):
    inputs = draw((9, 12, 300, 4), torch.float32)
    expected = gradients(encode(4), inputs, torch.ones(9, 4))
    leaves = [t.clone().requires_grad_(i != missing) for i, t in enumerate(inputs)]
    encode(4)(*leaves).sum().backward()
    for i, leaf in enumerate(leaves):
        if i == missing:
            assert leaf.grad is None
        else:
            assert_same_bits(leaf.grad, expected[i])


@pytest.mark.costly
@pytest.mark.parametrize("relu_first", [False, True])
def test_picks_that_are_zero_get_no_gradient(dtype, relu_first):
    """Negative biases leave tokens with fewer than k positive pre-activations."""
    x, W_enc, b_enc, b_dec = draw((19, 16, 300, 150), dtype)
    b_enc = b_enc - 3
    upstream = torch.ones(19, 150, dtype=dtype)
    codes = ops.encode_topk(x, W_enc, b_enc, 150, b_dec=b_dec, relu_first=relu_first)
    codes = codes if relu_first else codes.relu()
    assert (codes.values == 0).any(dim=1).all()

    def function(*inputs):
        values = encode(150, relu_first=relu_first)(*inputs)
        return values if relu_first else values.relu()

    def formula(*inputs):
        places = codes.indices.long()
        pre = (inputs[0] - inputs[3]) @ inputs[1] + inputs[2]
        return pre.gather(1, places).where(codes.values > 0, 0)

    inputs = x, W_enc, b_enc, b_dec
    assert_accurate(function(*inputs), formula, *inputs)
    assert_accurate(
        gradients(function, inputs, upstream),
        lambda *inputs: gradients(formula, inputs[:4], inputs[4]),
        *inputs,
        upstream,
    )


@pytest.mark.parametrize("relu_first", [False, True])
def test_gradcheck(relu_first):
    inputs = [t.contiguous().requires_grad_() for t in draw((4, 3, 8, 3), torch.float64)]

    def function(x, W_enc, b_enc, b_dec):
        return encode(3, relu_first=relu_first)(x, W_enc, b_enc, b_dec)

    assert torch.autograd.gradcheck(function, inputs)
    assert torch.autograd.gradgradcheck(function, inputs)


@pytest.mark.parametrize("feature_major", [True, False])
def test_gradient_strides(dtype, feature_major):
    """The gradient of a feature-major W_enc is feature-major: a latent's part of it is one contiguous row."""
    x, W_enc, b_enc, b_dec = draw((9, 12, 40, 4), dtype)
    W_enc = (W_enc if feature_major else W_enc.contiguous()).requires_grad_()
    encode(4)(x, W_enc, b_enc, b_dec).sum().backward()
    assert W_enc.grad.stride() == W_enc.stride()
    (grad,) = torch.autograd.grad(encode(4)(x, W_enc, b_enc, b_dec).sum(), W_enc)
    assert grad.T.is_contiguous()


def test_strides(dtype):
    """x sliced or transposed, W_enc row-major or padded: one result."""
    x, W_enc, b_enc, b_dec = draw((37, 24, 300, 5), dtype)
    expected = ops.encode_topk(x, W_enc, b_enc, 5, b_dec=b_dec)
    padded = torch.zeros(300, 40, dtype=dtype)
    padded[:, 3:27] = W_enc.T
    for same_x in (x.T.contiguous().T, x.repeat_interleave(2, dim=1)[:, ::2]):
        for same_w in (W_enc.contiguous(), padded[:, 3:27].T):
            codes = ops.encode_topk(same_x, same_w, b_enc.repeat_interleave(2)[::2], 5, b_dec=b_dec)
            assert codes.indices.equal(expected.indices)
            # PyTorch's GEMM may sum in another order for other strides; native code has one order.
            assert_accurate(codes.values, dense(codes.indices), x, W_enc, b_enc, b_dec)


@pytest.mark.parametrize("leading", [(), (0,), (2, 0, 3), (1,), (2, 3, 2)], ids=str)
def test_leading_dimensions(dtype, leading):
    n_tokens = torch.Size(leading).numel()
    x, W_enc, b_enc, b_dec = draw((n_tokens, 12, 300, 4), dtype)
    codes = ops.encode_topk(x.reshape(*leading, 12), W_enc, b_enc, 4, b_dec=b_dec)
    assert codes.shape == (*leading, 300)
    assert codes.n_tokens == n_tokens
    expected = ops.encode_topk(x, W_enc, b_enc, 4, b_dec=b_dec)
    assert_same_bits(codes.values, expected.values)
    assert codes.indices.equal(expected.indices)


def test_autocast_changes_nothing(dtype):
    inputs = draw((9, 12, 300, 4), dtype)
    expected = encode(4)(*inputs)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert_same_bits(encode(4)(*inputs), expected)


def test_torch_backend_takes_rows_in_blocks(monkeypatch):
    """Blocks of two rows, the last one of one, give what one block gives."""
    from fastsae.backends import torch as torch_backend

    x, w_enc = torch.randint(-3, 4, (7, 5)).float(), torch.randint(-3, 4, (40, 5)).float()
    expected = torch_backend.encode_topk(x, w_enc, None, None, 6, False)
    monkeypatch.setattr(torch_backend, "_BLOCK_ELEMENTS", 80)
    for actual, whole in zip(torch_backend.encode_topk(x, w_enc, None, None, 6, False), expected, strict=True):
        assert actual.equal(whole)
