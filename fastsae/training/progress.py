"""The progress bar of a run."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, Task, TextColumn, TimeRemainingColumn
from rich.text import Text


class StepsPerSecond(ProgressColumn):
    """The speed of late."""

    def render(self, task: Task) -> Text:
        speed = task.finished_speed or task.speed
        return Text("" if speed is None else f"{speed:.3g} steps/s")


class ProgressBar:
    """One bar: steps done, steps per second, remaining time and the numbers last recorded."""

    def __init__(self, progress: Progress, steps: int, step: int):
        self._progress = progress
        self._task = progress.add_task("training", total=steps, completed=step, values="")

    def advance(self) -> None:
        """One more step is done."""
        self._progress.advance(self._task)

    def show(self, values: dict[str, float]) -> None:
        """Shows numbers by name after the bar."""
        text = "  ".join(f"{name} {value:.4g}" for name, value in values.items())
        self._progress.update(self._task, values=text)


@contextmanager
def progress_bar(shown: bool, steps: int, step: int) -> Iterator[ProgressBar]:
    """A bar on standard error, `step` of `steps` done; invisible unless `shown` and standard error is a terminal."""
    console = Console(file=sys.stderr)
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        StepsPerSecond(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[values]}"),
    )
    with Progress(*columns, console=console, disable=not (shown and console.is_terminal)) as progress:
        yield ProgressBar(progress, steps, step)
