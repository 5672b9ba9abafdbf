"""Test metrics by variant: a table, the raw numbers as JSON, and a curve."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from .patient import Patient

Cell = str | int | float | list[int]


class Report:
    """Rows of test metrics, the first being the model as it came.

    Args:
        columns: what tells variants apart; the cells of `row` by name. Floats are shown with two decimals.
        about: what is operated on, for the title.
    """

    def __init__(self, patient: Patient, columns: Sequence[str], about: str, verb: str) -> None:
        self.patient, self.columns, self.verb = patient, list(columns), verb
        self.before = patient.test()
        headline = patient.task.headline
        self.names = [headline, *(name for name in self.before if name != headline)][:3]
        self.table = Table(*columns, *self.names, "change", title=f"{patient.cli.name}, test split; {about}")
        self.about = about
        self.rows: list[dict[str, Any]] = []
        self._add(["as trained", *[""] * (len(columns) - 1)], self.before)

    def row(self, cells: Mapping[str, Cell], metrics: dict[str, float]) -> None:
        """A variant; cells beyond the table's columns are in the raw numbers alone."""
        self.rows.append({**cells, "metrics": metrics})
        self._add([_shown(cells[column]) for column in self.columns], metrics)

    def _add(self, cells: Sequence[str], metrics: dict[str, float]) -> None:
        change = metrics[self.names[0]] - self.before[self.names[0]]
        worse = change < 0 if self.patient.headline.goal == "max" else change > 0
        style = "red" if worse else "green" if change else ""
        text = f"[{style}]{change:+.4f}[/]" if style else f"{change:+.4f}"
        self.table.add_row(*cells, *(f"{metrics[name]:.4f}" for name in self.names), text)

    def raw(self) -> dict[str, Any]:
        """All numbers, and what they are of."""
        info = self.patient.headline
        return {
            "recipe": self.patient.cli.name,
            "verb": self.verb,
            "about": self.about,
            "split": "test",
            "headline": self.names[0],
            "goal": info.goal,
            "n": info.n,
            "unit": info.unit,
            "seed": self.patient.cli.seed,
            "torch": torch.__version__,
            "as trained": self.before,
            "rows": self.rows,
        }

    def show(self, output: Path | None) -> None:
        """Print the table, and write the raw numbers where asked."""
        Console().print(self.table)
        if output is not None:
            output.parent.mkdir(parents=True, exist_ok=True)
            output.write_text(json.dumps(self.raw(), indent=1) + "\n")
            Console().print(f"raw numbers {output}", soft_wrap=True)


def draw_curve(raw: Mapping[str, Any], x: str, label: str, path: Path) -> None:
    """The headline over the cell `x`, a line for each value of the cell `how`, the trained model as a dashed line.

    Args:
        raw: what `Report.raw` gives.
        label: of the x axis.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5, 3.4), layout="constrained")
    axes = figure.subplots()
    axes.axhline(raw["as trained"][raw["headline"]], color="black", linestyle="--", linewidth=1, label="as trained")
    for how in dict.fromkeys(row.get("how", "") for row in raw["rows"]):
        points = sorted((row[x], row["metrics"][raw["headline"]]) for row in raw["rows"] if row.get("how", "") == how)
        axes.plot(*zip(*points, strict=True), "o-", label=how or raw["verb"])
    axes.set(xlabel=label, ylabel=raw["headline"].replace("_", " "), title=raw["recipe"])
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)


def _shown(cell: Cell) -> str:
    return f"{cell:.2f}" if isinstance(cell, float) else str(cell)
