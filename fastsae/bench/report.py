"""Tables of a result, from what its file holds and nothing else."""

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from fastsae.bench.result import Measurement, Result, Row
from fastsae.bench.shapes import SHAPES, get_shape


def show(result: Result, console: Console) -> None:
    """Prints machine, versions and every measurement; no speed where a check is red."""
    machine, versions, settings = result.machine, result.versions, result.settings
    commit = result.commit
    console.print(
        f"{machine['cpu']}, {machine['cores']} cores, {settings['threads']} threads, "
        f"{_gib(machine['memory_bytes'])} memory, kernels for {machine['isa']}, screen in {machine['screen']}",
        highlight=False,
    )
    console.print(
        f"fastsae {versions['fastsae']} ({_commit(commit)}), torch {versions['torch']}, Python {versions['python']}, "
        f"{versions['os']}, {result.date}",
        highlight=False,
    )
    gpu = machine.get("gpu")
    if gpu is not None:
        console.print(
            f"{gpu['name']}, {_gib(gpu['memory_bytes'])}, compute capability {gpu['compute_capability']}, "
            f"CUDA {gpu['cuda']}, Triton {versions['triton']}",
            highlight=False,
        )
    load = machine["load_average"]
    if load is not None and load > 0.5 * machine["cores"]:
        console.print(f"[yellow]The load average was {load} when this began: other work makes its times noisy.")
    for measurement in result.measurements:
        console.print()
        _show(measurement, settings, console)


def _show(measurement: Measurement, settings: dict, console: Console) -> None:
    shape = measurement.shape
    console.rule(
        f"{shape['name']}: d_in {shape['d_in']:,}, d_sae {shape['d_sae']:,}, k {shape['k']}, "
        f"{shape['n_tokens']:,} tokens ({measurement.inputs}), {measurement.dtype}"
    )
    if not measurement.green:
        _show_red(measurement, console)
        return
    console.print(
        f"{len(measurement.checks)} checks against float64 passed. nnz {measurement.nnz:,}, L0 {measurement.l0:.1f}. "
        f"Medians of {settings['rounds']} interleaved rounds; ratios are medians of those within a round.",
        highlight=False,
    )
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("phase")
    table.add_column("implementation")
    table.add_column("precision")
    for heading in ("ms", "p20 to p80", "over x @ W", "over mm(out=)", "rate", "peak memory", "of [N, F]"):
        table.add_column(heading, justify="right", no_wrap=True)
    previous = None
    for row in measurement.rows:
        if previous not in (None, row.phase):
            table.add_section()
        table.add_row("" if row.phase == previous else row.phase, *_cells(row, measurement))
        previous = row.phase
    console.print(table)
    for skipped in measurement.skipped:
        console.print(f"Not measured: {skipped.phase} of {skipped.implementation}: {escape(skipped.reason)}")
    _show_targets(measurement, console)


def _cells(row: Row, measurement: Measurement) -> list[str]:
    rate = f"{row.flops / row.p50 / 1e9:,.0f} GFLOP/s" if row.flops else f"{row.bytes / row.p50 / 1e9:,.1f} GB/s"
    peak = share = ""
    if row.peak_memory is not None:
        peak = f"{row.peak_memory / 2**20:,.1f} MiB"
        share = f"{row.peak_memory / measurement.dense_bytes:.1%}"
    return [
        row.implementation,
        row.precision,
        f"{row.p50 * 1e3:,.1f}",
        f"{row.p20 * 1e3:,.1f} to {row.p80 * 1e3:,.1f}",
        f"{row.over_gemm:.3f}",
        f"{row.over_gemm_out:.3f}",
        rate,
        peak,
        share,
    ]


def _show_red(measurement: Measurement, console: Console) -> None:
    console.print("[red]Wrong results: no speed is reported.")
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for heading in ("check", "", "found"):
        table.add_column(heading)
    for check in measurement.checks:
        mark = "passed" if check["passed"] else "[red]FAILED"
        table.add_row(check["name"], mark, escape(check["detail"]))
    console.print(table)


def _show_targets(measurement: Measurement, console: Console) -> None:
    if not measurement.targets:
        return
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("target")
    for heading in ("at most", "found", ""):
        table.add_column(heading, justify="right")
    for target in measurement.targets:
        found = "not measured" if target.found is None else f"{target.found:.3f}"
        table.add_row(escape(target.what), f"{target.limit:.2f}", found, "met" if target.met else "[red]missed")
    console.print(table)


def list_shapes(console: Console) -> None:
    """The registry as a table."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("shape")
    for heading in ("d_in", "d_sae", "k", "tokens here"):
        table.add_column(heading, justify="right")
    table.add_column("source")
    for name in SHAPES:
        shape = get_shape(name)
        sizes = (f"{size:,}" for size in (shape.d_in, shape.d_sae, shape.k, shape.n_tokens))
        table.add_row(name, *sizes, shape.source)
    console.print(table)


def _gib(size: int | None) -> str:
    return "unknown" if size is None else f"{size / 2**30:.0f} GiB"


def _commit(commit: dict | None) -> str:
    if commit is None:
        return "installed"
    return commit["hash"][:10] + (", with changes" if commit["dirty"] else "")
