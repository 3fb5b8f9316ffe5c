"""dictionary_learning's own trainSAE before and after: the same script, with the classes that it imports exchanged.

    python benchmarks/interop_dictionary_learning.py                                  # TopK, some minutes
    python benchmarks/interop_dictionary_learning.py --trainer BatchTopKTrainer --out NAME.json
    python benchmarks/interop_dictionary_learning.py --d-in 64 --d-sae 2048 --tokens 256 --rounds 1    # does it run?

The data are activations that stand ready, so a step is the SAE's part of a training run alone: `trainer.update`, and
the loop around it. First a gate: losses of a few steps against the library in float64 by the rule of the tests.
"""

import argparse
import contextlib
import io
import sys
import time
import types
from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import torch
from interop_runs import Run, arguments, compare, losses_agree, mixture
from torch import Tensor

try:
    import nnsight  # noqa: F401
except ModuleNotFoundError:
    # The library asks for this name of it when it is imported, and a generator of activations needs nothing more.
    sys.modules["nnsight"] = types.ModuleType("nnsight")
    sys.modules["nnsight"].LanguageModel = object

from dictionary_learning.training import trainSAE

from fastsae.interop import dictionary_learning as drop_ins

TRAINERS = ["TopKTrainer", "BatchTopKTrainer", "MatryoshkaBatchTopKTrainer"]


def trainer_class(given: argparse.Namespace, side: str) -> type:
    """What the script imports, from dictionary_learning or from fastsae.interop.dictionary_learning."""
    drop_in = getattr(drop_ins, given.trainer)
    return drop_in.original if side == "before" else drop_in


class Activations:
    """A generator of batches that notes when each is asked for: the time between two is one step of the loop."""

    def __init__(self, tokens: int, d_in: int, steps: int):
        self._batches = mixture(tokens * steps, d_in).split(tokens)
        self.asked: list[float] = []

    def __iter__(self) -> Iterator[Tensor]:
        for batch in self._batches:
            self.asked.append(time.perf_counter())
            # The loop may write to it.
            yield batch.clone()
        self.asked.append(time.perf_counter())


def config(given: argparse.Namespace, side: str, steps: int) -> dict[str, Any]:
    """As the library's own demonstration makes it."""
    more = {"group_fractions": [0.1, 0.2, 0.3, 0.4]} if given.trainer.startswith("Matryoshka") else {}
    return {
        "trainer": trainer_class(given, side),
        "activation_dim": given.d_in,
        "dict_size": given.d_sae,
        "k": given.k,
        "steps": steps,
        "layer": 0,
        "lm_name": "none",
        "warmup_steps": 1,
        "seed": 0,
        "device": "cpu",
    } | more


@contextlib.contextmanager
def losses_of(trainer: type) -> Iterator[list[float]]:
    """The losses that `update` returns, which trainSAE drops."""
    losses, update = [], trainer.update

    def noting(self: Any, step: int, x: Tensor) -> float:
        losses.append(update(self, step, x))
        return losses[-1]

    trainer.update = noting
    try:
        yield losses
    finally:
        trainer.update = update


def run(given: argparse.Namespace, side: str) -> Run:
    """One trainSAE."""
    data, wanted = Activations(given.tokens, given.d_in, given.steps), config(given, side, given.steps)
    # Its progress bar and remarks.
    with losses_of(wanted["trainer"]) as losses, contextlib.redirect_stderr(io.StringIO()):
        trainSAE(data, [wanted], given.steps, device="cpu")
    return Run([later - sooner for sooner, later in pairwise(data.asked)], losses)


def gate(given: argparse.Namespace) -> dict[str, Any]:
    """Losses of a few steps: the library's in float64 and float32, and the accelerated in float32."""
    x = mixture(given.gate_tokens, given.d_in, seed=1)
    losses = []
    for side, dtype in (("before", torch.float64), ("before", torch.float32), ("after", torch.float32)):
        wanted = config(given, side, given.gate_steps)
        trainer = wanted.pop("trainer")(**wanted)
        trainer.ae.to(dtype)
        losses.append([trainer.update(step, x.to(dtype)) for step in range(given.gate_steps)])
    return losses_agree(*losses)


def main() -> None:
    more = {"trainer": {"choices": TRAINERS, "default": TRAINERS[0]}}
    given = arguments(__doc__.splitlines()[0], "dictionary_learning", **more)
    compare(given, ["dictionary-learning"], lambda: gate(given), lambda side: run(given, side))


if __name__ == "__main__":
    main()
