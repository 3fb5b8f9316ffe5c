"""Whether fastsae has kernels for a call; where it has none, the library's own code is as good."""

import torch
from torch import Tensor

from fastsae.backends import dispatch


def why_not(op: str, x: Tensor, weight: Tensor, d_in: int, promotes: bool = True) -> str:
    """Why `op` on x [..., d_in] and a weight is left to the library, or an empty string.

    `promotes`: whether the library adds something of the weight's dtype to x first, which widens it.
    """
    if torch.compiler.is_compiling():
        return "torch.compile traces the library's own code"
    if not isinstance(x, Tensor) or not x.is_floating_point() or x.device != weight.device:
        return "the input is not a floating tensor on the device of the weights"
    if x.dim() == 0 or x.shape[-1] != d_in:
        return "the input has another width than the weights"
    if x.dtype != weight.dtype and not (promotes and torch.promote_types(x.dtype, weight.dtype) == weight.dtype):
        return f"the input is {x.dtype} and the weights {weight.dtype}"
    choice = dispatch.choose(op, weight.device, weight.dtype)
    # The reference computes densely, as the library does; it serves where somebody asks for it by name.
    return choice.reason if choice.backend == "torch" and dispatch._requested() is None else ""


def as_autocast(tensor: Tensor) -> Tensor:
    """`tensor` in the dtype that a matrix product would have here: autocast's, where that is on."""
    device = tensor.device.type
    return tensor.to(torch.get_autocast_dtype(device)) if torch.is_autocast_enabled(device) else tensor
