"""The same bits whatever the thread count, the split of a batch, the run and, where promised, the instruction set."""

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from fastsae import ops
from fastsae.ops.accumulate_rows import accumulate_rows_op
from fastsae.testing import assert_same_bits, backends, random_codes

N_TOKENS, D, D_SAE, K = 203, 70, 700, 9


def draw(dtype):
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(N_TOKENS, D, generator=generator).to(dtype)
    weight = torch.randn(D_SAE, D, generator=generator).to(dtype)
    # A fifth of all tokens on one latent: a sum long enough to have an order.
    weight[3] = 3 * x[:40].float().mean(dim=0).to(dtype)
    return x, weight, torch.randn(D_SAE, generator=generator).to(dtype)


def encode(dtype):
    x, weight, b_enc = draw(dtype)
    codes = ops.encode_topk(x, weight.T, b_enc, K, b_dec=x[0])
    return codes.values, codes.indices


def decode(dtype):
    _, weight, _ = draw(dtype)
    return [ops.decode(random_codes(N_TOKENS, D_SAE, k, dtype=dtype), weight, weight[0]) for k in (K, None)]


def squared_error(dtype):
    x, weight, _ = draw(dtype)
    return ops.squared_error(random_codes(N_TOKENS, D_SAE, K, dtype=dtype), weight, None, x)


def sampled_dot(dtype):
    x, weight, _ = draw(dtype)
    return [ops.sampled_dot(x, random_codes(N_TOKENS, D_SAE, k, dtype=dtype), weight) for k in (K, None)]


def transpose(dtype):
    return ops.transpose(random_codes(N_TOKENS, D_SAE, dtype=dtype))


def accumulate_rows(dtype):
    x, weight, b_enc = draw(dtype)
    codes = ops.encode_topk(x, weight.T, b_enc, K)
    return accumulate_rows_op(codes.values, *ops.transpose(codes), x, x[0], x[:, 0].contiguous())


def unit_rows(dtype):
    _, weight, _ = draw(dtype)
    return [ops.normalize_rows_(weight.clone()), ops.project_rows_(weight.flip(0), weight)]


def training_step(dtype):
    x, weight, b_enc = (t.requires_grad_() for t in draw(dtype))
    codes = ops.encode_topk(x, weight.T, b_enc, K).relu()
    _, squared = ops.squared_error(codes, weight, None, x.detach())
    squared.mean().backward()
    return [t.grad for t in (x, weight, b_enc)]


EVERY = [encode, decode, squared_error, sampled_dot, transpose, accumulate_rows, unit_rows, training_step]


def check_same(actual, expected):
    for one, other in zip(actual, expected, strict=True):
        assert_same_bits(one, other)


@pytest.fixture
def threads():
    """Sets the number of threads; what it was comes back after the test."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.mark.parametrize("function", EVERY, ids=lambda function: function.__name__)
def test_thread_counts(native, function, threads):
    for dtype in native.dtypes:
        threads(1)
        expected = function(dtype)
        for count in (1, 2, 3):
            threads(count)
            check_same(function(dtype), expected)


def test_thread_counts_with_each_screen(native, screen, threads):
    test_thread_counts(native, encode, threads)


@pytest.mark.parametrize("split", [1, 64, 202])
def test_split_batches(native, split):
    """A token's results do not hang on its company."""
    for dtype in native.dtypes:
        x, weight, b_enc = draw(dtype)

        def per_token(rows, weight=weight, b_enc=b_enc):
            codes = ops.encode_topk(rows, weight.T, b_enc, K)
            y = ops.decode(codes, weight)
            return codes.values, codes.indices, y, *ops.squared_error(codes, weight, None, rows)

        parts = [per_token(x[:split]), per_token(x[split:])]
        check_same([torch.cat(pieces) for pieces in zip(*parts, strict=True)], per_token(x))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("function", [encode, sampled_dot, transpose], ids=lambda function: function.__name__)
def test_instruction_sets(function, dtype):
    """The defined dot product has one order, however wide the registers."""
    results = []
    for backend in backends():
        if backend.isa:
            with backend.active():
                results.append(function(dtype))
    for result in results[1:]:
        check_same(result, results[0])


def test_calls_from_several_python_threads(native):
    """The kernels run without the interpreter's lock and share nothing but their inputs."""
    for function in (encode, squared_error, training_step):
        expected = function(torch.float32)
        with ThreadPoolExecutor(4) as pool:
            for result in pool.map(function, [torch.float32] * 12):
                check_same(result, expected)


def test_torch_backend_repeats_itself():
    torch_backend = next((backend for backend in backends() if backend.name == "torch"), None)
    if torch_backend is None:
        pytest.skip("FASTSAE_TEST_BACKENDS leaves out torch")
    with torch_backend.active():
        check_same(training_step(torch.float32), training_step(torch.float32))
