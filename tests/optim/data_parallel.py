"""One process of several that train one SAE, as FusedAdam's docstring has it: `python data_parallel.py RANK FILE`."""

import sys

import torch

import fastsae
from fastsae.optim import FusedAdam

PROCESSES = 2


def build():
    torch.manual_seed(0)
    sae = fastsae.TopKSAE(12, 40, 4, reconstruction="mse", dtype=torch.float64)
    x = torch.randn(16, 12, dtype=torch.float64)
    return sae, FusedAdam(sae, lr=1e-2, clip_norm=0.5), x


def train(rank, file, steps=3):
    """Every process sees its share of the tokens."""
    torch.distributed.init_process_group("gloo", init_method=f"file://{file}", rank=rank, world_size=PROCESSES)
    try:
        sae, optimizer, x = build()
        for _ in range(steps):
            sae.loss(x.chunk(PROCESSES)[rank]).total.backward()
            for p in sae.parameters():
                torch.distributed.all_reduce(p.grad)
                p.grad /= PROCESSES
            optimizer.step_from_gradients()
            optimizer.zero_grad()
        return sae, optimizer
    finally:
        torch.distributed.destroy_process_group()


if __name__ == "__main__":
    train(int(sys.argv[1]), sys.argv[2])
