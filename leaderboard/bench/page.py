"""The bench as a Markdown page with its picture, drawn from the result files; runs nothing."""

from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

import yaml
from jinja2 import Environment, FileSystemLoader, StrictUndefined

from ...errors import UserError
from .cases import IMPORT_GOAL, NEAR, Case, Device
from .figure import write_figure
from .ratios import LEVEL, RESAMPLES, ratio
from .results import Measured, Results, paths
from .summary import absent, by_name, duels, gaps, groups, share_ahead, verdicts
from .terminal import brackets

NOTES = Path(__file__).parent / "notes.yaml"
_BACKENDS = ("dense", "grouped", "segment", "padded", "gather")
Table = list[list[str]]


def write_page(folder: Path, device: Device, notes: Path = NOTES) -> list[Path]:
    """Draw `results/core-<device>` of a folder; return the paths of the page and the picture.

    Raises:
        UserError: no results, or notes that cannot be read.
    """
    results = Results.load(folder / "results", device)
    stem = "core" if device == "cpu" else f"core-{device}"
    picture = write_figure(results, folder / f"{stem}.png")
    page = folder / f"{stem}.md"
    text = _environment().get_template("core.md.jinja").render(_context(results, device, picture.name, notes))
    page.write_text(text.rstrip() + "\n", encoding="utf-8")
    return [page, picture]


def _context(results: Results, device: Device, picture: str, notes: Path) -> dict[str, Any]:
    found, goals = duels(results), verdicts(results)
    ahead, cases = share_ahead(found)
    contenders = results.run["contenders"]
    imports = results.run.get("import_seconds")
    return {
        "run": results.run,
        "picture": picture,
        "files": [f"results/{path.name}" for path in paths(Path(), device)],
        "goals": _goal_table(goals, _load_notes(notes)),
        "met": sum(verdict.met for verdict in goals),
        "goal_count": len(goals),
        "import_seconds": min(imports) if imports else None,
        "import_goal": IMPORT_GOAL.limit,
        "duels": found,
        "won": sum(duel.ahead for duel in found),
        "ahead": ahead,
        "cases": cases,
        "near": NEAR,
        "behind": [duel for duel in found if duel.behind],
        "tables": {title: _group_table(results, cases) for title, cases in groups(results).items()},
        "backends": _backend_table(results),
        "memory": {title: _memory_table(results, cases) for title, cases in groups(results).items()},
        "memory_median": _memory_medians(results),
        "absent": absent(results),
        "gaps": gaps(results),
        "checked": _checked(results),
        "waits": _waits(results),
        "contenders": contenders,
        "percent": f"{LEVEL:.0%}",
        "resamples": RESAMPLES,
        "brackets": brackets,
    }


def _goal_table(goals: Sequence[Any], notes: dict[str, str]) -> Table:
    table = []
    for verdict in goals:
        unit = "× floor" if verdict.goal.unit == "floor" else "µs"
        value = brackets(verdict.interval) if verdict.interval else f"{verdict.value:.0f}"
        outcome = "met" if verdict.met else f"**missed by {verdict.by:.0%}**"
        why = "" if verdict.met else notes.get(f"{verdict.case} {verdict.contender}", notes.get(verdict.case, ""))
        name = f"`{verdict.case}`" + ("" if verdict.contender == "ours" else f" {verdict.contender}")
        table.append([name, f"{value} {unit}", f"≤ {verdict.goal.limit:g} {unit}", outcome, why])
    return table


def _group_table(results: Results, cases: Sequence[Case]) -> Table:
    """A row per case: the floor in milliseconds, ours and the bound against it, peers against ours."""
    peers = _present(results, cases, "peer")
    extra = [name for name in ("ours/compiled",) if name in _present(results, cases, "ours")]
    table = [["N,d,h,E,k", "floor ms", "floor_bmm / floor", "ours / floor", *extra, *(f"{p} / ours" for p in peers)]]
    for case in cases:
        measured = by_name(results, case.name)
        if not ("floor" in measured and measured["floor"].samples):
            continue
        label = case.shape + (f" skew {case.skew:g}" if case.skew else "") + (" bias" if case.bias else "")
        row = [label, f"{measured['floor'].seconds * 1e3:.4g}"]
        row += [_against(measured, name, "floor") for name in ("floor_bmm", "ours", *extra)]
        table.append(row + [_against(measured, name, "ours") for name in peers])
    return table


