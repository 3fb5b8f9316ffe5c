"""encode_threshold in Triton where the operator's own tests do not reach: full lists, many tiles, ties, memory."""

import importlib

import pytest
import torch

from fastsae import reference
from fastsae.backends import triton as kernels
from fastsae.testing import assert_same_bits, backends

DEVICES = [backend.device for backend in backends() if backend.name == "triton"]
pytestmark = pytest.mark.skipif(not DEVICES, reason="no GPU, and TRITON_INTERPRET is not 1")


def check(x, w, threshold, b_enc=None, b_dec=None):
    """Equal to the choice among exact sums, one for one; -> offsets."""
    inputs = [None if t is None else t.to(DEVICES[0]) for t in (x, w, b_enc, b_dec, threshold)]
    actual = [t.cpu() for t in kernels.encode_threshold(*inputs)]
    exact = [None if t is None else t.double() for t in (x, w, b_enc, b_dec, threshold)]
    values, indices, offsets = reference.encode_threshold(*exact)
    assert_same_bits(actual[2], offsets)
    assert_same_bits(actual[1], indices)
    assert_same_bits(actual[0], values.to(x.dtype))
    return offsets


def room_for(monkeypatch, entries):
    # The package hands out the operator under the module's name.
    module = importlib.import_module("fastsae.backends.triton.encode_threshold")
    monkeypatch.setattr(module, "_USUAL_L0", entries)


def integers(n_tokens, d_in, d_sae, dtype=torch.float32):
    """Small integers: sums are exact in every order, and many of them are the threshold itself."""
    x, w = torch.randint(-2, 3, (n_tokens, d_in)).to(dtype), torch.randint(-2, 3, (d_sae, d_in)).to(dtype)
    return x, w, torch.randint(0, 4, (d_sae,)).float()


@pytest.mark.parametrize("usual", [1, 5, 128])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_lists_that_are_too_short_are_made_again(monkeypatch, usual, dtype):
    room_for(monkeypatch, usual)
    x, w, threshold = integers(37, 6, 331, dtype)
    b_enc, b_dec = torch.randint(-2, 3, (331,)).to(dtype), torch.randint(-1, 2, (6,)).to(dtype)
    x[5] = 0.0
    counts = check(x, w, threshold + 6, b_enc, b_dec).diff()
    assert counts.min() < 5 < counts.max()


@pytest.mark.parametrize("n_tokens", [1, 37, 199])
@pytest.mark.parametrize("d_in", [1, 37, 199])
def test_sizes_off_every_tile(n_tokens, d_in):
    check(*integers(n_tokens, d_in, 199))


def test_rows_that_are_not_finite_keep_their_own_latents_alone(monkeypatch):
    room_for(monkeypatch, 8)
    x, w, threshold = integers(9, 3, 300)
    w = w.abs() + 1
    x[1], x[3], x[5], x[7] = 0.0, torch.nan, -torch.inf, torch.inf
    counts = check(x, w, threshold + 10).diff()
    assert counts[[1, 3, 5, 7]].tolist() == [0, 300, 0, 300]


def test_thresholds_that_are_not_finite():
    x, w, threshold = integers(9, 3, 300)
    threshold[:100], threshold[100:200], threshold[250] = -torch.inf, torch.inf, torch.nan
    check(x, w, threshold)


def test_nothing_passes_and_no_rows():
    x, w, threshold = integers(5, 4, 64)
    assert check(x, w, threshold + 100)[-1] == 0
    assert check(x[:0], w, threshold).tolist() == [0]


def test_no_tensor_of_all_scores(monkeypatch):
    """The lists have room for what is kept, and nothing has room for [n_tokens, d_sae]."""
    room_for(monkeypatch, 16)
    sizes = []

    def counted(allocate):
        def call(*args, **options):
            tensor = allocate(*args, **options)
            sizes.append(tensor.numel())
            return tensor

        return call

    for name in ("empty", "zeros", "arange", "where"):
        monkeypatch.setattr(torch, name, counted(getattr(torch, name)))
    x, w, _ = integers(16, 4, 2000)
    kernels.encode_threshold(*(t.to(DEVICES[0]) for t in (x, w)), None, None, torch.full((2000,), 12.0).to(DEVICES[0]))
    assert max(sizes) <= 16 * 64 < 16 * 2000
