"""Pictures of a ranking test: who profits along the long tail, and who the gate listens to."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from matplotlib.figure import Figure

from .ranking_metrics import session_metrics

if TYPE_CHECKING:
    from .ranking import Scored

BINS = 8


def draw(scored: "Scored", group_names: Sequence[str], folder: Path) -> list[Path]:
    """Draw what the test has data for; returns the files written."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    if (scored.labels > 0).any() and scored.scores.shape[1] > 1:
        paths.append(_auc_by_length(scored, folder / "auc_by_history.png"))
    if scored.gate.shape[1] > 1 and group_names:
        paths.append(_gate_by_category(scored, group_names, folder / "gate_by_category.png"))
    return paths


def _auc_by_length(scored: "Scored", path: Path) -> Path:
    """Mean session AUC in equal-sized bins of history length, with 95 % intervals."""
    auc = session_metrics(scored.scores, scored.labels, scored.mask).session_auc
    defined = ~auc.isnan()
    auc, length = auc[defined], scored.length[defined]
    parts = [part for part in length.argsort(stable=True).tensor_split(max(min(BINS, len(length)), 1)) if len(part) > 1]
    middle = [float(length[part].double().median()) for part in parts]
    mean = [float(auc[part].mean()) for part in parts]
    error = [1.96 * float(auc[part].std()) / len(part) ** 0.5 for part in parts]
    figure = Figure(figsize=(6.4, 3.8), layout="constrained")
    axes = figure.subplots()
    axes.errorbar(middle, mean, error, fmt="o-", capsize=3, color="#2b6cb0")
    axes.axhline(0.5, color="grey", linewidth=1, linestyle=":")
    axes.set(xlabel="behaviour rows before the session (bin median)", ylabel="session AUC")
    axes.set_title(f"Along the long tail: {len(auc):,} sessions, 95 % intervals", fontsize=11)
    axes.spines[["top", "right"]].set_visible(False)
    return _save(figure, path)


def _gate_by_category(scored: "Scored", names: Sequence[str], path: Path) -> Path:
    """Mean gate weight of each expert in each category of the candidates, most frequent first."""
    codes, counts = scored.group.unique(return_counts=True)
    order = counts.argsort(descending=True, stable=True)[:24]
    weight = torch.stack([scored.gate[scored.group == code].mean(0) for code in codes[order]])
    labels = [
        f"{names[code]} ({count:,})" for code, count in zip(codes[order].tolist(), counts[order].tolist(), strict=True)
    ]
    experts = weight.shape[1]
    figure = Figure(figsize=(4.2 + 0.5 * experts, 1.4 + 0.24 * len(labels)), layout="constrained")
    axes = figure.subplots()
    # Un-normalised gates may be negative: a diverging scale then, centred on zero.
    limits: dict[str, Any] = {"vmin": 0, "cmap": "viridis"}
    if (weight < 0).any():
        limits = {"vmin": -float(weight.abs().max()), "vmax": float(weight.abs().max()), "cmap": "RdBu_r"}
    image = axes.imshow(weight.numpy(), aspect="auto", **limits)
    axes.set_xticks(range(experts), [str(e) for e in range(experts)])
    axes.set_yticks(range(len(labels)), labels, fontsize=8)
    axes.set(xlabel="expert")
    axes.set_title("Mean gate weight by category (sessions)", fontsize=11)
    figure.colorbar(image, ax=axes)
    return _save(figure, path)


def _save(figure: Figure, path: Path) -> Path:
    figure.savefig(path, dpi=150)
    return path
