"""accumulate_rows against the dense product codesᵀ g, with the shift and the scale of the backward passes."""

import pytest
import torch

from fastsae import SparseCodes, ops
from fastsae.ops.accumulate_rows import accumulate_rows_op
from fastsae.testing import assert_accurate, assert_same_bits, gradients, random_codes

# 350 entries a latent in the third, 133 in the fourth: more than the blocks in which they are summed.
COSTLY = pytest.param((700, 40, 20, 33), marks=pytest.mark.costly)
SHAPES = [(1, 5, 1, 1), (37, 150, 5, 40), COSTLY, (200, 3, 2, 33), (33, 70, None, 64), (9, 20, None, 7)]
EXTRAS = {"plain": (), "shift": ("shift",), "scale": ("scale",), "both": ("shift", "scale")}


def dense(codes):
    """(codes scaled by row)ᵀ (g - shift), and the sums of the scaled codes over tokens."""

    def formula(values, g, shift, row_scale):
        weights = codes.with_values(values).to_dense()
        weights = weights if row_scale is None else weights * row_scale[:, None]
        return weights.T @ (g if shift is None else g - shift), weights.sum(dim=0)

    return formula


def fused(codes):
    latent_major = ops.transpose(codes)
    return lambda values, g, shift, row_scale: accumulate_rows_op(values, *latent_major, g, shift, row_scale)


def draw(shape, dtype, extras=("shift", "scale")):
    n_tokens, d_sae, k, d = shape
    codes = random_codes(n_tokens, d_sae, k, dtype=dtype)
    shift = torch.randn(d).to(dtype) if "shift" in extras else None
    row_scale = torch.randn(n_tokens).to(dtype) if "scale" in extras else None
    return codes, (codes.values, torch.randn(n_tokens, d).to(dtype), shift, row_scale)


@pytest.mark.parametrize("extras", EXTRAS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_matches_the_dense_product(dtype, shape, extras):
    codes, inputs = draw(shape, dtype, EXTRAS[extras])
    out, sums = fused(codes)(*inputs)
    assert out.dtype == sums.dtype == dtype
    assert_accurate((out, sums), dense(codes), *inputs)
    if extras == "plain":
        assert_same_bits(ops.accumulate_rows(codes, inputs[1]), out)


@pytest.mark.parametrize("extras", EXTRAS)
@pytest.mark.parametrize("shape", SHAPES[1:], ids=str)
def test_gradients(dtype, shape, extras):
    codes, inputs = draw(shape, dtype, EXTRAS[extras])
    upstream = torch.randn(shape[1], shape[3]).to(dtype), torch.randn(shape[1]).to(dtype)

    def backward(formula):
        return lambda *inputs: gradients(formula(codes), inputs[:4], *inputs[4:])

    assert_accurate(backward(fused)(*inputs, *upstream), backward(dense), *inputs, *upstream)


@pytest.mark.parametrize("k", [3, None], ids=["fixed_k", "csr"])
def test_gradcheck(k):
    codes, inputs = draw((5, 8, k, 4), torch.float64)
    inputs = [t.clone().requires_grad_() for t in inputs]
    assert torch.autograd.gradcheck(fused(codes), inputs)
    assert torch.autograd.gradgradcheck(fused(codes), inputs)


def test_a_latent_of_thousands_of_entries_keeps_its_accuracy(dtype):
    """Sums of one sign over 5,000 tokens: one chain of float32 additions would be several times worse than a GEMM."""
    n_tokens = 5000
    codes = SparseCodes(torch.rand(n_tokens, 1).to(dtype), torch.zeros(n_tokens, 1, dtype=torch.int32), 2)
    g = torch.rand(n_tokens, 20).to(dtype)
    inputs = codes.values, g, None, None
    assert_accurate(fused(codes)(*inputs), dense(codes), *inputs)


def test_latents_without_entries_are_zero(dtype):
    codes = SparseCodes(torch.ones(2, 1, dtype=dtype), torch.tensor([[3], [3]]), 6)
    out = ops.accumulate_rows(codes, torch.ones(2, 17, dtype=dtype))
    assert_same_bits(out, torch.tensor([0, 0, 0, 2, 0, 0], dtype=dtype)[:, None].expand(6, 17))


@pytest.mark.parametrize("leading", [(), (0,), (2, 3, 2)], ids=str)
def test_leading_dimensions_and_strides(dtype, leading):
    n_tokens = torch.Size(leading).numel()
    codes, (values, g, _, _) = draw((n_tokens, 20, 3, 18), dtype)
    shaped = SparseCodes(values, codes.indices, 20, leading_shape=leading)
    padded = torch.zeros(*leading, 30, dtype=dtype)
    padded[..., 5:23] = g.reshape(*leading, 18)
    assert_same_bits(ops.accumulate_rows(shaped, padded[..., 5:23]), ops.accumulate_rows(codes, g))


def test_nan_reaches_only_its_latents(dtype):
    codes = SparseCodes(torch.ones(3, 1, dtype=dtype), torch.tensor([[0], [1], [2]]), 3)
    g = torch.ones(3, 20, dtype=dtype)
    g[1] = torch.nan
    out = ops.accumulate_rows(codes, g)
    assert out[1].isnan().all()
    assert_same_bits(out[[0, 2]], torch.ones(2, 20, dtype=dtype))
