"""The leaderboard as a web page and as Markdown. Reads result files and YAML; imports no model."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from . import robustbench
from .board import BOOTSTRAP_SEED, Comparison, Table, build_tables
from .plot import interval_plot
from .published import REPORTED, PublishedTable, load_published
from .statistics import LEVEL, RESAMPLES, MeanInterval

_KINDS = {"moe": "MoE", "dense": "dense", "rule": "rule", "rival": "rival", "unlisted": "not packaged"}
_EXPLAINED = {
    "moe": "a mixture of experts",
    "dense": "the same model without experts, matched in parameters",
    "rule": "nothing learned by gradient",
    "rival": "the field's usual model",
    "unlisted": "its recipe is not among the packaged ones",
}


@dataclass(frozen=True)
class DomainSection:
    """What the page shows of one domain: measured tables with their pictures, and published tables."""

    name: str
    tables: list[Table]
    plots: dict[str, Markup]
    published: list[PublishedTable]


def write_report(results: Path, output: Path, reported: Path = REPORTED) -> list[Path]:
    """Write `index.html` and `LEADERBOARD.md` into `output`, and robustness results in RobustBench's form; their paths.

    The same results and recipes give the same bytes.

    Raises:
        UserError: an invalid result or file of published numbers.
    """
    tables = build_tables(results)
    sections = _sections(tables, load_published(reported))
    cells = [cell for s in sections for t in s.tables for row in t.rows for cell in row.cells]
    context = {
        "sections": sections,
        "recipes": len({cell.recipe for cell in cells}),
        "cells": len(cells),
        "datasets": len({(cell.domain, cell.dataset) for cell in cells}),
        "newest": max((cell.created for cell in cells), default="")[:10],
        "kinds": _KINDS,
        "explained": _EXPLAINED,
        "percent": f"{LEVEL:.0%}",
        "resamples": f"{RESAMPLES:,}",
        "bootstrap_seed": BOOTSTRAP_SEED,
    }
    output.mkdir(parents=True, exist_ok=True)
    written = []
    for template, name in (("index.html.jinja", "index.html"), ("leaderboard.md.jinja", "LEADERBOARD.md")):
        text = _environment().get_template(template).render(context)
        path = output / name
        temporary = output / f".{name}.tmp"
        temporary.write_text(text.rstrip() + "\n", encoding="utf-8")
        written.append(temporary.replace(path))
    return [*written, *robustbench.export(tables, output)]


def _sections(tables: Sequence[Table], published: dict[str, list[PublishedTable]]) -> list[DomainSection]:
    sections = []
    for domain in sorted({table.domain for table in tables} | set(published)):
        own = [table for table in tables if table.domain == domain]
        # The picture is SVG that we made; all else on the page is escaped.
        plots = {table.anchor: Markup(interval_plot(table)) for table in own}
        sections.append(DomainSection(domain, own, plots, published.get(domain, [])))
    return sections


def _environment() -> Environment:
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent / "templates"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        "number": number,
        "interval": interval,
        "compact": compact,
        "duration": duration,
        "arrow": lambda goal: "↑" if goal == "max" else "↓",
        "units": unit_count,
        "as_published": as_published,
        "breakable": _breakable,
        "md": _markdown_cell,
    }
    environment.globals |= {"verdict": verdict}
    return environment


def number(value: float, signed: bool = False) -> str:
    """A metric with the digits that its size deserves: 0.7712, 42.31, 12,345.6."""
    digits = 4 if abs(value) < 10 else 2 if abs(value) < 1000 else 1
    return f"{value:{'+' if signed else ''},.{digits}f}".replace("-", "\N{MINUS SIGN}")


def interval(value: MeanInterval) -> str:
    """`0.7712 ± 0.0031`, `0.7712 [0.7701, 0.7730]` where the sides differ, or the mean alone for a single seed."""
    if value.high is None or value.low is None:
        return number(value.mean)
    above, below = value.high - value.mean, value.mean - value.low
    if abs(above - below) > 1e-9 * max(abs(value.mean), abs(value.high), abs(value.low)):
        return f"{number(value.mean)} [{number(value.low)}, {number(value.high)}]"
    return f"{number(value.mean)} ± {number(value.high - value.mean)}"


def compact(value: float | None) -> str:
    """1,234,567 as 1.23M; a dash for what is unknown."""
    if value is None:
        return "–"
    for size, suffix in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= size:
            return f"{value / size:.3g}{suffix}"
    return f"{value:.3g}"


def duration(seconds: float) -> str:
    """Seconds as 0.4 s, 85 s, 12.5 min or 3.2 h."""
    if seconds < 100:
        return f"{seconds:.2g} s"
    return f"{seconds / 60:.1f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"


def as_published(value: float, table: PublishedTable, metric: str) -> str:
    """A published number with as many decimals as its column has, as YAML drops closing zeros."""
    numbers = [row.values[metric] for row in table.rows if row.values[metric] is not None]
    decimals = max(len(repr(number).partition(".")[2]) for number in numbers)
    return f"{value:.{decimals}f}"


def unit_count(n: tuple[int, int]) -> str:
    """`n=1,005`, or a range where the rows of a table differ."""
    return f"n={n[0]:,}" if n[0] == n[1] else f"n={n[0]:,}–{n[1]:,}"


def verdict(comparison: Comparison, goal: str) -> str:
    """`better`, `worse` or `even`: even when the interval of the difference holds zero."""
    test = comparison.test
    if test is None or test.low <= 0 <= test.high:
        return "even"
    return "better" if (test.difference > 0) == (goal == "max") else "worse"


def _breakable(name: str) -> Markup:
    """A recipe's name that a narrow column may break after a slash or an underscore."""
    return Markup(str(Markup.escape(name)).replace("/", "/<wbr>").replace("_", "_<wbr>"))


def _markdown_cell(value: object) -> Markup:
    """Text for a Markdown table: escaped as HTML by Jinja, and with what would end the cell or start markup."""
    text = str(Markup.escape(" ".join(str(value).split())))
    for character in "\\|`*_[]":
        text = text.replace(character, f"\\{character}")
    return Markup(text)
