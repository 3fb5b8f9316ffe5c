"""float32 to bfloat16 up or down at random, unbiased; the bits are those of csrc/cpu/stochastic_rounding.h."""

import triton.language as tl

from fastsae.backends.triton._launch import device_function


@device_function
def _mix(x, key):
    """Wellons' lowbias32 with a key inside; uint32."""
    x ^= x >> 16
    x *= 0x7FEB352D
    x ^= x >> 15
    x += key
    x *= 0x846CA68B
    return x ^ (x >> 16)


@device_function
def random_bits(stream_first, stream_second, row, columns):
    """uint32 [columns]: the lower half is the first moment's, the upper the second's."""
    row = row.to(tl.uint32)
    nothing = row ^ row
    first = _mix(row + stream_first.to(tl.uint32), nothing)
    second = _mix(row ^ stream_second.to(tl.uint32), nothing)
    return _mix(first + columns.to(tl.uint32), second)


@device_function
def store_stochastic(to, at, x, random, mask):
    """`random` is below 2¹⁶."""
    bits = (x.to(tl.uint32, bitcast=True) + random) & 0xFFFF0000
    x = tl.where(x == x, bits.to(tl.float32, bitcast=True), x)
    tl.store(to + at, x.to(tl.bfloat16), mask=mask)


def stream_arguments(streams: list[int] | tuple[int, ...], number: int) -> tuple[int | None, int | None]:
    """The two words of parameter `number` as int32, of one type whatever their values; None where there are none."""
    if not streams:
        return None, None
    first, second = (word - (word >> 31 << 32) for word in streams[2 * number : 2 * number + 2])
    return first, second
