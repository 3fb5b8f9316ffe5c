"""Dense tensors that are held as codes, or not at all: what they answer, and that everything else is dense."""

import io

import pytest
import torch
from torch.nn import functional

from fastsae.codes import SparseCodes
from fastsae.interop.activations import Activations
from fastsae.interop.deferred import Deferred
from fastsae.interop.pre_activations import PreActivations
from fastsae.testing import random_codes

D_SAE = 30
W = torch.randn(D_SAE, 5, generator=torch.Generator().manual_seed(0))
FACTORS = torch.rand(D_SAE, generator=torch.Generator().manual_seed(1))

ANSWERED = {
    "sum over latents": lambda f: f.sum(dim=-1),
    "sum over tokens": lambda f: f.sum(0),
    "sum": lambda f: torch.sum(f),
    "norm": lambda f: f.norm(p=1, dim=-1),
    "linalg.norm": lambda f: torch.linalg.norm(f, ord=1, dim=-1),
    "power": lambda f: f.pow(0.5).sum(dim=-1),
    "factors of latents": lambda f: (f * FACTORS).sum(dim=-1),
    "factors [1, d_sae]": lambda f: (FACTORS[None] * f / 3).sum(dim=-1),
    "quotients": lambda f: (f / FACTORS[None]).sum(dim=-1),
    "product": lambda f: f @ W,
    "linear": lambda f: functional.linear(f, W.T.contiguous(), W[0]),
    "l0": lambda f: (f != 0).float().sum(dim=-1),
    "positive ones": lambda f: f[f > 0],
    "never active": lambda f: (f == 0).all(dim=0),
    "active": lambda f: f.sum(0) > 0,
    "parts": lambda f: torch.cat([part @ W[: part.shape[1]] for part in torch.split(f, [10, 20], dim=1)]),
    "shape": lambda f: torch.tensor([*f.shape, len(f), f.dim(), f.numel(), f.is_floating_point()]),
    "detached": lambda f: f.detach().sum(dim=-1),
}
DENSE = {
    "sum of both": lambda f: f.sum(dim=(0, 1)),
    "another norm": lambda f: f.norm(p=2, dim=-1),
    "power 0": lambda f: f.pow(0),
    "one of another": lambda f: f + 1,
    "factors of tokens": lambda f: f * torch.arange(7.0)[:, None],
    "comparison": lambda f: f > 0.5,
    "index": lambda f: f[2:4, 3],
    "transpose": lambda f: f.T @ torch.ones(7, 2),
    "parts of tokens": lambda f: torch.split(f, [3, 4], dim=0)[1],
    "copy": lambda f: f.clone(),
    "maximum": lambda f: f.max(dim=0).values,
}


@pytest.fixture(params=[3, None], ids=["k", "ragged"])
def codes(request):
    drawn = random_codes(7, D_SAE, request.param)
    return drawn.with_values(drawn.values.abs().requires_grad_())


def results(function, codes):
    noted = []
    found = function(Activations(codes, noted.append))
    expected = function(codes.to_dense())
    torch.testing.assert_close(found, expected)
    assert found.requires_grad == expected.requires_grad
    if expected.requires_grad:
        g = torch.randn(expected.shape)
        gradients = [torch.autograd.grad(y, codes.values, g, retain_graph=True)[0] for y in (found, expected)]
        torch.testing.assert_close(*gradients)
    return noted


@pytest.mark.parametrize("function", ANSWERED.values(), ids=ANSWERED)
def test_answered_by_codes(function, codes):
    assert results(function, codes) == []


@pytest.mark.parametrize("function", DENSE.values(), ids=DENSE)
def test_anything_else_is_dense(function, codes):
    assert len(results(function, codes)) == 1


def test_written_to_it_is_dense_ever_after(codes):
    f = Activations(codes)
    with torch.no_grad():
        f[:, 10:] = 0
    expected = codes.to_dense().detach()
    expected[:, 10:] = 0
    torch.testing.assert_close(f @ W, expected @ W)
    torch.testing.assert_close(f.sum(0), expected.sum(0))


