"""`fastsae bench compare OLD NEW`: which rows of a result became slower or faster, by more than their own noise.

A sample is a row's seconds over those of the encoder's GEMM in the same round, so that a busy machine or another clock
rate weighs on both. The ratio of the medians, new over old, has a 95 % interval by the bootstrap (Efron 1979): rounds
are drawn anew, with replacement, from each run. A row is marked where the whole interval lies beyond 5 %, since two
runs of the same code differ by that much more often than their own rounds tell.
"""

from dataclasses import dataclass

import numpy as np
from rich import box
from rich.console import Console
from rich.table import Table

from fastsae.bench.result import Measurement, Result, Row

RESAMPLES = 2000
MARKED_BEYOND = 1.05


@dataclass(frozen=True)
class Change:
    """One row of both results: new over old, and the interval of that ratio."""

    phase: str
    implementation: str
    precision: str
    ratio: float
    low: float
    high: float

    @property
    def verdict(self) -> str:
        """ "slower", "faster" or nothing."""
        if self.low > MARKED_BEYOND:
            return "slower"
        return "faster" if self.high < 1 / MARKED_BEYOND else ""


@dataclass(frozen=True)
class Comparison:
    """The changes of one measurement, and what the two results do not share."""

    name: str
    changes: list[Change]
    missing: list[str]


def _samples(measurement: Measurement, row: Row) -> np.ndarray:
    gemm = next(other for other in measurement.rows if other.phase == "gemm")
    seconds, unit = np.asarray(row.seconds), np.asarray(gemm.seconds)
    return seconds / unit if row is not gemm and len(seconds) == len(unit) else seconds


def _interval(old: np.ndarray, new: np.ndarray, generator: np.random.Generator) -> tuple[float, float]:
    def medians(samples: np.ndarray) -> np.ndarray:
        return np.median(generator.choice(samples, (RESAMPLES, len(samples))), axis=1)

    low, high = np.quantile(medians(new) / medians(old), (0.025, 0.975))
    return float(low), float(high)


def _key(measurement: Measurement) -> tuple:
    return tuple(sorted(measurement.shape.items())), measurement.dtype, measurement.inputs


def compare(old: Result, new: Result) -> list[Comparison]:
    """Every measurement that both results have, row by row.

    Raises ValueError where they share none, or one of them failed its checks and so holds no times.
    """
    before = {_key(measurement): measurement for measurement in old.measurements}
    found = []
    for now in new.measurements:
        then = before.get(_key(now))
        if then is None:
            continue
        if not (then.green and now.green):
            raise ValueError(
                f"{now.shape['name']} failed its checks in one of the results: there are no times to compare"
            )
        generator = np.random.default_rng(0)
        old_rows = {(row.phase, row.implementation, row.precision): row for row in then.rows}
        changes, missing = [], []
        for row in now.rows:
            other = old_rows.pop((row.phase, row.implementation, row.precision), None)
            if other is None:
                missing.append(f"{row.phase} of {row.implementation} ({row.precision}): only in the new result")
                continue
            a, b = _samples(then, other), _samples(now, row)
            low, high = _interval(a, b, generator)
            ratio = float(np.median(b) / np.median(a))
            changes.append(Change(row.phase, row.implementation, row.precision, ratio, low, high))
        missing += [f"{phase} of {name} ({precision}): only in the old result" for phase, name, precision in old_rows]
        found.append(Comparison(f"{now.shape['name']}, {now.dtype}, {now.inputs}", changes, missing))
    if not found:
        raise ValueError(
            "the two results share no measurement: expected the same shape, tokens, dtype and inputs in both"
        )
    return found


def show(old: Result, new: Result, console: Console) -> None:
    """Prints the comparison; a difference of machines or settings is said first."""
    comparisons = compare(old, new)
    for field in ("cpu", "cores", "isa", "screen"):
        if old.machine.get(field) != new.machine.get(field):
            console.print(f"[yellow]{field}: {old.machine.get(field)} before, {new.machine.get(field)} now")
    if old.settings.get("threads") != new.settings.get("threads"):
        console.print(f"[yellow]threads: {old.settings.get('threads')} before, {new.settings.get('threads')} now")
    colors = {"slower": "red", "faster": "green", "": "default"}
    for comparison in comparisons:
        table = Table(title=comparison.name, box=box.SIMPLE_HEAD, pad_edge=False)
        for heading in ("phase", "implementation", "precision"):
            table.add_column(heading)
        for heading in ("new over old", "95 % interval"):
            table.add_column(heading, justify="right")
        table.add_column("")
        for change in comparison.changes:
            interval = f"{change.low:.2f} to {change.high:.2f}"
            cells = (change.phase, change.implementation, change.precision, f"{change.ratio:.2f}", interval)
            table.add_row(*cells, change.verdict, style=colors[change.verdict])
        console.print(table)
        for line in comparison.missing:
            console.print(line, highlight=False)
