"""nested_errors against one dense reconstruction for each prefix; its gradients, its memory, its checks."""

import pytest
import torch

from fastsae import ops, reference
from fastsae.ops.nested_errors import nested_errors_backward_op, nested_errors_op
from fastsae.testing import assert_accurate, assert_same_bits, gradients, random_codes

# Tokens, d_sae, k (None: CSR with empty rows), d_out, widths: one, few, as many as latents, prefixes nobody is in.
SHAPES = [
    (37, 150, 5, 40, [10, 75, 150]),
    (33, 70, None, 40, [1, 2, 35, 69, 70]),
    (9, 20, None, 7, [*range(1, 21)]),
    (1, 5, 1, 1, [5]),
    (0, 5, None, 3, [2, 5]),
]


def dense(codes, widths):
    def formula(values, W_dec, b_dec, target):
        acts = codes.with_values(values).to_dense()
        errors = []
        for width in widths:
            y = acts[:, :width] @ W_dec[:width]
            residual = (y if b_dec is None else y + b_dec) - target
            errors.append(residual.square().sum(dim=-1))
        return residual, torch.stack(errors, dim=1)

    return formula


def nested(codes, widths):
    return lambda values, *rest: ops.nested_errors(codes.with_values(values), *rest, widths)


def draw(shape, dtype, with_bias=True):
    n_tokens, d_sae, k, d_out, widths = shape
    codes = random_codes(n_tokens, d_sae, k, dtype=dtype)
    b_dec = torch.randn(d_out).to(dtype) if with_bias else None
    inputs = codes.values, torch.randn(d_sae, d_out).to(dtype), b_dec, torch.randn(n_tokens, d_out).to(dtype)
    return codes, widths, inputs


@pytest.mark.parametrize("with_bias", [True, False], ids=["bias", "no_bias"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_matches_the_dense_formula(dtype, shape, with_bias):
    codes, widths, inputs = draw(shape, dtype, with_bias)
    residual, squared = nested(codes, widths)(*inputs)
    assert residual.dtype == dtype
    assert squared.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert_accurate((residual, squared), dense(codes, widths), *inputs)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_gradients(dtype, shape):
    codes, widths, inputs = draw(shape, dtype)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    upstream = torch.randn(shape[0], len(widths), dtype=wide)

    def backward(formula):
        return lambda *inputs: gradients(lambda *a: formula(codes, widths)(*a)[1:], inputs[:4], inputs[4])

    assert_accurate(backward(nested)(*inputs, upstream), backward(dense), *inputs, upstream)


def test_reference(backend):
    codes, widths, (values, W_dec, b_dec, target) = draw(SHAPES[1], torch.float32)
    expected = reference.nested_errors(values, codes.indices, codes.offsets, W_dec, b_dec, target, widths)
    for ours, right in zip(ops.nested_errors(codes, W_dec, b_dec, target, widths), expected, strict=True):
        torch.testing.assert_close(ours, right)


def test_gradcheck_and_opcheck():
    codes, widths, inputs = draw((4, 9, None, 3, [2, 9]), torch.float64)
    values, W_dec, b_dec, target = (t.requires_grad_() for t in inputs)
    arguments = values, codes.indices, codes.offsets, W_dec, b_dec, target, widths
    assert torch.autograd.gradcheck(lambda *a: nested_errors_op(*a)[1], arguments)
    torch.library.opcheck(nested_errors_op, arguments)
    squared = nested_errors_op(*arguments)[1].detach()
    detached = [a.detach() if isinstance(a, torch.Tensor) else a for a in arguments]
    torch.library.opcheck(nested_errors_backward_op, (squared, *detached, True))
    torch.library.opcheck(nested_errors_backward_op, (squared, *detached, False))


def test_gradients_of_some_inputs_alone(backend):
    codes, widths, inputs = draw(SHAPES[0], torch.float32)
    upstream = torch.randn(37, 3)
    everything = gradients(lambda *a: nested(codes, widths)(*a)[1:], inputs, upstream)
    for wanted in range(4):
        leaves = [t.detach().requires_grad_(i == wanted) for i, t in enumerate(inputs)]
        nested(codes, widths)(*leaves)[1].backward(upstream)
        assert_same_bits(leaves[wanted].grad, everything[wanted])


def test_the_last_width_is_squared_error(backend):
    codes, widths, (_, W_dec, b_dec, target) = draw(SHAPES[0], torch.float32)
    residual, squared = ops.nested_errors(codes, W_dec, b_dec, target.reshape(37, 40), widths)
    whole = ops.squared_error(codes, W_dec, b_dec, target)
    torch.testing.assert_close((residual, squared[:, -1]), whole)
    assert not residual.requires_grad


def test_leading_dimensions(backend):
    codes = random_codes(6, 20, 3)
    shaped = type(codes)(codes.values, codes.indices, 20, leading_shape=(2, 3))
    W_dec, target = torch.randn(20, 7), torch.randn(2, 3, 7)
    residual, squared = ops.nested_errors(shaped, W_dec, None, target, [5, 20])
    assert residual.shape == (2, 3, 7)
    assert squared.shape == (2, 3, 2)


@pytest.mark.parametrize("widths", [[], [3], [20, 3], [0, 20], [3, 3, 20], [3, 21]], ids=str)
def test_bad_widths_are_named(widths):
    codes = random_codes(6, 20, 3)
    with pytest.raises(ValueError, match=r"widths = .*expected them ascending from above 0 to d_sae = 20"):
        ops.nested_errors(codes, torch.randn(20, 7), None, torch.randn(6, 7), widths)


def test_bad_target_is_named():
    codes = random_codes(6, 20, 3)
    with pytest.raises(ValueError, match=r"target has shape \(5, 7\)"):
        ops.nested_errors(codes, torch.randn(20, 7), None, torch.randn(5, 7), [20])
