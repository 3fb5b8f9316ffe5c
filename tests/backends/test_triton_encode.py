"""encode_topk in Triton where the operator's own tests do not reach: many chunks, overflow, wide k, memory."""

import math

import pytest
import torch

from fastsae import reference
from fastsae.backends import triton as triton_backend
from fastsae.testing import assert_same_bits, backends

DEVICES = [backend.device for backend in backends() if backend.name == "triton"]
pytestmark = pytest.mark.skipif(not DEVICES, reason="no GPU, and TRITON_INTERPRET is not 1")

# How latents are taken: all from scores in memory, or by survivors of the product after a short seed.
MEMORY, FUSED = "memory", "fused"


@pytest.fixture(params=[MEMORY, FUSED])
def small_chunks(request, monkeypatch):
    """Chunks of 64 latents or so, so that a few hundred make many of them."""
    from fastsae.backends.triton import encode

    monkeypatch.setattr(encode, "_SEED_LATENTS", 64)
    monkeypatch.setattr(encode, "_SCORES", 1)
    monkeypatch.setattr(encode, "_fuses", lambda d_sae: request.param == FUSED)
    return request.param


def integers(n_tokens, d_in, d_sae, dtype=torch.float32):
    """Small integers: sums are exact in every order and most of them are tied."""
    x = torch.randint(-2, 3, (n_tokens, d_in)).to(dtype)
    return x, torch.randint(-2, 3, (d_sae, d_in)).to(dtype)


