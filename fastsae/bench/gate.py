"""Correctness before speed: every implementation against float64, in the process and on the tensors that are timed."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from fastsae.bench import checks
from fastsae.bench.implementations import FastSAE, FusedAdamSAE, Implementation
from fastsae.bench.problem import Problem


@dataclass(frozen=True)
class Check:
    """One thing that must hold, and what was found."""

    name: str
    passed: bool
    detail: str


def run(problem: Problem, implementations: Sequence[Implementation]) -> list[Check]:
    """Every check of a run. A check that raises has failed; the others still run.

    Raises ValueError under python -O, which removes assertions.
    """
    if not __debug__:
        raise ValueError("python -O removes the checks, and without them no speed is reported: run without -O")
    found = []
    for name, check in _checks(problem, implementations):
        try:
            found.append(Check(name, True, check()))
        except (AssertionError, ValueError, TypeError, RuntimeError) as error:
            found.append(Check(name, False, f"{type(error).__name__}: {error}"))
    return found


def _checks(problem: Problem, implementations: Sequence[Implementation]) -> Iterator[tuple[str, Callable[[], str]]]:
    yield "decode", lambda: checks.decode(problem)
    yield "squared_error", lambda: checks.squared_error(problem)
    yield "sampled_dot", lambda: checks.sampled_dot(problem)
    yield "transpose", lambda: checks.transpose(problem)
    yield "accumulate_rows", lambda: checks.accumulate_rows(problem)
    yield "projection and normalisation", lambda: checks.unit_rows(problem)
    for implementation in implementations:
        for about, check in checks_of(problem, implementation).items():
            yield f"{implementation.name}: {about}", lambda check=check, it=implementation: check(problem, it)


def checks_of(problem: Problem, implementation: Implementation) -> dict[str, Callable]:
    """What one implementation must pass, by name: functions of the problem and the implementation."""
    if isinstance(implementation, FusedAdamSAE):
        return {"moments": checks.moments}
    if isinstance(implementation, FastSAE) and implementation.screen is not None:
        # With the bits of the default screen it passes whatever that passes.
        return {"same bits": checks.same_bits}
    if implementation.mixed:
        return {"loss": checks.loss}
    return {"selection": checks.selection, "decode": checks.reconstruction, "gradients": checks.gradients}
