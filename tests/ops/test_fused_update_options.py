"""fused_update's options: clips against torch's own, lazy steps against torch.optim.SparseAdam, moments in bfloat16."""

import math

import pytest
import torch

import fastsae
from fastsae import ops
from fastsae.backends import dispatch
from fastsae.ops._random import rounding_stream
from fastsae.reference.stochastic_rounding import random_bits
from fastsae.testing import assert_accurate, assert_same_bits, backends, random_codes

# The last one's codes are ragged, with tokens and latents that have no entry.
SHAPES = [(1, 2, 1, 1), (37, 33, 11, 3), (7, 16, 13, None)]
ADAM = {"lr": 1e-2, "betas": (0.9, 0.99), "eps": 1e-3}
CLIPS = [{"clip_value": 2.5}, {"clip_row_norm": 7.0}, {"clip_value": 2.5, "clip_row_norm": 7.0}]


def inputs(n, d, f, k, dtype=torch.float32, seed=0):
    generator = torch.Generator(torch.get_default_device()).manual_seed(seed)

    def draw(*shape):
        return torch.randn(*shape, generator=generator).to(dtype)

    codes = random_codes(n, f, k, seed=seed).to(dtype)
    slots = [(draw(*shape), 0.1 * draw(*shape), (0.1 * draw(*shape)).square()) for shape in ((f, d), (f,), (f, d))]
    return codes, draw(*codes.values.shape), draw(n, d), draw(n, d), slots


def gradients(codes, values, grad_values, residual, x, w_dec, unit_norm, clip_value=None, clip_row_norm=None):
    """Of W_enc.T, b_enc and W_dec, by dense products, clipped by torch's own functions."""
    at = codes.tokens().reshape(-1), codes.indices.reshape(-1).long()
    dense = torch.zeros(codes.n_tokens, codes.d_sae, dtype=values.dtype)
    dense_grads = dense.index_put(at, grad_values.reshape(-1))
    grads = [dense_grads.T @ x, dense_grads.sum(0), dense.index_put(at, values.reshape(-1)).T @ residual]
    if unit_norm:
        grads[2] = grads[2] - (grads[2] * w_dec).sum(1, keepdim=True) / w_dec.square().sum(1, keepdim=True) * w_dec
    if clip_value is not None:
        torch.nn.utils.clip_grad_value_(holders(grads), clip_value)
    if clip_row_norm is not None:
        for row in [*grads[0], *grads[2]]:
            torch.nn.utils.clip_grad_norm_(holders([row]), clip_row_norm)
    return grads


def holders(grads):
    parameters = [torch.nn.Parameter(torch.zeros_like(grad)) for grad in grads]
    for parameter, grad in zip(parameters, grads, strict=True):
        parameter.grad = grad
    return parameters


def run_op(codes, grad_values, residual, x, slots, **options):
    state = [[t.clone() for t in slot] for slot in slots]
    w_enc, b_enc, w_dec = state
    encoder = ops.Slot(*(t.T for t in w_enc))
    ops.fused_update(codes, grad_values, residual, x, encoder, ops.Slot(*b_enc), ops.Slot(*w_dec), **ADAM | options)
    return [tensor for slot in state for tensor in slot]


@pytest.mark.parametrize(
    ("clips", "unit_norm"), [(CLIPS[0], False), (CLIPS[1], True), (CLIPS[2], True)], ids=["value", "row", "both"]
)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_clipped_gradients(dtype, shape, unit_norm, clips):
    """Seen in the first moments of a first step from zero, and in their norm."""
    codes, grad_values, residual, x, slots = inputs(*shape, dtype)
    slots = [(p, torch.zeros_like(p), torch.zeros_like(p)) for p, _, _ in slots]
    result = run_op(codes, grad_values, residual, x, slots, step=1, unit_norm=unit_norm, betas=(0.5, 0.5), **clips)
    arguments = codes.values, grad_values, residual, x, slots[2][0]

    def moments(*given):
        return [0.5 * grad for grad in gradients(codes, *given, unit_norm, **clips)]

    assert_accurate([result[1], result[4], result[7]], moments, *arguments)
    norm = ops.gradient_norm(codes, grad_values, residual, x, slots[2][0], unit_norm=unit_norm, **clips)

    def total(*given):
        return torch.stack([grad.square().sum() for grad in gradients(codes, *given, unit_norm, **clips)]).sum().sqrt()

    assert norm.dtype == torch.float64
    assert_accurate(norm.to(dtype), total, *arguments)


