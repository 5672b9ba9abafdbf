"""From result files to tables: which cells belong together, in what order, and what differs from what."""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import polars as pl

from .. import recipes as recipe_files
from ..errors import UserError
from ..recipes import RecipeInfo
from .aggregate import iqm, stratified_bootstrap
from .results import Goal, Result, load_results, units_path
from .statistics import MeanInterval, PairedTest, mean_interval, paired_bootstrap

HEADLINES = {
    "ranking": "session_auc",
    "stocks": "rank_ic",
    "trajectories": "ade",
    "robustness": "ra_route",
    "personalised": "user_accuracy",
    "rewards": "pair_accuracy",
    "control": "episode_return",
    "relations": "map",
}
BOOTSTRAP_SEED = 0


@dataclass(frozen=True)
class Recipe:
    """A recipe as the leaderboard names it. `info` and `present_hash` are None when there is no such recipe."""

    name: str
    info: RecipeInfo | None
    present_hash: str | None

    @property
    def title(self) -> str:
        return self.info.title if self.info else self.name

    @property
    def kind(self) -> str:
        return self.info.kind if self.info else "unlisted"

    @property
    def twin_of(self) -> str | None:
        return self.info.twin_of if self.info else None


@dataclass(frozen=True)
class Column:
    """A metric of a table. `n` is the (smallest, largest) number of units that it covers."""

    name: str
    goal: Goal
    unit: str
    n: tuple[int, int]


@dataclass(frozen=True)
class Comparison:
    """A row against another of the same table; `test` is None when they share no per-unit scores."""

    other: Recipe
    test: PairedTest | None


@dataclass
class Row:
    """One recipe: its cells (one per seed, all of the same recipe hash) and what they amount to."""

    recipe: Recipe
    cells: list[Result]
    left_out: int
    metrics: dict[str, MeanInterval]
    against_best: Comparison | None
    against_twins: list[Comparison]

    @property
    def stale(self) -> bool:
        """Whether the recipe has changed since (or was run with changes from the command line)."""
        return self.recipe.present_hash is not None and self.cells[0].recipe_hash != self.recipe.present_hash

    @property
    def seeds(self) -> list[int]:
        return [cell.seed for cell in self.cells]

    @property
    def train_seconds(self) -> float:
        return float(np.mean([cell.train_seconds for cell in self.cells]))

    @property
    def hardware(self) -> list[str]:
        parts = [cell.hardware for cell in self.cells]
        return sorted({f"{p.cpu}, {p.cores} cores" + (f", {p.gpu}" if p.gpu else "") for p in parts})

    @property
    def commits(self) -> list[str]:
        return sorted({_short_commit(cell.git_commit) for cell in self.cells})


@dataclass
class Table:
    """The recipes measured on one version of one dataset and split, best first."""

    domain: str
    dataset: str
    split: str
    fingerprint: str
    headline: Column
    columns: list[Column]
    rows: list[Row]
    best_other: Recipe | None

    @property
    def anchor(self) -> str:
        return f"{self.domain}-{self.dataset}-{self.split}-{self.fingerprint[:8]}"


def build_tables(store: Path) -> list[Table]:
    """Every table of a store, by domain, dataset, split and fingerprint of the data.

    Raises:
        UserError: an invalid result file, or two results that disagree about a metric's goal.
    """
    groups: dict[tuple[str, str, str, str], list[Result]] = defaultdict(list)
    for result in load_results(store):
        groups[result.domain, result.dataset, result.split, result.dataset_fingerprint].append(result)
    packaged = set(recipe_files.list_recipes())
    return [_table(results, store, packaged) for _, results in sorted(groups.items())]


def _table(results: Sequence[Result], store: Path, packaged: set[str]) -> Table:
    by_recipe: dict[str, list[Result]] = defaultdict(list)
    for result in results:
        by_recipe[result.recipe].append(result)
    rows = [_row(_find_recipe(name, packaged), cells) for name, cells in by_recipe.items()]
    columns = _columns([cell for row in rows for cell in row.cells])
    wanted = HEADLINES.get(results[0].domain, "")
    headline = columns.get(wanted) or next(iter(columns.values()))
    rows.sort(key=lambda row: _order(row, headline))
    best_other = next((r for r in rows if r.recipe.kind in ("dense", "rule", "rival") and not r.stale), None)
    _compare(rows, best_other, headline.name, {row.recipe.name: _units(row, headline.name, store) for row in rows})
    return Table(
        domain=results[0].domain,
        dataset=results[0].dataset,
        split=results[0].split,
        fingerprint=results[0].dataset_fingerprint,
        headline=headline,
        columns=[column for column in columns.values() if column is not headline],
        rows=rows,
        best_other=best_other.recipe if best_other else None,
    )


