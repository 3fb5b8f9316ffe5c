"""decode beside F.embedding_bag and the dense product."""

import torch
from torch.nn import functional

from fastsae import ops
from fastsae.bench import checks, work


@torch.no_grad()
def bench_decode(measure, problem):
    checks.decode(problem)
    codes, W_dec = problem.codes, problem.sae.W_dec
    measure(lambda: ops.decode(codes, W_dec), work.decode(problem.shape, W_dec.element_size()))


@torch.no_grad()
def bench_embedding_bag(measure, problem):
    codes, W_dec = problem.codes, problem.sae.W_dec
    values, indices = codes.values, codes.indices.long()
    measure(
        lambda: functional.embedding_bag(indices, W_dec, per_sample_weights=values, mode="sum"),
        work.decode(problem.shape, W_dec.element_size()),
    )


@torch.no_grad()
def bench_dense(measure, problem):
    dense, W_dec = problem.codes.to_dense(), problem.sae.W_dec
    measure(lambda: dense @ W_dec, work.gemm(problem.shape))
