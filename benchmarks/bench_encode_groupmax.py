"""encode_groupmax beside the dense formula: the largest pre-activation of each of k groups of latents."""

import math

import torch
from torch import Tensor

from fastsae import ops
from fastsae.bench import work
from fastsae.bench.problem import Problem


def groups(problem: Problem) -> int:
    """About k groups, as many as divide d_sae."""
    return math.gcd(problem.shape.d_sae, 2 ** math.ceil(math.log2(problem.sae.k)))


def dense(problem: Problem, x: Tensor) -> tuple[Tensor, Tensor]:
    """As sparsify has it: the pre-activations by groups, and the maximum of each."""
    sae, k = problem.sae, groups(problem)
    pre = ((x - sae.b_dec) @ sae.W_enc + sae.b_enc).relu()
    values, places = pre.unflatten(1, (k, -1)).max(dim=2)
    return values, places + torch.arange(k) * (pre.shape[1] // k)


@torch.no_grad()
def bench_encode_groupmax(measure, problem):
    sae, x, k = problem.sae, problem.x[problem.sample], groups(problem)
    codes = ops.encode_groupmax(x, sae.W_enc, sae.b_enc, k, b_dec=sae.b_dec)
    right = ((x.double() - sae.b_dec.double()) @ sae.W_enc.double() + sae.b_enc.double()).relu()
    best = right.unflatten(1, (k, -1)).amax(dim=2)
    found = right.gather(1, codes.indices.long())
    assert (best - found).abs().max() <= 64 * torch.finfo(x.dtype).eps * right.max()
    measure(lambda: ops.encode_groupmax(problem.x, sae.W_enc, sae.b_enc, k, b_dec=sae.b_dec), work.gemm(problem.shape))


@torch.no_grad()
def bench_dense(measure, problem):
    measure(lambda: dense(problem, problem.x), work.gemm(problem.shape))
