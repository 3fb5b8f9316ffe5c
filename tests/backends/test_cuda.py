"""The C++/CUDA kernels: their door on every machine, and their code run on a CPU by an emulator (emulator/)."""

import importlib.util
import os
import shutil
import sys
from pathlib import Path

import pytest
import torch

from fastsae import reference
from fastsae.backends import cpu, cuda, native
from fastsae.testing import assert_accurate, assert_same_bits, random_codes

ROOT = Path(__file__).parents[2]
OPS = ("decode", "squared_error", "sampled_dot", "transpose", "accumulate_rows", "fused_update")
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# Whole 16-byte vectors of every dtype, and a width that has none; more columns than a block has threads.
WIDTHS = [24, 13, 1100]


def _emulator_module():
    spec = importlib.util.spec_from_file_location("cuda_emulator", Path(__file__).parent / "emulator" / "build.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def library():
    builder = _emulator_module()
    if builder.cuda_headers() is None or shutil.which(os.environ.get("CXX", "g++")) is None:
        pytest.skip("needs the CUDA toolkit's headers and a C++ compiler")
    return builder.build(ROOT / "build" / f"emulator-{sys.implementation.cache_tag}")


@pytest.fixture(params=["forwards", "backwards"])
def emulated(request, library, monkeypatch):
    """The backend with the emulator behind it: it takes CPU tensors; threads run in either order between barriers."""
    if request.param == "backwards":
        monkeypatch.setenv("FASTSAE_EMULATOR_BACKWARDS", "1")
    monkeypatch.setattr(native, "cuda", library)
    monkeypatch.setattr(cuda, "_launch", lambda kernel, like, *args: kernel(0, 0, *args))
    return cuda


def randn(*shape, dtype=torch.float32):
    return torch.randn(*shape).to(dtype)


def codes_of(kind, n_tokens, d_sae, dtype):
    return random_codes(n_tokens, d_sae, 11 if kind == "top-k" else None, dtype=dtype)


@pytest.mark.parametrize("op", OPS)
def test_no_device_is_a_reason(op):
    assert "the tensors are on cpu" in cuda.why_not(op, torch.device("cpu"), torch.float32)


@pytest.mark.parametrize("op", OPS)
def test_no_library_is_a_reason(op, monkeypatch):
    monkeypatch.setattr(native, "cuda", None)
    monkeypatch.setattr(native, "why_not_cuda", "the CUDA library is not there")
    assert cuda.why_not(op, torch.device("cuda"), torch.float32) == "the CUDA library is not there"


def test_reasons_by_operator_and_dtype(monkeypatch):
    monkeypatch.setattr(native, "cuda", object())
    gpu = torch.device("cuda")
    assert "encode_topk" in cuda.why_not("encode_topk", gpu, torch.float32)
    assert "torch.float64" in cuda.why_not("decode", gpu, torch.float64)
    for op in OPS:
        assert callable(getattr(cuda, op))
        for dtype in DTYPES:
            assert cuda.why_not(op, gpu, dtype) == ""
    # Indices have no floating dtype.
    assert cuda.why_not("transpose", gpu, torch.int32) == ""


def test_the_library_is_there_or_the_reason_is():
    if native.cuda is None:
        assert "FASTSAE_CUDA=1" in native.why_not_cuda or "FASTSAE_NO_NATIVE" in native.why_not_cuda
    else:
        assert native.cuda.architectures()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("kind", ["top-k", "csr"])
def test_decode_and_squared_error(emulated, kind, width, dtype):
    codes = codes_of(kind, 9, 61, dtype)
    w_dec, b_dec, target = randn(61, width, dtype=dtype), randn(width), randn(9, width, dtype=dtype)
    arguments = codes.values, codes.indices, codes.offsets, w_dec, b_dec
    y = emulated.decode(*arguments)

    def formula(values, w_dec, b_dec):
        return reference.decode(values, codes.indices, codes.offsets, w_dec, b_dec)

    assert_accurate(y, formula, codes.values, w_dec, b_dec)
    residual, squared = emulated.squared_error(*arguments, target)
    expected = reference.squared_error(*arguments, target)
    torch.testing.assert_close(residual, expected[0])
    torch.testing.assert_close(squared, expected[1])
    if dtype != torch.float16 and native.cpu is not None:
        assert_same_bits(y, cpu.decode(*arguments))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("kind", ["top-k", "csr"])
def test_sampled_dot(emulated, kind, width, dtype):
    codes = codes_of(kind, 9, 61, dtype)
    g, w_dec, scale = randn(9, width, dtype=dtype), randn(61, width, dtype=dtype), randn(9)
    for row_scale in (None, scale):
        out = emulated.sampled_dot(g, codes.indices, codes.offsets, w_dec, row_scale)
        assert out.shape == codes.indices.shape

        def formula(g, w, row_scale=row_scale):
            return reference.sampled_dot(g, codes.indices, codes.offsets, w, row_scale)

        assert_accurate(out, formula, g, w_dec)


@pytest.mark.parametrize("kind", ["top-k", "csr"])
@pytest.mark.parametrize("d_sae", [33, 64, 1000])
def test_transpose(emulated, kind, d_sae):
    codes = codes_of(kind, 40, d_sae, torch.float32)
    results = emulated.transpose(codes.indices, codes.offsets, d_sae)
    for result, expected in zip(results, reference.transpose(codes.indices, codes.offsets, d_sae), strict=True):
        assert_same_bits(result, expected)


def test_tokens_with_many_entries(emulated):
    """More than a block stages at once, so that its shared memory is filled anew."""
    codes = random_codes(12, 600, None)
    assert codes.offsets.diff().max() > 128
    w_dec, g = randn(600, 20), randn(12, 20)

    def formula(values, w_dec):
        return reference.decode(values, codes.indices, codes.offsets, w_dec, None)

    y = emulated.decode(codes.values, codes.indices, codes.offsets, w_dec, None)
    assert_accurate(y, formula, codes.values, w_dec)

    def dots(g, w_dec):
        return reference.sampled_dot(g, codes.indices, codes.offsets, w_dec, None)

    assert_accurate(emulated.sampled_dot(g, codes.indices, codes.offsets, w_dec, None), dots, g, w_dec)


# Cut at 512 entries: none, one, just not cut, just cut, whole pieces, many.
COUNTS = [0, 1, 511, 512, 513, 0, 1024, 3, 1536, 2000, 0]


def long_segments(dtype):
    """Codes in which latents have these many entries, and their transposition."""
    latents = torch.arange(len(COUNTS)).repeat_interleave(torch.tensor(COUNTS))
    latents = latents[torch.randperm(latents.numel())].int()
    n_tokens = latents.numel() // 8
    indices = latents[: 8 * n_tokens].reshape(n_tokens, 8)
    values = torch.randn(n_tokens, 8).to(dtype)
    return values, reference.transpose(indices, None, len(COUNTS)), n_tokens


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("width", [24, 13])
def test_accumulate_rows(emulated, width, dtype):
    values, transposed, n_tokens = long_segments(dtype)
    g, shift, scale = randn(n_tokens, width, dtype=dtype), randn(width), randn(n_tokens)
    for optional in ((None, None), (shift, scale)):
        results = emulated.accumulate_rows(values, *transposed, g, *optional)

        def formula(values, g, optional=optional):
            return reference.accumulate_rows(values, *transposed, g, *optional)

        assert_accurate(results, formula, values, g)
        if dtype == torch.float32 and native.cpu is not None:
            # Up to one piece the order of the sum is that of the C++ code.
            short = torch.tensor(COUNTS) <= 512
            same = cpu.accumulate_rows(values, *transposed, g, *optional)
            assert_same_bits(results[0][short], same[0][short])


@pytest.mark.parametrize("unit_norm", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("d_in", "d_out"), [(24, 40), (13, 7)])
def test_fused_update(emulated, unit_norm, dtype, d_in, d_out):
    values, transposed, n_tokens = long_segments(dtype)
    d_sae = len(COUNTS)
    grad_values = torch.randn_like(values)
    g, x = randn(n_tokens, d_out, dtype=dtype), randn(n_tokens, d_in, dtype=dtype)
    slots = [
        [randn(*shape, dtype=dtype), randn(*shape, dtype=dtype), randn(*shape).abs().to(dtype)]
        for shape in ((d_sae, d_in), (d_sae,), (d_sae, d_out))
    ]
    slots[2][0][3] = 0
    scalars = (1e-2, 0.9, 0.999, 1e-8, 0.1, 3, unit_norm)
    optional = randn(n_tokens), randn(d_in)

    def run(function, dtype):
        copies = [[tensor.clone().to(dtype) for tensor in slot] for slot in slots]
        inputs = [tensor.to(dtype) for tensor in (values, grad_values, g, x)]
        function(*inputs[:2], *transposed, inputs[2], optional[0], inputs[3], optional[1], *copies, *scalars)
        return [tensor for slot in copies for tensor in slot]

    exact, plain = run(reference.fused_update, torch.float64), run(reference.fused_update, dtype)
    for result, wanted, one in zip(run(emulated.fused_update, dtype), exact, plain, strict=True):
        scale, error = wanted.abs().max(), (result.double() - wanted).abs().max()
        assert error <= 2 * (one.double() - wanted).abs().max() + torch.finfo(dtype).eps * scale


def test_a_wrong_index_stays_in_its_row(emulated):
    values, w_dec = torch.ones(3, 2), randn(5, 4)
    indices = torch.tensor([[0, 1], [2, 5], [-1, 4]], dtype=torch.int32)
    y = emulated.decode(values, indices, None, w_dec, None)
    assert y.isnan().all(dim=1).tolist() == [False, True, True]
    assert_same_bits(y[0], w_dec[0] + w_dec[1])
    dots = emulated.sampled_dot(randn(3, 4), indices, None, w_dec, None)
    assert dots.isnan().tolist() == [[False, False], [False, True], [True, False]]
    latent_offsets, tokens, entries = emulated.transpose(indices, None, 5)
    assert latent_offsets.tolist() == [0, 1, 2, 3, 3, 4]
    assert entries[:4].tolist() == [0, 1, 2, 5]
    assert tokens[:4].tolist() == [0, 0, 1, 2]
    sums, _ = emulated.accumulate_rows(values, latent_offsets, tokens + 3, entries, randn(3, 4), None, None)
    assert sums.isnan().all(dim=1).tolist() == [True, True, True, False, True]


def test_other_rows_do_not_see_nan(emulated):
    w_dec = randn(5, 8)
    w_dec[0], w_dec[4] = torch.nan, torch.inf
    indices = torch.tensor([[1, 2, 3], [0, 1, 2], [1, 2, 3]], dtype=torch.int32)
    y = emulated.decode(torch.ones(3, 3), indices, None, w_dec, None)
    assert y.isfinite().all(dim=1).tolist() == [True, False, True]
    dots = emulated.sampled_dot(torch.ones(3, 8), indices, None, w_dec, None)
    assert dots.isfinite().tolist() == [[True] * 3, [False, True, True], [True] * 3]


def test_nothing_to_do(emulated):
    empty = torch.empty(0, 3, dtype=torch.int32)
    assert emulated.decode(torch.empty(0, 3), empty, None, randn(5, 4), None).shape == (0, 4)
    transposed = emulated.transpose(empty, None, 5)
    assert transposed[0].tolist() == [0] * 6
    out, sums = emulated.accumulate_rows(torch.empty(0, 3), *transposed, randn(0, 4), None, None)
    assert out.eq(0).all()
    assert sums.eq(0).all()


def test_unaligned_rows(emulated):
    """A view that starts four bytes into its buffer, and rows apart by an odd stride."""
    buffer = randn(61 * 25 + 1)
    w_dec = buffer[1:].reshape(61, 25)[:, :24]
    codes = codes_of("top-k", 9, 61, torch.float32)
    arguments = codes.values, codes.indices, None
    assert_same_bits(emulated.decode(*arguments, w_dec, None), emulated.decode(*arguments, w_dec.contiguous(), None))


def test_bad_arguments_are_named(emulated):
    codes = random_codes(3, 5, 2)
    with pytest.raises(TypeError, match="indices has dtype"):
        emulated.decode(codes.values, codes.indices.long(), None, randn(5, 4), None)
    with pytest.raises(TypeError, match="values has dtype"):
        emulated.decode(codes.values.half(), codes.indices, None, randn(5, 4), None)
    with pytest.raises(ValueError, match="g has 2 rows"):
        emulated.sampled_dot(randn(2, 4), codes.indices, None, randn(5, 4), None)
