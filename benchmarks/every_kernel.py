"""Runs every operator of the GPU backends once, forward and backward, on small awkward shapes: for sanitizers.

compute-sanitizer --tool memcheck python benchmarks/every_kernel.py
"""

import torch

import fastsae
from fastsae.backends import dispatch
from fastsae.training import update

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# Off every block: d_in, d_sae, k, tokens.
SHAPES = [(37, 199, 5, 33), (1, 1, 1, 1), (768, 1_030, 33, 65)]


def step(d_in: int, d_sae: int, k: int, n_tokens: int, dtype: torch.dtype) -> None:
    """Two training steps, by autograd and by FusedAdam."""
    sae = fastsae.TopKSAE(d_in, d_sae, k, dtype=dtype, device="cuda")
    # A latent that every token shares has the longest segment there can be.
    x = torch.randn(n_tokens, d_in, device="cuda", dtype=dtype) + sae.W_dec[0].detach()
    optimizer = torch.optim.Adam(sae.parameters())
    sae.loss(x).total.backward()
    update(sae, optimizer)
    sae.zero_grad()
    fastsae.optim.FusedAdam(sae).step(x)


def main() -> None:
    device = torch.device("cuda")
    for name in ("triton", "cuda"):
        if name not in dispatch.BACKENDS:
            continue
        reason = dispatch.BACKENDS[name].why_not("decode", device, torch.float32)
        if reason:
            print(f"{name}: left out, {reason}")
            continue
        for dtype in DTYPES:
            for shape in SHAPES:
                with fastsae.backend(name):
                    step(*shape, dtype)
        torch.cuda.synchronize()
        print(f"{name}: {len(DTYPES) * len(SHAPES)} steps")


if __name__ == "__main__":
    main()
