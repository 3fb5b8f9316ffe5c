"""A plot of result files: how many encoder GEMMs each phase costs."""

import os
from collections.abc import Sequence
from pathlib import Path

from fastsae.bench.result import Measurement, Result
from fastsae.saes.files import _replace

PHASES = ("encode", "decode", "forward", "backward", "update", "step")
# Okabe and Ito's palette, told apart by every kind of colour vision.
_COLOURS = ("#0072B2", "#56B4E9", "#009E73", "#D55E00", "#E69F00", "#CC79A7", "#F0E442", "#000000")


def draw(results: Sequence[Result], path: str | os.PathLike) -> None:
    """Draws every green measurement of `results` as a panel of `path`, an image in the format its suffix names.

    Raises ValueError where there is nothing to draw or no matplotlib, with the way to get it.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ValueError("plots need matplotlib: pip install 'fastsae[bench]'") from error
    panels = [(result, m) for result in results for m in result.measurements if m.rows]
    if not panels:
        raise ValueError("results: expected at least one measurement whose checks passed")
    names = list(dict.fromkeys(row.implementation for _, m in panels for row in m.rows if row.phase in PHASES))
    colours = {name: _COLOURS[i % len(_COLOURS)] for i, name in enumerate(names)}
    figure = Figure(figsize=(10, 0.6 + 4.6 * len(panels)), layout="constrained")
    all_axes = figure.subplots(len(panels), 1, squeeze=False)[:, 0]
    for axes, (result, measurement) in zip(all_axes, panels, strict=True):
        _panel(axes, result, measurement, colours)
    all_axes[0].legend(loc="upper left", bbox_to_anchor=(1, 1), frameon=False)
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    kind = path.suffix.removeprefix(".") or "png"
    _replace(path, lambda temporary: figure.savefig(temporary, format=kind, dpi=150))


def _panel(axes, result: Result, measurement: Measurement, colours: dict[str, str]) -> None:
    phases = [phase for phase in PHASES if any(row.phase == phase for row in measurement.rows)]
    width = 0.84 / len(colours)
    for i, (name, colour) in enumerate(colours.items()):
        rows = [(at, measurement.row(phase, name)) for at, phase in enumerate(phases)]
        rows = [(at, row) for at, row in rows if row is not None]
        if not rows:
            continue
        places = [at + (i - (len(colours) - 1) / 2) * width for at, _ in rows]
        heights = [row.over_gemm for _, row in rows]
        # The spread of a phase's own times, on the scale of the ratio.
        below = [row.over_gemm * (1 - row.p20 / row.p50) for _, row in rows]
        above = [row.over_gemm * (row.p80 / row.p50 - 1) for _, row in rows]
        label = f"{name} [{rows[0][1].precision}]"
        axes.bar(places, heights, width, color=colour, label=label)
        axes.errorbar(places, heights, (below, above), fmt="none", ecolor="#444444", elinewidth=0.8)
        for place, height in zip(places, heights, strict=True):
            axes.annotate(
                f"{height:.2g}", (place, height), (0, 3), textcoords="offset points", ha="center", fontsize=6.5
            )
    axes.axhline(1, color="#444444", linewidth=0.8, linestyle="--")
    axes.set_yscale("log")
    axes.set_xticks(range(len(phases)), phases)
    axes.set_ylabel("time over x @ W_enc alone")
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_title(_title(result, measurement), fontsize=9, loc="left")


def _title(result: Result, measurement: Measurement) -> str:
    shape, machine = measurement.shape, result.machine
    commit = result.commit["hash"][:10] if result.commit else "installed"
    return (
        f"{shape['name']}: d_in {shape['d_in']:,}, d_sae {shape['d_sae']:,}, k {shape['k']}, "
        f"{shape['n_tokens']:,} tokens, {measurement.dtype}\n"
        f"{machine['cpu']}, {result.settings['threads']} threads, {machine['isa']}; torch {result.versions['torch']}, "
        f"fastsae {result.versions['fastsae']} ({commit}), {result.date[:10]}"
    )
