"""From what a file holds to a module of fastsae's: whole, or an error and none."""

from typing import Any, TypeVar

import torch
from torch import Tensor

from fastsae.saes.base import SAE

T = TypeVar("T", bound=SAE)
# What other libraries keep no record of, at its start.
_AT_START = {"activation_scale": 1.0, "target_scale": 1.0, "tokens_since_fired": 0}


def build(cls: type[T], where: str, tensors: dict[str, Tensor], device: torch.device | str, **options: Any) -> T:
    """An SAE of class `cls` with these options and these tensors by its names of parameters and buffers; in eval mode.

    Weights must have one dtype, which becomes the SAE's.

    Raises ValueError that names the file `where` for options the class does not take and for weights of mixed dtypes.
    """
    dtype = tensors["W_dec"].dtype
    try:
        sae = cls(**options, device="meta", dtype=dtype)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{where} does not describe a {cls.__name__}: {error}") from error
    for name, parameter in sae.named_parameters():
        if name not in cls._kept_dtypes and tensors[name].dtype != dtype:
            raise ValueError(f"{where}: {name} is {tensors[name].dtype} and W_dec {dtype}: expected one dtype")
        if tensors[name].shape != parameter.shape:
            raise ValueError(
                f"{where}: {name} has shape {tuple(tensors[name].shape)}: expected {tuple(parameter.shape)}"
            )
    sae.to_empty(device=device)
    with torch.no_grad():
        for name, tensor in sae.state_dict().items():
            if name in tensors:
                tensor.copy_(tensors[name])
            else:
                tensor.fill_(_AT_START[name])
    return sae.eval()
