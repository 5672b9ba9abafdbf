"""Pictures of a stocks test: the portfolio's curve, the IC over time, and which experts go for which style."""

from collections.abc import Sequence
from datetime import date
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import polars as pl
import torch
from matplotlib.axes import Axes
from matplotlib.dates import ConciseDateFormatter
from matplotlib.figure import Figure
from numpy.typing import NDArray

if TYPE_CHECKING:
    from .stocks import Scored
    from .stocks_portfolio import Portfolio

BLUE, ORANGE, GREY = "#2b6cb0", "#dd6b20", "#718096"


def draw(
    scored: "Scored", portfolio: "Portfolio", dates: Sequence[date] | None, styles: Sequence[str], folder: Path
) -> list[Path]:
    """Draw what the test has data for; returns the files written. Without `dates` days are counted."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = [_equity(scored, portfolio, dates, folder / "equity_curve.png")]
    if dates is not None and not scored.rank_ic.isnan().all():
        paths.append(_ic_by_month(scored, dates, folder / "ic_by_month.png"))
    if scored.usage.shape[1] and styles:
        paths.append(_usage_by_style(scored, styles, folder / "experts_by_style.png"))
    return paths


def _equity(scored: "Scored", portfolio: "Portfolio", dates: Sequence[date] | None, path: Path) -> Path:
    """Returns added up, before and after costs, beside both benchmarks; below, the excess after costs."""
    when = list(range(len(portfolio.gross))) if dates is None else list(dates)
    figure = Figure(figsize=(7.2, 5.2), layout="constrained")
    above, below = figure.subplots(2, 1, sharex=True, height_ratios=[2, 1])
    for label, series, colour, style in (
        ("portfolio, gross", portfolio.gross, BLUE, "--"),
        ("portfolio, net of costs", portfolio.net, BLUE, "-"),
        ("benchmark", scored.benchmark, ORANGE, "-"),
        ("universe, equal weights", scored.equal, GREY, "--"),
    ):
        above.plot(when, _running(series), style, color=colour, label=label, linewidth=1.3)
    above.set(ylabel="sum of returns, %")
    above.set_title("Top names, bought after each day's ranking (returns added, not compounded)", fontsize=11)
    above.legend(frameon=False, fontsize=9)
    for label, benchmark, colour, style in (
        ("over the benchmark", scored.benchmark, ORANGE, "-"),
        ("over equal weights", scored.equal, GREY, "--"),
    ):
        below.plot(when, _running(portfolio.net - benchmark), style, color=colour, label=label, linewidth=1.3)
    below.axhline(0, color="black", linewidth=0.7)
    below.set(ylabel="net excess, %", xlabel="day of the test" if dates is None else "")
    below.legend(frameon=False, fontsize=9)
    if dates is not None:
        _date_axis(below)
    for axes in (above, below):
        axes.spines[["top", "right"]].set_visible(False)
    return _save(figure, path)


def _ic_by_month(scored: "Scored", dates: Sequence[date], path: Path) -> Path:
    """Mean RankIC of each month as bars, and of each year as a line with its number."""
    table = pl.DataFrame({"date": dates, "rank_ic": scored.rank_ic.numpy()}).with_columns(
        pl.col("rank_ic").fill_nan(None)
    )
    table = table.drop_nulls().with_columns(month=pl.col("date").dt.truncate("1mo"), year=pl.col("date").dt.year())
    months = table.group_by("month").agg(pl.col("rank_ic").mean()).sort("month")
    years = (
        table.group_by("year")
        .agg(pl.col("rank_ic").mean(), first=pl.col("date").min(), last=pl.col("date").max())
        .sort("year")
    )
    figure = Figure(figsize=(7.2, 3.6), layout="constrained")
    axes = figure.subplots()
    positive = months["rank_ic"].to_numpy() >= 0
    colours = [BLUE if good else ORANGE for good in positive]
    axes.bar(months["month"].to_list(), months["rank_ic"].to_list(), width=24, color=colours, alpha=0.55, align="edge")
    top = axes.get_ylim()[1]
    for row in years.iter_rows(named=True):
        axes.plot([row["first"], row["last"]], [row["rank_ic"]] * 2, color="black", linewidth=1.6)
        middle = row["first"] + (row["last"] - row["first"]) / 2
        axes.annotate(f"{row['year']}\n{row['rank_ic']:+.3f}", (middle, top), ha="center", va="bottom", fontsize=8)
    axes.axhline(0, color="black", linewidth=0.7)
    _date_axis(axes)
    mean = float(np.mean(table["rank_ic"].to_numpy()))
    axes.set(ylabel="RankIC")
    axes.set_title(
        f"RankIC by month; black: by year; {float(np.mean(positive)):.0%} of months above 0, mean {mean:+.4f}",
        fontsize=11, pad=28,
    )  # fmt: skip
    axes.spines[["top", "right"]].set_visible(False)
    return _save(figure, path)


def _usage_by_style(scored: "Scored", styles: Sequence[str], path: Path) -> Path:
    """How much more (or less) than on average each expert is used in each fifth of each style."""
    cells = scored.usage.double().sum(0).view(len(styles), -1, scored.usage.shape[-1])
    share = cells / cells.sum(-1, keepdim=True).clamp(min=1e-12)
    whole = scored.usage.double().sum((0, 1))
    whole = whole / whole.sum().clamp(min=1e-12)
    order = whole.argsort(descending=True, stable=True)
    order = order[whole[order] > 0][:24]  # the experts that do most of the work
    lift = torch.log2((share[..., order] / whole[order]).clamp(min=2.0**-2, max=2.0**2))
    bins, filled = lift.shape[1], (cells.sum(-1) > 0).flatten()
    figure = Figure(figsize=(3.2 + 0.3 * len(order), 1.6 + 0.28 * int(filled.sum())), layout="constrained")
    axes = figure.subplots()
    image = axes.imshow(lift.flatten(0, 1)[filled].numpy(), cmap="RdBu_r", vmin=-2, vmax=2, aspect="auto")
    names = [
        f"{style} {'lowest fifth' if i == 0 else 'highest fifth' if i == bins - 1 else i + 1}"
        for style in styles
        for i in range(bins)
    ]
    axes.set_yticks(range(int(filled.sum())), [n for n, f in zip(names, filled.tolist(), strict=True) if f], fontsize=8)
    axes.set_xticks(range(len(order)), [f"{e}\n{whole[e]:.0%}" for e in order.tolist()], fontsize=7)
    for boundary in filled.view(len(styles), bins).sum(1).cumsum(0).tolist()[:-1]:
        axes.axhline(boundary - 0.5, color="black", linewidth=0.8)
    axes.set(xlabel="expert, and its share of all weight")
    axes.set_title("Who is asked about what", fontsize=11)
    bar = figure.colorbar(image, ax=axes, ticks=[-2, -1, 0, 1, 2])
    bar.ax.set_yticklabels(["≤1/4", "1/2", "1", "2", "≥4"])
    bar.set_label("use, times its average")
    return _save(figure, path)


def _date_axis(axes: Axes) -> None:
    axes.xaxis.set_major_formatter(ConciseDateFormatter(axes.xaxis.get_major_locator()))  # type: ignore[no-untyped-call]


def _running(series: torch.Tensor) -> NDArray[np.float64]:
    total: NDArray[np.float64] = 100 * series.double().nan_to_num(nan=0.0).cumsum(0).numpy()
    return total


def _save(figure: Figure, path: Path) -> Path:
    figure.savefig(path, dpi=150)
    return path
