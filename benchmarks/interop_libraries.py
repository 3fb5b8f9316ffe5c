"""Training runs of SAELens, sparsify and dictionary_learning before and after fastsae.accelerate, in one table.

    python benchmarks/interop_libraries.py                # runs all three; writes the records and README.md's table
    python benchmarks/interop_libraries.py --table-only   # the table again, from the records

Each library's own script does the work (interop_saelens.py, interop_sparsify.py, interop_dictionary_learning.py): a
gate on the losses first, then both sides in turns.
"""

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer
from readme_table import README, inserted

FOLDER = Path(__file__).resolve().parent
RESULTS = FOLDER / "results" / "interop"
LIBRARIES = ("saelens", "dictionary_learning", "sparsify")
SIZES = {"saelens": ("--tokens", "2048", "--rounds", "3"), "others": ("--steps", "5", "--rounds", "3")}


@dataclass(frozen=True)
class Line:
    """A library's run, before and after: tokens a second, the SAE's part of a step in seconds, peak bytes."""

    library: str
    what: str
    tokens_per_second: tuple[float, float]
    sae_seconds: tuple[float, float]
    peak_bytes: tuple[int, int]


def _pair(of_sides: dict[str, Any]) -> tuple[Any, Any]:
    before, after = of_sides.values()
    return before, after


def _median(values: list[float]) -> float:
    return sorted(values)[len(values) // 2]


def lines(record: dict[str, Any]) -> list[Line]:
    """The runs of one record, of either schema."""
    versions = record["versions"]
    library = next(f"{name} {versions[name]}" for name in list(versions)[::-1] if "-" in name or name == "sae_lens")
    if "rows" in record:
        return [
            Line(
                library.replace("sae_lens", "sae-lens"),
                f"`SAETrainer`, {row['arch']}",
                _pair(row["tokens_per_second"]),
                _pair({side: _median(seconds) for side, seconds in row["sae_seconds"].items()}),
                _pair(row["peak_bytes"]),
            )
            for row in record["rows"]
        ]
    settings, (before, after) = record["settings"], _pair(record["summary"])
    what = f"`{settings['trainer']}`" if "trainer" in settings else f"`Trainer`, {settings['optimizer']}"
    fields = ("tokens_per_second", "sae_seconds", "peak_bytes")
    return [Line(library, what, *((before[field], after[field]) for field in fields))]


def table(folder: Path = RESULTS) -> str:
    """The table of README.md from the newest records, one for each library."""
    records = {name: json.loads((folder / f"{name}.json").read_text()) for name in LIBRARIES}
    first = records["saelens"]
    settings, machine = first["settings"], first["machine"]
    links = ", ".join(f"[{name}.json](benchmarks/results/interop/{name}.json)" for name in LIBRARIES)
    rows = [
        f"Each library's own training loop on its own code and after `fastsae.accelerate`, in turns, losses equal: "
        f"d_in {settings['d_in']}, d_sae {settings['d_sae']:,}, k {settings['k']}, {settings['tokens']:,} tokens a "
        f"step, float32, on {machine['cpu']} with {settings['threads']} threads; medians. The SAE's part is a step "
        f"without the language model; peak memory of the whole process, for SAELens of a step beyond parameters, "
        f"Adam's state and the batch. From {links}.",
        "",
        "| library | run | tokens/s before | after | SAE's part before, s | after | faster | peak memory before "
        "| after |",
        "|---|---|--:|--:|--:|--:|--:|--:|--:|",
    ]
    for record in records.values():
        for line in lines(record):
            (slow, fast), (long, short), (large, small) = line.tokens_per_second, line.sae_seconds, line.peak_bytes
            rows.append(
                f"| {line.library} | {line.what} | {slow:,.0f} | {fast:,.0f} | {long:.2f} | {short:.2f} | "
                f"{long / short:.1f} × | {large / 2**20:,.0f} MiB | {small / 2**20:,.0f} MiB |"
            )
    return "\n".join(rows)


def main(
    table_only: Annotated[bool, typer.Option(help="Only write the table, from the records that are there.")] = False,
) -> None:
    """Measures all three libraries, and writes README.md's table of them."""
    if not table_only:
        # The scripts import what lies beside them, and a bare checkout is not installed.
        environment = os.environ | {
            "PYTHONPATH": os.pathsep.join([str(FOLDER.parent), os.environ.get("PYTHONPATH", "")])
        }
        for name in LIBRARIES:
            sizes = SIZES.get(name, SIZES["others"])
            command = [
                sys.executable,
                str(FOLDER / f"interop_{name}.py"),
                *sizes,
                "--out",
                str(RESULTS / f"{name}.json"),
            ]
            if code := subprocess.run(command, env=environment).returncode:
                raise typer.Exit(code)
    README.write_text(inserted(README.read_text(), table(), "interop"))
    typer.echo(table())


if __name__ == "__main__":
    typer.run(main)
