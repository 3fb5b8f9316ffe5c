"""A small TopKSAE, batches for it, and a step by torch's own optimizers and clipping."""

import torch

import fastsae

D_IN, D_SAE, K = 12, 40, 4
CLIPS = {"clip_value": 0.002, "clip_row_norm": 0.006, "clip_norm": 0.02}


def new(dtype=torch.float64, **options):
    torch.manual_seed(0)
    sae = fastsae.TopKSAE(D_IN, D_SAE, K, dtype=dtype, **options)
    with torch.no_grad():
        # Every pick is positive, so that an entry of the codes has a gradient.
        sae.b_enc += 3
    return sae


def idle_latents(codes):
    """Those without an entry; a JumpReLU's entries may be zero."""
    return torch.bincount(codes.indices.reshape(-1).long(), minlength=codes.d_sae) == 0


def batches(count, dtype=torch.float64, n_tokens=16):
    generator = torch.Generator(torch.get_default_device()).manual_seed(1)
    return [torch.randn(n_tokens, D_IN, generator=generator, dtype=torch.float64).to(dtype) for _ in range(count)]


def schedule(optimizer, steps):
    return torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1, (step + 1) / 50) * (1 - step / steps))


def autograd_step(sae, optimizer, x, target=None, *, clip_value=None, clip_row_norm=None, clip_norm=None):
    """torch's optimizer and torch's clipping; -> the norm before the last clip."""
    optimizer.zero_grad()
    sae.loss(x, target).total.backward()
    sae.project_decoder_grad_()
    if clip_value is not None:
        torch.nn.utils.clip_grad_value_(sae.parameters(), clip_value)
    if clip_row_norm is not None:
        for row in (*sae.W_enc.grad.T, *sae.W_dec.grad):
            holder = torch.nn.Parameter(torch.zeros_like(row))
            holder.grad = row
            torch.nn.utils.clip_grad_norm_([holder], clip_row_norm)
    norm = None if clip_norm is None else torch.nn.utils.clip_grad_norm_(sae.parameters(), clip_norm)
    optimizer.step()
    sae.normalize_decoder_()
    return norm


def assert_close(ours, theirs, allowed=1e-12):
    for (name, p), q in zip(ours.named_parameters(), theirs.named_parameters(), strict=True):
        assert (p - q[1]).abs().max() < allowed, name
