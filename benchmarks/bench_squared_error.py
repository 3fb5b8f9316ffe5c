"""squared_error (decode, difference and norms in one pass) beside embedding_bag and the two passes after it."""

import torch
from torch.nn import functional

from fastsae import ops
from fastsae.bench import checks, work


@torch.no_grad()
def bench_squared_error(measure, problem):
    checks.squared_error(problem)
    sae, codes = problem.sae, problem.codes
    measure(
        lambda: ops.squared_error(codes, sae.W_dec, sae.b_dec, problem.x),
        work.squared_error(problem.shape, problem.x.element_size()),
    )


@torch.no_grad()
def bench_embedding_bag(measure, problem):
    sae, codes = problem.sae, problem.codes
    values, indices = codes.values, codes.indices.long()

    def residual_and_norms():
        y = functional.embedding_bag(indices, sae.W_dec, per_sample_weights=values, mode="sum") + sae.b_dec
        residual = y - problem.x
        return residual, residual.float().square().sum(dim=1)

    measure(residual_and_norms, work.squared_error(problem.shape, problem.x.element_size()))
