"""The picture of a personalised test: what each user gains."""

from collections.abc import Sequence
from pathlib import Path

from matplotlib.figure import Figure

from .base import TestResult

GREY, BLUE, ORANGE = "#a0aec0", "#2b6cb0", "#dd6b20"


def draw(result: TestResult, users: Sequence[str] | None, folder: Path) -> list[Path]:
    """Draw `users.png`, with the names of users where there are any; returns the files written."""
    table = result.units.sort("user_accuracy")
    names = [users[k] if users else str(k) for k in table["unit"]]
    after, gain, share = (table[name].to_numpy() for name in ("user_accuracy", "user_gain", "local_share_user"))
    figure = Figure(figsize=(7.2, 1.4 + 0.32 * len(names)), layout="constrained")
    axes = figure.subplots()
    rows = range(len(names))
    axes.hlines(rows, after - gain, after, color=GREY, linewidth=3, zorder=1)
    axes.scatter(after - gain, rows, color=GREY, s=40, label="generic expert", zorder=2)
    axes.scatter(after, rows, color=BLUE, s=40, label="personalised", zorder=3)
    for row in rows:
        axes.annotate(
            f"local expert {share[row]:.0%}",
            (1.0, row),
            xycoords=("axes fraction", "data"),
            xytext=(6, 0),
            textcoords="offset points",
            va="center",
            fontsize=8,
            color=ORANGE,
        )
    axes.set_yticks(list(rows), names)
    axes.set(xlabel="accuracy on held-back images of the user's own")
    axes.legend(loc="upper left", bbox_to_anchor=(0, 1.14), ncols=2, frameon=False)
    axes.grid(axis="x", alpha=0.3)
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "users.png"
    figure.savefig(path, dpi=150)
    return [path]
