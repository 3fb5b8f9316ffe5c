"""Every operator keeps torch's contract for custom operators: schema, fake kernel, autograd, torch.compile."""

import shutil

import pytest
import torch

from fastsae import SparseCodes, ops
from fastsae.ops.accumulate_rows import accumulate_rows_op
from fastsae.ops.decode import decode_op
from fastsae.ops.encode import encode_topk_op
from fastsae.ops.gradient_norm import gradient_norm_op
from fastsae.ops.sampled_dot import sampled_dot_op
from fastsae.ops.squared_error import squared_error_op
from fastsae.ops.transpose import transpose_op
from fastsae.testing import assert_same_bits, backends, random_codes

N_TOKENS, D, D_SAE, K = 6, 20, 300, 3


def leaf(*shape, dtype=torch.float32):
    return torch.randn(shape).to(dtype).requires_grad_()


# For each operator: arguments with every optional one, and with none of them.
def encode_arguments(dtype):
    x, w, b_enc, b_dec = (leaf(*s, dtype=dtype) for s in ((N_TOKENS, D), (D_SAE, D), (D_SAE,), (D,)))
    return (x, w, b_enc, b_dec, K, False), (x.detach(), w, None, None, K, True)


def decode_arguments(dtype):
    csr, fixed = random_codes(N_TOKENS, D_SAE, dtype=dtype), random_codes(N_TOKENS, D_SAE, K, dtype=dtype)
    w, b_dec = leaf(D_SAE, D, dtype=dtype), leaf(D, dtype=dtype)
    return (
        (csr.values.requires_grad_(), csr.indices, csr.offsets, w, b_dec),
        (fixed.values, fixed.indices, None, w, None),
    )


def squared_error_arguments(dtype):
    target = leaf(N_TOKENS, D, dtype=dtype)
    every, none = decode_arguments(dtype)
    return (*every, target), (*none, target.detach())


def sampled_dot_arguments(dtype):
    csr, fixed = random_codes(N_TOKENS, D_SAE), random_codes(N_TOKENS, D_SAE, K)
    g, w, row_scale = leaf(N_TOKENS, D, dtype=dtype), leaf(D_SAE, D, dtype=dtype), leaf(N_TOKENS)
    return (g, csr.indices, csr.offsets, w, row_scale), (g, fixed.indices, None, w.detach(), None)


def transpose_arguments(dtype):
    csr, fixed = random_codes(N_TOKENS, D_SAE), random_codes(N_TOKENS, D_SAE, K)
    return (csr.indices, csr.offsets, D_SAE), (fixed.indices, None, D_SAE)


def accumulate_rows_arguments(dtype):
    codes = random_codes(N_TOKENS, D_SAE, K, dtype=dtype)
    latent_major = ops.transpose(codes)
    g, shift, row_scale = leaf(N_TOKENS, D, dtype=dtype), leaf(D, dtype=dtype), leaf(N_TOKENS)
    return (
        (codes.values.requires_grad_(), *latent_major, g, shift, row_scale),
        (codes.values.detach(), *latent_major, g, None, None),
    )


def gradient_norm_arguments(dtype):
    codes = random_codes(N_TOKENS, D_SAE, K, dtype=dtype)
    grad_values, g, x, w, b_dec, row_scale = (
        leaf(*shape, dtype=kind).detach()
        for shape, kind in (((N_TOKENS, K), dtype), ((N_TOKENS, D), dtype), ((N_TOKENS, D), dtype), ((D_SAE, D), dtype),
                            ((D,), dtype), ((N_TOKENS,), torch.float32))
    )  # fmt: skip
    sums = codes.values, grad_values, *ops.transpose(codes), g
    return (*sums, row_scale, x, b_dec, w, True, 0.5, 2.0), (*sums, None, x, None, w, False, None, None)


OPERATORS = {
    encode_topk_op: encode_arguments,
    decode_op: decode_arguments,
    squared_error_op: squared_error_arguments,
    sampled_dot_op: sampled_dot_arguments,
    transpose_op: transpose_arguments,
    accumulate_rows_op: accumulate_rows_arguments,
    gradient_norm_op: gradient_norm_arguments,
}
# Held to their contracts by tests of their own: one changes its arguments, some find the sizes of their results.
ELSEWHERE = {
    "fastsae::fused_update",
    "fastsae::encode_threshold",
    "fastsae::encode_batch_topk",
    "fastsae::encode_groupmax",
    "fastsae::nested_errors",
    "fastsae::nested_errors_backward",
}
# One instruction set is enough here: what is checked is the Python around the kernels.
BACKENDS = {backend.name: backend for backend in backends()}


