"""Pictures of control: a video and a strip of an episode, and the learning curve."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ..datasets.control import Episode

STRIP = 12  # images of a strip
SMALLEST = 160  # pixels; smaller images are enlarged by a whole number


def draw(
    episodes: Sequence[Episode], curve: Sequence[dict[str, Any]], schema: dict[str, Any], folder: Path
) -> list[Path]:
    """Draw what there is into `folder`; returns the files."""
    folder.mkdir(parents=True, exist_ok=True)
    drawn = []
    if episodes:
        first = episodes[0]
        if first.frames:
            drawn.append(write_video(first, folder / "episode.gif", int(schema.get("action_repeat", 1))))
        drawn.append(draw_episode(first, folder / "episode.png"))
    if len(curve) > 1:
        drawn.append(draw_curve(curve, schema, folder / "learning.png"))
    return drawn


def picture(pixels: np.ndarray) -> np.ndarray:
    """A frame [channels, height, width] as [height, width, 3]; the first camera's where there are several."""
    shown = pixels[:3] if len(pixels) >= 3 else np.repeat(pixels[:1], 3, 0)
    return np.ascontiguousarray(shown.transpose(1, 2, 0))


def write_video(episode: Episode, file: Path, action_repeat: int = 1) -> Path:
    """An animated GIF of an episode, looped, at about the simulator's own pace (20 steps a second)."""
    from PIL import Image

    frames = [picture(pixels) for pixels in episode.frames]
    scale = -(-SMALLEST // frames[0].shape[0])
    images = [Image.fromarray(frame.repeat(scale, 0).repeat(scale, 1)) for frame in frames]
    milliseconds = max(20, 50 * action_repeat)
    images[0].save(file, save_all=True, append_images=images[1:], duration=milliseconds, loop=0, optimize=False)
    return file


def draw_episode(episode: Episode, file: Path) -> Path:
    """A strip of images over the episode, its rewards and its actions."""
    from matplotlib.figure import Figure

    steps = np.arange(episode.length)
    figure = Figure(figsize=(9.0, 4.6 if episode.frames else 3.4), layout="constrained")
    grid = figure.add_gridspec(3, 1, height_ratios=[1.1, 1.0, 1.0] if episode.frames else [0.01, 1.0, 1.0])
    if episode.frames:
        chosen = np.linspace(0, len(episode.frames) - 1, min(STRIP, len(episode.frames))).round().astype(int)
        line = grid[0].subgridspec(1, len(chosen), wspace=0.04)
        for place, index in enumerate(chosen):
            axes = figure.add_subplot(line[place])
            axes.imshow(picture(episode.frames[index]))
            axes.set_title(f"{index}", fontsize=8)
            axes.set(xticks=[], yticks=[])
    axes = figure.add_subplot(grid[1])
    axes.plot(steps, episode.rewards, color="tab:green", lw=1.4)
    axes.set(ylabel="reward", xlim=(0, max(episode.length - 1, 1)))
    axes.set_title(f"return {episode.episode_return:.1f} over {episode.length} agent steps", fontsize=10)
    below = figure.add_subplot(grid[2], sharex=axes)
    for i, values in enumerate(np.array(episode.actions).T[:8]):
        below.plot(steps, values, lw=1.2, label=f"action {i}")
    below.set(ylabel="action", xlabel="agent step", ylim=(-1.05, 1.05))
    if len(episode.actions[0]) > 1:
        below.legend(fontsize=7, ncols=4)
    figure.savefig(file, dpi=130)
    return file


def draw_curve(curve: Sequence[dict[str, Any]], schema: dict[str, Any], file: Path) -> Path:
    """Mean return of the validation episodes over environment frames."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.4, 3.8), layout="constrained")
    axes = figure.subplots()
    frames = [row["frame"] for row in curve]
    axes.plot(frames, [row["episode_reward"] for row in curve], marker="o", ms=4, color="tab:purple")
    axes.set(xlabel="environment frames", ylabel="mean return of validation episodes", xlim=(0, None))
    axes.set_title(f"{curve[0]['agent']} on {schema.get('dataset', '')}, seed {curve[0]['seed']}", fontsize=10)
    if curve[0].get("success_rate") is not None:
        twin = axes.twinx()
        twin.plot(frames, [row["success_rate"] for row in curve], color="tab:orange", ls="--")
        twin.set(ylabel="success rate (dashed)", ylim=(-0.02, 1.02))
    axes.grid(alpha=0.3)
    figure.savefig(file, dpi=130)
    return file
