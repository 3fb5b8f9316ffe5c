"""What `fastsae bench --arch` found: its file, and its table."""

import json
import os
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from fastsae.durable import replace_file

SCHEMA = "fastsae-architectures/1"

# What is promised at d_in 768, d_sae 24,576, L0 of 32 to 64 and 2,048 tokens in float32 on two cores: a step's time
# over the dense one, and its peak memory beyond parameters, gradients, Adam's state and x over one [n_tokens, d_sae].
RATIO, MEMORY = 0.35, 0.10


@dataclass
class ArchitectureRow:
    """One architecture; without a green check there are no times."""

    name: str
    architecture: str
    green: bool
    detail: str
    l0: float | None = None
    seconds: dict[str, list[float]] = field(default_factory=dict)
    ratio: float | None = None
    peak_memory: dict[str, int | None] = field(default_factory=dict)


@dataclass
class ArchitectureResult:
    """A run: machine, versions, commit, settings, shape, and a row for each architecture."""

    date: str
    machine: dict[str, Any]
    versions: dict[str, Any]
    commit: dict[str, Any] | None
    settings: dict[str, Any]
    shape: dict[str, Any]
    rows: list[ArchitectureRow] = field(default_factory=list)
    schema: str = SCHEMA

    @property
    def green(self) -> bool:
        return all(row.green for row in self.rows)

    @property
    def dense_bytes(self) -> int:
        """One [n_tokens, d_sae] tensor."""
        return 4 * self.shape["n_tokens"] * self.shape["d_sae"]


def to_json(result: ArchitectureResult) -> str:
    return json.dumps(asdict(result), indent=1) + "\n"


def save(result: ArchitectureResult, path: str | os.PathLike) -> None:
    """Writes a result whole or not at all."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    replace_file(path, to_json(result).encode())


def load(path: str | os.PathLike) -> ArchitectureResult:
    """Reads a result file. Raises ValueError, naming the file, for anything but a whole result of this schema."""
    try:
        raw = json.loads(Path(path).read_text())
        if not isinstance(raw, dict) or raw.get("schema") != SCHEMA:
            raise ValueError(f"schema {raw.get('schema') if isinstance(raw, dict) else None!r}, expected {SCHEMA!r}")
        return ArchitectureResult(**raw | {"rows": [ArchitectureRow(**row) for row in raw["rows"]]})
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is no result of `fastsae bench --arch`: {error}") from error


def show(result: ArchitectureResult, console: Console) -> None:
    """Prints one table; no speed where a check is red."""
    shape, settings = result.shape, result.settings
    console.print(
        f"{result.machine['cpu']}, {settings['threads']} threads; torch {result.versions['torch']}; "
        f"d_in {shape['d_in']:,}, d_sae {shape['d_sae']:,}, {shape['n_tokens']:,} tokens, float32; medians of "
        f"{settings['rounds']} interleaved rounds; a step is forward, backward and {settings['optimizer']}.",
        highlight=False,
    )
    load_average = result.machine["load_average"]
    if load_average is not None and load_average > 0.5 * result.machine["cores"]:
        console.print(f"[yellow]The load average was {load_average} when this began: other work makes its times noisy.")
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("architecture")
    for heading in ("L0", "dense ms", "fastsae ms", "ratio", "dense memory", "fastsae memory", "of [N, F]"):
        table.add_column(heading, justify="right", no_wrap=True)
    for row in result.rows:
        if not row.green:
            table.add_row(row.name, "[red]red", *[""] * 6)
            continue
        ours = row.peak_memory.get("fastsae")
        share = None if ours is None else ours / result.dense_bytes
        table.add_row(
            row.name,
            f"{row.l0:.1f}",
            *(f"{1e3 * median(row.seconds[which]):,.0f}" for which in ("dense", "fastsae")),
            f"{row.ratio:.2f}" + ("" if row.ratio <= RATIO else f" [yellow]> {RATIO}"),
            *(_mebibytes(row.peak_memory.get(which)) for which in ("dense", "fastsae")),
            "" if share is None else f"{share:.1%}" + ("" if share <= MEMORY else f" [yellow]> {MEMORY:.0%}"),
        )
    console.print(table)
    for row in result.rows:
        if not row.green:
            console.print(f"[red]{row.name}: {row.detail}", markup=True, highlight=False)


def _mebibytes(count: int | None) -> str:
    return "" if count is None else f"{count / 2**20:,.1f} MiB"
