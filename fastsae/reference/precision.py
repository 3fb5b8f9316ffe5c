"""The dtype a sum is made in."""

import torch
from torch import Tensor


def accumulator(dtype: torch.dtype) -> torch.dtype:
    """float64 for float64, float32 for everything narrower."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def widen(tensor: Tensor | None) -> Tensor | None:
    """`tensor` in the dtype its sums are made in."""
    return None if tensor is None else tensor.to(accumulator(tensor.dtype))


def tokens_of(indices: Tensor, offsets: Tensor | None) -> Tensor:
    """The token each entry belongs to, int64 [nnz]."""
    if offsets is None:
        n_tokens, k = indices.shape
        return torch.arange(n_tokens, device=indices.device).repeat_interleave(k)
    counts = offsets.diff()
    return torch.arange(counts.numel(), device=indices.device).repeat_interleave(counts)