@pytest.fixture(params=BACKENDS)
def backend(request, monkeypatch):
    # Native code screens from 256 latents on; Triton's interpreter pays for each of them.
    if BACKENDS[request.param].spared:
        monkeypatch.setattr(request.module, "D_SAE", 40)
    with BACKENDS[request.param].active():
        yield


def test_every_operator_is_here():
    names = {name for name in torch._C._dispatch_get_all_op_names() if name.startswith("fastsae::")}
    assert {op._schema.name for op in OPERATORS} == names - ELSEWHERE


@pytest.mark.parametrize("optional", [0, 1], ids=["every_argument", "no_optional_argument"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("op", OPERATORS, ids=lambda op: op._schema.name[9:])
def test_opcheck(backend, op, dtype, optional):
    torch.library.opcheck(op, OPERATORS[op](dtype)[optional])


@pytest.mark.parametrize("op", OPERATORS, ids=lambda op: op._schema.name[9:])
def test_meta_tensors(op, dtype):
    """Shapes and dtypes without data are those of the real thing."""
    for arguments in OPERATORS[op](dtype):
        real = op(*arguments)
        on_meta = op(*(a.detach().to("meta") if isinstance(a, torch.Tensor) else a for a in arguments))
        real, on_meta = ([r] if isinstance(r, torch.Tensor) else r for r in (real, on_meta))
        for one, other in zip(real, on_meta, strict=True):
            assert other.device.type == "meta"
            assert (one.shape, one.dtype, one.stride()) == (other.shape, other.dtype, other.stride())


def encode(x, W_enc, b_enc):
    return ops.encode_topk(x, W_enc, b_enc, K, b_dec=x[0, 0].detach()).relu()


def compiled(function, use_compile, backend="aot_eager"):
    return torch.compile(function, fullgraph=True, backend=backend) if use_compile else function


def test_functions_that_return_codes(backend, use_compile):
    x, W_enc, b_enc = torch.randn(2, 3, D), torch.randn(D_SAE, D).T, torch.randn(D_SAE)
    codes = compiled(encode, use_compile)(x, W_enc, b_enc)
    assert isinstance(codes, SparseCodes)
    assert codes.shape == (2, 3, D_SAE)
    expected = encode(x, W_enc, b_enc)
    assert_same_bits(codes.values, expected.values)
    assert codes.indices.equal(expected.indices)


def test_functions_that_take_codes(backend, use_compile):
    codes, W_dec, g = random_codes(N_TOKENS, D_SAE), torch.randn(D_SAE, D), torch.randn(N_TOKENS, D)

    def function(codes, W_dec, g):
        return ops.decode(codes, W_dec), ops.sampled_dot(g, codes, W_dec), ops.accumulate_rows(codes, g)

    for actual, expected in zip(
        compiled(function, use_compile)(codes, W_dec, g), function(codes, W_dec, g), strict=True
    ):
        assert_same_bits(actual, expected)


def training_step(x, W_enc, b_enc, W_dec, b_dec):
    codes = ops.encode_topk(x, W_enc, b_enc, K, b_dec=b_dec).relu()
    _, squared = ops.squared_error(codes, W_dec, b_dec, x)
    loss = squared.mean() / x.shape[-1]
    return loss + 1e-3 * ops.decode(codes, W_dec, b_dec).square().mean()


def step_inputs():
    return leaf(N_TOKENS, D), leaf(D_SAE, D).T.detach().requires_grad_(), leaf(D_SAE), leaf(D_SAE, D), leaf(D)


def gradients_of(function, inputs):
    return torch.autograd.grad(function(*inputs), inputs)


def test_forward_and_backward(backend, use_compile):
    inputs = step_inputs()
    actual = gradients_of(compiled(training_step, use_compile), inputs)
    for one, other in zip(actual, gradients_of(training_step, inputs), strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.skipif(not any(map(shutil.which, ("g++", "clang++"))), reason="inductor needs a C++ compiler")
def test_forward_and_backward_by_inductor():
    """The default compiler, once; what it fuses around the operators rounds in its own order."""
    torch.compiler.reset()
    inputs = step_inputs()
    actual = gradients_of(compiled(training_step, True, "inductor"), inputs)
    for one, other in zip(actual, gradients_of(training_step, inputs), strict=True):
        torch.testing.assert_close(one, other)


def test_batch_sizes_share_one_compilation():
    """With dynamic sizes the second shape compiles the last graph."""
    torch.compiler.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    function = torch.compile(encode, fullgraph=True, backend=counter, dynamic=True)
    W_enc, b_enc = torch.randn(D_SAE, D).T, torch.randn(D_SAE)
    for batch in (2, 3, 5, 7):
        x = torch.randn(batch, 4, D)
        assert_same_bits(function(x, W_enc, b_enc).values, encode(x, W_enc, b_enc).values)
    assert counter.frame_count == 1
