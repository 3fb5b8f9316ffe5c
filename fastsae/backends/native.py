"""The native libraries, loaded once: the module, or why there is none."""

import importlib
import os
from types import ModuleType

import torch  # noqa: F401  (first: the library's OpenMP must resolve to the copy torch has loaded)

_HOW_TO_BUILD = (
    "install a C++17 compiler (Debian: apt-get install g++) and run "
    "`pip install --force-reinstall --no-deps fastsae` or, in a source tree, `pip install -e .`"
)

_HOW_TO_BUILD_CUDA = (
    "install the CUDA toolkit (its nvcc) and run `FASTSAE_CUDA=1 pip install --force-reinstall --no-deps fastsae` or, "
    "in a source tree, `FASTSAE_CUDA=1 pip install -e .`"
)


def _load() -> tuple[ModuleType | None, str]:
    if os.environ.get("FASTSAE_NO_NATIVE") == "1":
        return None, "FASTSAE_NO_NATIVE=1 is set"
    try:
        module = importlib.import_module("fastsae._cpu")
    except ImportError as error:
        return None, f"the native CPU library is not there ({error}); to get it, {_HOW_TO_BUILD}"
    isa = os.environ.get("FASTSAE_ISA")
    if isa and not module.select_isa(isa):
        usable = ", ".join(name for name, _, runs in module.isas() if runs)
        raise ValueError(f"FASTSAE_ISA={isa!r}: this machine and build have {usable}; set one of these")
    return module, ""


def _load_cuda() -> tuple[ModuleType | None, str]:
    if os.environ.get("FASTSAE_NO_NATIVE") == "1":
        return None, "FASTSAE_NO_NATIVE=1 is set"
    try:
        return importlib.import_module("fastsae._cuda"), ""
    except ImportError as error:
        return None, f"the CUDA library is not there ({error}); to get it, {_HOW_TO_BUILD_CUDA}"


cpu, why_not_cpu = _load()
cuda, why_not_cuda = _load_cuda()
