"""The picture of benchmarks/recovery.py's record, for the toy model of superposition; from the record alone."""

import io
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from fastsae.durable import replace_file

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# Okabe and Ito's palette, told apart by every kind of colour vision.
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
DRAWN = "toy"
# Below it, 1 - cosine is rounding.
_LEAST = 1e-5


def draw(content: dict[str, Any], path: Path) -> bool:
    """Draws the record's runs on the toy model into `path`, a PNG; False where it holds none."""
    from matplotlib.figure import Figure

    about = content["data"].get(DRAWN)
    rows = best_rows(content)
    if about is None or not rows:
        return False
    figure = Figure(figsize=(12, 6.6), layout="constrained")
    panels = figure.subplot_mosaic(
        [["matrix", "cosines"], ["matrix", "norms"]], width_ratios=[1, 1.1], height_ratios=[2, 1]
    )
    _matrix(panels["matrix"], figure, about)
    _cosines(panels["cosines"], about, rows, content["threshold"])
    _norms(panels["norms"], about)
    panels["cosines"].sharex(panels["norms"])
    image = io.BytesIO()
    figure.savefig(image, format="png", dpi=150)
    path.parent.mkdir(parents=True, exist_ok=True)
    replace_file(path, image.getvalue())
    return True


def best_rows(content: dict[str, Any]) -> list[dict[str, Any]]:
    """The row of each architecture with the highest MMCS on the toy model, in the order of the record."""
    best: dict[str, dict[str, Any]] = {}
    for row in content["rows"]:
        name = row["run"]["architecture"]
        if row["run"]["data"] == DRAWN and (name not in best or row["mmcs"] > best[name]["mmcs"]):
            best[name] = row
    return list(best.values())


def _matrix(axes: "Axes", figure, about: dict[str, Any]) -> None:
    best = about["best"]
    cosines = np.array(best["features"]) @ np.array(best["matched_latents"]).T
    image = axes.imshow(cosines, cmap="RdBu_r", vmin=-1, vmax=1, interpolation="nearest")
    found = np.diagonal(cosines)
    name, cosine = f"{best['architecture']} ({best['setting']})", found[found > 0].mean()
    axes.set_title(f"A latent for each feature: {name}, mean cosine {cosine:.3f}", loc="left", fontsize=10)
    axes.set_xlabel("latent matched to the feature")
    axes.set_ylabel("true feature, the most important first")
    figure.colorbar(image, ax=axes, orientation="horizontal", shrink=0.6, label="cosine")


def _cosines(axes: "Axes", about: dict[str, Any], rows: list[dict[str, Any]], threshold: float) -> None:
    for row, colour in zip(rows, _COLOURS, strict=False):
        distance = np.maximum(1 - np.array(row["best_cosine"]), _LEAST)
        label = f"{row['run']['architecture']} ({row['run']['setting']}): {row['recovered']:.0%}"
        axes.plot(about["feature_numbers"], distance, ".", markersize=3, color=colour, label=label)
    axes.axhline(1 - threshold, color="#444444", linewidth=0.8, linestyle="--")
    axes.set_yscale("log")
    axes.invert_yaxis()
    axes.set_ylabel("1 - cosine with the nearest latent")
    axes.set_title("What the model keeps is found; recovered is above the dashed line", loc="left", fontsize=10)
    axes.legend(fontsize=7, frameon=False, markerscale=3, loc="upper right")
    axes.spines[["top", "right"]].set_visible(False)


def _norms(axes: "Axes", about: dict[str, Any]) -> None:
    axes.plot(about["norms"], ".", markersize=3, color="#444444")
    axes.set_ylabel("norm of the feature")
    axes.set_xlabel("feature of the toy model, the most important first")
    axes.set_title(f"The model keeps {about['n_features']} features in {about['d']} neurons", loc="left", fontsize=10)
    axes.spines[["top", "right"]].set_visible(False)
