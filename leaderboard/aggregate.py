"""Aggregates over runs and tasks for reinforcement learning: IQM and others with stratified bootstrap intervals.

After Agarwal et al., "Deep reinforcement learning at the edge of the statistical precipice" (NeurIPS 2021). Scores are
[runs, tasks], normalised to about [0, 1] where several tasks come together; NaN where a task had fewer runs. NumPy and
polars alone.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import polars as pl
from jaxtyping import Float

from ..errors import UserError
from .statistics import LEVEL

BOOTSTRAP = 2000  # resamples
COLUMNS = {"agent": pl.String, "task": pl.String, "seed": pl.Int64, "frame": pl.Int64, "episode_reward": pl.Float64}

Scores = Float[np.ndarray, "runs tasks"]


@dataclass(frozen=True)
class Aggregate:
    """A number over all runs and its percentile interval."""

    value: float
    low: float
    high: float


def iqm(scores: Float[np.ndarray, "..."]) -> float:
    """Interquartile mean: of all runs of all tasks together, without the lowest and the highest quarter.

    From n scores floor(n / 4) go on either side, as in SciPy's `trim_mean(0.25)`.
    """
    known = np.sort(scores[~np.isnan(scores)], axis=None)
    if not len(known):
        raise ValueError("no scores")
    cut = len(known) // 4
    return float(known[cut : len(known) - cut].mean())


def optimality_gap(scores: Float[np.ndarray, "..."], target: float = 1.0) -> float:
    """How far the runs stay below `target` on average; what lies above it counts as `target`."""
    return float(target - np.minimum(scores[~np.isnan(scores)], target).mean())


def median_of_tasks(scores: Scores) -> float:
    """Median over tasks of their mean scores."""
    return float(np.median(np.nanmean(scores, axis=0)))


def mean_of_tasks(scores: Scores) -> float:
    """Mean over tasks of their mean scores."""
    return float(np.mean(np.nanmean(scores, axis=0)))


AGGREGATES: Mapping[str, Callable[[Scores], float]] = {
    "iqm": iqm,
    "median": median_of_tasks,
    "mean": mean_of_tasks,
    "optimality_gap": optimality_gap,
}


def stratified_bootstrap(
    scores: Scores,
    statistic: Callable[[Scores], float],
    generator: np.random.Generator,
    resamples: int = BOOTSTRAP,
    level: float = LEVEL,
) -> Aggregate:
    """The statistic and its percentile interval: runs are resampled inside each task, tasks are kept.

    Raises:
        ValueError: a task without a run.
    """
    columns = [column[~np.isnan(column)] for column in scores.T]
    if not columns or min(map(len, columns)) == 0:
        raise ValueError("a task has no run")
    draws = np.empty(resamples)
    for i in range(resamples):
        sample = np.full(scores.shape, np.nan)
        for task, known in enumerate(columns):
            sample[: len(known), task] = known[generator.integers(0, len(known), len(known))]
        draws[i] = statistic(sample)
    low, high = np.quantile(draws, [(1 - level) / 2, (1 + level) / 2])
    return Aggregate(statistic(scores), float(low), float(high))


def probability_of_improvement(first: Scores, second: Scores) -> float:
    """Mean over tasks of P(a run of `first` beats one of `second`); ties count half (Mann-Whitney)."""
    shares = []
    for mine, theirs in zip(first.T, second.T, strict=True):
        difference = mine[~np.isnan(mine)][:, None] - theirs[~np.isnan(theirs)][None]
        shares.append(np.mean((difference > 0) + 0.5 * (difference == 0)))
    return float(np.mean(shares))


def performance_profile(scores: Scores, thresholds: Float[np.ndarray, " points"]) -> Float[np.ndarray, " points"]:
    """Share of the runs above each threshold, averaged over tasks."""
    shares = [(column[~np.isnan(column)][:, None] > thresholds).mean(0) for column in scores.T]
    profile: np.ndarray = np.mean(shares, axis=0)
    return profile


def read_curves(files: Sequence[Path]) -> pl.DataFrame:
    """Evaluations of many runs as one table: our `eval.csv` files and DrQ-v2's published `dmc_*.csv` alike.

    Columns agent, task, seed, frame, episode_reward (undiscounted return), success_rate (null where there is none).

    Raises:
        UserError: a file that is missing, or lacks a column.
    """
    tables = []
    for file in files:
        try:
            table = pl.read_csv(file, infer_schema_length=10_000)
        except (OSError, pl.exceptions.PolarsError) as error:
            raise UserError(f"{file}: not a readable CSV file ({str(error).splitlines()[0]})") from None
        if missing := [name for name in COLUMNS if name not in table.columns]:
            raise UserError(f"{file}: column '{missing[0]}' is missing; expected {', '.join(COLUMNS)}")
        if "success_rate" not in table.columns:
            table = table.with_columns(success_rate=pl.lit(None, pl.Float64))
        chosen = [pl.col(name).cast(dtype, strict=False) for name, dtype in COLUMNS.items()]
        tables.append(table.select(*chosen, pl.col("success_rate").cast(pl.Float64)))
    if not tables:
        raise UserError("no curves given: expected CSV files with the columns " + ", ".join(COLUMNS))
    return pl.concat(tables)


def scores_at(curves: pl.DataFrame, frame: int, metric: str = "episode_reward") -> dict[str, np.ndarray]:
    """Of every agent a matrix [runs, tasks] of scores at `frame`, read linearly between a run's evaluations.

    A run counts if its evaluations reach `frame`; before the first one, the first one counts. Tasks come in
    alphabetical order, those without a run of the agent are left out.
    """
    found: dict[str, dict[str, list[float]]] = {}
    for (agent, task, _), run in curves.group_by("agent", "task", "seed", maintain_order=True):
        run = run.drop_nulls(metric).sort("frame")
        if run.height and run["frame"][-1] >= frame:
            value = float(np.interp(frame, run["frame"].to_numpy(), run[metric].to_numpy()))
            found.setdefault(str(agent), {}).setdefault(str(task), []).append(value)
    matrices = {}
    for agent, tasks in found.items():
        rows = max(map(len, tasks.values()))
        columns = [np.array(values + [np.nan] * (rows - len(values))) for _, values in sorted(tasks.items())]
        matrices[agent] = np.stack(columns, axis=1)
    return matrices


def sample_efficiency(
    curves: pl.DataFrame,
    frames: Sequence[int],
    generator: np.random.Generator,
    metric: str = "episode_reward",
    resamples: int = 200,
) -> pl.DataFrame:
    """IQM and its interval at each number of frames: columns agent, frame, iqm, low, high, runs."""
    rows = []
    for frame in frames:
        for agent, scores in sorted(scores_at(curves, frame, metric).items()):
            found = stratified_bootstrap(scores, iqm, generator, resamples)
            runs = int((~np.isnan(scores)).sum())
            rows.append((agent, frame, found.value, found.low, found.high, runs))
    names = ["agent", "frame", "iqm", "low", "high", "runs"]
    return pl.DataFrame(rows, schema=names, orient="row").sort("agent", "frame", maintain_order=True)
