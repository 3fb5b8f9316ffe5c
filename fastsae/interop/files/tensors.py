"""Tensors of a file, read without running code: a wrong one is named with its file, shape and what was expected."""

import math
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

FLOATS = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


class Tensors:
    """The tensors of one file by name; each is taken once, `done` refuses those that nothing took.

    Attributes:
        where: the file, for messages.
    """

    def __init__(self, tensors: Mapping[str, Tensor], where: str):
        self._left = dict(tensors)
        self.where = where

    def __contains__(self, name: str) -> bool:
        return name in self._left

    def names(self) -> list[str]:
        return sorted(self._left)

    def shape(self, name: str, dims: int) -> tuple[int, ...]:
        """The sizes of a tensor that must be there, with so many dimensions, none of them empty."""
        tensor = self._left.get(name)
        if tensor is None:
            raise ValueError(f"{self.where}: the tensor {name!r} is missing; it has {self.names()}")
        if tensor.dim() != dims or not tensor.numel():
            raise ValueError(f"{self.where}: {name} has shape {tuple(tensor.shape)}: expected {dims} sizes above 0")
        return tuple(tensor.shape)

    def take(self, name: str, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        """A tensor of this shape, floating or of this dtype.

        Raises ValueError if it is missing, or of another shape or dtype.
        """
        tensor = self._left.pop(name, None)
        if tensor is None:
            raise ValueError(f"{self.where}: the tensor {name!r} is missing; it has {self.names()}")
        if tuple(tensor.shape) != shape:
            raise ValueError(f"{self.where}: {name} has shape {tuple(tensor.shape)}: expected {shape}")
        if tensor.dtype != dtype if dtype is not None else tensor.dtype not in FLOATS:
            expected = dtype or "float32, float64, bfloat16 or float16"
            raise ValueError(f"{self.where}: {name} is {tensor.dtype}: expected {expected}")
        return tensor

    def drop(self, *names: str) -> None:
        """Forgets tensors that say nothing about what the SAE computes."""
        for name in names:
            self._left.pop(name, None)

    def done(self) -> None:
        """Raises ValueError that names the tensors nothing took."""
        if self._left:
            raise ValueError(f"{self.where}: unknown tensors {self.names()}")


def read_safetensors(path: Path) -> Tensors:
    """Every tensor of a .safetensors file. Raises FileNotFoundError, and ValueError if it is not whole."""
    _must_exist(path)
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise ValueError(f"{path} is not a whole safetensors file ({error}); copy or save it again") from error
    return Tensors(tensors, str(path))


def read_pickle(path: Path) -> dict[str, Any]:
    """The dict in a file of torch.save, of tensors and plain values alone: nothing that could run code is unpickled.

    Raises FileNotFoundError, and ValueError for a file that is truncated, holds anything else or is not a dict.
    """
    _must_exist(path)
    try:
        values = torch.load(path, map_location="cpu", weights_only=True)
    # What a damaged or hostile pickle makes the reader raise has no common type.
    except Exception as error:
        reason = (str(error).splitlines() or [""])[0]
        raise ValueError(
            f"{path} is not a whole file of tensors and plain values ({type(error).__name__}: {reason}); nothing in it "
            "was executed. Copy or save it again; if it holds other objects, save its state dict alone"
        ) from error
    if not isinstance(values, dict) or not all(isinstance(name, str) for name in values):
        raise ValueError(f"{path} holds a {type(values).__name__}: expected a dict by name, as of a state dict")
    return dict(values)


def tensors_of(values: Any, where: str) -> Tensors:
    """A dict of a pickle as Tensors. Raises ValueError for a value that is not a plain tensor with its own memory."""
    if not isinstance(values, dict) or not all(isinstance(name, str) for name in values):
        raise ValueError(f"{where} holds a {type(values).__name__} where the state dict should be: expected a dict")
    for name, value in values.items():
        if type(value) is not Tensor and type(value) is not torch.nn.Parameter:
            raise ValueError(f"{where}: {name} is a {type(value).__name__}: expected a tensor")
        if value.layout != torch.strided or value.is_meta or value.device.type != "cpu":
            raise ValueError(f"{where}: {name} is not a plain dense tensor")
        # A stride of 0 lets a small file claim a tensor of any size.
        if value.numel() * value.element_size() > value.untyped_storage().nbytes():
            raise ValueError(f"{where}: {name} claims {tuple(value.shape)}, more than is stored of it")
    return Tensors({name: value.detach() for name, value in values.items()}, where)


def read_npz(path: Path) -> Tensors:
    """Every array of an .npz file. Raises FileNotFoundError, and ValueError if it is not whole or holds objects."""
    _must_exist(path)
    try:
        tensors = {}
        with zipfile.ZipFile(path) as archive:
            for member in archive.infolist():
                with archive.open(member) as file:
                    tensors[member.filename.removesuffix(".npy")] = _array(file, member.file_size)
    # As of a pickle: zipfile, zlib, numpy's parser of headers and torch each have their own.
    except Exception as error:
        raise ValueError(f"{path} is not a whole .npz file of numbers ({error}); copy or save it again") from error
    return Tensors(tensors, str(path))


def _array(file: Any, stored: int) -> Tensor:
    """One .npy member; its header is held to the bytes that are there before memory is taken for them."""
    version = np.lib.format.read_magic(file)
    read_header = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
    if version not in read_header:
        raise ValueError(f"its array format {version} is unknown")
    shape, fortran, dtype = read_header[version](file)
    count = math.prod(shape)
    if dtype.hasobject or count * dtype.itemsize > stored:
        raise ValueError(f"an array of {dtype} {shape} is not stored in {stored} bytes")
    content = file.read(count * dtype.itemsize)
    array = np.frombuffer(content, dtype=dtype, count=count).reshape(shape, order="F" if fortran else "C")
    return torch.from_numpy(array.astype(dtype.newbyteorder("="), order="C"))


def _must_exist(path: Path) -> None:
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist")


def exactly(tensor: Tensor, dtype: torch.dtype, name: str, where: str) -> Tensor:
    """`tensor` in another dtype. Raises ValueError if that would round it."""
    narrowed = tensor.to(dtype)
    if not torch.equal(narrowed.to(tensor.dtype).nan_to_num(), tensor.nan_to_num()):
        raise ValueError(f"{where}: {name} is {tensor.dtype} and would be rounded: expected values of {dtype}")
    return narrowed
