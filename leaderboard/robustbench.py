"""Robustness results in RobustBench's form: `model_info/<dataset>/Linf/<recipe>.json`, accuracies in per cent.

One file a recipe, of its present version, the mean over its seeds; the footnote says what RobustBench's format cannot.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .. import recipes as recipe_files
from .board import Row, Table
from .results import Result

DOMAIN = "robustness"


def export(tables: Sequence[Table], output: Path) -> list[Path]:
    """Write every robustness recipe that was tested under AutoAttack below `output`/model_info; returns the files."""
    written = []
    for table in tables:
        for row in table.rows if table.domain == DOMAIN else ():
            if "ra_aa" in row.metrics:
                folder = output / "model_info" / table.dataset / "Linf"
                folder.mkdir(parents=True, exist_ok=True)
                path = folder / f"{row.recipe.name.partition('/')[2]}.json"
                temporary = folder / f".{path.name}.tmp"
                temporary.write_text(json.dumps(entry(row, table.dataset), indent=2) + "\n", encoding="utf-8")
                written.append(temporary.replace(path))
    return written


def entry(row: Row, dataset: str) -> dict[str, Any]:
    """A recipe's file in RobustBench's form. `reported` is the accuracy under PGD."""
    info = row.recipe.info
    task = _arguments(row.recipe.name).get("model", {}).get("init_args", {})
    model = task.get("model", {})
    arguments = model.get("init_args", {})
    pgd = next((name for name in row.metrics if name.startswith("ra_pgd")), None)
    paper = info.paper if info else ""
    flags = sorted({name for cell in row.cells for name in cell.metrics if name.startswith("aa_flag_")})
    return {
        "link": f"https://arxiv.org/abs/{paper.rpartition('arXiv ')[2]}" if "arXiv " in paper else "",
        "name": row.recipe.title,
        "authors": paper.partition(",")[0],
        "additional_data": False,
        "number_forward_passes": 1,
        "dataset": dataset,
        "venue": paper,
        "architecture": f"{model.get('class_path', '').rpartition('.')[2]} {arguments.get('backbone', 'resnet18')}",
        "eps": str(task.get("eps", "8/255")),
        "clean_acc": _percent(row, "sa"),
        "reported": _percent(row, pgd) if pgd else None,
        "autoattack_acc": _percent(row, "ra_aa"),
        "footnote": _footnote(row.cells, flags),
        "unreliable": bool(flags),
    }


def _footnote(cells: Sequence[Result], flags: Sequence[str]) -> str:
    metrics, info = cells[0].metrics, cells[0].metric_info
    images = info["ra_aa"].n
    text = f"Mean of {len(cells)} seed{'s' if len(cells) > 1 else ''}; AutoAttack on the first {images:,} test images"
    if "ra_route" in metrics:
        route = 100 * sum(cell.metrics["ra_route"] for cell in cells) / len(cells)
        text += f"; {route:.2f}% under attacks that know the router, {info['ra_route'].n:,} images"
    if flags:
        text += f"; flags of AutoAttack: {', '.join(name.removeprefix('aa_flag_') for name in flags)}"
    return f"{text}."


def _percent(row: Row, metric: str) -> str:
    return f"{100 * row.metrics[metric].mean:.2f}"


def _arguments(name: str) -> dict[str, Any]:
    return recipe_files.read(name) if name in recipe_files.list_recipes() else {}
