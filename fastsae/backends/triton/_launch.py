"""What the launches of the row kernels share."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastsae.backends.triton import interpreted

# One warp that loads 16 bytes a lane covers 512 contiguous bytes of a row: the width of a slice.
_SLICE_BYTES = 512
# Triton's name of each dtype, as signatures of compile cases have it.
TYPES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}
_INTERPRETED = tl.constexpr(interpreted())


def device_function(function):
    """What kernels call. Triton's interpreter spends a millisecond on each call of a jit function, none on Python's."""
    return function if interpreted() else triton.jit(function)


@device_function
def narrow(x, dtype: tl.constexpr):
    """float32 x in `dtype`, rounded to nearest even, which Triton's interpreter does not do for bfloat16: it cuts."""
    if _INTERPRETED and dtype == tl.bfloat16:
        bits = x.to(tl.uint32, bitcast=True)
        bits = (bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000
        x = tl.where(x == x, bits.to(tl.float32, bitcast=True), x)
    return x.to(dtype)


def launch(kernel, grid: tuple[int, ...], first: Tensor, *args, **options) -> None:
    """kernel[grid](first, *args) on the device of `first` and torch's current stream; nothing for an empty grid."""
    if 0 not in grid:
        with torch.cuda.device_of(first):
            kernel[grid](first, *args, **options)


def power_of_two(n: int) -> int:
    """The lowest power of two that is at least n."""
    return 1 << max(0, n - 1).bit_length()


def slice_width(d: int, dtype: torch.dtype) -> int:
    """Columns that one warp treats at once; narrow rows get fewer, so that no lane stands idle."""
    return min(_SLICE_BYTES // dtype.itemsize, max(16, power_of_two(d)))


def slices_of(d: int, width: int) -> int:
    """Programs a row; one where the row is empty, for what a kernel writes beside it."""
    return max(1, triton.cdiv(d, width))


def rows_of(matrix: Tensor) -> Tensor:
    """`matrix`, copied only if its rows are not contiguous."""
    return matrix if matrix.stride(1) == 1 or matrix.shape[1] <= 1 else matrix.contiguous()


def vector(tensor: Tensor | None) -> Tensor | None:
    """Biases and scales come in any floating dtype; the kernels widen them as they load."""
    return None if tensor is None else tensor.contiguous()


def one_for_each(name: str, tensor: Tensor | None, n: int, what: str) -> None:
    """Raises ValueError where a kernel would read past the end of `tensor`. Sizes are the host's: nothing waits."""
    if tensor is not None and tensor.shape[0] != n:
        raise ValueError(f"{name} has {tensor.shape[0]} rows: expected {n}, one for each {what}")
