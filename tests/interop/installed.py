"""sparsify and dictionary_learning, imported without a network (as tests/peers/conftest.py has it)."""

import sys
import types
import warnings

import pytest

# dictionary_learning's import asks nnsight for this name alone, which nothing here uses.
_nnsight = types.ModuleType("nnsight")
_nnsight.LanguageModel = type("LanguageModel", (), {})

with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings():
    warnings.simplefilter("ignore")
    patch.setenv("HF_HUB_OFFLINE", "1")
    # Else sparsify decodes by Triton, on a CPU too.
    patch.setenv("SPARSIFY_DISABLE_TRITON", "1")
    if "nnsight" not in sys.modules:
        patch.setitem(sys.modules, "nnsight", _nnsight)
    import dictionary_learning
    import sparsify

__all__ = ["dictionary_learning", "sparsify"]
