"""encode_threshold: to the bit on native code, against the dense formula elsewhere; its gradients; ragged results."""

import os
from unittest import mock

import hypothesis
import pytest
import torch
from hostile import W_FAULTS, X_FAULTS, problems, spoil_w, spoil_x

from fastsae import ops, reference
from fastsae.backends import dispatch, screen_threshold
from fastsae.backends import torch as torch_backend
from fastsae.ops.encode_threshold import encode_threshold_op
from fastsae.reference.encode import preactivations
from fastsae.testing import assert_accurate, assert_same_bits, backends, defined_encode_threshold, gradients

NATIVE = [backend for backend in backends() if backend.isa]
SCREENS = ("float32", "bfloat16")


def serves(backend):
    why_not = dispatch.BACKENDS[backend.name].why_not
    return not why_not("encode_threshold", torch.device(backend.device), torch.float32)


SERVED = list(filter(serves, backends()))
CASES = [(backend, dtype) for backend in SERVED for dtype in backend.dtypes]
each = pytest.mark.parametrize(("backend", "dtype"), CASES, ids=lambda case: str(case))


def assert_same(actual, expected):
    for found, right in zip(actual, expected, strict=True):
        assert_same_bits(found, right)


def check_native(*arguments):
    expected = defined_encode_threshold(*arguments)
    for backend in NATIVE:
        for screen in SCREENS:
            with backend.active(), mock.patch.dict(os.environ, FASTSAE_SCREEN=screen):
                assert_same(encode_threshold_op(*arguments), expected)


def draw(n_tokens, d_in, d_sae, dtype=torch.float32):
    x, w_enc = torch.randn(n_tokens, d_in).to(dtype), torch.randn(d_sae, d_in).to(dtype)
    return x, w_enc, torch.randn(d_sae).to(dtype), torch.randn(d_in).to(dtype), torch.randn(d_sae) + d_in**0.5


@pytest.mark.skipif(not NATIVE, reason="no native code here")
@hypothesis.settings(max_examples=3 * hypothesis.settings.default.max_examples)
@hypothesis.given(problems([torch.float32, torch.bfloat16]))
def test_native_code_matches_the_definition_to_the_bit(problem):
    """The threshold is a value that occurs, so ties with it do too."""
    x, w_enc, b_enc, b_dec, k, _ = problem.arguments
    pre = preactivations(x, w_enc, b_enc, b_dec)
    threshold = pre[0].nan_to_num().sort(descending=True).values[k - 1].expand(len(w_enc)).contiguous()
    check_native(x, w_enc, b_enc, b_dec, threshold)
    threshold[::3] = torch.inf
    check_native(x, w_enc, b_enc, b_dec, threshold)


@pytest.mark.skipif(not NATIVE, reason="no native code here")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("fault", [*(f"x {f}" for f in X_FAULTS), *(f"w {f}" for f in W_FAULTS)])
def test_faults(fault, dtype):
    x, w_enc, b_enc, b_dec, threshold = draw(9, 24, 600, dtype)
    where, _, how = fault.partition(" ")
    spoil_x(x, how, 4) if where == "x" else spoil_w(w_enc, how, 17)
    check_native(x, w_enc, b_enc, b_dec, threshold)


@pytest.mark.skipif(not NATIVE, reason="no native code here")
@pytest.mark.parametrize("n_tokens", [0, 1, 1024, 1025])
def test_blocks_of_rows(n_tokens):
    check_native(*draw(n_tokens, 5, 600))


@pytest.mark.skipif(not NATIVE, reason="no native code here")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("spares_nothing", [0.0, 0.3, 2.0], ids=["never_screened", "sometimes", "always_screened"])
def test_with_and_without_the_screen(monkeypatch, dtype, spares_nothing):
    """Few survive of the first 512 latents, most of the next, some of the last: each way must give the same bits."""
    monkeypatch.setattr(
        screen_threshold, "_SCREEN_SPARES_NOTHING", dict.fromkeys((torch.float32, torch.bfloat16), spares_nothing)
    )
    x, w_enc, b_enc, b_dec, _ = draw(37, 21, 1300, dtype)
    threshold = torch.cat([torch.full((512,), 9.0), torch.full((512,), -20.0), torch.randn(276)])
    check_native(x, w_enc, b_enc, b_dec, threshold)


@pytest.mark.skipif(not NATIVE, reason="no native code here")
def test_rows_go_on_in_halves_where_much_waits(monkeypatch):
    monkeypatch.setattr(screen_threshold, "_MOST_WAITING", 5_000)
    monkeypatch.setattr(screen_threshold, "_FEWEST_ROWS", 20)
    x, w_enc, b_enc, b_dec, threshold = draw(101, 5, 1700)
    check_native(x, w_enc, b_enc, b_dec, threshold - 3)


@each
def test_matches_the_dense_formula(backend, dtype):
    with backend.active():
        x, w_enc, b_enc, b_dec, threshold = draw(37, 33, 199, dtype)
        codes = ops.encode_threshold(x, w_enc.T, b_enc, threshold, b_dec=b_dec)
        _, indices, offsets = reference.encode_threshold(
            x.double(), w_enc.double(), b_enc.double(), b_dec.double(), threshold.double()
        )
        # Rounding may decide at the threshold itself: no random draw lies there.
        assert codes.offsets.equal(offsets)
        assert codes.indices.equal(indices)
        tokens = codes.tokens()

        def formula(x, w_enc, b_enc, b_dec):
            return ((x - b_dec) @ w_enc.T + b_enc)[tokens, indices.long()]

        assert codes.dtype == dtype
        assert 0 < codes.nnz < 37 * 199 / 4
        assert_accurate(codes.values, formula, x, w_enc, b_enc, b_dec)


