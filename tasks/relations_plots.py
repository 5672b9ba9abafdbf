"""Pictures of a relations test: relations over time, each predicate's average precision, experts by domain."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import polars as pl
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from ..datasets.relations_table import Relation
from .relations_eval import match

if TYPE_CHECKING:
    from .relations import Tested

BLUE, ORANGE, GREY = "#2b6cb0", "#dd6b20", "#a0aec0"
_ROWS = 14  # relations of a clip that are drawn
_PREDICATES = 40  # most frequent predicates that are drawn


def draw(tested: "Tested", folder: Path) -> list[Path]:
    """Draw what the test has data for; returns the files written."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = [_timelines(tested, folder / "relations_over_time.png"), _predicates(tested, folder / "predicate_ap.png")]
    if tested.usage.numel():
        paths.append(_usage(tested, folder / "experts_by_domain.png"))
    return paths


def _timelines(tested: "Tested", path: Path) -> Path:
    """The clips at the quartiles of AP: annotated relations as outlines, the best predictions as bars."""
    ranked = tested.scores.videos.sort("ap")
    chosen = [ranked["video"][int(share * (ranked.height - 1))] for share in (0.25, 0.5, 0.75)]
    clips = {clip.name: clip for clip in tested.clips}
    figure = Figure(figsize=(15, 5.6), layout="constrained")
    for axes, name in zip(figure.subplots(1, 3, squeeze=False)[0], chosen, strict=True):
        ap = ranked.filter(pl.col("video") == name)["ap"][0]
        _timeline(axes, clips[name].relations(), list(tested.predictions.videos.get(name, ())), clips[name].frames)
        axes.set_title(f"{name}: AP {ap:.2f}", fontsize=9, loc="left")
    handles = [
        figure.axes[0].barh([-9], [0], color=BLUE, label="found"),
        figure.axes[0].barh([-9], [0], color=ORANGE, label="false"),
        figure.axes[0].barh([-9], [0], color="none", edgecolor="black", label="annotated, matched"),
    ]
    figure.legend(handles=handles, loc="outside lower center", ncols=3, frameon=False, fontsize=9)
    figure.suptitle(
        "Best predictions of the clips at the quartiles of AP (25, 50, 75 %)", x=0.01, ha="left", fontsize=11
    )
    return _save(figure, path)


def _timeline(axes: Axes, truth: Sequence[Relation], predictions: Sequence[Relation], frames: int) -> None:
    found = match(truth, predictions)
    shown = predictions[:_ROWS]
    for row, (relation, hit) in enumerate(zip(shown, found.tolist(), strict=False)):
        left, width = relation.begin, relation.end - relation.begin
        axes.barh(row, width, left=left, height=0.55, color=BLUE if hit >= 0 else ORANGE)
        if hit >= 0:
            real = truth[hit]
            axes.barh(row, real.end - real.begin, left=real.begin, height=0.8, color="none", edgecolor="black")
    names = [f"{' '.join(r.triplet)}  {r.score:.2f}" for r in shown]
    axes.set_yticks(range(len(shown)), names, fontsize=8)
    axes.set_ylim(max(len(shown), 1) - 0.4, -0.6)
    axes.set_xlim(0, frames)
    axes.set_xlabel("frame")
    axes.spines[["top", "right"]].set_visible(False)


def _predicates(tested: "Tested", path: Path) -> Path:
    rows = tested.scores.predicates.filter(pl.col("instances") > 0).sort("instances", descending=True)
    rows = rows.head(_PREDICATES)
    figure = Figure(figsize=(7, 0.9 + 0.26 * rows.height), layout="constrained")
    axes = figure.subplots()
    axes.barh(range(rows.height), rows["recall"].to_list(), color=GREY, height=0.75, label="recall")
    axes.barh(range(rows.height), rows["ap"].to_list(), color=BLUE, height=0.4, label="average precision")
    axes.set_yticks(range(rows.height), [f"{n}  ({k})" for n, k in rows.select("predicate", "instances").iter_rows()])
    axes.invert_yaxis()
    axes.set_xlim(0, 1)
    axes.set_title(f"Each predicate (instances), dialect {tested.scores.dialect}", fontsize=10, loc="left")
    axes.legend(frameon=False, fontsize=9, loc="lower right")
    axes.spines[["top", "right"]].set_visible(False)
    return _save(figure, path)


def _usage(tested: "Tested", path: Path) -> Path:
    usage = tested.usage.numpy()
    domains, experts = usage.shape
    figure = Figure(figsize=(1.6 + 0.8 * experts, 1.4 + 0.5 * domains), layout="constrained")
    axes = figure.subplots()
    image = axes.imshow(usage, vmin=0, vmax=1, cmap="Blues", aspect="auto")
    for (row, column), value in np.ndenumerate(usage):
        axes.text(column, row, f"{value:.2f}", ha="center", va="center", color="white" if value > 0.6 else "black")
    axes.set_xticks(range(experts), [str(e) for e in range(experts)])
    axes.set_yticks(range(domains), ["unknown" if d < 0 else str(d) for d in tested.domains])
    axes.set_xlabel("expert")
    axes.set_ylabel("domain")
    axes.set_title("Share of pairs an expert decides", fontsize=10, loc="left")
    figure.colorbar(image, ax=axes)
    return _save(figure, path)


def _save(figure: Figure, path: Path) -> Path:
    figure.savefig(path, dpi=120)
    return path
