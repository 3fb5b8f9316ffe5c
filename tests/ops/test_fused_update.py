"""fused_update against its formula, and against torch.optim.Adam on the gradients of the separate operators."""

import pytest
import torch

from fastsae import ops
from fastsae.testing import assert_accurate, assert_same_bits, random_codes

SHAPES = [(1, 1, 1, 1), (37, 33, 199, 7), (199, 64, 37, 3)]
HYPER = {"lr": 1e-3, "betas": (0.9, 0.99), "eps": 1e-4, "weight_decay": 0.1, "step": 3}


def inputs(n, d, f, k, dtype, seed=0):
    generator = torch.Generator(torch.get_default_device()).manual_seed(seed)

    def draw(*shape):
        return torch.randn(*shape, generator=generator).to(dtype)

    codes = random_codes(n, f, k, dtype=dtype, seed=seed)
    slots = [(draw(*shape), 0.1 * draw(*shape), (0.1 * draw(*shape)).square()) for shape in ((f, d), (f,), (f, d))]
    return codes, draw(n, k), draw(n, d), draw(n, d), draw(d), draw(n).abs(), slots


def formula(codes, unit_norm):
    """Dense gradients and Adam as Kingma & Ba write it, in the dtype of the arguments."""

    def run(values, grad_values, residual, x, b_dec, row_scale, *state):
        dense = torch.zeros(codes.n_tokens, codes.d_sae, dtype=values.dtype)
        at = codes.indices.long()
        grad_dec = dense.scatter(1, at, values).T @ (row_scale[:, None] * residual)
        grad_codes = dense.scatter(1, at, grad_values)
        grads = [grad_codes.T @ (x - b_dec), grad_codes.sum(0), grad_dec]
        if unit_norm:
            w = state[6]
            grads[2] = grads[2] - (grads[2] * w).sum(1, keepdim=True) / w.square().sum(1, keepdim=True) * w
        beta1, beta2 = HYPER["betas"]
        results = []
        for grad, (p, m, s) in zip(grads, (state[0:3], state[3:6], state[6:9]), strict=True):
            grad = grad + HYPER["weight_decay"] * p
            m = beta1 * m + (1 - beta1) * grad
            s = beta2 * s + (1 - beta2) * grad**2
            corrected = m / (1 - beta1 ** HYPER["step"])
            p = p - HYPER["lr"] * corrected / ((s / (1 - beta2 ** HYPER["step"])).sqrt() + HYPER["eps"])
            results += [p, m, s]
        if unit_norm:
            results[6] = results[6] / results[6].norm(dim=1, keepdim=True)
        return results

    return run


def run_op(codes, grad_values, residual, x, b_dec, row_scale, slots, unit_norm):
    w_enc, b_enc, w_dec = ([t.clone() for t in slot] for slot in slots)
    ops.fused_update(
        codes,
        grad_values,
        residual,
        x,
        ops.Slot(*(t.T for t in w_enc)),
        ops.Slot(*b_enc),
        ops.Slot(*w_dec),
        b_dec=b_dec,
        row_scale=row_scale,
        unit_norm=unit_norm,
        **HYPER,
    )
    return [*w_enc, *b_enc, *w_dec]


