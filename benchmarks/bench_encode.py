"""encode_topk beside the GEMM alone and torch.topk of its product."""

import pytest
import torch

from fastsae.bench import work
from fastsae.bench.baselines import Dense
from fastsae.bench.checks import selection
from fastsae.bench.implementations import FastSAE


@pytest.mark.parametrize("screen", [None, "float32"], ids=["default_screen", "float32_screen"])
def bench_encode_topk(measure, problem, screen):
    implementation = FastSAE(problem.dtype, screen=screen)
    selection(problem, implementation)
    with torch.no_grad():
        measure(lambda: implementation.encode(problem, problem.x), work.gemm(problem.shape))


@torch.no_grad()
def bench_gemm(measure, problem):
    x, W_enc = problem.x, problem.sae.W_enc
    measure(lambda: x @ W_enc, work.gemm(problem.shape))


@torch.no_grad()
def bench_gemm_and_topk(measure, problem):
    dense = Dense(problem.dtype)
    measure(lambda: dense.picks(problem, problem.x), work.gemm(problem.shape))
