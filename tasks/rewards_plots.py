"""Pictures of a rewards test: accuracy by task and capability, the router's confusion, best of n, length bias."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from .rewards_metrics import (
    best_of_n,
    length_bias,
    overoptimisation,
    pair_accuracy,
    pair_scores,
    pool_matrix,
    router_report,
)

if TYPE_CHECKING:
    from .rewards import Judged

BLUE, ORANGE, GREY = "#2b6cb0", "#dd6b20", "#718096"


def draw(seen: "Judged", names: Sequence[str], capabilities: Sequence[Sequence[str]], folder: Path) -> list[Path]:
    """Draw what the test has data for; returns the files written."""
    folder.mkdir(parents=True, exist_ok=True)
    pairs, pools = seen.rows(seen.pool < 0), seen.rows(seen.pool >= 0)
    paths = [_accuracy(pairs, names, capabilities, folder / "accuracy.png")]
    if pairs.logits.shape[1] and (pairs.task >= 0).any():
        paths.append(_router(pairs, names, folder / "router.png"))
    if len(pools.pool):
        paths.append(_best_of_n(pools, folder / "best_of_n.png"))
    return [*paths, _length(pairs, folder / "length.png")]


def _accuracy(pairs: "Judged", names: Sequence[str], capabilities: Sequence[Sequence[str]], path: Path) -> Path:
    """Of each task the pair accuracy, and how often each capability's reward alone agrees with the label."""
    report = pair_accuracy(pairs.reward[:, 0], pairs.reward[:, 1], pairs.task, names or None)
    shares = report.by_task
    inner = bool(pairs.capability.shape[2]) and not bool(pairs.capability.isnan().all())
    figure = Figure(figsize=(11 if inner else 5, 3.8), layout="constrained")
    axes = figure.subplots(1, 2 if inner else 1, width_ratios=[1, 2.4] if inner else None, squeeze=False)[0]
    left = axes[0]
    labels, values = list(shares) or ["all"], [s.value for s in shares.values()] or [report.micro]
    errors = [1.96 * s.se for s in shares.values()] or [1.96 * report.micro_se]
    left.barh(labels, values, xerr=errors, color=BLUE, ecolor="#1a365d", height=0.6)
    left.axvline(0.5, color=GREY, linewidth=1, linestyle=":")
    left.axvline(report.micro, color=ORANGE, linewidth=1.5)
    left.set(xlim=(0.0, 1.0), xlabel="pair accuracy, 95 % interval")
    left.set_title(f"all tasks {report.micro:.1%}", fontsize=10, color=ORANGE)
    left.invert_yaxis()
    left.spines[["top", "right"]].set_visible(False)
    if inner:
        _capabilities(axes[1], pairs, labels, names, capabilities)
    return _save(figure, path)


def _capabilities(
    axes: Axes, pairs: "Judged", labels: Sequence[str], names: Sequence[str], capabilities: Sequence[Sequence[str]]
) -> None:
    columns = list(dict.fromkeys(name for own in capabilities for name in own))
    grid = torch.full((len(labels), len(columns)), torch.nan)
    for y, label in enumerate(labels):
        task = list(names).index(label)
        rows = pairs.rows(pairs.task == task)
        for k, name in enumerate(capabilities[task]):
            grid[y, columns.index(name)] = pair_scores(rows.capability[:, 0, k], rows.capability[:, 1, k]).nanmean()
    image = axes.imshow(grid.numpy(), vmin=0.2, vmax=0.8, cmap="RdBu", aspect="auto")
    for y, values in enumerate(grid.tolist()):
        for x, value in enumerate(values):
            if value == value:
                axes.text(x, y, f"{100 * value:.0f}", ha="center", va="center", fontsize=8)
    axes.set_xticks(range(len(columns)), columns, rotation=55, ha="right", fontsize=8)
    axes.set_yticks(range(len(labels)), labels)
    axes.set_title("agreement of one capability's reward with the overall label, %", fontsize=10)
    axes.figure.colorbar(image, ax=axes)