@each
@pytest.mark.parametrize("with_biases", [True, False], ids=["biases", "no_biases"])
def test_gradients(backend, dtype, with_biases):
    with backend.active():
        x, w_enc, b_enc, b_dec, threshold = draw(19, 20, 70, dtype)
        b_enc, b_dec = (b_enc, b_dec) if with_biases else (None, None)
        codes = ops.encode_threshold(x, w_enc.T, b_enc, threshold, b_dec=b_dec)
        g, tokens, latents = torch.randn_like(codes.values), codes.tokens(), codes.indices.long()
        inputs = x, w_enc.T, b_enc, b_dec

        def ours(x, W_enc, b_enc, b_dec):
            return ops.encode_threshold(x, W_enc, b_enc, threshold, b_dec=b_dec).values

        def dense(x, W_enc, b_enc, b_dec):
            pre = (x if b_dec is None else x - b_dec) @ W_enc
            return (pre if b_enc is None else pre + b_enc)[tokens, latents]

        actual = gradients(ours, inputs, g)
        assert_accurate(actual, lambda *inputs: gradients(dense, inputs[:4], inputs[4]), *inputs, g)


def test_gradcheck():
    x, w_enc, b_enc, b_dec, threshold = (t.double() for t in draw(5, 4, 9))
    inputs = [t.requires_grad_() for t in (x, w_enc, b_enc, b_dec)]
    assert torch.autograd.gradcheck(lambda *inputs: encode_threshold_op(*inputs, threshold)[0], inputs)


def test_opcheck():
    x, w_enc, b_enc, b_dec, threshold = (t.requires_grad_(i < 4) for i, t in enumerate(draw(5, 4, 9)))
    torch.library.opcheck(encode_threshold_op, (x, w_enc, b_enc, b_dec, threshold))


@each
def test_ragged_results(backend, dtype):
    """A token with nothing, one with everything, and only those on the threshold: strictly above is kept."""
    with backend.active():
        x = torch.tensor([[0.0], [1.0], [-1.0], [2.0]]).to(dtype)
        W_enc = torch.ones(1, 40).to(dtype)
        codes = ops.encode_threshold(x, W_enc, None)
        assert codes.offsets.tolist() == [0, 0, 40, 40, 80]
        assert codes.indices.tolist() == [*range(40)] * 2
        assert ops.encode_threshold(x, W_enc, None, 1.0).offsets.tolist() == [0, 0, 0, 0, 40]
        assert ops.encode_threshold(x, W_enc, None, 2.0).nnz == 0
        everything = ops.encode_threshold(x, W_enc, None, -torch.inf)
        assert everything.nnz == 160
        assert_same_bits(everything.to_dense(), x @ W_enc)


@each
def test_nan_is_kept_and_stays_in_its_token(backend, dtype):
    with backend.active():
        x, w_enc, b_enc, _, threshold = draw(5, 8, 300, dtype)
        clean = ops.encode_threshold(x, w_enc.T, b_enc, threshold)
        x[2, 3] = torch.nan
        codes = ops.encode_threshold(x, w_enc.T, b_enc, threshold)
        assert codes.rows(2).values.isnan().all()
        assert codes.rows(2).nnz == 300
        others = [0, 1, 3, 4]
        assert_same_bits(codes.rows(torch.tensor(others)).to_dense(), clean.rows(torch.tensor(others)).to_dense())


@each
@pytest.mark.parametrize("leading", [(), (0,), (2, 0, 3), (2, 3)], ids=str)
def test_leading_dimensions_and_strides(backend, dtype, leading):
    with backend.active():
        _, w_enc, b_enc, b_dec, threshold = draw(1, 8, 300, dtype)
        x = torch.randn(*leading, 8).to(dtype)
        codes = ops.encode_threshold(x, w_enc.T, b_enc, threshold, b_dec=b_dec)
        assert codes.shape == (*leading, 300)
        strided = torch.stack([x, x], dim=-1)[..., 0]
        same = ops.encode_threshold(strided, w_enc.T.contiguous(), b_enc, threshold, b_dec=b_dec)
        assert same.indices.equal(codes.indices)
        assert same.offsets.equal(codes.offsets)
        if backend.isa:
            # A product of PyTorch's may round differently in another layout.
            assert_same_bits(same.values, codes.values)


def test_same_bits_with_any_number_of_threads(native):
    arguments = draw(199, 24, 700)
    threads = torch.get_num_threads()
    try:
        results = []
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            results.append(encode_threshold_op(*arguments))
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        assert_same(other, results[0])


def test_blocks_of_the_torch_backend(monkeypatch):
    arguments = draw(37, 5, 64)
    monkeypatch.setattr(torch_backend, "_BLOCK_ELEMENTS", 64 * 10)
    assert_same(torch_backend.encode_threshold(*arguments), reference.encode_threshold(*arguments))


def test_bad_input():
    x, w_enc, b_enc, _, threshold = draw(3, 8, 30)
    with pytest.raises(ValueError, match=r"threshold has shape \(29,\): expected \[30\]"):
        ops.encode_threshold(x, w_enc.T, b_enc, threshold[:29])
    with pytest.raises(TypeError, match=r"threshold has dtype torch.int64"):
        ops.encode_threshold(x, w_enc.T, b_enc, torch.zeros(30, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"x has shape \(3, 8\) and W_enc \(7, 30\)"):
        ops.encode_threshold(x, w_enc.T[:7], b_enc, threshold)
