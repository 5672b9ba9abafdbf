"""Pictures of a robustness test: images before and after the attack, accuracy by radius, who goes to which expert."""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from matplotlib.figure import Figure
from torch import Tensor

from .robustness_metrics import Attacked, expert_by_class

if TYPE_CHECKING:
    from .robustness import Examples

ORANGE, GREY = "#dd6b20", "#718096"
_SHOWN = 8  # images: half that fell, half that stood, as far as there are


def draw(
    examples: "Examples",
    curve: Mapping[float, float],
    table: Attacked,
    experts: int,
    eps: float,
    schema: Mapping[str, Any],
    folder: Path,
) -> list[Path]:
    """Draw what the test has data for; returns the files written."""
    folder.mkdir(parents=True, exist_ok=True)
    classes = 1 + max(int(examples.said.max()), int(table.label.max()))
    names = [str(name) for name in schema.get("class_names") or range(classes)]
    paths = [_examples(examples, eps, names, folder / "attack_examples.png")]
    if len(curve) > 2:
        paths.append(_curve(curve, eps, folder / "accuracy_by_eps.png"))
    if experts:
        paths.append(_experts(table, experts, names, folder / "expert_by_class.png"))
    return paths


def _examples(examples: "Examples", eps: float, names: list[str], path: Path) -> Path:
    """A column an image: clean, attacked, and the difference, white for +eps and black for -eps."""
    right = examples.said[:, 0] == examples.label
    fell = (right & (examples.said[:, 1] != examples.label)).nonzero()[:, 0]
    stood = right & (examples.said[:, 1] == examples.label) & (examples.adversarial != examples.image).flatten(1).any(1)
    stood = stood.nonzero()[:, 0] if stood.any() else (right & (examples.said[:, 1] == examples.label)).nonzero()[:, 0]
    half = _SHOWN // 2
    chosen = torch.cat([fell[: max(half, _SHOWN - len(stood))], stood[: max(half, _SHOWN - len(fell))]])[:_SHOWN]
    if not len(chosen):
        chosen = torch.arange(min(_SHOWN, len(examples.label)))
    figure = Figure(figsize=(1.45 * len(chosen) + 0.5, 5.4), layout="constrained")
    grid = figure.subplots(3, len(chosen), squeeze=False)
    for column, i in enumerate(chosen.tolist()):
        difference = (examples.adversarial[i] - examples.image[i]) / max(2 * eps, 1e-9) + 0.5
        for row, picture in enumerate((examples.image[i], examples.adversarial[i], difference)):
            axes = grid[row][column]
            axes.imshow(_pixels(picture), cmap="gray", vmin=0, vmax=1)
            axes.set_xticks([]), axes.set_yticks([])
            if row < 2:
                said, expert = int(examples.said[i, row]), int(examples.expert[i, row])
                text = names[said] + (f"\nexpert {expert}" if expert >= 0 else "")
                colour = "black" if said == int(examples.label[i]) else ORANGE
                axes.set_title(text, fontsize=8, color=colour)
    for row, text in enumerate(("clean", "attacked", "difference")):
        grid[row][0].set_ylabel(text, fontsize=9)
    figure.suptitle(
        f"What attacks within eps = {eps:.3g} make of test images (wrong in orange)", x=0.02, ha="left", fontsize=10
    )
    return _save(figure, path)


def _curve(curve: Mapping[float, float], eps: float, path: Path) -> Path:
    """Accuracy under PGD against the radius, the radius of training marked."""
    radii = [radius for radius in curve if radius < 1]
    figure = Figure(figsize=(5.2, 3.4), layout="constrained")
    axes = figure.subplots()
    axes.axvline(eps, color=GREY, linewidth=1, linestyle=":")
    axes.annotate(
        "trained for", (eps, 1.0), xytext=(3, -2), textcoords="offset points", fontsize=8, color=GREY, va="top"
    )
    axes.plot(radii, [curve[radius] for radius in radii], marker="o", color=ORANGE)
    axes.set(xlabel="eps (L∞, pixels in [0, 1])", ylabel="accuracy under PGD", ylim=(0, 1), xlim=(0, None))
    axes.spines[["top", "right"]].set_visible(False)
    return _save(figure, path)


def _experts(table: Attacked, experts: int, names: list[str], path: Path) -> Path:
    """Share of each class that each expert gets; one panel a router, the first eight of them."""
    routers = min(table.expert.shape[1], 8)
    figure = Figure(figsize=(2.2 + (0.6 * experts + 0.5) * routers, 1.2 + 0.28 * len(names)), layout="constrained")
    panels = figure.subplots(1, routers, squeeze=False, sharey=True)[0]
    image = None
    for number, axes in enumerate(panels):
        share = expert_by_class(table.expert[:, number], table.label, experts, len(names))
        image = axes.imshow(share.numpy(), vmin=0, vmax=1, cmap="viridis", aspect="auto")
        if len(names) <= 20:
            for y, values in enumerate(share.tolist()):
                for x, value in enumerate(values):
                    colour = "w" if value < 0.6 else "k"
                    axes.text(x, y, f"{value:.2f}", ha="center", va="center", color=colour, fontsize=7)
        axes.set_xticks(range(experts), [str(e) for e in range(experts)])
        axes.set(xlabel="expert")
    step = 1 + len(names) // 40
    panels[0].set_yticks(range(0, len(names), step), names[::step], fontsize=8)
    assert image is not None
    figure.colorbar(image, ax=panels.tolist(), label="share of the class")
    return _save(figure, path)


def _pixels(image: Tensor) -> Any:
    """[height, width] or [height, width, 3] in [0, 1]."""
    image = image.clamp(0, 1)
    return (image[0] if len(image) == 1 else image.permute(1, 2, 0)).numpy()


def _save(figure: Figure, path: Path) -> Path:
    figure.savefig(path, dpi=150)
    return path
