"""A plot of result files: how many encoder GEMMs each phase costs."""

import io
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from fastsae.bench.result import Measurement, Result, Row
from fastsae.durable import replace_file

if TYPE_CHECKING:
    from matplotlib.axes import Axes

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
    names.sort(key=lambda name: not name.startswith("fastsae"))
    colours = {name: _COLOURS[i % len(_COLOURS)] for i, name in enumerate(names)}
    figure = Figure(figsize=(10, 0.8 + 6 * len(panels)), layout="constrained")
    all_axes = figure.subplots(len(panels), 1, squeeze=False)[:, 0]
    for axes, (result, measurement) in zip(all_axes, panels, strict=True):
        _panel(axes, result, measurement, colours)
    handles = {
        label: handle for axes in all_axes for handle, label in zip(*axes.get_legend_handles_labels(), strict=True)
    }
    figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=2, frameon=False, fontsize=8)
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    image = io.BytesIO()
    figure.savefig(image, format=path.suffix.removeprefix(".") or "png", dpi=150)
    replace_file(path, image.getvalue())


def _panel(axes: "Axes", result: Result, measurement: Measurement, colours: dict[str, str]) -> None:
    """One line a phase and implementation: a dot at the median, a bar from p20 to p80. Dots, since the scale is log."""
    ticks, line = [], 0
    for phase in PHASES:
        rows = [row for row in (measurement.row(phase, name) for name in colours) if row is not None]
        if not rows:
            continue
        ticks.append((line + (len(rows) - 1) / 2, phase))
        for row in rows:
            _dot(axes, row, line, colours[row.implementation])
            line += 1
        axes.axhline(line, color="#dddddd", linewidth=0.8)
        line += 1
    axes.axvline(1, color="#444444", linewidth=0.8, linestyle="--")
    axes.set_xscale("log")
    axes.set_ylim(line - 1, -1)
    axes.set_yticks([at for at, _ in ticks], [phase for _, phase in ticks])
    axes.tick_params(axis="y", length=0)
    axes.set_xlabel("time over x @ W_enc alone")
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.set_title(_title(result, measurement), fontsize=9, loc="left")


def _dot(axes: "Axes", row: Row, line: int, colour: str) -> None:
    # The spread of the phase's own times, on the scale of the ratio.
    spread = [[row.over_gemm * (1 - row.p20 / row.p50)], [row.over_gemm * (row.p80 / row.p50 - 1)]]
    label = f"{row.implementation} [{row.precision}]"
    axes.errorbar([row.over_gemm], [line], xerr=spread, fmt="o", color=colour, markersize=5, linewidth=1.2, label=label)
    right = row.over_gemm * row.p80 / row.p50
    axes.annotate(f"{row.over_gemm:.2f}", (right, line), (6, 0), textcoords="offset points", va="center", fontsize=7)


def _title(result: Result, measurement: Measurement) -> str:
    shape, machine = measurement.shape, result.machine
    commit = result.commit["hash"][:10] if result.commit else "installed"
    return (
        f"{shape['name']}: d_in {shape['d_in']:,}, d_sae {shape['d_sae']:,}, k {shape['k']}, "
        f"{shape['n_tokens']:,} tokens, {measurement.dtype}\n"
        f"{machine['cpu']}, {result.settings['threads']} threads, {machine['isa']}; torch {result.versions['torch']}, "
        f"fastsae {result.versions['fastsae']} ({commit}), {result.date[:10]}"
    )
