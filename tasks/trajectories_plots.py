"""Pictures of a trajectories test: tracks on the lanes, error over the horizon, gates of each manoeuvre."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

from ..zoo.tmmoe import INTENTIONS, TASKS
from .trajectories_metrics import Windows, distance

if TYPE_CHECKING:
    from collections.abc import Mapping

BLUE, ORANGE, GREY = "#2b6cb0", "#dd6b20", "#718096"
LANE_WIDTH = 3.5  # m, drawn where the data's schema gives none


def draw(windows: Windows, schema: "Mapping[str, Any]", folder: Path) -> list[Path]:
    """Draw what the test has data for; returns the files written."""
    folder.mkdir(parents=True, exist_ok=True)
    rate = float(schema["frame_rate"])
    paths = [_tracks(windows, schema, folder / "tracks.png"), _horizon(windows, rate, folder / "rmse_by_horizon.png")]
    if windows.gates.shape[-1] and (windows.intention >= 0).any():
        paths.append(_gates(windows, folder / "gates_by_manoeuvre.png"))
    return paths


def _tracks(windows: Windows, schema: "Mapping[str, Any]", path: Path) -> Path:
    """For each intention the windows at the lower quartile, median and upper quartile of the error."""
    width = float(schema.get("lane_width") or LANE_WIDTH)
    error = distance(windows.position, windows.future).nanmean(-1)
    figure = Figure(figsize=(11, 6.6), layout="constrained")
    grid = figure.subplots(len(INTENTIONS), 3, squeeze=False)
    for row, name in zip(range(len(INTENTIONS)), INTENTIONS, strict=True):
        chosen = ((windows.intention == row) & ~error.isnan()).nonzero()[:, 0]
        order = chosen[error[chosen].argsort()]
        for column, share in enumerate((0.25, 0.5, 0.75)):
            axes = grid[row][column]
            if not len(order):
                axes.set_axis_off()
                axes.set_title(f"no window with intention {name}", fontsize=9)
                continue
            _track(axes, windows, int(order[int(share * (len(order) - 1))]), width)
            if row == len(INTENTIONS) - 1:
                axes.set_xlabel("along the road, m")
            if column == 0:
                axes.set_ylabel(f"{name}\nto the left, m")
    handles, labels = grid[0][0].get_legend_handles_labels()
    if handles:
        figure.legend(handles, labels, loc="outside upper right", ncols=3, frameon=False, fontsize=9)
    figure.suptitle("Tracks at the quartiles of the error (25, 50, 75 %)", x=0.02, ha="left", fontsize=11)
    return _save(figure, path)


def _track(axes: Axes, windows: Windows, i: int, width: float) -> None:
    real, predicted = windows.future[i], windows.position[i]
    velocity = windows.velocity[i]
    seconds = torch.linspace(0, 1, 2)[:, None]
    reach = predicted[-1, 0] / velocity[0].clamp(min=0.1) if velocity[0] > 0.1 else torch.tensor(1.0)
    onward = seconds * reach * velocity
    centre = -float(windows.lateral[i].nan_to_num(nan=0.0))
    for lane in range(-1, 3):
        axes.axhline(centre + (lane - 0.5) * width, color="#a0aec0", linewidth=0.9, dashes=(6, 4))
    axes.plot(*_line(onward), color=GREY, linewidth=1, linestyle=":", label="constant velocity")
    axes.plot(*_line(_from_here(real)), color="black", linewidth=2.2, alpha=0.8, label="real")
    axes.plot(*_line(_from_here(predicted)), color=ORANGE, linewidth=1.6, label="predicted")
    axes.plot([0], [0], marker=">", color="black", markersize=6)
    axes.set_ylim(centre - 1.6 * width, centre + 1.6 * width)
    said = ", ".join(f"{name} {p:.0%}" for name, p in zip(INTENTIONS, windows.probability[i].tolist(), strict=True))
    axes.set_title(f"{said}; ADE {float(distance(predicted[None], real[None]).nanmean()):.2f} m", fontsize=9)
    axes.spines[["top", "right"]].set_visible(False)


def _horizon(windows: Windows, rate: float, path: Path) -> Path:
    """RMSE of each step, along, across and joint, beside constant velocity's."""
    seconds = torch.arange(1, windows.future.shape[1] + 1) / rate
    figure = Figure(figsize=(10, 3.4), layout="constrained")
    onward = seconds[:, None] * windows.velocity[:, None]
    panels = figure.subplots(1, 3)
    for axes, name, chosen in zip(panels, ("joint", "along the road", "across"), ([0, 1], [0], [1]), strict=True):
        for label, position, colour, style in (
            ("model", windows.position, ORANGE, "-"),
            ("constant velocity", onward, GREY, ":"),
        ):
            error = (position - windows.future).square()[..., chosen].sum(-1).nanmean(0).sqrt()
            axes.plot(seconds.numpy(), error.numpy(), style, color=colour, label=label)
        axes.set(xlabel="seconds ahead", ylabel="RMSE, m", ylim=(0, None))
        axes.set_title(name, fontsize=10)
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(frameon=False, fontsize=8)
    return _save(figure, path)


def _gates(windows: Windows, path: Path) -> Path:
    """Mean gate weight of each expert, for each task, by the manoeuvre that follows."""
    experts = windows.gates.shape[-1]
    figure = Figure(figsize=(2.4 + 2.8 * len(TASKS), 2.8), layout="constrained")
    present = [c for c in range(len(INTENTIONS)) if (windows.intention == c).any()]
    image = None
    for axes, task, gate in zip(figure.subplots(1, len(TASKS)), TASKS, windows.gates.unbind(1), strict=True):
        mean = torch.stack([gate[windows.intention == c].mean(0) for c in present])
        image = axes.imshow(mean.numpy(), vmin=0, vmax=1, cmap="viridis", aspect="auto")
        for y, values in enumerate(mean.tolist()):
            for x, value in enumerate(values):
                axes.text(x, y, f"{value:.2f}", ha="center", va="center", color="w" if value < 0.6 else "k", fontsize=8)
        axes.set_xticks(range(experts), [str(e) for e in range(experts)])
        axes.set_yticks(range(len(present)), [INTENTIONS[c] for c in present])
        axes.set(xlabel="expert")
        axes.set_title(f"{task} gate", fontsize=10)
    assert image is not None
    figure.colorbar(image, ax=figure.axes, label="mean weight")
    return _save(figure, path)


def _from_here(track: Tensor) -> Tensor:
    return torch.cat([track.new_zeros(1, 2), track])


def _line(track: Tensor) -> tuple[list[float], list[float]]:
    return track[:, 0].tolist(), track[:, 1].tolist()


def _save(figure: Figure, path: Path) -> Path:
    figure.savefig(path, dpi=150)
    return path
