"""What the Triton kernels over rows do by themselves: latents cut into windows, wide rows, indices out of range."""

import sys
from itertools import chain, pairwise

import pytest
import torch

from fastsae import ops, reference
from fastsae.testing import assert_accurate, assert_same_bits, backends, random_codes

TRITON = [backend for backend in backends() if backend.name == "triton"]
pytestmark = pytest.mark.skipif(not TRITON, reason="needs Triton, and a GPU or TRITON_INTERPRET=1")


@pytest.fixture(params=TRITON, ids=str)
def triton(request):
    from fastsae.backends import triton as kernels

    with request.param.active():
        yield kernels


def latent_major(counts, n_tokens):
    """Entries of latents with these counts, each at any token."""
    nnz = sum(counts)
    offsets = torch.tensor([0, *counts]).cumsum(0)
    return offsets, torch.randint(n_tokens, (nnz,), dtype=torch.int32), torch.randperm(nnz)


@pytest.mark.parametrize("counts", [[0, 40, 3, 0, 33, 52, 0], [16, 16], [15, 1, 31, 1], [128], [7, 7]], ids=str)
def test_windows_add_up(triton, monkeypatch, counts):
    """Windows of 16 entries at every place of a latent: none, its first, inner ones, its last."""
    from fastsae.backends.triton import _segments

    monkeypatch.setattr(_segments, "_LEAST_WINDOW_BITS", 4)
    codes = latent_major(counts, 9)
    values, g, shift, scale = torch.randn(sum(counts)), torch.randn(9, 20), torch.randn(20), torch.randn(9)
    actual = triton.accumulate_rows(values, *codes, g, shift, scale)
    assert_accurate(
        actual, lambda values, g, shift, scale: reference.accumulate_rows(values, *codes, g, shift, scale),
        values, g, shift, scale,
    )  # fmt: skip


def test_rows_of_no_width(triton, monkeypatch):
    """What stands beside a row is written where there is no row: sums of the values, the bias of a latent."""
    from fastsae.backends.triton import _segments

    monkeypatch.setattr(_segments, "_LEAST_WINDOW_BITS", 2)
    codes, values, g = latent_major([0, 11, 2], 9), torch.randn(13), torch.randn(9, 0)
    out, sums = triton.accumulate_rows(values, *codes, g, None, None)
    assert out.shape == (3, 0)
    assert_accurate(sums, lambda values: reference.accumulate_rows(values, *codes, g, None, None)[1], values)
    slots = [[torch.rand(s) for _ in range(3)] for s in ((3, 0), (3,), (3, 0))]
    expected = [[t.clone() for t in slot] for slot in slots]
    step = 1e-2, 0.9, 0.99, 1e-3, 0.1, 3, False
    triton.fused_update(values, values, *codes, g, None, g, None, *slots, *step)
    reference.fused_update(values, values, *codes, g, None, g, None, *expected, *step)
    torch.testing.assert_close(slots, expected)


