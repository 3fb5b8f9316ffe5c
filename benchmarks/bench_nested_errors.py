"""nested_errors (every prefix's squared error from one walk over the codes) beside one decode for each prefix."""

import torch
from torch.nn import functional

from fastsae import ops
from fastsae.bench import work


def widths_of(d_sae: int) -> list[int]:
    """Five prefixes, as Bussmann et al. 2025 have them."""
    return [d_sae // 32, d_sae // 8, d_sae // 4, d_sae // 2, d_sae]


def one_by_one(problem):
    """Squared errors [n_tokens, 5], values outside of a prefix made zero."""
    sae, codes = problem.sae, problem.codes
    indices = codes.indices.long()
    errors = []
    for width in widths_of(problem.shape.d_sae):
        values = codes.values.where(codes.indices < width, 0)
        y = functional.embedding_bag(indices, sae.W_dec, per_sample_weights=values, mode="sum") + sae.b_dec
        errors.append((y - problem.x).float().square().sum(dim=1))
    return torch.stack(errors, dim=1)


@torch.no_grad()
def bench_nested_errors(measure, problem):
    sae, codes, x = problem.sae, problem.codes, problem.x
    widths = widths_of(problem.shape.d_sae)
    _, errors = ops.nested_errors(codes, sae.W_dec, sae.b_dec, x, widths)
    torch.testing.assert_close(errors, one_by_one(problem), rtol=64 * torch.finfo(x.dtype).eps, atol=0)
    measure(
        lambda: ops.nested_errors(codes, sae.W_dec, sae.b_dec, x, widths),
        work.squared_error(problem.shape, x.element_size()),
    )


@torch.no_grad()
def bench_embedding_bag(measure, problem):
    measure(lambda: one_by_one(problem), work.squared_error(problem.shape, problem.x.element_size()))