def check(x, w, b_enc=None, b_dec=None, k=8, relu_first=False, scale=None):
    """Equal to the sort of exact sums, one for one."""
    device = DEVICES[0]
    inputs = [None if t is None else t.to(device) for t in (x, w, b_enc, b_dec)]
    on_device = None if scale is None else scale.to(device)
    values, indices = (t.cpu() for t in triton_backend.encode_topk(*inputs, k, relu_first, on_device))
    exact = [None if t is None else t.double() for t in (x, w, b_enc, b_dec)]
    exact_scale = None if scale is None else scale.double()
    expected, expected_indices = reference.encode_topk(*exact, k, relu_first, exact_scale)
    assert indices.equal(expected_indices)
    assert_same_bits(values, expected.to(x.dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("relu_first", [False, True])
def test_ties_across_chunks(small_chunks, dtype, relu_first):
    x, w = integers(37, 6, 700, dtype)
    b_enc, b_dec = torch.randint(-2, 3, (700,)).to(dtype), torch.randint(-1, 2, (6,)).to(dtype)
    check(x, w, b_enc, b_dec, 9, relu_first)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("relu_first", [False, True])
def test_scaled(small_chunks, dtype, relu_first):
    x, w = integers(19, 6, 300, dtype)
    b_enc, b_dec = torch.randint(-2, 3, (300,)).to(dtype), torch.randint(-1, 2, (6,)).to(dtype)
    x[3], x[5] = torch.nan, 0.0
    check(x, w, b_enc, b_dec, 9, relu_first, torch.randint(0, 5, (300,)) / 2)


@pytest.mark.parametrize("k", [1, 2, 33, 64])
@pytest.mark.parametrize("n_tokens", [1, 37])
@pytest.mark.parametrize("d_in", [1, 37, 199])
def test_sizes_off_every_block(small_chunks, n_tokens, d_in, k):
    check(*integers(n_tokens, d_in, 331), k=k)


@pytest.mark.parametrize("order", [1, -1])
def test_latents_in_order_of_their_value(small_chunks, order):
    """Ascending, each latent beats all before it: candidates overflow and rows are redone."""
    w = torch.arange(1.0, 701.0)[:, None] * order
    x = torch.ones(20, 1)
    x[7] = -1.0
    x[8] = 0.0
    check(x, w, k=5)


def test_rows_that_overflow_do_not_touch_the_others(small_chunks):
    x, w = integers(150, 2, 900)
    x[:, 1], w[:, 1] = 0.0, torch.arange(900.0)
    x[140, 1] = 1.0
    check(x, w, k=3)


def test_rows_that_are_one_value(small_chunks):
    """Zeros, NaN, -inf and +inf: the lowest latents win, and the rows between are their own."""
    x, w = integers(9, 3, 400)
    w = w.abs() + 1
    x[1], x[3], x[5], x[7] = 0.0, torch.nan, -torch.inf, torch.inf
    for relu_first in (False, True):
        check(x, w, k=6, relu_first=relu_first)


def test_latents_that_are_not_finite(small_chunks):
    """NaN of late latents rank above what every row has found before, in the order of their indices."""
    x, w = integers(9, 3, 600)
    w[300], w[599], w[450:460] = torch.inf, torch.nan, torch.nan
    w[10] = -torch.inf
    for k in (1, 8, 20):
        check(x, w, k=k)
    check(x, w, torch.zeros(600).index_fill(0, torch.arange(100, 500), -torch.inf), k=8)


def test_more_nan_than_places(small_chunks):
    x, w = integers(5, 3, 600)
    w[200:] = torch.nan
    check(x, w, k=4)


def test_every_latent_kept(small_chunks):
    check(*integers(5, 4, 64), k=64)


@pytest.mark.parametrize("k", [1500, 2048])
def test_wide_k(k, monkeypatch):
    """The widest blocks, from the seed and from survivors."""
    from fastsae.backends.triton import encode

    x, w = integers(3, 4, 2100)
    check(x, w, k=k)
    monkeypatch.setattr(encode, "_fuses", lambda d_sae: True)
    check(x, w, k=k)


def test_beyond_the_widest_k():
    check(*integers(2, 3, 2100), k=2090)


def test_rows_in_blocks(small_chunks, monkeypatch):
    from fastsae.backends.triton import encode

    monkeypatch.setattr(encode, "_MOST_ROWS", 16)
    check(*integers(37, 5, 300), k=4)


def test_no_tensor_of_all_scores(monkeypatch):
    """Nothing that the encoder allocates is as large as [n_tokens, d_sae]."""
    from fastsae.backends.triton import encode

    monkeypatch.setattr(encode, "_SEED_LATENTS", 64)
    monkeypatch.setattr(encode, "_SCORES", 1)
    sizes = []
    allocate = torch.empty

    def counted(*shape, **options):
        tensor = allocate(*shape, **options)
        sizes.append(tensor.numel() * tensor.element_size())
        return tensor

    monkeypatch.setattr(torch, "empty", counted)
    x, w = integers(16, 4, 2000)
    check(x, w, k=4)
    # 16 rows: 64 float32 scores, 128 pairs of 8 bytes.
    assert max(sizes) <= 16 * 128 * 8 < 16 * 2000 * 4


@pytest.mark.parametrize("k", [1, 31, 32, 64, 100, 512, 513, 1024, 1025, 2048])
def test_memory_and_chunks_of_real_sizes(k):
    """At most 256 MiB for 8,192 rows and k = 64; chunks that candidates have room for, from first latent to last."""
    from fastsae.backends.triton import encode

    capacity = encode.capacity_of(k)
    if k <= 64:
        assert encode._SCORES * 4 + encode._MOST_ROWS * capacity * 8 <= 256 << 20
    assert capacity & (capacity - 1) == 0
    begin = encode._SEED_LATENTS
    assert begin >= encode._MOST_K
    ends = encode.chunk_ends(begin, 131072, k)
    assert ends[-1] == 131072
    for end in ends:
        ratio = (end - begin) / begin
        assert k * ratio + 6 * math.sqrt(k * ratio * (1 + ratio)) <= capacity - k
        begin = end
    assert len(ends) <= 12


def test_float32_products_follow_torch(monkeypatch):
    from fastsae.backends.triton import encode

    for setting, expected in (("highest", "ieee"), ("high", "tf32"), ("medium", "tf32")):
        monkeypatch.setattr(torch, "get_float32_matmul_precision", lambda setting=setting: setting)
        assert encode.float32_products() == expected
