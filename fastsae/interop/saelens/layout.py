"""The memory of W_enc [d_in, d_sae]: a row for each latent, as kernels read it, or SAELens' plain layout."""

import torch
from torch import Tensor


@torch.no_grad()
def feature_major_(weight: Tensor) -> None:
    """The same tensor with the same numbers, and its transpose contiguous."""
    weight.data = weight.data.T.contiguous().T


@torch.no_grad()
def row_major_(weight: Tensor) -> None:
    """The same tensor with the same numbers, contiguous."""
    weight.data = weight.data.contiguous()


@torch.no_grad()
def follow_layout_(optimizer: torch.optim.Optimizer) -> None:
    """Gives the state of each parameter the strides of the parameter: tensors stay the same objects."""
    for parameter, state in optimizer.state.items():
        for value in state.values():
            if isinstance(value, Tensor) and value.shape == parameter.shape and value.stride() != parameter.stride():
                laid_out = torch.empty_like(parameter, dtype=value.dtype, device=value.device)
                value.data = laid_out.copy_(value)
