"""A whole training step on the Triton kernels, small enough for the interpreter; `make test-triton` runs everything."""

import copy

import torch

import fastsae
from fastsae.optim import FusedAdam


def test_a_step_is_that_of_plain_pytorch():
    device = "cuda" if torch.cuda.is_available() else "cpu"
    start = fastsae.TopKSAE(17, 24, 3, device=device)
    x = torch.randn(5, 17, device=device)
    results = []
    for backend in ("torch", "triton"):
        sae = copy.deepcopy(start)
        with fastsae.backend(backend):
            codes = sae.encode(x)
            loss = sae.loss(x)
            loss.total.backward()
            gradients = [parameter.grad for parameter in sae.parameters()]
            sae.zero_grad()
            # A large eps: without it the first step of Adam is the sign of the gradient.
            FusedAdam(sae, lr=0.1, eps=1.0).step(x)
        results.append((codes.indices, [codes.values, sae.decode(codes), loss.mse, *gradients, *sae.parameters()]))
    (indices, expected), (found, actual) = results
    assert found.equal(indices)
    for ours, theirs in zip(actual, expected, strict=True):
        torch.testing.assert_close(ours, theirs)
