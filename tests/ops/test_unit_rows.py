"""normalize_rows_ and project_rows_ against their formulas, in place and whatever the strides."""

import pytest
import torch

from fastsae import ops
from fastsae.testing import assert_accurate, assert_same_bits

SHAPES = [(1, 1), (37, 40), (5, 64), (3, 7), (0, 8)]


def normalized(rows):
    return rows / rows.norm(dim=1, keepdim=True)


def projected(grad, rows):
    unit = normalized(rows)
    return grad - (grad * unit).sum(dim=1, keepdim=True) * unit


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_normalize(dtype, shape):
    rows = torch.randn(shape).to(dtype)
    actual = rows.clone()
    assert ops.normalize_rows_(actual) is actual
    assert_accurate(actual, normalized, rows)


@pytest.mark.parametrize("shape", SHAPES[1:], ids=str)
def test_project(dtype, shape):
    grad, rows = torch.randn(shape).to(dtype), torch.randn(shape).to(dtype)
    actual = grad.clone()
    assert ops.project_rows_(actual, rows) is actual
    assert_accurate(actual, projected, grad, rows)


def test_rows_of_zeros(dtype):
    zeros, grad = torch.zeros(2, 20, dtype=dtype), torch.randn(2, 20).to(dtype)
    assert_same_bits(ops.normalize_rows_(zeros.clone()), zeros)
    assert_same_bits(ops.project_rows_(grad.clone(), zeros), grad)


def test_eps_bounds_the_scale(dtype):
    rows = torch.full((1, 16), 2.0**-10, dtype=dtype)
    assert_same_bits(ops.normalize_rows_(rows.clone(), eps=2.0**-4), rows * 16)


@pytest.mark.parametrize("layout", ["transposed", "sliced"])
def test_strides(dtype, layout):
    def laid_out(tensor):
        if layout == "transposed":
            return tensor.T.contiguous().T
        padded = torch.zeros(tensor.shape[0], tensor.shape[1] + 9, dtype=dtype)
        padded[:, 4:-5] = tensor
        return padded[:, 4:-5]

    rows, grad = torch.randn(19, 24).to(dtype), torch.randn(19, 24).to(dtype)
    strided_rows, strided_grad = laid_out(rows), laid_out(grad)
    ops.project_rows_(strided_grad, strided_rows)
    assert_accurate(strided_grad, projected, grad, rows)
    ops.normalize_rows_(strided_rows)
    assert_accurate(strided_rows, normalized, rows)


def test_autograd_sees_the_change(backend):
    """A tensor that a graph has saved may not be changed under it."""
    rows = torch.randn(4, 5)
    weight = torch.randn(4, 5, requires_grad=True)
    product = (weight * rows).sum()
    ops.normalize_rows_(rows)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        product.backward()


def test_parameters_are_changed_outside_the_graph(backend):
    rows = torch.nn.Parameter(torch.randn(4, 5))
    ops.normalize_rows_(rows)
    assert rows.grad_fn is None
    assert rows.requires_grad