def test_more_windows_than_the_buffer_may_have_are_longer(triton, monkeypatch):
    from fastsae.backends.triton import _segments

    monkeypatch.setattr(_segments, "_LEAST_WINDOW_BITS", 3)
    monkeypatch.setattr(_segments, "_MOST_WINDOWS", 4)
    codes = latent_major([100], 9)
    windows = _segments.sum_windows(torch.randn(100), *codes, None, torch.randn(9, 4), None)
    assert (windows.window_bits, len(windows.sums)) == (5, 3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("masters", [False, True], ids=["plain", "masters"])
def test_rows_too_wide_for_registers(triton, monkeypatch, dtype, masters):
    """The same update, up to the order of the sums, by blocks of 16 columns."""
    from fastsae.backends.triton import fused_update

    if masters and dtype == torch.float32:
        pytest.skip("a float32 parameter needs no master")
    codes = random_codes(11, 5, 2, dtype=dtype)
    g, x, grad_values = torch.randn(11, 40).to(dtype), torch.randn(11, 3).to(dtype), torch.randn(11, 2).to(dtype)
    slots = [[torch.randn(s), 0.1 * torch.randn(s), torch.rand(s)] for s in ((5, 3), (5,), (5, 40))]
    weight_dtype = torch.float32 if masters else dtype

    def updated():
        state = [[t.to(weight_dtype, copy=True) for t in slot] for slot in slots]
        if masters:
            state = [[p.to(dtype), m, s, p] for p, m, s in state]
        fused_update(
            codes.values, grad_values, *ops.transpose(codes), g, torch.ones(11), x, None, *state,
            1e-2, 0.9, 0.99, 1e-8, 0.1, 3, True,
        )  # fmt: skip
        return state[2]

    expected = updated()
    module = sys.modules[fused_update.__module__]
    for name, value in {"_WIDEST_ROW": 32, "_WIDE_COLUMNS": 16, "_WIDE_PROGRAMS": 2}.items():
        monkeypatch.setattr(module, name, value)
    actual = updated()
    for one, other in zip(actual, expected, strict=True):
        torch.testing.assert_close(one, other)
    if masters:
        assert_same_bits(actual[0], actual[3].to(dtype))


@pytest.mark.parametrize("wrong", [-1, 30, 2**31 - 1])
def test_an_index_out_of_range_is_nan_in_its_token(triton, wrong):
    """Without a check on the host, which would wait for the device, nothing outside W_dec is read."""
    codes = random_codes(6, 30, 4)
    W_dec, b_dec, target = torch.randn(30, 20), torch.randn(20), torch.randn(6, 20)

    def results(indices):
        decoded = triton.decode(codes.values, indices, None, W_dec, b_dec)
        residual, squared = triton.squared_error(codes.values, indices, None, W_dec, b_dec, target)
        return decoded, residual, squared, triton.sampled_dot(target, indices, None, W_dec, None)

    indices = codes.indices.clone()
    indices[3, 1] = wrong
    others = [0, 1, 2, 4, 5]
    *rows, dots = results(indices)
    *clean_rows, clean_dots = results(codes.indices)
    for actual, expected in zip(rows, clean_rows, strict=True):
        assert actual[3].isnan().all()
        assert_same_bits(actual[others], expected[others])
    clean_dots[3, 1] = torch.nan
    assert_same_bits(dots, clean_dots)


@pytest.mark.parametrize("offsets", [[0, 2, 9, 5], [-3, 2, 4, 5], [0, 4, 2, 5]], ids=str)
def test_offsets_that_do_not_fit_are_nan_in_their_tokens(triton, offsets):
    values, indices, W_dec = torch.ones(5), torch.arange(5, dtype=torch.int32), torch.randn(5, 20)
    y = triton.decode(values, indices, torch.tensor(offsets), W_dec, None)
    wrong = [not 0 <= begin <= end <= 5 for begin, end in pairwise(offsets)]
    assert y.isnan().all(dim=1).tolist() == wrong
    assert y.isnan().any(dim=1).tolist() == wrong
    assert_same_bits(triton.squared_error(values, indices, torch.tensor(offsets), W_dec, None, y * 0)[0], y)


@pytest.mark.parametrize(("which", "wrong"), [("token", -1), ("token", 9), ("entry", -1), ("entry", 12)])
def test_an_entry_out_of_range_is_nan_in_its_latent(triton, which, wrong):
    offsets, tokens, entries = latent_major([5, 3, 4], 9)
    values, g = torch.randn(12), torch.randn(9, 20)
    clean = triton.accumulate_rows(values, offsets, tokens, entries, g, None, None)
    (tokens if which == "token" else entries)[6] = wrong
    for actual, expected in zip(
        triton.accumulate_rows(values, offsets, tokens, entries, g, None, None), clean, strict=True
    ):
        assert actual[1].isnan().all()
        assert_same_bits(actual[[0, 2]], expected[[0, 2]])


def test_state_of_any_strides(triton):
    codes = random_codes(7, 6, 2)
    arguments = codes.values, codes.values, *ops.transpose(codes), torch.randn(7, 20), None, torch.randn(7, 20), None
    state = [[torch.rand(s) for _ in range(3)] for s in ((6, 20), (6,), (6, 20))]
    strided = [[torch.stack([t, t], dim=-1)[..., 0] for t in slot] for slot in state]
    for slots in (state, strided):
        triton.fused_update(*arguments, *slots, 1e-2, 0.9, 0.99, 1e-8, 0.0, 1, False)
    for one, other in zip(chain(*state), chain(*strided), strict=True):
        assert_same_bits(other, one)


def test_sizes_that_do_not_fit_are_refused(triton):
    codes, W_dec = random_codes(6, 30, 4), torch.randn(30, 20)
    with pytest.raises(ValueError, match=r"values has 20 rows: expected 24, one for each index"):
        triton.decode(codes.values[:5], codes.indices, None, W_dec, None)
    with pytest.raises(ValueError, match=r"g has 5 rows: expected 6, one for each token of the codes"):
        triton.sampled_dot(torch.randn(5, 20), codes.indices, None, W_dec, None)
    with pytest.raises(ValueError, match=r"row_scale has 5 rows: expected 6, one for each row"):
        triton.accumulate_rows(codes.values, *ops.transpose(codes), torch.randn(6, 20), None, torch.ones(5))