def test_saved_and_given_to_numpy(codes):
    f = Activations(codes.detach())
    file = io.BytesIO()
    torch.save(f, file)
    file.seek(0)
    loaded = torch.load(file)
    assert type(loaded) is torch.Tensor
    torch.testing.assert_close(loaded, codes.to_dense().detach())
    assert (f.numpy() == loaded.numpy()).all()


class Doubled(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x * 2

    @staticmethod
    def backward(ctx, g):
        return 2 * g


def test_a_gradient_that_would_be_lost_is_an_error(codes):
    with pytest.raises(RuntimeError, match="its gradient would be lost"):
        (Doubled.apply(Activations(codes)).sum() + codes.values.sum()).backward()
    Doubled.apply(Activations(codes) + 0).sum().backward()
    torch.testing.assert_close(codes.values.grad, torch.full_like(codes.values, 2))


def test_made_once_in_the_modes_it_was_asked_for_in():
    calls, x = [], torch.randn(3, 4, requires_grad=True)

    def make():
        calls.append(torch.is_grad_enabled())
        return x @ x.T

    deferred = Deferred(make, (3, 3), dtype=torch.float32, device=x.device, sources=[x])
    with torch.no_grad():
        assert not calls
        deferred.dense()
    assert (deferred + 1).requires_grad
    assert calls == [True]


def test_of_a_source_that_has_changed_it_is_an_error():
    x = torch.randn(3, 4)
    deferred = Deferred(lambda: x + 1, (3, 4), dtype=torch.float32, device=x.device, sources=[x])
    x.zero_()
    with pytest.raises(RuntimeError, match=r"abs asks for .* has changed since"):
        deferred.abs()


@pytest.fixture
def encoder():
    generator = torch.Generator().manual_seed(3)
    sizes = (7, 6), (D_SAE, 6), (D_SAE,), (6,)
    return [torch.randn(*size, generator=generator).requires_grad_() for size in sizes]


def dense(x, rows, b_enc, b_dec):
    return functional.linear(x - b_dec, rows, b_enc).relu()


MASK = torch.arange(D_SAE) % 3 == 0


@pytest.mark.parametrize(
    "function",
    [
        lambda pre: pre.topk(4, sorted=False),
        lambda pre: torch.where(MASK[None], pre, -torch.inf).topk(4, sorted=False),
        lambda pre: torch.topk(torch.where(MASK, pre, -torch.inf), 10, dim=1),
    ],
    ids=["topk", "of some", "all of some"],
)
def test_the_largest_pre_activations(function, encoder):
    noted = []
    found, expected = function(PreActivations(*encoder, noted=noted.append)), function(dense(*encoder))
    assert noted == []
    # Which of equal ones, zeros, is nowhere defined.
    for part in (found, expected):
        torch.testing.assert_close(dense(*encoder).gather(1, part.indices), part.values)
    assert found.indices.dtype == torch.int64
    torch.testing.assert_close(found.values.sort(dim=1).values, expected.values.sort(dim=1).values)
    gradients = [torch.autograd.grad(y.values.square().sum(), encoder) for y in (found, expected)]
    for part, other in zip(*gradients, strict=True):
        torch.testing.assert_close(part, other)


def test_scattered_pre_activations_are_activations(encoder):
    pre = PreActivations(*encoder)
    values, places = pre.topk(4)
    f = torch.zeros_like(pre).scatter_(dim=-1, index=places, src=values)
    assert isinstance(f, Activations)
    assert isinstance(f.codes, SparseCodes)
    torch.testing.assert_close(f + 0, torch.zeros(7, D_SAE).scatter(1, places, values))


@pytest.mark.parametrize(
    "function",
    [lambda pre: pre.mean(), lambda pre: pre.topk(4, dim=0).values, lambda pre: torch.where(pre > 1, pre, 0.0)],
    ids=["mean", "of tokens", "where"],
)
def test_other_uses_of_pre_activations_are_dense(function, encoder):
    noted = []
    torch.testing.assert_close(function(PreActivations(*encoder, noted=noted.append)), function(dense(*encoder)))
    assert len(noted) == 1
