"""fastsae bench: speed and memory of an SAE's step beside a GEMM, dense PyTorch and embedding_bag."""

from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer

# Enough to see whether fastsae serves this machine well; the numbers of a record come from the defaults.
_QUICK_TOKENS = 512
_QUICK_ROUNDS = 3


def bench(
    results: Annotated[
        list[Path] | None,
        typer.Argument(help="Result files to plot, or `compare OLD NEW`; nothing is measured then."),
    ] = None,
    shape: Annotated[list[str] | None, typer.Option(help="Registered shape; repeatable. Default: gpt2-small.")] = None,
    list_shapes: Annotated[bool, typer.Option("--list", help="List the registered shapes and stop.")] = False,
    arch: Annotated[
        list[str] | None,
        typer.Option(help="Architecture whose step is timed beside its own dense step (all: every one); repeatable."),
    ] = None,
    tokens: Annotated[int | None, typer.Option(help="Tokens of a batch, instead of the shape's.")] = None,
    k: Annotated[int | None, typer.Option(help="Latents a token, instead of the shape's.")] = None,
    dtype: Annotated[str, typer.Option(help="float32 or bfloat16.")] = "float32",
    inputs: Annotated[str, typer.Option(help="mixture (of latents, as activations are) or gaussian.")] = "mixture",
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    repeats: Annotated[int | None, typer.Option(help="Interleaved rounds. Default: 11.")] = None,
    threads: Annotated[int | None, typer.Option(help="Threads of torch and fastsae. Default: torch's.")] = None,
    quick: Annotated[bool, typer.Option(help="Fewer tokens and rounds: a first look.")] = False,
    memory: Annotated[bool, typer.Option(help="Measure peak memory, in a process for each implementation.")] = True,
    out: Annotated[Path | None, typer.Option(help="Result file to write.")] = None,
    plot: Annotated[Path | None, typer.Option(help="Plot to draw from result files (or from --out).")] = None,
    json: Annotated[bool, typer.Option("--json", help="Print the result as JSON.")] = False,
) -> None:
    """Checks every implementation against float64, then times and weighs them side by side.

    Exits with 1, and reports no speed, when a check fails.
    """
    from rich.console import Console

    from fastsae.bench import report

    console = _wide(Console())
    if list_shapes:
        report.list_shapes(console)
        return
    try:
        if arch:
            _bench_architectures(arch, shape, tokens, k, repeats, threads, quick, memory, out, json, console)
            return
        if results and results[0] == Path("compare"):
            _compare(results[1:], console)
            return
        if results:
            _plot_files(results, plot)
            return
        if plot is not None and out is None:
            raise ValueError("--plot draws from result files: name some, or the one to write with --out")
        result = _measure(shape, tokens, k, dtype, inputs, device, repeats, threads, quick, memory)
    except (ValueError, OSError) as error:
        typer.echo(f"fastsae bench: {error}", err=True)
        raise typer.Exit(2) from error
    from fastsae.bench.result import save_result, to_json

    if json:
        typer.echo(to_json(result), nl=False)
    else:
        report.show(result, console)
    if not all(measurement.green for measurement in result.measurements):
        raise typer.Exit(1)
    if out is not None:
        save_result(result, out)
        typer.echo(f"wrote {out}", err=True)
        if plot is not None:
            _plot_files([out], plot)


def _bench_architectures(arch, shape, tokens, k, repeats, threads, quick, memory, out, as_json, console):
    from rich.console import Console

    from fastsae.bench import architectures, architectures_result, get_shape, shapes

    _set_threads(threads)
    names = shape or [shapes.DEFAULT]
    if len(names) > 1:
        raise ValueError(f"--shape {' --shape '.join(names)} with --arch: expected one")
    size = get_shape(names[0], n_tokens=tokens, k=k)
    if quick and tokens is None:
        size = replace(size, n_tokens=min(size.n_tokens, _QUICK_TOKENS))
    rounds = repeats if repeats is not None else _QUICK_ROUNDS if quick else 7
    chosen = list(architectures.VARIANTS) if "all" in arch else arch
    with Console(stderr=True).status("starting") as status:
        result = architectures.run(chosen, size, rounds=rounds, memory=memory, progress=status.update)
    if as_json:
        typer.echo(architectures_result.to_json(result), nl=False)
    else:
        architectures_result.show(result, console)
    if not result.green:
        raise typer.Exit(1)
    if out is not None:
        architectures_result.save(result, out)
        typer.echo(f"wrote {out}", err=True)


def _set_threads(threads):
    import torch

    if threads is not None:
        if threads < 1:
            raise ValueError(f"--threads {threads}: expected at least 1")
        torch.set_num_threads(threads)


def _measure(shape, tokens, k, dtype, inputs, device, repeats, threads, quick, memory):
    from rich.console import Console

    from fastsae.bench import get_shape, run, shapes

    _set_threads(threads)
    chosen = [get_shape(name, n_tokens=tokens, k=k) for name in shape or [shapes.DEFAULT]]
    if quick and tokens is None:
        chosen = [replace(size, n_tokens=min(size.n_tokens, _QUICK_TOKENS)) for size in chosen]
    rounds = repeats if repeats is not None else _QUICK_ROUNDS if quick else 11
    progress = Console(stderr=True)
    with progress.status("starting") as status:
        return run(
            chosen, dtype=dtype, inputs=inputs, rounds=rounds, memory=memory, device=device, progress=status.update
        )


def _plot_files(results: list[Path], plot: Path | None) -> None:
    from fastsae.bench import load_result
    from fastsae.bench.plot import draw

    if plot is None:
        raise ValueError("result files are there to be plotted: give --plot FILE")
    draw([load_result(path) for path in results], plot)
    typer.echo(f"drew {plot}", err=True)


def _compare(results: list[Path], console) -> None:
    from fastsae.bench import compare, load_result

    if len(results) != 2:
        raise ValueError(f"compare takes two result files, OLD and NEW: got {len(results)}")
    compare.show(*map(load_result, results), console)


def _wide(console):
    """Tables are never cut: a narrow terminal wraps lines instead."""
    console.width = max(console.width, 180)
    return console
