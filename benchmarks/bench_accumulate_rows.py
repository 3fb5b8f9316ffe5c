"""accumulate_rows, with its transposition, beside index_add_ and the dense product."""

import torch

from fastsae import ops
from fastsae.bench import checks, work


@torch.no_grad()
def bench_accumulate_rows(measure, problem):
    checks.accumulate_rows(problem)
    codes, g = problem.codes, problem.g
    measure(lambda: ops.accumulate_rows(codes, g), work.accumulate_rows(problem.shape, g.element_size()))


@torch.no_grad()
def bench_index_add(measure, problem):
    codes, g = problem.codes, problem.g
    latents = codes.indices.reshape(-1).long()

    def index_add():
        terms = (codes.values[:, :, None] * g[:, None]).flatten(0, 1)
        return g.new_zeros(codes.d_sae, g.shape[1]).index_add_(0, latents, terms)

    measure(index_add, work.accumulate_rows(problem.shape, g.element_size()))


@torch.no_grad()
def bench_dense(measure, problem):
    dense, g = problem.codes.to_dense(), problem.g
    measure(lambda: dense.T @ g, work.gemm(problem.shape))
