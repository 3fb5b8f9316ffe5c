"""The other libraries, imported once and without a network; and the precisions in which fastsae is held to them."""

import sys
import types
import warnings

import pytest
import torch

from fastsae.testing import Backend, backends

# dictionary_learning's import asks nnsight for the name LanguageModel, a language model to take activations from, which
# nothing here does. nnsight itself would bring torchvision, and patches torch and einops wherever it is imported.
_nnsight = types.ModuleType("nnsight")
_nnsight.LanguageModel = type("LanguageModel", (), {})

with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings():
    warnings.simplefilter("ignore")
    patch.setenv("HF_HUB_OFFLINE", "1")
    # Else sparsify decodes by Triton, on a CPU too.
    patch.setenv("SPARSIFY_DISABLE_TRITON", "1")
    patch.setitem(sys.modules, "nnsight", _nnsight)
    import dictionary_learning.trainers.matryoshka_batch_top_k  # noqa: F401
    import sae_lens  # noqa: F401
    import sparsify  # noqa: F401

_PRECISIONS = [(Backend("torch"), torch.float64)]
_PRECISIONS += [
    (backend, torch.float32) for backend in backends() if backend.device == "cpu" and not backend.interpreted
][-1:]


@pytest.fixture(params=_PRECISIONS, ids=lambda case: f"{case[0]}-{str(case[1])[6:]}")
def precision(request):
    """float64 by plain PyTorch, where hardly anything is left to rounding, and float32 by the best kernels here."""
    backend, dtype = request.param
    with backend.active():
        yield dtype