@pytest.mark.parametrize("unit_norm", [False, True], ids=["free", "unit_norm"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_matches_the_formula(dtype, shape, unit_norm):
    codes, grad_values, residual, x, b_dec, row_scale, slots = inputs(*shape, torch.float32)
    codes = codes.to(dtype)
    grad_values, residual, x, b_dec = (t.to(dtype) for t in (grad_values, residual, x, b_dec))
    slots = [tuple(t.to(dtype) for t in slot) for slot in slots]
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    actual = run_op(codes, grad_values, residual, x, b_dec, row_scale.to(wide), slots, unit_norm)
    flat = [t for slot in slots for t in slot]
    assert_accurate(actual, formula(codes, unit_norm), codes.values, grad_values, residual, x, b_dec, row_scale, *flat)


@pytest.mark.parametrize("unit_norm", [False, True], ids=["free", "unit_norm"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("half", [torch.bfloat16, torch.float16], ids=str)
def test_masters_take_the_step_and_parameters_are_copies(backend, half, shape, unit_norm):
    """Activations in half precision, weights and moments in float32: as exact as a step in float32."""
    if half not in backend.dtypes:
        pytest.skip(f"{backend} does not compute in {half}")
    codes, grad_values, residual, x, b_dec, row_scale, slots = inputs(*shape, torch.float32)
    codes = codes.to(half)
    grad_values, residual, x, b_dec = (t.to(half) for t in (grad_values, residual, x, b_dec))
    flat = [t for slot in slots for t in slot]
    w_enc, b_enc, w_dec = ((p.to(half), m.clone(), s.clone(), p.clone()) for p, m, s in slots)
    ops.fused_update(
        codes, grad_values, residual, x, ops.Slot(*(t.T for t in w_enc)), ops.Slot(*b_enc), ops.Slot(*w_dec),
        b_dec=b_dec, row_scale=row_scale, unit_norm=unit_norm, **HYPER,
    )  # fmt: skip
    actual = [part for p, m, s, master in (w_enc, b_enc, w_dec) for part in (master, m, s)]
    wide = (t.float() for t in (codes.values, grad_values, residual, x, b_dec))
    assert_accurate(actual, formula(codes, unit_norm), *wide, row_scale, *flat)
    for parameter, _, _, master in (w_enc, b_enc, w_dec):
        assert_same_bits(parameter, master.to(half))


def test_refuses_masters_that_do_not_fit():
    codes, grad_values, residual, x, _, _, slots = inputs(5, 8, 20, 2, torch.bfloat16)
    (w_enc, m, s), b_enc, w_dec = slots

    def run(w_enc, b_enc, w_dec, residual=residual):
        ops.fused_update(codes, grad_values, residual, x, w_enc, b_enc, w_dec, **HYPER)

    encoder = ops.Slot(w_enc.T, m.float().T, s.float().T, w_enc.float().T)
    with pytest.raises(ValueError, match=r"expected all of them to have a master, or none"):
        run(encoder, ops.Slot(*b_enc), ops.Slot(*w_dec))
    with pytest.raises(
        TypeError, match=r"first_moment has dtype torch.float16: expected torch.float32 or torch.bfloat"
    ):
        run(ops.Slot(w_enc.T, m.half().T, s.half().T, w_enc.float().T), ops.Slot(*b_enc), ops.Slot(*w_dec))
    wide = ops.Slot(*(t.float().T for t in (w_enc, m, s, w_enc)))
    with pytest.raises(TypeError, match=r"W_enc.master of a torch.float32 parameter"):
        run(wide, ops.Slot(*b_enc), ops.Slot(*w_dec), residual.float())


def test_same_bits_with_any_number_of_threads(native):
    arguments = inputs(199, 48, 300, 9, torch.float32)
    threads = torch.get_num_threads()
    try:
        results = []
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            results.append(run_op(*arguments, True))
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        for a, b in zip(results[0], other, strict=True):
            assert_same_bits(a, b)


def test_a_write_is_seen_by_autograd():
    """In-place updates count as such: a graph that saved the old weights refuses to go on."""
    codes, grad_values, residual, x, b_dec, row_scale, slots = inputs(5, 8, 20, 2, torch.float32)
    (w_enc, m, s), b_enc, w_dec = slots
    used = w_dec[0].requires_grad_()
    y = used.square().sum()
    ops.fused_update(
        codes, grad_values, residual, x, ops.Slot(w_enc.T, m.T, s.T), ops.Slot(*b_enc),
        ops.Slot(used.detach(), *w_dec[1:]), b_dec=b_dec, row_scale=row_scale, **HYPER,
    )  # fmt: skip
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.backward()


def test_refuses_a_row_major_encoder():
    codes, grad_values, residual, x, b_dec, row_scale, slots = inputs(5, 8, 20, 2, torch.float32)
    (w_enc, m, s), b_enc, w_dec = slots
    with pytest.raises(ValueError, match="feature-major"):
        ops.fused_update(
            codes, grad_values, residual, x, ops.Slot(w_enc.T.contiguous(), m.T, s.T), ops.Slot(*b_enc),
            ops.Slot(*w_dec), b_dec=b_dec, row_scale=row_scale, **HYPER,
        )  # fmt: skip


def test_refuses_rows_and_scales_that_do_not_fit():
    codes, grad_values, residual, x, _, row_scale, slots = inputs(5, 8, 20, 2, torch.float32)
    (w_enc, m, s), b_enc, w_dec = slots
    encoder = ops.Slot(w_enc.T, m.T, s.T)
    transposed = ops.Slot(w_dec[0].T.contiguous().T, *w_dec[1:])
    with pytest.raises(ValueError, match=r"W_dec.parameter has strides \(1, 20\): expected rows that are contiguous"):
        ops.fused_update(codes, grad_values, residual, x, encoder, ops.Slot(*b_enc), transposed, **HYPER)
    with pytest.raises(ValueError, match=r"row_scale has shape \(4,\)"):
        ops.fused_update(
            codes, grad_values, residual, x, encoder, ops.Slot(*b_enc), ops.Slot(*w_dec),
            row_scale=row_scale[:4], **HYPER,
        )  # fmt: skip


def test_refuses_step_zero():
    codes, grad_values, residual, x, _, _, slots = inputs(5, 8, 20, 2, torch.float32)
    (w_enc, m, s), b_enc, w_dec = slots
    with pytest.raises(ValueError, match="step = 0"):
        ops.fused_update(
            codes, grad_values, residual, x, ops.Slot(w_enc.T, m.T, s.T), ops.Slot(*b_enc), ops.Slot(*w_dec),
            **HYPER | {"step": 0},
        )  # fmt: skip
