"""float32 rounded to bfloat16 at random, up or down so that the mean is right, from bits that a counter gives."""

import torch
from torch import Tensor

_WORD = 0xFFFFFFFF


def stochastic_rounding(values: Tensor, rows: Tensor, stream: tuple[int, int], moment: int) -> Tensor:
    """values [n, d] float32 -> bfloat16: the truncated sum of the bits of each and of 16 random ones.

    `rows` int64 [n] are the places of the rows in their parameter. `moment` 0 uses the lower half of an element's 32
    random bits, 1 the upper half.
    """
    random = (random_bits(rows, values.shape[1], stream) >> 16 * moment) & 0xFFFF
    bits = values.contiguous().view(torch.int32).long() & _WORD
    rounded = (bits + random) & 0xFFFF0000
    rounded = (rounded - ((rounded >> 31) << 32)).int().view(torch.float32)
    return values.where(values.isnan(), rounded).to(torch.bfloat16)


def random_bits(rows: Tensor, d: int, stream: tuple[int, int]) -> Tensor:
    """int64 [n, d] in [0, 2³²), a function of stream, row and column alone; the mixer is Wellons' lowbias32."""
    rows = rows[:, None]
    columns = torch.arange(d, device=rows.device)
    first = _mix((rows + stream[0]) & _WORD, 0)
    second = _mix(rows ^ stream[1], 0)
    return _mix((first + columns) & _WORD, second)


def _mix(x: Tensor, key: Tensor | int) -> Tensor:
    x = x ^ (x >> 16)
    x = (x * 0x7FEB352D) & _WORD
    x = ((x ^ (x >> 15)) + key) & _WORD
    x = (x * 0x846CA68B) & _WORD
    return x ^ (x >> 16)
