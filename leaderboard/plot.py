"""The picture of a table: one dot and interval per recipe, as an SVG that takes its colours from the page."""

import io
import re
from collections.abc import Sequence
from typing import Any

import matplotlib as mpl
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure

from .board import Row, Table

# Placeholders that matplotlib writes and the page's CSS variables replace, so that dark mode needs no second
# picture. Their values mean nothing.
_PLACEHOLDERS = {
    "moe": "#0a0001",
    "dense": "#0a0002",
    "rule": "#0a0003",
    "rival": "#0a0004",
    "unlisted": "#0a0005",
    "ink": "#0a0006",
    "line": "#0a0007",
}
_OFF_SCALE = ("←", "→")
_INCHES_PER_ROW = 0.28


def interval_plot(table: Table) -> str:
    """An inline `<svg>`: the headline metric of each recipe, its interval, and each seed as a small tick."""
    rows = [row for row in table.rows if table.headline.name in row.metrics]
    settings: Any = {"svg.fonttype": "none", "svg.hashsalt": table.anchor, "font.size": 10}
    with mpl.rc_context(settings):
        figure = Figure(figsize=(6.8, 0.75 + _INCHES_PER_ROW * len(rows)), layout="constrained")
        FigureCanvasSVG(figure)
        axes = figure.add_subplot()
        left, right = _limits(rows, table.headline.name)
        for position, row in enumerate(rows):
            mean = row.metrics[table.headline.name].mean
            if left <= mean <= right:
                _draw_row(axes, position, row, table.headline.name)
            else:
                _point_off_scale(axes, position, row, mean, to_left=mean < left)
        axes.set_yticks(range(len(rows)), [_shorten(row.recipe.title) for row in rows])
        axes.set_ylim(len(rows) - 0.4, -0.6)
        axes.set_xlim(left, right)
        better = "higher" if table.headline.goal == "max" else "lower"
        unit = f" ({table.headline.unit})" if table.headline.unit else ""
        axes.set_xlabel(f"{table.headline.name}{unit}, {better} is better")
        _style(axes)
        svg = io.StringIO()
        figure.savefig(svg, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    return _for_page(svg.getvalue(), table)


def _draw_row(axes: mpl.axes.Axes, position: int, row: Row, metric: str) -> None:
    colour, value = _PLACEHOLDERS[row.recipe.kind], row.metrics[metric]
    seeds = [cell.metrics[metric] for cell in row.cells if metric in cell.metrics]
    if value.low is not None and value.high is not None:
        axes.plot([value.low, value.high], [position] * 2, color=colour, lw=2.2, solid_capstyle="round")
        axes.plot(seeds, [position] * len(seeds), "|", color=colour, ms=9, mew=1.1)
    face = "none" if row.stale else colour
    axes.plot([value.mean], [position], "o", color=colour, ms=7.5, markerfacecolor=face, mew=1.6)


def _point_off_scale(axes: mpl.axes.Axes, position: int, row: Row, mean: float, to_left: bool) -> None:
    axes.text(
        0.01 if to_left else 0.99,
        position,
        f"{_OFF_SCALE[0]} {mean:.4g}" if to_left else f"{mean:.4g} {_OFF_SCALE[1]}",
        color=_PLACEHOLDERS[row.recipe.kind],
        ha="left" if to_left else "right",
        va="center_baseline",
        transform=axes.get_yaxis_transform(),
    )


def _limits(rows: Sequence[Row], metric: str) -> tuple[float, float]:
    """Ends of the axis: a rule far from all that is learned would press the rest into one dot."""
    everything, learned = [_extent([row], metric) for row in rows], [r for r in rows if r.recipe.kind != "rule"]
    low, high = _extent(learned or rows, metric)
    reach = high - low
    if len(learned) > 1 and reach > 0:
        everything = [(a, b) for a, b in everything if a >= low - reach and b <= high + reach]
    left, right = min(a for a, _ in everything), max(b for _, b in everything)
    margin = 0.05 * (right - left) or 0.05 * max(abs(left), 1e-3)
    return left - margin, right + margin


def _extent(rows: Sequence[Row], metric: str) -> tuple[float, float]:
    values = [cell.metrics[metric] for row in rows for cell in row.cells if metric in cell.metrics]
    ends = [end for row in rows for end in (row.metrics[metric].low, row.metrics[metric].high) if end is not None]
    return min(values + ends), max(values + ends)


def _style(axes: mpl.axes.Axes) -> None:
    ink, line = _PLACEHOLDERS["ink"], _PLACEHOLDERS["line"]
    axes.grid(axis="x", color=line, lw=0.8)
    axes.set_axisbelow(True)
    axes.tick_params(axis="both", length=0, labelcolor=ink, pad=6)
    axes.xaxis.label.set_color(ink)
    for side, spine in axes.spines.items():
        spine.set_visible(side == "bottom")
        spine.set_color(line)


def _for_page(svg: str, table: Table) -> str:
    svg = svg[svg.index("<svg") :]
    for name, colour in _PLACEHOLDERS.items():
        svg = svg.replace(colour, f"var(--{name})")
    # matplotlib numbers its ids from one in every file; a page with several pictures needs them apart.
    svg = re.sub(r'(\bid="|"#|url\(#)', rf"\g<1>{table.anchor}-", svg)
    svg = re.sub(r'width="[\d.]+pt" height="[\d.]+pt"', 'class="plot"', svg, count=1)
    svg = re.sub(r"font: (?:\S+ )*?([\d.]+px) [^;\"]*", r"font: \1 system-ui, sans-serif", svg)
    label = f"Dot and interval plot of {table.headline.name} by recipe; the table below holds the numbers."
    return svg.replace("<svg ", f'<svg role="img" aria-label="{label}" ', 1)


def _shorten(title: str, longest: int = 30) -> str:
    # matplotlib would take a dollar sign for the start of a formula.
    title = title if len(title) <= longest else title[: longest - 1].rstrip() + "…"
    return title.replace("$", r"\$")
