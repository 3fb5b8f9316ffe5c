"""sparsify and dictionary_learning, imported without a network (as tests/peers/conftest.py has it)."""

import importlib.machinery
import sys
import types
import warnings

import pytest


def _stand_in(name: str) -> types.ModuleType:
    module = types.ModuleType(name)
    module.__spec__ = importlib.machinery.ModuleSpec(name, None)
    return module


# dictionary_learning's import asks for these, which nothing here uses: a language model, a reader of compressed text.
_nnsight = _stand_in("nnsight")
_nnsight.LanguageModel = type("LanguageModel", (), {})

with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings():
    warnings.simplefilter("ignore")
    patch.setenv("HF_HUB_OFFLINE", "1")
    # Else sparsify decodes by Triton, on a CPU too.
    patch.setenv("SPARSIFY_DISABLE_TRITON", "1")
    import sparsify

    for module in (_nnsight, _stand_in("zstandard")):
        if module.__name__ not in sys.modules:
            patch.setitem(sys.modules, module.__name__, module)
    import dictionary_learning
    from dictionary_learning.training import trainSAE
    from dictionary_learning.utils import load_dictionary

__all__ = ["dictionary_learning", "load_dictionary", "sparsify", "trainSAE"]
