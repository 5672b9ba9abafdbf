"""`moezoo leaderboard curves`: sample efficiency of runs, ours and published ones, in one picture and table."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import polars as pl

from ..errors import UserError
from .aggregate import read_curves, sample_efficiency

POINTS = 25  # numbers of frames at which runs are compared


def write_curves(
    files: Sequence[Path],
    output: Path,
    metric: str = "episode_reward",
    scale: float = 1.0,
    tasks: Sequence[str] = (),
    resamples: int = 200,
) -> list[Path]:
    """Draw IQM over frames with 95 % stratified bootstrap bands; write the picture and its numbers beside it as CSV.

    Args:
        files: `eval.csv` of our runs, or CSV files in DrQ-v2's layout.
        output: the PNG file.
        metric: `episode_reward` or `success_rate`.
        scale: what scores are divided by, e.g. 1000 for DeepMind Control.
        tasks: only these; default: all that are there.
        resamples: of the bootstrap at each point.

    Raises:
        UserError: a file that is no curve, or nothing left to draw.
    """
    if scale == 0:
        raise UserError("--scale 0: scores are divided by it; expected another number")
    curves = read_curves(files).with_columns(pl.col(metric) / scale)
    if tasks:
        curves = curves.filter(pl.col("task").is_in(list(tasks)))
    curves = curves.drop_nulls(metric)
    if curves.is_empty():
        raise UserError(f"no {metric} of the tasks asked for in the {len(files)} files given")
    first, last = int(curves["frame"].min() or 0), int(curves["frame"].max() or 0)  # type: ignore[arg-type]
    frames = np.unique(np.linspace(first, last, POINTS).round().astype(int)).tolist()
    table = sample_efficiency(curves, frames, np.random.default_rng(0), metric, resamples)
    output.parent.mkdir(parents=True, exist_ok=True)
    numbers = output.with_suffix(".csv")
    table.write_csv(numbers)
    _draw(table, curves, metric, output)
    return [output, numbers]


def _draw(table: pl.DataFrame, curves: pl.DataFrame, metric: str, file: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.2, 4.2), layout="constrained")
    axes = figure.subplots()
    for (agent,), rows in table.group_by("agent", maintain_order=True):
        runs = int(rows["runs"].max() or 0)  # type: ignore[arg-type]
        (line,) = axes.plot(rows["frame"], rows["iqm"], lw=1.8, label=f"{agent} ({runs} runs)")
        axes.fill_between(rows["frame"].to_numpy(), rows["low"], rows["high"], color=line.get_color(), alpha=0.18, lw=0)
    tasks = curves["task"].unique().sort().to_list()
    named = ", ".join(tasks) if len(tasks) < 4 else f"{len(tasks)} tasks"
    axes.set(xlabel="environment frames", ylabel=f"{metric.replace('_', ' ')}, interquartile mean")
    axes.set_title(f"{named}; band: 95 % stratified bootstrap", fontsize=10)
    axes.grid(alpha=0.3)
    axes.legend(frameon=False, fontsize=9)
    figure.savefig(file, dpi=130)
