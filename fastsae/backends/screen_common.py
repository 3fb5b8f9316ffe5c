"""What the screens of a CPU share."""

import torch
from torch import Tensor

_DTYPES = {torch.float32: 0, torch.bfloat16: 1}


def _address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def _gamma(operations: int) -> float:
    """γ_n = n u / (1 - n u), u = 2⁻²⁴: the relative error bound of n float32 operations (Higham 2002, section 3.1)."""
    unit = operations * 2.0**-24
    return unit / (1 - unit)


class _State:
    """The candidates of a block of rows: up to `capacity` a row, each with the interval its value lies in."""

    def __init__(self, rows: int, capacity: int):
        self.capacity = capacity
        self.lower, self.upper = torch.empty(2, rows, self.capacity)
        self.indices = torch.empty(rows, self.capacity, dtype=torch.int32)
        self.counts = torch.empty(rows, dtype=torch.int32)
        self.thresholds = torch.empty(rows)
        self.redo = torch.empty(rows, dtype=torch.uint8)

    def reset(self) -> None:
        self.counts.zero_()
        self.thresholds.fill_(-torch.inf)
        self.redo.zero_()

    def arguments(self) -> tuple[int, ...]:
        parts = (self.lower, self.upper, self.indices, self.counts, self.thresholds, self.redo)
        return (*map(_address, parts), self.capacity)
