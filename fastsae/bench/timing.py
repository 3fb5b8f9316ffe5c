"""Interleaved timing: every round runs each case once, so that drift and neighbours touch all of them alike."""

import gc
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch

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


class HostClock:
    """The clock of a CPU: what a call takes until it returns."""

    def start(self) -> Any:
        return self.mark()

    def mark(self) -> Any:
        return time.perf_counter()

    def seconds(self, first: Any, last: Any) -> float:
        return last - first


class DeviceClock(HostClock):
    """Events on the current CUDA stream: what the device takes, and waits for launches, from an idle start."""

    def start(self) -> Any:
        torch.cuda.synchronize()
        return self.mark()

    def mark(self) -> Any:
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def seconds(self, first: Any, last: Any) -> float:
        last.synchronize()
        return first.elapsed_time(last) / 1e3


def clock_of(device: torch.device) -> HostClock:
    return DeviceClock() if device.type == "cuda" else HostClock()


def time_once(case: Case, clock: HostClock) -> dict[str, float]:
    """Seconds of one call by phase: the case's own, and those of its parts if it has any."""
    start = clock.start()
    marks = [start]
    # The result is alive until the clock has stopped: freeing it is not part of any phase.
    result = case.run()
    parts = []
    if case.generator:
        for part in result:
            parts.append(part)
            marks.append(clock.mark())
    end = clock.mark()
    spans = zip(parts, marks, marks[1:], strict=False)
    return {part: clock.seconds(*span) for part, *span in spans} | {case.phase: clock.seconds(start, end)}


def interleave(
    cases: Sequence[Case],
    rounds: int,
    progress: Callable[[str], None] = lambda message: None,
    clock: HostClock | None = None,
) -> dict[tuple[str, str], Samples]:
    """Runs every case once a round, after rounds of warm-up: samples by (phase, implementation)."""
    clock = clock or HostClock()
    collected: dict[tuple[str, str], list[float]] = {}
    for number in range(-WARM_UP_ROUNDS, rounds):
        progress("warming up" if number < 0 else f"round {number + 1} of {rounds}")
        # A collection in the midst of a case would be its neighbour's rubbish.
        gc.collect()
        gc.disable()
        try:
            for case in cases:
                for phase, seconds in time_once(case, clock).items():
                    if number >= 0:
                        collected.setdefault((phase, case.implementation), []).append(seconds)
        finally:
            gc.enable()
    return {key: Samples(seconds) for key, seconds in collected.items()}