def _find_recipe(name: str, packaged: set[str]) -> Recipe:
    if name not in packaged:
        return Recipe(name, None, None)
    return Recipe(name, recipe_files.metadata(name), recipe_files.recipe_hash(name))


def _row(recipe: Recipe, results: Sequence[Result]) -> Row:
    """A mean over seeds mixes no two versions of a recipe: the present one counts, else the newest."""
    hashes = {result.recipe_hash for result in results}
    newest = max(results, key=lambda result: result.created).recipe_hash
    chosen = recipe.present_hash if recipe.present_hash in hashes else newest
    cells = sorted((r for r in results if r.recipe_hash == chosen), key=lambda result: result.seed)
    names = dict.fromkeys(name for cell in cells for name in cell.metrics)
    summary = iqm_interval if recipe.name.startswith("control/") else mean_interval
    metrics = {name: summary(np.array([c.metrics[name] for c in cells if name in c.metrics])) for name in names}
    return Row(recipe, cells, len(results) - len(cells), metrics, None, [])


def iqm_interval(values: np.ndarray) -> MeanInterval:
    """Interquartile mean over seeds and its bootstrap interval, as is usual in reinforcement learning."""
    if len(values) < 2:
        return mean_interval(values)
    found = stratified_bootstrap(values[:, None], iqm, np.random.default_rng(BOOTSTRAP_SEED))
    return MeanInterval(found.value, found.low, found.high, len(values))


def _columns(cells: Sequence[Result]) -> dict[str, Column]:
    columns: dict[str, Column] = {}
    for cell in cells:
        for name, info in cell.metric_info.items():
            known = columns.get(name, Column(name, info.goal, info.unit, (info.n, info.n)))
            if (known.goal, known.unit) != (info.goal, info.unit):
                raise UserError(
                    f"{cell.recipe} s{cell.seed}: metric {name!r} is ({info.goal}, {info.unit!r}), "
                    f"in other results of {cell.dataset} ({known.goal}, {known.unit!r}); expected one meaning"
                )
            n = (min(known.n[0], info.n), max(known.n[1], info.n))
            columns[name] = Column(name, known.goal, known.unit, n)
    return columns


def _order(row: Row, headline: Column) -> tuple[bool, float, str]:
    if headline.name not in row.metrics:
        return True, 0.0, row.recipe.name
    mean = row.metrics[headline.name].mean
    return False, -mean if headline.goal == "max" else mean, row.recipe.name


def _units(row: Row, metric: str, store: Path) -> pl.DataFrame | None:
    """Columns `unit` and `score`: the metric of each unit, averaged over seeds; None when none is stored."""
    frames = []
    for cell in row.cells:
        path = units_path(cell.store_path(store))
        if path.exists() and metric in pl.read_parquet_schema(path):
            frames.append(pl.read_parquet(path, columns=["unit", metric]))
    if not frames:
        return None
    scores = pl.concat(frames).group_by("unit").agg(pl.col(metric).mean().alias("score"))
    return scores.drop_nulls().sort("unit")


def _compare(
    rows: Sequence[Row], best_other: Row | None, metric: str, units: Mapping[str, pl.DataFrame | None]
) -> None:
    by_name = {row.recipe.name: row for row in rows}
    for row in rows:
        if best_other is not None and row is not best_other:
            row.against_best = _comparison(row, best_other, units)
        moe = by_name.get(row.recipe.twin_of or "")
        if moe is not None:
            row.against_twins.append(_comparison(row, moe, units))
            moe.against_twins.append(_comparison(moe, row, units))


def _comparison(row: Row, other: Row, units: Mapping[str, pl.DataFrame | None]) -> Comparison:
    first, second = units[row.recipe.name], units[other.recipe.name]
    if first is None or second is None:
        return Comparison(other.recipe, None)
    both = first.join(second, on="unit", suffix="_other").sort("unit")
    if both.is_empty():
        return Comparison(other.recipe, None)
    generator = np.random.default_rng(BOOTSTRAP_SEED)
    return Comparison(
        other.recipe, paired_bootstrap(both["score"].to_numpy(), both["score_other"].to_numpy(), generator)
    )


def _short_commit(commit: str | None) -> str:
    if commit is None:
        return "none"
    sha, plus, rest = commit.partition("+")
    return sha[:8] + plus + rest