def _router(pairs: "Judged", names: Sequence[str], path: Path) -> Path:
    report = router_report(pairs.logits, pairs.task)
    share = report.confusion / report.confusion.sum(1, keepdim=True).clamp(min=1)
    tasks = list(names) or [str(t) for t in range(len(share))]
    size = max(4.6, 1.8 + 0.8 * len(tasks)), max(3.6, 1.2 + 0.7 * len(tasks))  # room for the title of few tasks
    figure = Figure(figsize=size, layout="constrained")
    axes = figure.subplots()
    image = axes.imshow(share.numpy(), vmin=0, vmax=1, cmap="viridis")
    for y, values in enumerate(share.tolist()):
        for x, value in enumerate(values):
            axes.text(
                x, y, f"{100 * value:.0f}", ha="center", va="center", color="w" if value < 0.6 else "k", fontsize=9
            )
    axes.set_xticks(range(len(tasks)), tasks, rotation=35, ha="right")
    axes.set_yticks(range(len(tasks)), tasks)
    axes.set(xlabel="routed to", ylabel="task")
    axes.set_title(f"router: accuracy {report.accuracy:.1%}, macro-F1 {report.macro_f1:.2f}", fontsize=10)
    figure.colorbar(image, ax=axes, label="share of the task's prompts")
    return _save(figure, path)


def _best_of_n(pools: "Judged", path: Path) -> Path:
    """Gold reward of the best of n by the model, by gold itself and by length, over KL from one draw."""
    proxy, gold = pool_matrix(pools.reward, pools.gold, pools.pool)
    length, _ = pool_matrix(pools.length.float(), pools.gold, pools.pool)
    figure = Figure(figsize=(6, 3.8), layout="constrained")
    axes = figure.subplots()
    for name, judge, colour, style in (
        ("gold reward itself", gold, GREY, "--"),
        ("this model", proxy, BLUE, "-"),
        ("longest response", length, ORANGE, ":"),
    ):
        curve = best_of_n(judge, gold)
        kl, value = curve.kl.numpy(), curve.gold.numpy()
        axes.plot(kl, value, color=colour, linestyle=style, marker="o", markersize=4, label=name)
        if name == "this model":
            error = 1.96 * curve.gold_se.nan_to_num().numpy()
            axes.fill_between(kl, value - error, value + error, color=colour, alpha=0.15, linewidth=0)
            fall = overoptimisation(curve.n, curve.gold)
            ticks = [f"{k:.1f}\nn = {int(n)}" for k, n in zip(curve.kl, curve.n, strict=True)]
            axes.set_xticks(kl, ticks, fontsize=8)
    axes.set(xlabel="KL of best of n from one draw, nats", ylabel="gold reward")
    axes.set_title(f"best of n: falls {fall.score:.3f} from its peak at n = {fall.peak}", fontsize=10)
    axes.legend(frameon=False, fontsize=9)
    axes.spines[["top", "right"]].set_visible(False)
    return _save(figure, path)


def _length(pairs: "Judged", path: Path) -> Path:
    """Accuracy by how much longer the chosen response is; a model that counts words falls to 0 on the left."""
    bias = length_bias(pairs.reward[:, 0], pairs.reward[:, 1], pairs.length)
    ratio = ((pairs.length[:, 0] + 1).double() / (pairs.length[:, 1] + 1)).log2()
    scores = pair_scores(pairs.reward[:, 0], pairs.reward[:, 1])
    edges = torch.tensor([-torch.inf, -1.0, -0.5, -0.2, 0.0, 0.2, 0.5, 1.0, torch.inf], dtype=torch.double)
    bins = torch.bucketize(ratio, edges[1:-1])
    labels = ["< ½", "½ – 0.7", "0.7 – 0.9", "0.9 – 1", "1 – 1.1", "1.1 – 1.4", "1.4 – 2", "> 2"]
    figure = Figure(figsize=(6, 3.6), layout="constrained")
    axes = figure.subplots()
    for b, _ in enumerate(labels):
        own = scores[bins == b]
        if len(own):
            p = float(own.mean())
            axes.bar(b, p, width=0.75, color=BLUE, yerr=1.96 * (p * (1 - p) / len(own)) ** 0.5, ecolor="#1a365d")
            axes.text(b, 0.02, f"{len(own)}", ha="center", fontsize=8, color="w")
    axes.axhline(0.5, color=GREY, linewidth=1, linestyle=":")
    axes.set_xticks(range(len(labels)), labels, fontsize=8)
    axes.set(ylim=(0, 1), xlabel="length of the chosen response / of the rejected one", ylabel="pair accuracy")
    title = f"longer wins: {bias.length_accuracy:.1%} right; the model prefers the longer in {bias.prefers_longer:.1%}"
    axes.set_title(title, fontsize=10)
    axes.spines[["top", "right"]].set_visible(False)
    return _save(figure, path)


def _save(figure: Figure, path: Path) -> Path:
    figure.savefig(path, dpi=150)
    return path
