"""Interleaved timing: every round runs each case once, so that drift and neighbours touch all of them alike."""

import gc
import time
from collections.abc import Callable, Sequence

import numpy as np

from fastsae.bench.cases import Case

WARM_UP_ROUNDS = 2


class Samples:
    """Seconds of one phase of one implementation, one for each round."""

    def __init__(self, seconds: Sequence[float]):
        self.seconds = list(seconds)

    def quantile(self, q: float) -> float:
        return float(np.quantile(self.seconds, q))

    def ratio(self, other: "Samples") -> float:
        """The median over rounds of this one's time over the other's in the same round."""
        return float(np.median(np.divide(self.seconds, other.seconds)))


def time_once(case: Case) -> dict[str, float]:
    """Seconds of one call by phase: the case's own, and those of its parts if it has any."""
    seconds = {}
    start = last = time.perf_counter()
    # The result is alive until the clock has stopped: freeing it is not part of any phase.
    result = case.run()
    if case.generator:
        for part in result:
            now = time.perf_counter()
            seconds[part] = now - last
            last = now
    seconds[case.phase] = time.perf_counter() - start
    return seconds


def interleave(
    cases: Sequence[Case], rounds: int, progress: Callable[[str], None] = lambda message: None
) -> dict[tuple[str, str], Samples]:
    """Runs every case once a round, after rounds of warm-up: samples by (phase, implementation)."""
    collected: dict[tuple[str, str], list[float]] = {}
    for number in range(-WARM_UP_ROUNDS, rounds):
        progress("warming up" if number < 0 else f"round {number + 1} of {rounds}")
        # A collection in the midst of a case would be its neighbour's rubbish.
        gc.collect()
        gc.disable()
        try:
            for case in cases:
                for phase, seconds in time_once(case).items():
                    if number >= 0:
                        collected.setdefault((phase, case.implementation), []).append(seconds)
        finally:
            gc.enable()
    return {key: Samples(seconds) for key, seconds in collected.items()}
