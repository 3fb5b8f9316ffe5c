"""How old the oldest latent may be, without asking a GPU in every step."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor


class AgeBound:
    """An upper bound of the largest of `tokens_since_fired`, kept on the host.

    Ages grow by a batch at most, so a bound that was exact once stays one. Asking the tensor itself makes the host
    wait for a GPU; that is done only once the bound says that somebody may have come of age. A change from elsewhere
    is seen by the tensor's version; a copy of the module starts anew.
    """

    def __init__(self):
        self._ages: Tensor | None = None
        self._version, self._bound = -1, 0

    def _holds_for(self, ages: Tensor) -> bool:
        return _asking_waits(ages) and self._ages is ages and self._version == ages._version

    @contextmanager
    def growing(self, ages: Tensor, tokens: int) -> Iterator[None]:
        """Around an update of `ages` by a batch of so many tokens."""
        holds = self._holds_for(ages)
        yield
        if holds:
            self._version, self._bound = ages._version, self._bound + tokens

    def reaches(self, ages: Tensor, tokens: int) -> bool:
        """Whether any of `ages` is at least `tokens`."""
        if self._holds_for(ages) and self._bound < tokens:
            return False
        self._ages, self._version, self._bound = ages, ages._version, int(ages.max())
        return self._bound >= tokens

    def __deepcopy__(self, memo: dict) -> "AgeBound":
        return AgeBound()

    def __reduce__(self) -> tuple:
        return AgeBound, ()


def _asking_waits(ages: Tensor) -> bool:
    return ages.device.type != "cpu" and not torch.compiler.is_compiling()
