"""Interleaving, parts and ratios."""

import time

import pytest

from fastsae.bench import cases, timing
from fastsae.bench.cases import Case
from fastsae.bench.work import Work


def case(name, run, phases=("decode",), **more):
    return Case(phases[-1], name, "float32", run, dict.fromkeys(phases, Work(flops=1)), **more)


def test_rounds_are_interleaved():
    calls = []
    recorded = [case(name, lambda name=name: calls.append(name)) for name in "abc"]
    samples = timing.interleave(recorded, 2)
    assert calls == list("abc") * (timing.WARM_UP_ROUNDS + 2)
    assert {key: len(s.seconds) for key, s in samples.items()} == {("decode", name): 2 for name in "abc"}


class CountingClock(timing.HostClock):
    """A clock that work moves by hand: what is timed is known to the digit, on any machine."""

    now = 0.0

    def mark(self):
        return self.now


def test_parts_are_timed_inside_the_whole():
    clock = CountingClock()

    def step():
        clock.now += 2.0
        yield "forward"
        clock.now += 20.0
        yield "backward"
        clock.now += 0.5

    recorded = [case("x", step, ("forward", "backward", "step"), generator=True)]
    samples = timing.interleave(recorded, 3, clock=clock)
    assert {phase: s.seconds for (phase, _), s in samples.items()} == {
        "forward": [2.0] * 3,
        "backward": [20.0] * 3,
        "step": [22.5] * 3,
    }


def test_the_clock_of_a_cpu_counts_seconds():
    clock = timing.HostClock()
    start = clock.start()
    time.sleep(0.01)
    assert clock.seconds(start, clock.mark()) >= 0.01


def test_ratios_are_medians_within_rounds():
    # A slow round (the last) slows both, and must not count.
    ours, gemm = timing.Samples([1.0, 3.0, 40.0]), timing.Samples([2.0, 2.0, 20.0])
    assert ours.ratio(gemm) == pytest.approx(1.5)
    assert ours.quantile(0.5) / gemm.quantile(0.5) == pytest.approx(1.5)
    assert timing.Samples([1.0, 9.0, 2.0]).ratio(timing.Samples([1.0, 3.0, 1.0])) == 2.0


def test_every_phase_has_a_place_in_the_report():
    assert {cases.GEMM[0], *cases.STEP_PARTS, "encode", "decode", "step"} <= set(cases.PHASES)
