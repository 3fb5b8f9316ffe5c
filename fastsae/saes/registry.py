"""Every architecture by the name its files carry."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from fastsae.saes.base import SAE

ARCHITECTURES: dict[str, type["SAE"]] = {}


def register(cls: type["SAE"]) -> type["SAE"]:
    """A class decorator: `fastsae.load` finds the class by its `architecture`. Raises ValueError for a name taken."""
    if ARCHITECTURES.setdefault(cls.architecture, cls) is not cls:
        raise ValueError(f"architecture = {cls.architecture!r} is {ARCHITECTURES[cls.architecture].__name__}'s")
    return cls
