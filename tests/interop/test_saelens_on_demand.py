"""Tensors that are made when they are needed: to every caller they are the dense tensor."""

import copy

import numpy as np
import pytest
import torch
from interop.saelens_cases import sae_lens  # noqa: F401  (imported without a network)

from fastsae.interop.saelens.on_demand import DenseOnDemand, of_codes, of_formula
from fastsae.testing import assert_same_bits, random_codes


@pytest.fixture(params=[4, None], ids=["k", "csr"])
def codes(request):
    codes = random_codes(7, 20, request.param)
    codes.values.relu_().requires_grad_()
    return codes


@pytest.fixture
def asked():
    return []


def test_what_the_trainer_asks(codes, asked):
    acts, dense = of_codes(codes, asked.append), codes.to_dense()
    for ask in (
        lambda t: t.bool().float().sum(-2),
        lambda t: t.bool().float().sum(0),
        lambda t: t.bool().float().sum(-1),
        lambda t: t.detach().bool().sum(1),
        lambda t: (t > 0).sum(0),
        lambda t: (t != 0).float().sum(dim=-1),
        lambda t: t.bool().sum(-1, dtype=torch.float64),
    ):
        assert_same_bits(ask(acts), ask(dense))
    assert acts.is_sparse is False
    assert acts.shape == dense.shape
    assert acts.dtype == dense.dtype
    assert asked == []


def test_leading_dimensions(asked):
    codes = random_codes(12, 20, 4)
    codes.leading_shape = torch.Size((3, 4))
    acts, dense = of_codes(codes, asked.append), codes.to_dense()
    assert_same_bits(acts.bool().float().sum(-1), dense.bool().float().sum(-1))
    assert_same_bits(acts.bool().sum((0, 1)), dense.bool().sum((0, 1)))
    assert asked == []
    assert_same_bits(acts.bool().sum(1), dense.bool().sum(1))
    assert len(asked) == 1


@pytest.mark.parametrize(
    "ask",
    [
        lambda t: t * 2,
        lambda t: t[0],
        lambda t: t[:, 3:5].sum(),
        lambda t: t.view(-1),
        lambda t: t.reshape(7, 4, 5),
        lambda t: t @ torch.ones(20, 2),
        lambda t: torch.cat([t, t]),
        lambda t: t.max(),
        lambda t: t.norm(),
        lambda t: t.bool(),
        lambda t: t.bool().any(),
        lambda t: (t > 0) & (t < 1),
        lambda t: t > 0.5,
        lambda t: t.double(),
        lambda t: t.float().sum(0),
        lambda t: t.clone(),
        lambda t: t.detach().cpu() + 0,
        lambda t: torch.from_numpy(np.asarray(t.detach())),
        lambda t: torch.tensor(t.tolist()),
        lambda t: copy.deepcopy(t.detach()) + 0,
        lambda t: torch.topk(t, 3).values,
    ],
)
def test_anything_else(codes, asked, ask):
    found = ask(of_codes(codes, asked.append))
    expected = ask(codes.to_dense())
    if isinstance(found, DenseOnDemand):
        found = found | False if found.dtype == torch.bool else found + 0
    assert type(found) is torch.Tensor
    assert found.requires_grad == expected.requires_grad
    assert_same_bits(found, expected)
    assert asked


def test_printed(codes, asked):
    assert repr(of_codes(codes.detach(), asked.append)) == repr(codes.detach().to_dense())


def test_gradient(codes, asked):
    grads = []
    for acts in (of_codes(codes, asked.append), codes.to_dense()):
        codes.values.grad = None
        (acts.square() * torch.arange(140.0).view(7, 20)).sum().backward()
        grads.append(codes.values.grad)
    assert_same_bits(*grads)


def test_writing(codes, asked):
    """Views of it and it share memory, as of any tensor; what was made of it before does not change."""
    codes = codes.detach()
    acts, dense = of_codes(codes, asked.append), codes.to_dense()
    fired, expected = acts.bool(), dense.bool()
    for tensor in (acts, dense):
        tensor[:, 3] = 5
        tensor.view(-1)[7] = -1
        assert tensor.mul_(2) is tensor
        torch.add(tensor.detach(), 1, out=tensor)
    assert_same_bits(acts + 0, dense)
    assert_same_bits(fired | False, expected)
    assert_same_bits(acts.bool().float().sum(0), dense.bool().float().sum(0))


def test_formula(asked):
    x, W = torch.randn(7, 5, requires_grad=True), torch.randn(5, 20, requires_grad=True)
    pre = of_formula(torch.matmul, torch.Size((7, 20)), asked.append, x, W)
    assert asked == []
    found = torch.autograd.grad(pre.square().sum(), (x, W))
    expected = torch.autograd.grad((x @ W).square().sum(), (x, W))
    for one, other in zip(found, expected, strict=True):
        assert_same_bits(one, other)
    pre = of_formula(torch.matmul, torch.Size((7, 20)), asked.append, x.detach(), W)
    with torch.no_grad():
        W.add_(1)
    with pytest.raises(RuntimeError, match="after its weights have changed"):
        pre.sum()
