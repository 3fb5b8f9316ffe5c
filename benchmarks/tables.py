"""Writes the table of README.md from the records in benchmarks/results: `python benchmarks/tables.py [--check]`.

A record is a file that `fastsae bench --out` wrote. Nothing between the markers of README.md is written by hand.
"""

import sys
from pathlib import Path

from fastsae.bench import load_result
from fastsae.bench.result import Measurement, Result
from fastsae.training.durable import replace_file

ROOT = Path(__file__).resolve().parents[1]
RECORDS = ROOT / "benchmarks" / "results"
README = ROOT / "README.md"
BEGIN, END = "<!-- bench:begin -->\n", "<!-- bench:end -->"
EMPTY = "No measurement is recorded yet.\n"
PHASES = ("encode", "decode", "forward", "backward", "update", "step")


def tables(folder: Path) -> str:
    """Markdown of every record in `folder`, by name."""
    paths = sorted(folder.glob("*.json"))
    return "\n".join(_record(path, load_result(path)) for path in paths) or EMPTY


def _record(path: Path, result: Result) -> str:
    return "\n".join(_measurement(path, result, m) for m in result.measurements if m.rows)


def _measurement(path: Path, result: Result, measurement: Measurement) -> str:
    shape, machine = measurement.shape, result.machine
    gemm = measurement.row("gemm", "x @ W_enc")
    names = list(dict.fromkeys(row.implementation for row in measurement.rows if row.phase == "step"))
    lines = [
        f"**{shape['name']}**: d_in {shape['d_in']:,}, d_sae {shape['d_sae']:,}, k {shape['k']}, "
        f"{shape['n_tokens']:,} tokens, {measurement.dtype}; {machine['cpu']}, {result.settings['threads']} threads, "
        f"torch {result.versions['torch']}, {result.date[:10]} "
        f"([record]({path.relative_to(ROOT) if path.is_relative_to(ROOT) else path.name})).",
        f"Times over the encoder's GEMM alone, `x @ W_enc` in {gemm.precision}: {gemm.p50 * 1e3:,.0f} ms. Medians of "
        f"{result.settings['rounds']} interleaved rounds.",
        "",
        "| | precision | " + " | ".join(PHASES) + " | step, ms | step, memory¹ |",
        "|---|---|" + "--:|" * (len(PHASES) + 2),
    ]
    for name in names:
        rows = [measurement.row(phase, name) for phase in PHASES]
        step = measurement.row("step", name)
        cells = [f"{row.over_gemm:.2f}" if row else "" for row in rows]
        memory = "" if step.peak_memory is None else f"{step.peak_memory / 2**20:,.0f} MiB"
        lines.append(f"| {name} | {step.precision} | {' | '.join(cells)} | {step.p50 * 1e3:,.0f} | {memory} |")
    dense = measurement.dense_bytes / 2**20
    note = "¹ Peak beyond parameters, gradients, optimizer state and x; one [n_tokens, d_sae] tensor has "
    return "\n".join([*lines, "", f"{note}{dense:,.0f} MiB.", ""])


def main(check: bool) -> int:
    text = README.read_text()
    before, _, rest = text.partition(BEGIN)
    if BEGIN not in text or END not in rest:
        raise ValueError(f"README.md has no {BEGIN.strip()} ... {END}: put the markers where the tables belong")
    updated = before + BEGIN + tables(RECORDS) + END + rest.partition(END)[2]
    if check:
        return int(updated != text)
    replace_file(README, updated.encode())
    return 0


if __name__ == "__main__":
    sys.exit(main("--check" in sys.argv[1:]))
