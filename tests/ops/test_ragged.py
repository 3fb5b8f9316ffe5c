"""Every operator on codes whose rows have 0 to d_sae entries, wildly uneven."""

import pytest
import torch

import fastsae
from fastsae import SparseCodes, ops
from fastsae.backends import dense_products
from fastsae.backends import native as native_library
from fastsae.ops.accumulate_rows import accumulate_rows_op
from fastsae.testing import assert_accurate, assert_same_bits, gradients

N_TOKENS, D_SAE, D = 37, 70, 40
LENGTHS = {
    "no_entry": torch.zeros(N_TOKENS),
    "one_full_row": torch.where(torch.arange(N_TOKENS) == 5, D_SAE, 0),
    "all_full": torch.full((N_TOKENS,), D_SAE),
    "zipf": D_SAE // torch.arange(1, N_TOKENS + 1),
    "last_row_only": torch.where(torch.arange(N_TOKENS) == N_TOKENS - 1, 3, 0),
}
ragged = pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS)


def codes_of(lengths, dtype=torch.float32, d_sae=D_SAE, ascending=True):
    """Normal values; lengths[n] of all latents in row n, no latent twice."""
    lengths = lengths.to(torch.get_default_device()).long()
    generator = torch.Generator(lengths.device).manual_seed(3)
    places = torch.rand(len(lengths), d_sae, generator=generator).argsort(dim=1)
    kept = torch.arange(d_sae) < lengths[:, None]
    if ascending:
        places = places.where(kept, d_sae).sort(dim=1).values
    offsets = torch.cat([lengths.new_zeros(1), lengths.cumsum(0)])
    values = torch.randn(int(offsets[-1]), generator=generator).to(dtype)
    return SparseCodes(values, places[kept].int(), d_sae, offsets=offsets)


def decoded(codes):
    return lambda values, W_dec, b_dec: codes.with_values(values).to_dense() @ W_dec + b_dec


@ragged
def test_decode_and_its_gradients(dtype, lengths):
    codes = codes_of(lengths, dtype)
    W_dec, b_dec, g = torch.randn(D_SAE, D).to(dtype), torch.randn(D).to(dtype), torch.randn(N_TOKENS, D).to(dtype)
    inputs = codes.values, W_dec, b_dec
    assert_accurate(ops.decode(codes, W_dec, b_dec), decoded(codes), *inputs)
    actual = gradients(lambda values, W, b: ops.decode(codes.with_values(values), W, b), inputs, g)
    assert_accurate(actual, lambda *inputs: gradients(decoded(codes), inputs[:3], inputs[3]), *inputs, g)


@ragged
def test_squared_error(dtype, lengths):
    codes = codes_of(lengths, dtype)
    W_dec, b_dec, target = torch.randn(D_SAE, D).to(dtype), torch.randn(D).to(dtype), torch.randn(N_TOKENS, D).to(dtype)

    def formula(values, W_dec, b_dec, target):
        residual = decoded(codes)(values, W_dec, b_dec) - target
        return residual, residual.square().sum(dim=1)

    actual = ops.squared_error(codes, W_dec, b_dec, target)
    expected = formula(*(t.double() for t in (codes.values, W_dec, b_dec, target)))
    assert_accurate(actual[0], lambda *inputs: formula(*inputs)[0], codes.values, W_dec, b_dec, target)
    torch.testing.assert_close(
        actual[1].double(), expected[1], rtol=1e-5 if dtype == torch.float32 else 2e-2, atol=1e-6
    )


@ragged
def test_sampled_dot(dtype, lengths):
    codes = codes_of(lengths, dtype)
    g, W_dec = torch.randn(N_TOKENS, D).to(dtype), torch.randn(D_SAE, D).to(dtype)
    rows = torch.repeat_interleave(codes.offsets.diff())
    assert_accurate(ops.sampled_dot(g, codes, W_dec), lambda g, W: (g @ W.T)[rows, codes.indices.long()], g, W_dec)


@ragged
def test_transpose_is_the_stable_sort(backend, lengths):
    codes = codes_of(lengths, ascending=False)
    latent_offsets, tokens, entries = ops.transpose(codes)
    order = codes.indices.sort(stable=True).indices
    assert entries.equal(order)
    assert tokens.equal(torch.repeat_interleave(codes.offsets.diff())[order].int())
    assert latent_offsets[1:].equal(codes.indices.bincount(minlength=D_SAE).cumsum(0))


def every_result(codes, W_dec, b_dec, x):
    row_scale = x[:, 0].abs().float()
    latent_major = ops.transpose(codes)
    return [
        ops.decode(codes, W_dec, b_dec),
        *ops.squared_error(codes, W_dec, b_dec, x),
        ops.sampled_dot(x, codes, W_dec),
        *accumulate_rows_op(codes.values, *latent_major, x, None, None),
        *accumulate_rows_op(codes.values, *latent_major, x, b_dec.float(), row_scale),
    ]


# Rows and columns off the tiles of 128 rows, the strips of 64 columns and the blocks of 128 sums; a strip alone; less.
TILED = [(33, 129, 64), (200, 300, 199), (131, 700, 128), (40, 37, 37), (150, 513, 1)]


