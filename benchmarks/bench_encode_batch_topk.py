"""encode_batch_topk beside the dense formula: the k · n_tokens largest pre-activations of the batch."""

import torch
from torch import Tensor

from fastsae import ops
from fastsae.bench import work
from fastsae.bench.problem import Problem


def dense(problem: Problem, x: Tensor, k_total: int) -> Tensor:
    """As BatchTopK's authors have it: one topk over the flat batch, scattered back."""
    sae = problem.sae
    pre = ((x - sae.b_dec) @ sae.W_enc + sae.b_enc).relu()
    values, places = pre.flatten().topk(k_total, sorted=False)
    return torch.zeros_like(pre.flatten()).scatter_(0, places, values).reshape(pre.shape)


@torch.no_grad()
def bench_encode_batch_topk(measure, problem):
    sae, x = problem.sae, problem.x[problem.sample]
    k = problem.sae.k
    codes = ops.encode_batch_topk(x, sae.W_enc, sae.b_enc, k, b_dec=sae.b_dec)
    right = ((x.double() - sae.b_dec.double()) @ sae.W_enc.double() + sae.b_enc.double()).relu()
    least = right.flatten().topk(k * len(x)).values.min()
    # Where rounding does not decide, exactly the largest are kept.
    clear = (right - least).abs() > 64 * torch.finfo(x.dtype).eps * right.max()
    assert ((codes.to_dense() != 0) == (right >= least))[clear].all()
    assert codes.values.numel() == k * len(x)
    measure(
        lambda: ops.encode_batch_topk(problem.x, sae.W_enc, sae.b_enc, k, b_dec=sae.b_dec), work.gemm(problem.shape)
    )


@torch.no_grad()
def bench_dense(measure, problem):
    measure(lambda: dense(problem, problem.x, problem.shape.nnz), work.gemm(problem.shape))
