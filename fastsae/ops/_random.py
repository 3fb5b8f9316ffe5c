"""Where the random bits of stochastic rounding begin."""

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
