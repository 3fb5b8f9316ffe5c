"""encode_batch_topk in Triton: exact whatever the chunks, ties across rows, full lists, what is not finite."""

import importlib

import pytest
import torch

from fastsae.backends import triton as kernels
from fastsae.testing import assert_same_bits, backends

DEVICES = [backend.device for backend in backends() if backend.name == "triton"]
pytestmark = pytest.mark.skipif(not DEVICES, reason="no GPU, and TRITON_INTERPRET is not 1")


@pytest.fixture(params=[1, 256], ids="room_{}".format)
def room(request, monkeypatch):
    """Least lengths of a row's list, and so of the first chunk."""
    module = importlib.import_module("fastsae.backends.triton.encode_batch_topk")
    monkeypatch.setattr(module, "_LEAST_ROOM", request.param)


def definition(x, w, b_enc, b_dec, k_total, scale):
    """All of pre in float64, and a stable sort of the batch: ties go to the lower row, then the lower latent."""
    x, w, b_enc, b_dec, scale = (None if t is None else t.double() for t in (x, w, b_enc, b_dec, scale))
    pre = (x if b_dec is None else x - b_dec) @ w.T
    pre = pre if b_enc is None else pre + b_enc
    strange = pre.isnan() | (pre == torch.inf)
    ranks = (pre if scale is None else pre * scale).masked_fill(strange | (pre <= 0), -torch.inf).flatten()
    best = ranks.argsort(descending=True, stable=True)[:k_total]
    kept = strange.flatten().index_fill(0, best[ranks[best] > -torch.inf], True).reshape(pre.shape)
    offsets = torch.cat([torch.zeros(1, dtype=torch.int64), kept.sum(dim=1).cumsum(0)])
    return pre[kept], kept.nonzero()[:, 1].int(), offsets


def check(x, w, k_total, b_enc=None, b_dec=None, scale=None):
    """Equal to the choice among exact sums, one for one; -> offsets."""
    on_device = [None if t is None else t.to(DEVICES[0]) for t in (x, w, b_enc, b_dec, scale)]
    *inputs, scale_there = on_device
    actual = [t.cpu() for t in kernels.encode_batch_topk(*inputs, k_total, scale_there)]
    values, indices, offsets = definition(x, w, b_enc, b_dec, k_total, scale)
    assert_same_bits(actual[2], offsets)
    assert_same_bits(actual[1], indices)
    assert_same_bits(actual[0], values.to(x.dtype))
    return offsets


def integers(n_tokens, d_in, d_sae, dtype=torch.float32):
    """Small integers: sums are exact in every order and most of them are tied."""
    return torch.randint(-2, 3, (n_tokens, d_in)).to(dtype), torch.randint(-2, 3, (d_sae, d_in)).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("scaled", [False, True], ids=["plain", "scaled"])
def test_ties_across_rows_and_chunks(room, dtype, scaled):
    x, w = integers(37, 6, 331, dtype)
    b_enc, b_dec = torch.randint(-2, 3, (331,)).to(dtype), torch.randint(-1, 2, (6,)).to(dtype)
    scale = torch.randint(1, 4, (331,)).float() / 2 if scaled else None
    assert check(x, w, 37 * 5, b_enc, b_dec, scale)[-1] == 37 * 5


@pytest.mark.parametrize("k_total", [1, 7, 300, 100_000])
@pytest.mark.parametrize("n_tokens", [1, 37])
@pytest.mark.parametrize("d_in", [1, 37])
def test_sizes_off_every_tile(room, n_tokens, d_in, k_total):
    check(*integers(n_tokens, d_in, 199), k_total)


@pytest.mark.parametrize("falling", [False, True])
def test_latents_in_order_of_their_value(room, falling):
    """Ascending, each latent beats all before it: lists overflow and the call is repeated in short chunks."""
    w = torch.arange(1.0, 601.0)[:, None]
    w = w.flip(0) if falling else w
    x = torch.ones(5, 1)
    x[3] = -1.0
    check(x, w, 25)


def test_a_row_that_takes_every_place(room):
    """The others get nothing: places belong to the batch."""
    x, w = integers(9, 4, 300)
    x[4] *= 1000
    counts = check(x, w, 40).diff()
    assert counts[4] == counts.sum() == 40


def test_what_is_not_finite_is_kept_and_does_not_count(room):
    x, w = integers(9, 3, 300)
    w = w.abs() + 1
    x[1], x[3], x[5], x[7] = 0.0, torch.nan, -torch.inf, torch.inf
    offsets = check(x, w, 30)
    assert offsets.diff()[[1, 3, 5, 7]].tolist() == [0, 300, 0, 300]
    assert offsets[-1] == 630


def test_nothing_is_positive_and_no_rows():
    x, w = torch.ones(5, 4), -torch.ones(64, 4)
    assert check(x, w, 20)[-1] == 0
    assert check(x[:0], w, 20).tolist() == [0]


def test_runs_are_the_same():
    x, w = torch.randn(37, 16), torch.randn(300, 16)
    first, second = (kernels.encode_batch_topk(x.to(DEVICES[0]), w.to(DEVICES[0]), None, None, 200, None) for _ in "12")
    for one, other in zip(first, second, strict=True):
        assert_same_bits(one, other)
