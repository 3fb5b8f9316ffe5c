"""The Triton kernels: NVIDIA GPUs, and any CPU through Triton's interpreter (TRITON_INTERPRET=1), slowly, for tests.

One module a primitive, imported when first called: Triton itself takes a second to import.
"""

import importlib
import importlib.util
import os
import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch

_MODULE_OF = {
    "encode_topk": "encode",
    "encode_threshold": "encode_threshold",
    "encode_batch_topk": "encode_batch_topk",
    "decode": "decode",
    "squared_error": "decode",
    "sampled_dot": "sampled_dot",
    "transpose": "transpose",
    "accumulate_rows": "accumulate_rows",
    "fused_update": "fused_update",
    "gradient_norm": "gradient_norm",
    "normalize_rows_": "unit_rows",
    "project_rows_": "unit_rows",
}
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def interpreted() -> bool:
    """Whether kernels run in Triton's interpreter; Triton reads the variable when a kernel is defined."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def why_not(op: str, device: torch.device, dtype: torch.dtype) -> str:
    """Why this backend cannot run `op`, or an empty string."""
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed: pip install triton"
    if device.type != "cuda" and not (device.type == "cpu" and interpreted()):
        return f"the Triton kernels run on a CUDA device, the tensors are on {device.type}"
    if op not in _MODULE_OF:
        return f"{op} has no Triton kernel"
    if op != "transpose" and dtype not in _DTYPES:
        return f"the Triton kernels take float32, bfloat16 and float16, not {dtype}"
    return ""


class _Door(ModuleType):
    """Importing `decode` would put that module where the operator of the same name is looked for."""

    def __setattr__(self, name: str, value: Any) -> None:
        if name in _MODULE_OF and isinstance(value, ModuleType):
            value = getattr(value, name)
        super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Door


def __getattr__(name: str) -> Callable:
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_MODULE_OF[name]}"), name)
