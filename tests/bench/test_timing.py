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


def test_parts_are_timed_inside_the_whole():
    def step():
        time.sleep(0.002)
        yield "forward"
        time.sleep(0.02)
        yield "backward"

    samples = timing.interleave([case("x", step, ("forward", "backward", "step"), generator=True)], 3)
    forward, backward, whole = (samples[phase, "x"].quantile(0.5) for phase in ("forward", "backward", "step"))
    assert 0.002 <= forward < backward
    assert forward + backward <= whole < 1.2 * (forward + backward)


def test_ratios_are_medians_within_rounds():
    # A slow round (the last) slows both, and must not count.
    ours, gemm = timing.Samples([1.0, 3.0, 40.0]), timing.Samples([2.0, 2.0, 20.0])
    assert ours.ratio(gemm) == pytest.approx(1.5)
    assert ours.quantile(0.5) / gemm.quantile(0.5) == pytest.approx(1.5)
    assert timing.Samples([1.0, 9.0, 2.0]).ratio(timing.Samples([1.0, 3.0, 1.0])) == 2.0


def test_every_phase_has_a_place_in_the_report():
    assert {cases.GEMM[0], *cases.STEP_PARTS, "encode", "decode", "step"} <= set(cases.PHASES)
