"""A library's own function, with some of the helpers that it calls replaced."""

from collections.abc import Callable
from types import FunctionType


def rebound(function: Callable, **helpers: Callable) -> FunctionType:
    """A copy of `function` that finds `helpers` under these names, where it found its module's.

    The library's code runs as it is installed, whatever its version, and the library itself is left alone. Raises
    RuntimeError if the function calls no such helper: then the library is one that fastsae does not know.
    """
    for name in helpers:
        if name not in function.__code__.co_names or name not in function.__globals__:
            raise RuntimeError(
                f"{function.__module__}.{function.__qualname__} calls no {name}: expected a version of the library "
                "that fastsae's adapter was written for (see docs)"
            )
    copy = FunctionType(
        function.__code__,
        {**function.__globals__, **helpers},
        function.__name__,
        function.__defaults__,
        function.__closure__,
    )
    for attribute in ("__kwdefaults__", "__doc__", "__qualname__", "__module__"):
        setattr(copy, attribute, getattr(function, attribute))
    return copy
