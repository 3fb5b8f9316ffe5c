"""Writes the tables of README.md from the newest records in benchmarks/results; run it after recording one.

    fastsae bench --out benchmarks/results/NAME.json && python benchmarks/readme_table.py
    fastsae bench --arch all --out benchmarks/results/architectures/NAME.json && python benchmarks/readme_table.py

tests/test_readme.py checks that README.md holds what this would write.
"""

from pathlib import Path
from statistics import median

from fastsae.bench import architectures_result
from fastsae.bench.result import Measurement, Result, Row, load_result

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks/results"
README = ROOT / "README.md"
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
        f"optimizer state, x and the packed W_enc that the screens keep (at most 2 bytes an entry). From {link}."
    )


def _line(phase: str, row: Row) -> str:
    memory = "" if row.peak_memory is None else f"{row.peak_memory / 2**20:,.1f} MiB"
    name = f"**{row.implementation}**" if row.implementation.startswith("fastsae") else row.implementation
    return f"| {phase} | {name} | {row.precision} | {row.p50 * 1e3:,.1f} | {row.over_gemm:.2f} | {memory} |"


def architectures(folder: Path = RESULTS) -> str:
    """The latest green record of every architecture's step beside its dense step."""
    records = [(architectures_result.load(path), path) for path in sorted(folder.glob("architectures/*.json"))]
    records = [(result.date, path.name, result) for result, path in records if result.green]
    if not records:
        return "No measurement is recorded yet."
    _, name, result = max(records, key=lambda record: record[:2])
    shape, machine = result.shape, result.machine
    commit = f"commit {result.commit['hash'][:10]}" if result.commit else "an installed copy"
    lines = [
        f"A training step (forward, backward, torch's fused Adam) in float32 beside the same step in dense PyTorch: "
        f"d_in {shape['d_in']:,}, d_sae {shape['d_sae']:,}, {shape['n_tokens']:,} tokens, on {machine['cpu']} with "
        f"{result.settings['threads']} threads; torch {result.versions['torch']}, {commit}, {result.date[:10]}. "
        f"Medians of {result.settings['rounds']} interleaved rounds; peak memory beyond parameters, gradients, Adam's "
        f"state, x and the packed W_enc that the screens keep. From [{name}](benchmarks/results/architectures/{name}).",
        "",
        "| architecture | L0 | dense ms | fastsae ms | ratio | dense memory | fastsae memory |",
        "|---|--:|--:|--:|--:|--:|--:|",
    ]
    for row in result.rows:
        times = [f"{1e3 * median(row.seconds[which]):,.0f}" for which in ("dense", "fastsae")]
        peaks = [row.peak_memory.get(which) for which in ("dense", "fastsae")]
        memory = ["" if peak is None else f"{peak / 2**20:,.0f} MiB" for peak in peaks]
        cells = row.name, f"{row.l0:.0f}", *times, f"{row.ratio:.2f}", *memory
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def inserted(text: str, block: str, name: str = "bench") -> str:
    """`text` with `block` between its markers. Raises ValueError if it has not exactly one pair of them."""
    begin, end = f"<!-- {name}:begin -->", f"<!-- {name}:end -->"
    if text.count(begin) != 1 or text.count(end) != 1 or text.index(begin) > text.index(end):
        raise ValueError(f"expected {begin} and {end} once each, in this order")
    before, rest = text.split(begin)
    return f"{before}{begin}\n{block}\n{end}{rest.split(end)[1]}"


if __name__ == "__main__":
    text = inserted(README.read_text(), table())
    README.write_text(inserted(text, architectures(), "architectures"))
