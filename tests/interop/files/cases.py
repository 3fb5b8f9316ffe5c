"""SAEs with every tensor away from its start, and how two of them are compared."""

import copy

import architectures
import torch
from torch import Tensor, nn

import fastsae
from fastsae.testing import assert_accurate

D_IN, D_SAE = architectures.D_IN, architectures.D_SAE


def build(name: str, options: dict, dtype: torch.dtype = torch.float32) -> fastsae.SAE:
    sae = architectures.build(name, options, dtype)
    if isinstance(sae, fastsae.BatchTopKSAE):
        sae.threshold.fill_(float(torch.tensor(0.7, dtype=dtype)))
    if isinstance(sae, fastsae.JumpReLUSAE):
        # Of the SAE's dtype, as libraries have it.
        for parameter in sae.parameters():
            parameter.data = parameter.data.to(dtype).to(parameter.dtype)
    return sae.eval()


def assert_same_sae(actual: fastsae.SAE, expected: fastsae.SAE) -> None:
    """The same class and the same bits of every parameter and of every buffer that files of others keep."""
    assert type(actual) is type(expected)
    assert not actual.training
    ours, theirs = expected.state_dict(), actual.state_dict()
    assert list(ours) == list(theirs)
    for name, tensor in ours.items():
        assert theirs[name].dtype == tensor.dtype, name
        assert torch.equal(theirs[name], tensor), name


def both(sae: fastsae.SAE, x: Tensor) -> tuple[Tensor, Tensor]:
    """Dense activations and the reconstruction."""
    codes = sae.encode(x)
    return codes.to_dense().detach(), sae.decode(codes, x).detach()


def assert_as_its_library(sae: fastsae.SAE, library: nn.Module, run, x: Tensor) -> None:
    """What fastsae's SAE makes of x, held to `run(library module, x)`: activations and reconstruction."""

    def formula(x: Tensor) -> tuple[Tensor, Tensor]:
        with torch.no_grad():
            return run(copy.deepcopy(library).to(x.dtype), x)

    assert_accurate(both(sae, x), formula, x)
