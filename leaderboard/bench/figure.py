"""The picture of a run: time over floor, one row per case, ours and its peers as dots with intervals."""

from pathlib import Path

from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter

from .cases import GOALS
from .ratios import ratio
from .results import Results
from .summary import by_name, groups

_OURS, _INK, _LINE = "#1a56b0", "#333333", "#dddddd"
_MARKERS = "osD^v<>PXhd*p"
_COLOURS = (
    "#c2410c",
    "#e08a3c",
    "#7c2d12",
    "#15803d",
    "#4d9a6a",
    "#86198f",
    "#b45cc0",
    "#0f766e",
    "#a16207",
    "#64748b",
)
_WIDTH, _DPI = 12.0, 100  # 1200 pixels


def write_figure(results: Results, path: Path) -> Path:
    """Draw ours, the bound of equal groups, the goals and every peer on a logarithmic axis; write a PNG."""
    rows = [(title, case) for title, cases in groups(results).items() for case in cases]
    titles = {title: index for index, title in enumerate(dict.fromkeys(title for title, _ in rows))}
    peers = [name for name, one in results.run["contenders"].items() if one["role"] == "peer"]
    height = 1.7 + 0.25 * (len(rows) + 1.4 * len(titles))
    figure = Figure(figsize=(_WIDTH, height), dpi=_DPI, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    labels, position, shown = {}, 0.0, ""
    for title, case in rows:
        if title != shown:
            position += 1.4 if shown else 0.4
            axes.text(
                0.0, position - 0.35, title, transform=axes.get_yaxis_transform(), weight="bold", size=9, va="center"
            )
            position, shown = position + 0.6, title
        suffix = (f" skew {case.skew:g}" if case.skew else "") + (" bias" if case.bias else "")
        labels[position] = case.shape + suffix
        _draw(axes, position, results, case.name, peers)
        position += 1.0
    axes.set_yticks(list(labels), list(labels.values()), size=8.5)
    axes.set_ylim(position - 0.3, -0.4)
    _style(axes)
    handles, names = _unique_handles(axes)
    figure.legend(handles, names, loc="outside lower center", ncols=6, frameon=False, fontsize=8.5)
    figure.savefig(path, metadata={"Software": None})
    return path


def _draw(axes: Axes, position: float, results: Results, case: str, peers: list[str]) -> None:
    measured = by_name(results, case)
    if "floor" not in measured:
        return
    floor = measured["floor"].samples
    looks = [("floor_bmm", "#999999", "|", 6.0)]
    looks += [(name, _COLOURS[i % len(_COLOURS)], _MARKERS[i % len(_MARKERS)], 4.5) for i, name in enumerate(peers)]
    looks += [("ours/compiled", "#5b8fd6", "o", 7.0), ("ours", _OURS, "o", 7.0)]
    for name, colour, marker, size in looks:
        against = ratio(measured[name].samples, floor) if name in measured else None
        if against is None:
            continue
        own = name.startswith("ours")
        axes.plot(
            [against.low, against.high], [position] * 2, color=colour, lw=2.4 if own else 1.2, zorder=5 if own else 3
        )
        axes.plot(
            [against.value], [position], marker, color=colour, ms=size, label=name, ls="none",
            markerfacecolor=colour if own else "white", mew=1.2, zorder=6 if own else 4,
        )  # fmt: skip
    goal = GOALS.get((case, "ours"))
    if goal is not None and goal.unit == "floor":
        axes.plot([goal.limit], [position], "|", color=_INK, ms=14, mew=2.0, ls="none", label="goal", zorder=7)


def _style(axes: Axes) -> None:
    axes.set_xscale("log")
    axes.set_xlabel("time / floor (log scale; left is faster)", size=9)
    axes.axvline(1.0, color=_INK, lw=1.0, zorder=1)
    low, high = axes.get_xlim()
    ticks = [t for t in (0.8, 1, 1.25, 1.5, 2, 3, 4, 6, 8, 10, 15, 20, 30, 50, 100, 200) if low <= t <= high]
    axes.xaxis.set_major_locator(FixedLocator(ticks))
    axes.xaxis.set_minor_locator(FixedLocator([]))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.grid(axis="both", color=_LINE, lw=0.7)
    axes.set_axisbelow(True)
    axes.tick_params(length=0, labeltop=True, labelsize=8.5)
    for spine in axes.spines.values():
        spine.set_visible(False)


def _unique_handles(axes: Axes) -> tuple[list[Artist], list[str]]:
    handles, labels = axes.get_legend_handles_labels()
    unique = dict(zip(labels, handles, strict=True))
    order = sorted(unique, key=lambda name: (not name.startswith("ours"), name not in ("goal", "floor_bmm")))
    return [unique[name] for name in order], order
