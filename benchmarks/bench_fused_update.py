"""fused_update beside the operators it fuses: two accumulate_rows, the projection, torch's fused Adam, unit rows; and
with each of its options."""

import pytest
import torch

from fastsae import ops
from fastsae.bench import checks, work
from fastsae.bench.implementations import FusedAdamSAE


def _inputs(problem):
    loss, parts = problem.sae.loss_with_gradients(problem.x)
    sae = problem.sae
    weights = [p.detach().clone(memory_format=torch.preserve_format) for p in (sae.W_enc, sae.b_enc, sae.W_dec)]
    return loss.codes, parts, weights


@torch.no_grad()
def bench_fused_update(measure, problem):
    with torch.enable_grad():
        checks.moments(problem, FusedAdamSAE(problem.dtype))
    codes, parts, weights = _inputs(problem)
    slots = [ops.Slot(p, torch.zeros_like(p), torch.zeros_like(p)) for p in weights]

    def fused():
        ops.fused_update(
            codes, parts.grad_values, parts.residual, parts.x, *slots, lr=1e-6, step=1,
            b_dec=problem.sae.b_dec, row_scale=parts.row_scale, unit_norm=True,
        )  # fmt: skip

    measure(fused, work.update(problem.shape, problem.x.element_size()))


OPTIONS = {
    "clip_value": {"clip_value": 1e-3},
    "clip_row_norm": {"clip_row_norm": 1e-3},
    "clip_norm, two passes": {},
    "lazy": {"lazy": True},
    "bfloat16 moments": {},
}


@pytest.mark.parametrize("name", OPTIONS)
@torch.no_grad()
def bench_fused_update_with(measure, problem, name):
    codes, parts, weights = _inputs(problem)
    moments = torch.bfloat16 if name == "bfloat16 moments" else problem.dtype
    slots = [ops.Slot(p, *(torch.zeros_like(p, dtype=moments) for _ in range(2))) for p in weights]
    batch = codes, parts.grad_values, parts.residual, parts.x
    shared = {"b_dec": problem.sae.b_dec, "row_scale": parts.row_scale, "unit_norm": True}

    def fused():
        scale = None
        if name == "clip_norm, two passes":
            scale = (1e-3 / (ops.gradient_norm(*batch, weights[2], **shared) + 1e-6)).clamp(max=1).float()
        ops.fused_update(*batch, *slots, lr=1e-6, step=1, gradient_scale=scale, **shared, **OPTIONS[name])

    measure(fused, work.update(problem.shape, problem.x.element_size()))


@torch.no_grad()
def bench_separate_operators(measure, problem):
    codes, parts, (W_enc, b_enc, W_dec) = _inputs(problem)
    optimizer = torch.optim.Adam([W_enc, b_enc, W_dec], lr=1e-6, fused=True)
    scaled = parts.row_scale[:, None].to(problem.dtype) * parts.residual
    by_value = codes.with_values(parts.grad_values)
    centred = parts.x - problem.sae.b_dec

    def separate():
        W_enc.grad = ops.accumulate_rows(by_value, centred).T
        b_enc.grad = torch.zeros_like(b_enc).index_add_(0, codes.indices.reshape(-1), parts.grad_values.reshape(-1))
        W_dec.grad = ops.accumulate_rows(codes, scaled)
        ops.project_rows_(W_dec.grad, W_dec)
        optimizer.step()
        ops.normalize_rows_(W_dec)

    measure(separate, work.update(problem.shape, problem.x.element_size()))