def _backend_table(results: Results) -> Table:
    """Each backend against the choice by shape."""
    table = [["case", "ours ms", *(f"{name} / ours" for name in _BACKENDS)]]
    for case in results.cases:
        measured = by_name(results, case)
        if "ours" in measured and measured["ours"].samples and any(f"ours/{b}" in measured for b in _BACKENDS):
            row = [f"`{case}`", f"{measured['ours'].seconds * 1e3:.4g}"]
            table.append(row + [_against(measured, f"ours/{name}", "ours") for name in _BACKENDS])
    return table


def _memory_table(results: Results, cases: Sequence[Case]) -> Table:
    """Peak bytes of a step in MB."""
    names = ["floor", "ours", *_present(results, cases, "peer")]
    table = [["N,d,h,E,k", *names]]
    for case in cases:
        measured = by_name(results, case.name)
        peaks = [measured[name].peak_bytes if name in measured else None for name in names]
        label = case.shape + (f" skew {case.skew:g}" if case.skew else "") + (" bias" if case.bias else "")
        table.append([label, *("" if peak is None else f"{peak / 1e6:.2f}" for peak in peaks)])
    return table


def _memory_medians(results: Results) -> dict[str, tuple[float, float, int]]:
    """Of each comparable peer: median and largest of ours / peer over the training cases, and their number."""
    shares: dict[str, list[float]] = {}
    for case in results.case_list():
        measured = by_name(results, case.name)
        own = measured["ours"].peak_bytes if "ours" in measured else None
        for name, one in measured.items():
            contender = results.run["contenders"][name]
            if contender["role"] == "peer" and contender["comparable"] and own and one.peak_bytes:
                shares.setdefault(name, []).append(own / one.peak_bytes)
    return {name: (median(values), max(values), len(values)) for name, values in shares.items()}


def _present(results: Results, cases: Sequence[Case], role: str) -> list[str]:
    """Contenders of a role that ran on one of the cases, in order."""
    ran = {one.contender for case in cases for one in results.cases[case.name] if one.samples}
    return [name for name, one in results.run["contenders"].items() if one["role"] == role and name in ran]


def _against(measured: dict[str, Measured], name: str, other: str) -> str:
    if name not in measured or other not in measured:
        return ""
    return brackets(ratio(measured[name].samples, measured[other].samples))


def _checked(results: Results) -> dict[str, list[str]]:
    """Contenders by how they were checked wherever they ran."""
    checks: dict[str, set[str]] = {}
    for measured in results.cases.values():
        for one in measured:
            if one.samples and one.check:
                checks.setdefault(one.contender, set()).add(one.check)
    kinds: dict[str, list[str]] = {"equal": [], "shape": []}
    for name, found in checks.items():
        kinds["shape" if "shape" in found else "equal"].append(name)
    return kinds


def _waits(results: Results) -> dict[str, dict[str, list[str]]]:
    """On a GPU: contenders of ours, and on which cases what made them wait for the device."""
    found: dict[str, dict[str, list[str]]] = {}
    for case, measured in results.cases.items():
        for one in measured:
            if one.waits and one.contender.startswith("ours"):
                found.setdefault(one.contender, {}).setdefault(one.waits, []).append(case)
    return found


def _load_notes(path: Path) -> dict[str, str]:
    try:
        notes = yaml.safe_load(path.read_text(encoding="utf-8")) if path.exists() else {}
    except (OSError, yaml.YAMLError) as error:
        raise UserError(f"{path}: not readable notes ({error})") from None
    if not isinstance(notes or {}, dict):
        raise UserError(f"{path}: expected a mapping from a case to why its goal is missed")
    return {str(case): " ".join(str(text).split()) for case, text in (notes or {}).items()}


def _environment() -> Environment:
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent / "templates"),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["cell"] = lambda value: " ".join(str(value).split()).replace("|", "\\|")
    return environment
