"""encode_threshold beside the dense formula, at a threshold that keeps about k latents a token."""

import pytest
import torch
from torch import Tensor

from fastsae import ops
from fastsae.bench import work
from fastsae.bench.problem import Problem


@pytest.fixture(scope="module")
def threshold(problem: Problem) -> float:
    """Between the least of the k picks and what lies under it, as a mean over tokens."""
    with torch.no_grad():
        codes = ops.encode_topk(problem.x, problem.sae.W_enc, problem.sae.b_enc, problem.sae.k, b_dec=problem.sae.b_dec)
    return codes.values.min(dim=1).values.float().mean().item()


def dense(problem: Problem, x: Tensor, threshold: float) -> Tensor:
    sae = problem.sae
    pre = (x - sae.b_dec) @ sae.W_enc + sae.b_enc
    return pre * (pre > threshold)


@torch.no_grad()
def bench_encode_threshold(measure, problem, threshold):
    sae, x = problem.sae, problem.x[problem.sample]
    codes = ops.encode_threshold(x, sae.W_enc, sae.b_enc, threshold, b_dec=sae.b_dec)
    right = (x.double() - sae.b_dec.double()) @ sae.W_enc.double() + sae.b_enc.double()
    # Where rounding does not decide, exactly what lies above is kept.
    clear = (right - threshold).abs() > 64 * torch.finfo(x.dtype).eps * right.abs().max()
    assert ((codes.to_dense() != 0) == (right > threshold))[clear].all()
    measure(
        lambda: ops.encode_threshold(problem.x, sae.W_enc, sae.b_enc, threshold, b_dec=sae.b_dec),
        work.gemm(problem.shape),
    )


@torch.no_grad()
def bench_dense(measure, problem, threshold):
    measure(lambda: dense(problem, problem.x, threshold), work.gemm(problem.shape))