@pytest.mark.parametrize("clips", [{}, CLIPS[2]], ids=str)
def test_two_passes_clip_the_norm_of_everything(dtype, clips):
    codes, grad_values, residual, x, slots = inputs(*SHAPES[1], dtype)
    slots = [(p, torch.zeros_like(p), torch.zeros_like(p)) for p, _, _ in slots]
    norm = ops.gradient_norm(codes, grad_values, residual, x, slots[2][0], unit_norm=True, **clips)
    scale = (3.0 / (norm + 1e-6)).clamp(max=1).to(torch.promote_types(dtype, torch.float32))
    assert scale < 0.9
    result = run_op(
        codes, grad_values, residual, x, slots, step=1, unit_norm=True, betas=(0.5, 0.5), gradient_scale=scale, **clips
    )

    def moments(*given):
        grads = gradients(codes, *given, True, **clips)
        torch.nn.utils.clip_grad_norm_(holders(grads), 3.0)
        return [0.5 * grad for grad in grads]

    assert_accurate(
        [result[1], result[4], result[7]], moments, codes.values, grad_values, residual, x, slots[2][0]
    )  # fmt: skip


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_lazy_steps_are_those_of_sparse_adam(dtype, shape):
    """Three steps on other codes each, with the same gradients as sparse tensors; rows without an entry to the bit."""
    if dtype in (torch.bfloat16, torch.float16):
        pytest.skip("torch.optim.SparseAdam computes in float32 and float64")
    batches = [inputs(*shape, dtype, seed=seed) for seed in range(3)]
    start = [(p, torch.zeros_like(p), torch.zeros_like(p)) for p, _, _ in batches[0][-1]]
    # A large eps shows where it is added.
    options = {"lazy": True, "eps": 0.3}
    actual, slots = [], start
    for step, (codes, *batch, _) in enumerate(batches, 1):
        before = [t for slot in slots for t in slot]
        actual = run_op(codes, *batch, slots, step=step, **options)
        idle = codes.feature_counts() == 0
        for new, old in zip(actual, before, strict=True):
            assert_same_bits(new[idle], old[idle])
        slots = [tuple(actual[at : at + 3]) for at in (0, 3, 6)]
    flat = [t for codes, *batch, _ in batches for t in (codes.values, *batch)]

    def sparse_adam(*given):
        *given, w_enc, b_enc, w_dec = given
        parameters = [torch.nn.Parameter(t.clone()) for t in (w_enc, b_enc, w_dec)]
        optimizer = torch.optim.SparseAdam(parameters, **ADAM | {"eps": 0.3})
        for i, (codes, *_) in enumerate(batches):
            used = codes.feature_counts().nonzero()
            for parameter, grad in zip(
                parameters, gradients(codes, *given[4 * i : 4 * i + 4], None, False), strict=True
            ):
                parameter.grad = torch.sparse_coo_tensor(used.T, grad[used[:, 0]], grad.shape, check_invariants=True)
            optimizer.step()
        state = [optimizer.state[parameter] for parameter in parameters]
        parts = zip(parameters, state, strict=True)
        return [part for p, s in parts for part in (p.detach(), s["exp_avg"], s["exp_avg_sq"])]

    assert_accurate(actual, sparse_adam, *flat, *(slot[0] for slot in start))


def whole_numbers(n, d, f, k):
    """A step whose float32 sums and moments (betas of a half) have no rounding: every backend has them alike."""
    codes, grad_values, residual, x, slots = inputs(n, d, f, k)
    codes = codes.with_values((3 * codes.values).round())
    slots = [(p, (99 * m).round().bfloat16(), (999 * s).round().bfloat16()) for p, m, s in slots]
    return codes, (3 * grad_values).round(), (9 * residual).round(), (9 * x).round(), slots


@pytest.mark.parametrize("shape", [(1, 1, 1, 1), (37, 33, 13, 5), (11, 80, 17, None)], ids=str)
def test_random_bits_are_those_of_the_definition(backend, shape):
    codes, grad_values, residual, x, slots = whole_numbers(*shape)
    step, seed = 5, 2**40 + 7
    result = run_op(
        codes, grad_values, residual, x, slots, step=step, betas=(0.5, 0.5), seed=seed, lr=0.0
    )  # fmt: skip
    grads = gradients(codes, codes.values, grad_values, residual, x, None, False)
    for number, (grad, (_, m, s)) in enumerate(zip(grads, slots, strict=True)):
        stream = rounding_stream(seed, step, number)
        random = random_bits(torch.arange(len(grad)), grad[0].numel(), stream).reshape(grad.shape)
        for moment, wide, drawn in (
            (result[3 * number + 1], (m + grad) / 2, random & 0xFFFF),
            (result[3 * number + 2], (s + grad.square()) / 2, random >> 16),
        ):
            down = (wide.view(torch.int32) & -0x10000).view(torch.float32)
            up = (down.view(torch.int32) + 0x10000).view(torch.float32)
            share = (wide.view(torch.int32) & 0xFFFF).long()
            # A share of 2^16 bit patterns carries into the bits that stay.
            assert_same_bits(moment, torch.where(drawn + share >= 0x10000, up, down).bfloat16())


