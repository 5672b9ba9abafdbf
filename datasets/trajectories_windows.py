"""Tracks as flat tensors, and batches of windows gathered from them."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import NamedTuple

import numpy as np
import polars as pl
import torch
from jaxtyping import Float, Int
from torch import Tensor

from .trajectories_features import FEATURES

_AT_ONCE = 8192  # windows whose statistics are summed in one go


class TrajectoryBatch(NamedTuple):
    """Windows of the past, and what came after.

    The road frame of a window has its origin at the vehicle's current position, x along the direction of travel and y
    positive to the left, in metres. The last step of the history is now.

    Attributes:
        history: `schema["features"]`, normalised with statistics of the train windows.
        future: displacement from the current position at each coming frame, metres; NaN after the track's end.
        velocity: longitudinal and lateral, m/s, now; measured up to now.
        intention: 0 keep, 1 left, 2 right, -1 unknown.
        crossing: seconds from now to the lane crossing the label is about, negative if it is over; NaN for keep.
        lateral: offset from the lane's centre, metres, positive to the left; NaN where unknown.
        track: index of the track; its windows follow each other in validation and test.
        frame: the current frame's number in the recording, at `schema["frame_rate"]`.
    """

    history: Float[Tensor, "batch time features"]
    future: Float[Tensor, "batch horizon 2"]
    velocity: Float[Tensor, "batch 2"]
    intention: Int[Tensor, "batch"]
    crossing: Float[Tensor, "batch"]
    lateral: Float[Tensor, "batch"]
    track: Int[Tensor, "batch"]
    frame: Int[Tensor, "batch"]


@dataclass(frozen=True)
class Tracks:
    """All frames of all tracks, in order of track and frame; frames of a track follow each other without a gap.

    Attributes:
        seen: `FEATURES` of each frame as measured; the first two are not used.
        position: metres from the track's first frame.
        end: row of the track's last frame.
        mean, scale: of each feature over the train windows.
    """

    seen: Float[Tensor, "rows features"]
    position: Float[Tensor, "rows 2"]
    velocity: Float[Tensor, "rows 2"]
    intention: Int[Tensor, "rows"]
    crossing: Float[Tensor, "rows"]
    lateral: Float[Tensor, "rows"]
    track: Int[Tensor, "rows"]
    frame: Int[Tensor, "rows"]
    end: Int[Tensor, "rows"]
    mean: Float[Tensor, "features"]
    scale: Float[Tensor, "features"]

    @classmethod
    def from_frame(cls, frame: pl.DataFrame, rate: float) -> "Tracks":
        """Rows with `FEATURES`, track, frame, intention, crossing (frames), lateral; not normalised yet."""
        frame = frame.with_columns(
            (pl.col(name) - pl.col(name).first().over("track")).alias(f"from_{name}") for name in ("x", "y")
        )
        last = frame.select(pl.int_range(pl.len()).alias("row"), "track").select(pl.col("row").max().over("track"))

        def real(*names: str) -> Tensor:
            columns = frame.select(pl.col(names).cast(pl.Float32).fill_null(float("nan"))).to_numpy()
            return torch.from_numpy(np.array(columns, order="C"))

        def whole(column: pl.Series) -> Tensor:
            return torch.from_numpy(column.cast(pl.Int64).to_numpy().copy())

        seen = real(*FEATURES).nan_to_num_()
        return cls(
            seen=seen,
            position=real("from_x", "from_y"),
            velocity=real("vx", "vy"),
            intention=whole(frame["intention"]),
            crossing=real("crossing")[:, 0] / rate,
            lateral=real("lateral")[:, 0],
            track=whole(frame["track"]),
            frame=whole(frame["frame"]),
            end=whole(last["row"]),
            mean=torch.zeros(len(FEATURES)),
            scale=torch.ones(len(FEATURES)),
        )

    def to(self, device: torch.device) -> "Tracks":
        return replace(self, **{field.name: getattr(self, field.name).to(device) for field in fields(self)})

    def normalised(self, windows: Int[Tensor, "windows"], history: int) -> "Tracks":
        """With mean and standard deviation of every feature over all steps of these windows."""
        total, square = torch.zeros(2, self.seen.shape[1], dtype=torch.float64)
        for some in windows.split(_AT_ONCE):
            seen = self._history(some, history).double()
            total += seen.sum((0, 1))
            square += seen.square().sum((0, 1))
        count = len(windows) * history
        mean = total / count
        scale = (square / count - mean.square()).clamp_min(0).sqrt()
        return replace(self, mean=mean.float(), scale=torch.where(scale > 1e-4, scale, 1.0).float())

    def batch(self, rows: Int[Tensor, "batch"], history: int, horizon: int) -> TrajectoryBatch:
        """Windows whose current frames are `rows`."""
        ahead = rows[:, None] + torch.arange(1, horizon + 1, device=rows.device)
        there = ahead <= self.end[rows, None]
        future = self.position[ahead.clamp_max(len(self.position) - 1)] - self.position[rows, None]
        return TrajectoryBatch(
            history=(self._history(rows, history) - self.mean) / self.scale,
            future=torch.where(there[..., None], future, torch.nan),
            velocity=self.velocity[rows],
            intention=self.intention[rows],
            crossing=self.crossing[rows],
            lateral=self.lateral[rows],
            track=self.track[rows],
            frame=self.frame[rows],
        )

    def _history(self, rows: Int[Tensor, "batch"], history: int) -> Float[Tensor, "batch time features"]:
        """The frames up to each of these, with positions relative to it."""
        back = rows[:, None] + torch.arange(1 - history, 1, device=rows.device)
        relative = self.position[back] - self.position[rows, None]
        return torch.cat([relative, self.seen[back][..., 2:]], -1)


def windows(
    frame: pl.DataFrame, history: int, horizon: int, stride: int, partial: bool, ignore_band: int
) -> pl.DataFrame:
    """Rows at which a window may stand: row, recording, vehicle, track, frame, first and last frame it touches.

    Args:
        frame: all rows in order of track and frame.
        history, horizon: frames of past (with now) and future.
        stride: frames between windows of a track, from its first possible one on.
        partial: take windows whose future ends early, but for one frame at least.
        ignore_band: leave out windows within so many frames after a crossing.
    """
    place = pl.int_range(pl.len()).over("track")
    left = pl.len().over("track") - 1 - place
    need = 1 if partial else horizon
    # A vehicle off every lane is not on the road; elsewhere a source without lanes has none at all.
    off = (pl.col("lane").is_null() & pl.col("lane").is_not_null().any().over("recording")).cast(pl.Int32).cum_sum()
    span = off.shift(-horizon).over("track").fill_null(off.last().over("track"))
    before = off.shift(history).over("track").fill_null(off.first().over("track"))
    first_off = (pl.col("lane").first().over("track").is_null()) & (place < history)
    clear = (span == before) & ~(first_off & pl.col("lane").is_not_null().any().over("recording"))
    started = (place >= history - 1) & ((place - (history - 1)) % stride == 0)
    calm = (pl.col("since") >= ignore_band).fill_null(True) if ignore_band else pl.lit(True)
    return (
        frame.lazy()
        .with_row_index("row")
        .filter(started & (left >= need) & clear & calm)
        .select(
            "row", "recording", "vehicle", "track", "frame",
            first=pl.col("frame") - (history - 1),
            last=pl.col("frame") + pl.lit(horizon),
        )
        .collect()
    )  # fmt: skip


def rows_of(found: pl.DataFrame, split: Sequence[bool] | pl.Series) -> Tensor:
    """The rows of those windows that belong to a split."""
    return torch.from_numpy(found.filter(pl.Series(split))["row"].cast(pl.Int64).to_numpy().copy())


def class_counts(intention: Int[Tensor, "rows"], rows: Mapping[str, Tensor]) -> dict[str, dict[str, int]]:
    """How many windows of each split keep, go left, go right or are unknown."""
    names = {"keep": 0, "left": 1, "right": 2, "unknown": -1}
    return {
        split: {name: int((intention[some] == value).sum()) for name, value in names.items()}
        for split, some in rows.items()
    }
