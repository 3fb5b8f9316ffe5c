"""What became of an accelerated module's calls: which path served each method, and why."""

from collections import Counter
from dataclasses import dataclass, field

from torch import nn

_ATTRIBUTE = "_fastsae_record"


@dataclass
class Record:
    """Kept on a module while it is accelerated.

    Attributes:
        library: its import name, "sae_lens" for one.
        original: the module's class before.
        why_not: why the whole module stays with its library's code; None where fastsae serves it.
        calls: how often each (method, path, reason) was taken; path is "fastsae" or the library's name.
    """

    library: str
    original: type
    why_not: str | None = None
    calls: Counter[tuple[str, str, str]] = field(default_factory=Counter)

    def took_fastsae(self, method: str, reason: str = "") -> None:
        """Counts a call of `method` that fastsae's operators served."""
        self.calls[method, "fastsae", reason] += 1

    def took_original(self, method: str, reason: str) -> None:
        """Counts a call of `method` that the library's own code served, and why it had to."""
        self.calls[method, self.library, reason] += 1


def record_of(module: nn.Module) -> Record | None:
    """The record of an accelerated module; None for any other."""
    return module.__dict__.get(_ATTRIBUTE)


def attach(module: nn.Module, record: Record) -> None:
    """Puts a record on a module: no parameter, no buffer, not in its state dict."""
    module.__dict__[_ATTRIBUTE] = record


def detach(module: nn.Module) -> None:
    """Takes the record off again."""
    module.__dict__.pop(_ATTRIBUTE, None)
