"""A JSON object of a file, read field by field: a wrong one is named with its file, value and what was expected."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

from fastsae.strict_json import read_object

# Sizes of tensors that any machine could hold.
_MOST = 2**31 - 1
_REQUIRED = object()


class Fields:
    """The fields of one JSON object; each is taken once, `done` refuses those that nothing took.

    Attributes:
        where: the file, for messages.
    """

    def __init__(self, values: dict[str, Any], where: str):
        self._left = dict(values)
        self.where = where

    def __contains__(self, name: str) -> bool:
        return name in self._left

    def fail(self, name: str, value: object, expected: str) -> NoReturn:
        text = repr(value)
        raise ValueError(f"{self.where}: {name} = {text if len(text) < 100 else text[:100] + '…'}: expected {expected}")

    def take(self, name: str, default: Any = _REQUIRED) -> Any:
        """The field as it is. Raises ValueError if it is missing and has no default."""
        value = self._left.pop(name, default)
        if value is _REQUIRED:
            raise ValueError(f"{self.where}: {name} is missing")
        return value

    def size(self, name: str, default: Any = _REQUIRED) -> int:
        value = self.take(name, default)
        if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= _MOST:
            self.fail(name, value, f"an int from 1 to {_MOST}")
        return value

    def number(self, name: str, default: Any = _REQUIRED) -> float:
        value = self.take(name, default)
        # An int may be too large for a float.
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not abs(value) <= 1e300:
            self.fail(name, value, "a finite number")
        return value

    def flag(self, name: str, default: Any = _REQUIRED) -> bool:
        value = self.take(name, default)
        if not isinstance(value, bool):
            self.fail(name, value, "true or false")
        return value

    def text(self, name: str, default: Any = _REQUIRED, *, of: Sequence[str] | None = None) -> str:
        value = self.take(name, default)
        if not isinstance(value, str) or (of is not None and value not in of):
            self.fail(name, value, "a string" if of is None else f"one of {', '.join(map(repr, of))}")
        return value

    def object(self, name: str, default: Any = _REQUIRED) -> "Fields":
        value = self.take(name, default)
        if not isinstance(value, dict):
            self.fail(name, value, "an object")
        return Fields(value, f"{self.where}: {name}")

    def refuse(self, name: str, *harmless: Any, why: str) -> None:
        """Takes a field that means something only if it is there and none of `harmless`."""
        value = self.take(name, harmless[0])
        # 0 == False, but only one of them is what a flag may be.
        if not any(type(value) is type(known) and value == known for known in harmless):
            self.fail(name, value, f"{', '.join(json.dumps(known) for known in harmless)}; {why}")

    def drop(self, *names: str) -> None:
        """Forgets fields that say nothing about what the SAE computes."""
        for name in names:
            self._left.pop(name, None)

    def done(self) -> None:
        """Raises ValueError that names the fields nothing took."""
        if self._left:
            raise ValueError(f"{self.where}: unknown fields {', '.join(sorted(map(repr, self._left)))}")


def read_json(path: Path) -> Fields:
    """The fields of a JSON file; raises as `fastsae.strict_json.read_object`."""
    return Fields(read_object(path), str(path))
