"""The log of a run: one JSON object on each line, for every recorded step."""

import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from fastsae.durable import replace_file


@contextmanager
def json_lines(path: str | None, step: int) -> Iterator[Callable[[dict[str, Any]], None]]:
    """A function that appends a record to the file at `path`, flushed; one that does nothing if path is None.

    A run that goes on after `step` finished steps keeps the records up to there and drops later ones, which a run that
    was cut off wrote after its last checkpoint. So step 0 starts the file anew.

    Raises ValueError for a file that holds something other than such a log; it is left as it is.
    """
    if path is None:
        yield lambda record: None
        return
    file_path = Path(path)
    file_path.parent.mkdir(parents=True, exist_ok=True)
    kept = _lines_up_to(file_path, step)
    replace_file(file_path, "".join(line + "\n" for line in kept).encode())
    with open(file_path, "a", encoding="utf-8") as file:

        def write(record: dict[str, Any]) -> None:
            file.write(json.dumps(record, allow_nan=False) + "\n")
            file.flush()

        yield write
        os.fsync(file.fileno())


def _lines_up_to(path: Path, step: int) -> list[str]:
    if not path.exists():
        return []
    kept = []
    *lines, unfinished = path.read_text(encoding="utf-8", errors="replace").split("\n")
    # A crash may leave half a line at the end; without its line break it does not count, whatever it holds.
    if unfinished and not lines and not unfinished.startswith("{"):
        raise ValueError(_not_a_log(path, 1))
    for number, line in enumerate(lines, 1):
        try:
            recorded = json.loads(line)["step"]
        except (ValueError, TypeError, KeyError):
            raise ValueError(_not_a_log(path, number)) from None
        if recorded <= step:
            kept.append(line)
    return kept


def _not_a_log(path: Path, number: int) -> str:
    return f"log_path = '{path}': line {number} is not a record of a training log; give another path or move the file"