def decayed(seed, step, d=200, f=37):
    """First and second moments of a step without gradients: 0.9 of ±1 and 0.999 of 1."""
    codes = fastsae.SparseCodes(torch.ones(1, 1), torch.zeros(1, 1, dtype=torch.int32), f)
    signs = torch.ones(f, d).bfloat16()
    signs[1::2] = -1
    slots = [(torch.zeros(shape), m, m.abs()) for m in (signs, signs[:, 0], signs) for shape in (m.shape,)]
    zeros = torch.zeros(1, d)
    result = run_op(codes, torch.zeros(1, 1), zeros, zeros, slots, betas=(0.9, 0.999), step=step, seed=seed)
    return result[1] * signs, result[2], result[7] * signs, result[8]


@pytest.mark.costly
def test_rounding_has_the_right_mean(backend):
    """Five standard deviations of a fair coin's mean around the float32 value; only its two neighbours appear."""
    firsts, seconds = [], []
    for seed, step in ((0, 1), (0, 2), (1, 1)):
        encoder_first, encoder_second, decoder_first, decoder_second = decayed(seed, step)
        firsts += [encoder_first, decoder_first]
        seconds += [encoder_second, decoder_second]
    for moments, value, low, high in ((firsts, 0.9, 0.8984375, 0.90234375), (seconds, 0.999, 0.99609375, 1.0)):
        every = torch.stack(moments).double()
        assert sorted(every.unique().tolist()) == [low, high]
        chance = (float(torch.tensor(value)) - low) / (high - low)
        allowed = 5 * (high - low) * math.sqrt(chance * (1 - chance) / every.numel())
        assert abs(every.mean().item() - value) < allowed
    ups = [moments.double() - moments.double().mean() for moments in firsts + seconds]
    # Neither parameters, steps, seeds, moments nor neighbouring rows and columns round together.
    pairs = [(a, b) for i, a in enumerate(ups) for b in ups[:i]]
    pairs += [(up[1:], up[:-1]) for up in ups] + [(up[:, 1:], up[:, :-1]) for up in ups]
    for a, b in pairs:
        correlation = (a * b).mean() / (a.square().mean() * b.square().mean()).sqrt()
        assert correlation.abs() < 6 / math.sqrt(a.numel())


def test_rounding_keeps_what_bfloat16_holds_and_what_is_not_finite(backend):
    codes, grad_values, residual, x, slots = inputs(5, 33, 20, 2)
    residual[:, 3], x[:, 4], residual[:, 5] = torch.nan, torch.inf, -torch.inf
    slots = [(p, m.bfloat16(), s.bfloat16()) for p, m, s in slots]
    result = run_op(codes, grad_values, residual, x, slots, step=1, betas=(0.0, 0.0), lr=0.0)
    used = codes.feature_counts() > 0
    wide = run_op(
        codes,
        grad_values,
        residual,
        x,
        [(p, m.float(), s.float()) for p, m, s in slots],
        step=1,
        betas=(0.0, 0.0),
        lr=0.0,
    )
    for ours, exact in zip(
        (result[1], result[2], result[7], result[8]), (wide[1], wide[2], wide[7], wide[8]), strict=True
    ):
        assert ours[used].isfinite().equal(exact[used].isfinite())
        assert_same_bits(
            ours[used].float().where(exact[used].isfinite(), 0).sign(), exact[used].nan_to_num(0, 0, 0).sign()
        )
        assert_same_bits(ours[~used], torch.zeros_like(ours[~used]))


def every_option(dtype=torch.float32, lazy=False):
    codes, grad_values, residual, x, slots = inputs(61, 40, 90, None, dtype)
    options = {"clip_value": 2.5, "clip_row_norm": 7.0, "gradient_scale": torch.tensor(0.7), "lazy": lazy, "seed": 3}
    norm = ops.gradient_norm(codes, grad_values, residual, x, slots[2][0], unit_norm=True, clip_value=2.5)
    if dtype == torch.float32:
        slots = [(p, m.bfloat16(), s.bfloat16()) for p, m, s in slots]
    return [norm, *run_op(codes, grad_values, residual, x, slots, step=4, unit_norm=True, **options)]


