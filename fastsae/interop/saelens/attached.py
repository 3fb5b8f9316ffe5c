"""SAEs attached to a model: SAELens' wrapper calls their `encode` and `decode` one after the other."""

from functools import wraps

from sae_lens.analysis.hooked_sae_transformer import _SAEWrapper
from torch import Tensor

from fastsae.interop.saelens.base import Fast

_library_forward = _SAEWrapper.forward


@wraps(_library_forward)
def _forward(self: _SAEWrapper, original_output: Tensor) -> Tensor:
    if not isinstance(self.sae, Fast):
        return _library_forward(self, original_output)
    with self.sae._handing_on("forward in a model"):
        return _library_forward(self, original_output)


def install() -> None:
    """Lets accelerated SAEs hand codes on inside the wrapper, now and wherever they are attached later.

    A wrapper lives as long as one `run_with_saes`, so it is the class that is changed; other SAEs notice nothing.
    """
    _SAEWrapper.forward = _forward