@pytest.mark.parametrize("share", [1.0, 0.3, 0.07])
@pytest.mark.parametrize("shape", TILED, ids=str)
@pytest.mark.parametrize("half", [False, True], ids=["float32", "bfloat16"])
def test_tiles_of_dense_codes_change_no_bit(native, monkeypatch, shape, share, half):
    """The ways of a CPU for sparse and for dense codes make the same sums in the same order."""
    n_tokens, d_sae, d = shape
    dtype = torch.bfloat16 if half else torch.float32
    lengths = (torch.rand(n_tokens) * 2 * share * d_sae).clamp(max=d_sae)
    lengths[::7] = 0
    lengths[3] = d_sae
    inputs = torch.randn(d_sae, d).to(dtype), torch.randn(d).to(dtype), torch.randn(n_tokens, d).to(dtype)
    for ascending in (True, False):
        codes = codes_of(lengths, dtype, d_sae, ascending)
        monkeypatch.setattr(dense_products, "pays", lambda *_: False)
        by_entries = every_result(codes, *inputs)
        monkeypatch.setattr(dense_products, "pays", lambda *_: True)
        for by_tiles, expected in zip(every_result(codes, *inputs), by_entries, strict=True):
            assert_same_bits(by_tiles, expected)


def test_nan_of_a_latent_stays_with_those_who_name_it(native):
    """A dense product would multiply it by the zeros of all others."""
    lengths = torch.full((64,), D_SAE)
    lengths[10:20] = 4
    codes = codes_of(lengths)
    W_dec = torch.randn(D_SAE, 64)
    named = (codes.to_dense() != 0)[:, 9]
    assert 0 < named.sum() < 64
    W_dec[9] = torch.nan
    assert ops.decode(codes, W_dec).isnan().any(dim=1).equal(named)


def test_which_way_was_taken_is_told(native):
    W_dec = torch.randn(D_SAE, D)
    ops.decode(codes_of(torch.full((64,), D_SAE)), W_dec)
    assert "dense codes (1 of 1.0 places)" in fastsae.explain().choices["decode"].reason
    ops.decode(codes_of(torch.full((64,), 2)), W_dec)
    assert "dense" not in fastsae.explain().choices["decode"].reason
    ops.decode(codes_of(torch.full((64,), D_SAE), ascending=False), W_dec)
    assert "dense" not in fastsae.explain().choices["decode"].reason


def test_no_token_and_many_latents(dtype):
    codes = codes_of(torch.zeros(0), dtype)
    W_dec = torch.randn(D_SAE, D).to(dtype).requires_grad_()
    (gradient,) = torch.autograd.grad(ops.decode(codes, W_dec).sum(), W_dec)
    assert_same_bits(gradient, torch.zeros_like(W_dec))


# Where an entry lies beyond what 32 bits count, without the 16 GB that come before it: the kernels are given addresses
# so far before the arrays that only the right arithmetic leads into them.
FAR = 2**31 + 12_345


def far(tensor, elements):
    return tensor.data_ptr() - elements * tensor.element_size()


@pytest.mark.parametrize("dense", [False, True], ids=["by_entries", "by_tiles"])
def test_entries_beyond_two_to_the_31(native, dense):
    kernels = native_library.cpu
    codes = codes_of(LENGTHS["zipf"])
    W_dec, x = torch.randn(D_SAE, D), torch.randn(N_TOKENS, D)
    expected = every_result(codes, W_dec, torch.zeros(D), x)
    offsets = codes.offsets + FAR
    values, indices = far(codes.values, FAR), far(codes.indices, FAR)
    matrix = W_dec.data_ptr(), D, 0, D_SAE, D
    rows = [x.new_empty(N_TOKENS, D) for _ in range(2)]
    squared, dots = x.new_empty(N_TOKENS), torch.empty_like(codes.values)
    given = indices, offsets.data_ptr(), N_TOKENS, 0
    kernels.decode(values, *given, *matrix, 0, dense, rows[0].data_ptr(), D)
    kernels.squared_error(values, *given, *matrix, 0, dense, x.data_ptr(), D, rows[1].data_ptr(), D, squared.data_ptr())
    kernels.sampled_dot(x.data_ptr(), D, *given, *matrix, 0, dense, far(dots, FAR))

    latent_offsets = torch.empty(D_SAE + 1, dtype=torch.int64)
    tokens, entries = torch.empty_like(codes.indices), torch.empty(len(codes.indices), dtype=torch.int64)
    places = latent_offsets.data_ptr(), tokens.data_ptr(), entries.data_ptr()
    kernels.transpose(*given, D_SAE, *places)
    assert entries.min() == FAR
    latent_offsets += FAR
    summed, sums = torch.empty(D_SAE, D), torch.empty(D_SAE)
    kernels.accumulate_rows(
        values, places[0], far(tokens, FAR), far(entries, FAR), D_SAE, x.data_ptr(), D, 0, N_TOKENS, D, 0, 0, dense,
        summed.data_ptr(), D, sums.data_ptr(),
    )  # fmt: skip
    for actual, wanted in zip([*rows, squared, dots, summed, sums], expected, strict=False):
        assert_same_bits(actual, wanted)


def test_latents_whose_rows_lie_beyond_two_to_the_31(native):
    kernels = native_library.cpu
    latent, d_sae = 2**30 + 3, 2**30 + 3 + D_SAE
    codes = codes_of(LENGTHS["zipf"])
    W_dec, x = torch.randn(D_SAE, D), torch.randn(N_TOKENS, D)
    expected = every_result(codes, W_dec, torch.zeros(D), x)
    indices = codes.indices + latent
    given = indices.data_ptr(), codes.offsets.data_ptr(), N_TOKENS, 0, far(W_dec, latent * D), D, 0, d_sae, D
    decoded, dots = torch.empty(N_TOKENS, D), torch.empty_like(codes.values)
    kernels.decode(codes.values.data_ptr(), *given, 0, False, decoded.data_ptr(), D)
    kernels.sampled_dot(x.data_ptr(), D, *given, 0, False, dots.data_ptr())
    assert_same_bits(decoded, expected[0])
    assert_same_bits(dots, expected[3])