@pytest.mark.parametrize("lazy", [False, True], ids=["every row", "lazy"])
def test_same_bits_with_any_number_of_threads_and_instruction_set(lazy):
    threads = torch.get_num_threads()
    for dtype in (torch.float32, torch.bfloat16):
        results = []
        try:
            for backend in backends():
                for count in (1, 2, 3) if backend.isa else ():
                    torch.set_num_threads(count)
                    with backend.active():
                        results.append(every_option(dtype, lazy))
        finally:
            torch.set_num_threads(threads)
        for result in results[1:]:
            for one, other in zip(result, results[0], strict=True):
                assert_same_bits(one, other)


def test_masters_take_every_option(backend):
    """Parameters in bfloat16, masters in float32, moments in bfloat16: the masters go as float32 parameters do."""
    codes, grad_values, residual, x, slots = inputs(13, 40, 11, 2, torch.bfloat16)
    clips = {"clip_value": 2.5, "clip_row_norm": 7.0}
    options = {**clips, "gradient_scale": torch.tensor(0.5), "seed": 1, "step": 2, "unit_norm": True}
    slots = [(p, m, s, p.float()) for p, m, s in slots]
    state = [[t.clone() for t in slot] for slot in slots]
    w_enc, b_enc, w_dec = state
    ops.fused_update(
        codes, grad_values, residual, x, ops.Slot(*(t.T for t in w_enc)), ops.Slot(*b_enc), ops.Slot(*w_dec),
        **ADAM | options,
    )  # fmt: skip
    wide = [(p.float(), m, s) for p, m, s, _ in slots]
    expected = run_op(codes.to(torch.float32), grad_values.float(), residual.float(), x.float(), wide, **options)
    for (parameter, _, _, master), right in zip(state, expected[::3], strict=True):
        torch.testing.assert_close(master, right)
        assert_same_bits(parameter, master.bfloat16())
    norms = [ops.gradient_norm(codes, grad_values, residual, x, slots[2][at], unit_norm=True, **clips) for at in (0, 3)]
    torch.testing.assert_close(*norms)


def test_an_empty_batch(backend):
    codes, grad_values, residual, x, slots = inputs(0, 8, 20, 2)
    assert ops.gradient_norm(codes, grad_values, residual, x, slots[2][0], unit_norm=True, clip_row_norm=1.0) == 0
    result = run_op(codes, grad_values, residual, x, slots, step=1, lazy=True, clip_row_norm=1.0)
    for new, old in zip(result, [t for slot in slots for t in slot], strict=True):
        assert_same_bits(new, old)


def test_refuses_options_that_do_not_fit():
    codes, *batch, slots = inputs(5, 8, 20, 2)
    for name in ("clip_value", "clip_row_norm"):
        for value in (0.0, -1.0, math.nan):
            with pytest.raises(ValueError, match=f"{name} = {value}: expected a number above 0, or None"):
                run_op(codes, *batch, slots, step=1, **{name: value})
            with pytest.raises(ValueError, match=f"{name} = {value}"):
                ops.gradient_norm(codes, *batch, slots[2][0], **{name: value})
    with pytest.raises(ValueError, match=r"weight_decay = 0.1 with lazy=True: expected 0"):
        run_op(codes, *batch, slots, step=1, lazy=True, weight_decay=0.1)
    p, m, s = slots[1]
    with pytest.raises(TypeError, match=r"moments have dtypes \['torch.bfloat16', 'torch.float32'\]"):
        run_op(codes, *batch, [slots[0], (p, m.bfloat16(), s), slots[2]], step=1)
    with pytest.raises(TypeError, match=r"W_dec has dtype torch.float64: expected torch.float32 or its float32 master"):
        ops.gradient_norm(codes, *batch, slots[2][0].double())


def test_a_backend_without_an_option_says_so(monkeypatch):
    """Asked for by name it refuses the call; left to fastsae the choice falls on one that knows the option."""
    monkeypatch.setattr(dispatch.BACKENDS["cuda"], "why_not", lambda *_: "")
    device = torch.device("cuda")
    with fastsae.backend("cuda"):
        assert dispatch.choose("fused_update", device, torch.float32).backend == "cuda"
        with pytest.raises(ValueError, match=r"cannot run fused_update: its kernel has no clip_value, lazy"):
            dispatch.choose("fused_update", device, torch.float32, ("clip_value", "lazy"))
    with fastsae.backend(None):
        assert dispatch.choose("fused_update", device, torch.float32, ("lazy",)).backend in ("torch", "triton")
