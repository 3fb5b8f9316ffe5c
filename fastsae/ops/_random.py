"""Stochastic rounding outside the kernels, and where its random bits begin."""

from torch import Tensor

from fastsae.backends import torch as plain

_WORD64 = (1 << 64) - 1


def rounding_stream(seed: int, step: int, number: int) -> tuple[int, int]:
    """Two 32-bit numbers for parameter `number` in `step`: SplitMix64 (Steele et al. 2014) over the three, in turn."""
    state = 0
    for part in (seed, step, number):
        state = _mix((state + part) & _WORD64)
    return state & 0xFFFFFFFF, state >> 32


def _mix(x: int) -> int:
    x = (x + 0x9E3779B97F4A7C15) & _WORD64
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9 & _WORD64
    x = (x ^ (x >> 27)) * 0x94D049BB133111EB & _WORD64
    return x ^ (x >> 31)


def round_moments_(moments: tuple[Tensor, Tensor], wide: tuple[Tensor, Tensor], rows: Tensor, stream: tuple[int, int]):
    """Writes both moments' rows [n, d] of a parameter, float32, into bfloat16 as fused_update's kernels would."""
    for which, (to, values) in enumerate(zip(moments, wide, strict=True)):
        to[rows] = plain.stochastic_rounding(values, rows, stream, which)
