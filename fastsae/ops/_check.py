"""What an operator's public function asks of its arguments; each failure names the argument and the mend."""

import torch
from torch import Tensor

from fastsae.codes import SparseCodes

FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def floating(name: str, tensor: Tensor) -> None:
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name} is a {type(tensor).__name__}: expected a torch.Tensor")
    if tensor.dtype not in FLOATS:
        raise TypeError(
            f"{name} has dtype {tensor.dtype}: expected float16, bfloat16, float32 or float64; convert it first"
        )


def codes(value: SparseCodes) -> None:
    if not isinstance(value, SparseCodes):
        raise TypeError(f"codes is a {type(value).__name__}: expected fastsae.SparseCodes")


def same_device(name: str, tensor: Tensor, other_name: str, other: Tensor) -> None:
    if tensor.device != other.device:
        raise ValueError(f"{name} is on {tensor.device} and {other_name} on {other.device}: move one to the other")


def same_kind(name: str, tensor: Tensor, other_name: str, other: Tensor) -> None:
    """Same device and same dtype."""
    same_device(name, tensor, other_name, other)
    if tensor.dtype != other.dtype:
        raise TypeError(f"{name} has dtype {tensor.dtype} and {other_name} {other.dtype}: convert one to the other")


def shape(name: str, tensor: Tensor, expected: tuple[int | None, ...], meaning: str) -> None:
    """`expected` has None where any size will do."""
    fits = tensor.dim() == len(expected) and all(
        want is None or have == want for have, want in zip(tensor.shape, expected, strict=True)
    )
    if not fits:
        raise ValueError(f"{name} has shape {tuple(tensor.shape)}: expected {meaning}")


def k(value: int, d_sae: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"k is {value!r}: expected an int")
    if not 1 <= value <= d_sae:
        raise ValueError(f"k = {value}: expected 1 <= k <= d_sae = {d_sae}")
