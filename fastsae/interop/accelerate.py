"""fastsae.accelerate: another library's SAE on fastsae's operators, in place; fastsae.restore undoes it.

Each library has an adapter, a module of `fastsae.interop` with

    saes_in(obj) -> list                the library's SAEs that obj is or holds, none if it knows nothing of obj; and a
                                        trainer itself, where that has code of its own to accelerate
    accelerate(sae, **options) -> None  gives the module a class of fastsae's that derives from its own
    restore(sae) -> None                gives it its own class back

that is imported when the library is: fastsae itself needs none of them.
"""

import importlib
import sys
from types import ModuleType
from typing import Any, TypeVar

from torch import nn

from fastsae.interop.record import record_of

_ADAPTERS = {
    "sae_lens": "fastsae.interop.saelens",
    "sparsify": "fastsae.interop.sparsify",
    "dictionary_learning": "fastsae.interop.dictionary_learning",
}
T = TypeVar("T")


def saes_in(obj: object) -> list[nn.Module]:
    """The SAEs of other libraries that obj is or holds."""
    return [sae for _, sae in _found_in(obj)]


def _found_in(obj: object) -> list[tuple[ModuleType, nn.Module]]:
    found = []
    for library, adapter_name in _ADAPTERS.items():
        # An object of a library that was never imported cannot exist.
        if library in sys.modules:
            adapter = importlib.import_module(adapter_name)
            found += [(adapter, sae) for sae in adapter.saes_in(obj)]
    return found


def _saes_in(obj: object) -> list[tuple[ModuleType, nn.Module]]:
    found = _found_in(obj)
    if not found:
        raise TypeError(
            f"obj is a {type(obj).__module__}.{type(obj).__qualname__}: expected an SAE of SAELens, sparsify or "
            "dictionary_learning, or a trainer or model that holds some"
        )
    return found


def accelerate(obj: T, **options: Any) -> T:
    """Makes another library's SAEs run on fastsae's operators, in place; returns obj.

    Parameters, state dict, optimizer and results stay what they were, up to rounding (`fastsae.testing`); what has no
    fast path runs the library's own code, and `fastsae.explain(obj)` says which and why. An SAE that is accelerated
    already stays as it is.

    Args:
        obj: an SAE of SAELens, sparsify or dictionary_learning, or a trainer or model that holds some.
        options: of the library's adapter; sparsify's is fix_gradients (see docs/sparsify.md).

    Raises:
        TypeError: nothing in obj is known to any adapter, or an option that the library's adapter does not have.
    """
    for adapter, sae in _saes_in(obj):
        if record_of(sae) is None:
            adapter.accelerate(sae, **options)
    return obj


def restore(obj: T) -> T:
    """Undoes `accelerate`: every SAE in obj runs its library's own code again; returns obj.

    Raises:
        TypeError: nothing in obj is known to any adapter.
    """
    for adapter, sae in _saes_in(obj):
        if record_of(sae) is not None:
            adapter.restore(sae)
    return obj
