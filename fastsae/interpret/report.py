"""One self-contained HTML page about an SAE."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jinja2

from fastsae.interpret.histogram import Bar
from fastsae.interpret.pages import LatentPage, Snippet
from fastsae.interpret.telling import EXPLANATION

# Control characters and blanks that would vanish or break a line are shown by a sign of their own.
_SIGNS = str.maketrans({"\n": "↵", "\r": "␍", "\t": "⇥"})
_SHADES = 10

_CHART_WIDTH, _CHART_HEIGHT = 640, 180
_MARGIN_LEFT, _MARGIN_BOTTOM, _MARGIN_TOP = 44, 34, 18


@dataclass(frozen=True)
class Fact:
    """A number of the report with its name, and a sentence that says what it means."""

    name: str
    value: str
    meaning: str


def render_report(
    *,
    title: str,
    subtitle: str,
    facts: Sequence[Fact],
    timing: Sequence[Fact],
    details: Mapping[str, Any],
    histogram: Sequence[Bar],
    pages: Sequence[LatentPage],
) -> str:
    """The HTML of a report; every text is escaped, nothing is loaded from elsewhere, and no script runs.

    Args:
        title, subtitle: heading and the line beneath it.
        facts, timing: what is measured of the SAE, and how long a step takes.
        details: settings and versions by name, for the table at the end.
        histogram: bars of `density_histogram`.
        pages: the latents to show, in order.
    """
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("fastsae.interpret"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"visible": _visible, "spaced": _spaced, "rate": _rate}
    return environment.get_template("report.html.j2").render(
        title=title,
        subtitle=subtitle,
        facts=facts,
        timing=timing,
        details=details,
        chart=_chart(histogram),
        pages=pages,
        shades=_shades,
        n_shades=_SHADES,
        explanation=EXPLANATION,
    )


def _visible(token: str) -> str:
    """A token inside running text: line breaks and tabs as signs, spaces as they are."""
    return token.translate(_SIGNS)


def _spaced(token: str) -> str:
    """A token on its own: spaces as signs too, so that ` in` and `in` differ."""
    return _visible(token).replace(" ", "·") or "∅"


def _rate(density: float) -> str:
    """A density as a reader takes it in: "1 in 250"; "every token" at 1."""
    return "every token" if density >= 1 else f"1 in {round(1 / density):,}" if density > 0 else "never"


def _shades(snippet: Snippet, largest: float) -> list[tuple[str, int, float]]:
    """(token, shade 0 to `_SHADES`, activation) in order; any activation above 0 gets at least the first shade."""
    return [
        (token, 0 if activation <= 0 else max(1, min(_SHADES, round(_SHADES * activation / largest))), activation)
        for token, activation in zip(snippet.tokens, snippet.activations, strict=True)
    ]


def _chart(bars: Sequence[Bar]) -> dict[str, Any]:
    """Places and sizes of the histogram's parts, in the units of its SVG."""
    tallest = max((bar.n_latents for bar in bars), default=1)
    plot_width, plot_height = _CHART_WIDTH - _MARGIN_LEFT, _CHART_HEIGHT - _MARGIN_BOTTOM - _MARGIN_TOP
    step = plot_width / max(len(bars), 1)
    base = _CHART_HEIGHT - _MARGIN_BOTTOM
    columns = []
    for i, bar in enumerate(bars):
        height = plot_height * bar.n_latents / tallest
        columns.append({"bar": bar, "x": _MARGIN_LEFT + i * step, "y": base - height, "height": height})
    return {
        "width": _CHART_WIDTH,
        "height": _CHART_HEIGHT,
        "left": _MARGIN_LEFT,
        "top": _MARGIN_TOP,
        "base": base,
        "step": step,
        "tallest": tallest,
        "columns": columns,
        # Whole decades alone: an edge is one where log10 is an integer.
        "ticks": [column for column in columns if math.log10(column["bar"].low) % 1 < 1e-6],
    }
