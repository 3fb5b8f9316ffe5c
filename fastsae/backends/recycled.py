"""Tensors for large results that come and go with every step, in memory that is kept (csrc/cpu/memory.cpp)."""

import torch
from torch import Tensor

from fastsae.backends import native

# A smaller result is served by the C library from memory that it keeps itself.
LEAST_BYTES = 4 << 20


def empty(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """As torch.empty on a CPU; the memory goes back when the last tensor on it is gone."""
    count = torch.Size(shape).numel()
    if count * dtype.itemsize < LEAST_BYTES:
        return torch.empty(shape, dtype=dtype)
    return torch.frombuffer(native.cpu.Memory(count * dtype.itemsize), dtype=dtype, count=count).view(shape)
