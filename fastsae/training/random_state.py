"""The states of the random generators that a source of batches may draw from, as JSON can hold them."""

import random
from collections.abc import Callable
from typing import Any

import numpy
import torch


def capture(device: torch.device) -> dict[str, Any]:
    """The states of Python's, numpy's and torch's global generators, and of CUDA's on `device`."""
    name, keys, *rest = numpy.random.get_state()
    return {
        "python": random.getstate(),
        "numpy": [name, keys.tolist(), *rest],
        "torch": _text(torch.get_rng_state()),
        "cuda": _text(torch.cuda.get_rng_state(device)) if device.type == "cuda" else None,
    }


def restorer(state: dict[str, Any], device: torch.device) -> Callable[[], None]:
    """A function that sets the generators to what `capture` returned; all of it is decoded before it is returned.

    A state taken on a CPU leaves CUDA's generator alone. Raises ValueError for anything that `capture` did not make.
    """
    try:
        version, words, gauss = state["python"]
        numpy_state = tuple(state["numpy"])
        torch_state = _tensor(state["torch"])
        cuda_state = None if state["cuda"] is None or device.type != "cuda" else _tensor(state["cuda"])
        python_state = (version, tuple(words), gauss)
        # Generators of their own show that the states are sound before a global one is touched.
        random.Random().setstate(python_state)
        numpy.random.RandomState().set_state(numpy_state)
        torch.Generator().set_state(torch_state)
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        raise ValueError(f"not the states of random generators: {error!r}") from error

    def restore() -> None:
        random.setstate(python_state)
        numpy.random.set_state(numpy_state)
        torch.set_rng_state(torch_state)
        if cuda_state is not None:
            torch.cuda.set_rng_state(cuda_state, device)

    return restore


def _text(state: torch.Tensor) -> str:
    return state.numpy().tobytes().hex()


def _tensor(text: str) -> torch.Tensor:
    return torch.tensor(list(bytes.fromhex(text)), dtype=torch.uint8)
