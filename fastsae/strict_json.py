"""Reads the small JSON files that describe an SAE; a hostile one is an error and nothing worse."""

import json
import math
from pathlib import Path
from typing import Any, NoReturn

# A config is a few kB; what is larger is another file, or a hostile one.
_MOST_BYTES = 1 << 24


def read_object(path: Path) -> dict[str, Any]:
    """The object in a JSON file.

    Raises FileNotFoundError, and ValueError for what is not one object of strict JSON (NaN and infinities are not).
    """
    try:
        size = path.stat().st_size
        if size > _MOST_BYTES:
            raise ValueError(f"{size} bytes, where a config takes a few thousand")
        values = json.loads(path.read_bytes(), parse_constant=_no_constant, parse_float=_finite)
        if not isinstance(values, dict):
            raise ValueError("not a JSON object")
    except FileNotFoundError:
        raise FileNotFoundError(f"{path} does not exist") from None
    # Nesting without end is a RecursionError.
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not a readable config ({error}); write it anew") from error
    return values


def _no_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not JSON")


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"{text} is too large for a number")
    return value
