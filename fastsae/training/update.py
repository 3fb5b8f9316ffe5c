"""What follows backward in a training step: decoder projection, clipping, optimizer, unit decoder rows."""

from collections.abc import Iterator
from contextlib import contextmanager

from torch import Tensor
from torch.nn.utils import clip_grad_norm_
from torch.optim import Optimizer

from fastsae.saes import SAE


def update(sae: SAE, optimizer: Optimizer, clip_grad_norm: float | None = None) -> Tensor | None:
    """Steps any torch optimizer on the SAE's gradients; returns their norm before clipping, if they are clipped.

    In this order: the part of W_dec's gradient along its rows is taken away, gradients are clipped to a norm of
    `clip_grad_norm`, the optimizer steps, rows of W_dec are scaled to unit norm (first and last if
    `normalize_decoder` is on). The projection comes before clipping, as in OpenAI's train.py (`training_loop_`): the
    part that it takes away would be undone by the unit rows, and should not shrink the rest.

        sae.loss(x).total.backward()
        fastsae.training.update(sae, optimizer)

    Instead of `sae.register_optimizer_hooks`, not beside it. The same numbers to the bit, but on a CPU torch's fused
    optimizers then copy the gradient of W_enc, which here they need not.
    """
    sae.project_decoder_grad_()
    norm = None if clip_grad_norm is None else clip_grad_norm_(sae.parameters(), clip_grad_norm)
    with row_major(optimizer, sae.W_enc):
        optimizer.step()
    sae.normalize_decoder_()
    return norm


@contextmanager
def row_major(optimizer: Optimizer, W_enc: Tensor) -> Iterator[None]:
    """Meanwhile W_enc, its gradient and its state are their own transposes, for a fused optimizer on a CPU.

    torch's fused kernels for CPUs call `grad.contiguous()`, which for a feature-major gradient is a copy as large as
    the parameter, made and thrown away in each step. Its transpose is contiguous as it is, and every element is
    updated alike. Other optimizers work in any layout, and some (Adafactor) treat the two dimensions differently.
    """
    groups = [group for group in optimizer.param_groups if any(p is W_enc for p in group["params"])]
    fused = any(group.get("fused") for group in groups)
    if W_enc.device.type != "cpu" or not fused or W_enc.grad is None or W_enc.is_contiguous():
        yield
        return
    grad = W_enc.grad
    _transpose(optimizer, W_enc, grad.T)
    try:
        yield
    finally:
        _transpose(optimizer, W_enc, grad)


def _transpose(optimizer: Optimizer, parameter: Tensor, grad: Tensor) -> None:
    state = optimizer.state[parameter]
    for key, value in state.items():
        if isinstance(value, Tensor) and value.shape == parameter.shape:
            state[key] = value.T
    # torch wants a gradient of its parameter's shape at every moment.
    parameter.grad = None
    parameter.data = parameter.data.T
    parameter.grad = grad
