"""What a constructor asks of its options; each failure names the option, its value and what was expected."""

import math
from collections.abc import Sequence


def size(name: str, value: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f"{name} = {value!r}: expected an int of at least 1")


def flag(name: str, value: bool) -> None:
    if not isinstance(value, bool):
        raise ValueError(f"{name} = {value!r}: expected True or False")


def one_of(name: str, value: str, allowed: Sequence[str]) -> None:
    if value not in allowed:
        raise ValueError(f"{name} = {value!r}: expected one of {', '.join(map(repr, allowed))}")


def at_least(name: str, value: float, least: float = 0.0) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not least <= value < math.inf:
        raise ValueError(f"{name} = {value!r}: expected a finite number of at least {least:g}")


def above(name: str, value: float, bound: float = 0.0) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not bound < value < math.inf:
        raise ValueError(f"{name} = {value!r}: expected a finite number above {bound:g}")
