"""sampled_dot beside the dense product it samples and beside a gather of the rows."""

import torch

from fastsae import ops
from fastsae.bench import checks, work


@torch.no_grad()
def bench_sampled_dot(measure, problem):
    checks.sampled_dot(problem)
    codes, g, W_dec = problem.codes, problem.g, problem.sae.W_dec
    measure(lambda: ops.sampled_dot(g, codes, W_dec), work.sampled_dot(problem.shape, g.element_size()))


@torch.no_grad()
def bench_dense_and_gather(measure, problem):
    g, W_dec, places = problem.g, problem.sae.W_dec, problem.codes.indices.long()
    measure(lambda: (g @ W_dec.T).gather(1, places), work.gemm(problem.shape))


@torch.no_grad()
def bench_gathered_rows(measure, problem):
    g, W_dec, places = problem.g, problem.sae.W_dec, problem.codes.indices.long()
    measure(
        lambda: torch.bmm(W_dec[places], g[:, :, None])[:, :, 0],
        work.sampled_dot(problem.shape, g.element_size()),
    )
