"""Writes the table of README.md from the newest record in benchmarks/results; run it after recording one.

    fastsae bench --out benchmarks/results/NAME.json && python benchmarks/readme_table.py

tests/test_readme.py checks that README.md holds what this would write.
"""

from pathlib import Path

from fastsae.bench.result import Measurement, Result, Row, load_result

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks/results"
README = ROOT / "README.md"
BEGIN, END = "<!-- bench:begin -->", "<!-- bench:end -->"
SHAPE, DTYPE = "gpt2-small", "float32"
PHASES = {"encode": "encode", "decode": "decode", "step": "training step with Adam"}


def newest(folder: Path) -> tuple[Path, Result, Measurement] | None:
    """The latest record that holds a correct measurement of the shape shown, by the date in the file."""
    found = []
    for path in sorted(folder.glob("*.json")):
        result = load_result(path)
        for measurement in result.measurements:
            if (measurement.shape["name"], measurement.dtype) == (SHAPE, DTYPE) and measurement.green:
                found.append((result.date, path.name, (path, result, measurement)))
    return max(found)[-1] if found else None


def table(folder: Path = RESULTS) -> str:
    """What stands between the markers."""
    record = newest(folder)
    if record is None:
        return "No measurement is recorded yet."
    path, result, measurement = record
    lines = [
        _heading(path, result, measurement),
        "",
        "| phase | implementation | precision | ms | encoder GEMMs | peak memory |",
        "|---|---|---|--:|--:|--:|",
    ]
    for phase, name in PHASES.items():
        rows = [row for row in measurement.rows if row.phase == phase]
        for row in sorted(rows, key=lambda row: row.p50):
            lines.append(_line(name, row))
    return "\n".join(lines)


def _heading(path: Path, result: Result, measurement: Measurement) -> str:
    shape, machine = measurement.shape, result.machine
    commit = f"commit {result.commit['hash'][:10]}" if result.commit else "an installed copy"
    link = f"[{path.name}](benchmarks/results/{path.name})"
    return (
        f"d_in {shape['d_in']:,}, d_sae {shape['d_sae']:,}, k {shape['k']}, {shape['n_tokens']:,} tokens, "
        f"{measurement.dtype}, on {machine['cpu']} with {result.settings['threads']} threads; torch "
        f"{result.versions['torch']}, {commit}, {result.date[:10]}. Medians of {result.settings['rounds']} interleaved "
        f"rounds; an encoder GEMM is `x @ W_enc` timed in the same round. Peak memory is beyond parameters, gradients, "
        f"optimizer state and x. From {link}."
    )


def _line(phase: str, row: Row) -> str:
    memory = "" if row.peak_memory is None else f"{row.peak_memory / 2**20:,.1f} MiB"
    name = f"**{row.implementation}**" if row.implementation.startswith("fastsae") else row.implementation
    return f"| {phase} | {name} | {row.precision} | {row.p50 * 1e3:,.1f} | {row.over_gemm:.2f} | {memory} |"


def inserted(text: str, block: str) -> str:
    """`text` with `block` between its markers. Raises ValueError if it has not exactly one pair of them."""
    if text.count(BEGIN) != 1 or text.count(END) != 1 or text.index(BEGIN) > text.index(END):
        raise ValueError(f"expected {BEGIN} and {END} once each, in this order")
    before, rest = text.split(BEGIN)
    return f"{before}{BEGIN}\n{block}\n{END}{rest.split(END)[1]}"


if __name__ == "__main__":
    README.write_text(inserted(README.read_text(), table()))
