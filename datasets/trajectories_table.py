"""The one table every trajectory reader returns: SI units, a road frame, whole frames at a stated rate."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import polars as pl

# x is along the direction of travel, y positive to the left; lane 1 is the leftmost. `scene` is what shares a clock and
# a road (a recording, one direction of it, a scenario): neighbours are looked for inside it. `recording` is the scope
# in which a vehicle's id means the same vehicle: splits go by (recording, vehicle).
COLUMNS: Mapping[str, type[pl.DataType]] = {
    "recording": pl.String,
    "scene": pl.String,
    "vehicle": pl.String,
    "frame": pl.Int64,
    "x": pl.Float64,  # m, centre of the vehicle
    "y": pl.Float64,  # m
    "vx": pl.Float64,  # m/s
    "vy": pl.Float64,  # m/s
    "ax": pl.Float64,  # m/s^2
    "lane": pl.Int32,  # from 1, the leftmost
    "lateral": pl.Float64,  # m from the centre of the lane, positive to the left
    "left_lane": pl.Boolean,  # is there a lane to the left
    "right_lane": pl.Boolean,
    "length": pl.Float64,  # m
    "width": pl.Float64,  # m
}
REQUIRED = ("recording", "scene", "vehicle", "frame", "x", "y")


@dataclass(frozen=True)
class TrackTable:
    """Tracks as read and checked, sorted by scene, vehicle and frame.

    Attributes:
        frame: a row per vehicle and frame, `COLUMNS`; null where the source does not say.
        frame_rate: frames a second.
        split_of: recording -> `train`, `valid` or `test` where the source decides; else empty.
    """

    frame: pl.DataFrame
    frame_rate: float
    split_of: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Source:
    """Trajectory data before it is read.

    Attributes:
        name: on the leaderboard.
        content: the files whose bytes are the data.
        frame_rate: frames a second, known without reading rows.
        read: reads and checks all of it.
        lane_width: metres, where the road is known.
        split: how vehicles are split by default.
    """

    name: str
    content: tuple[Path, ...]
    frame_rate: float
    read: Callable[[], TrackTable]
    lane_width: float | None = None
    split: str = "time"


def completed(frame: pl.DataFrame) -> pl.DataFrame:
    """The table with every column of `COLUMNS` and none else, in order of scene, vehicle and frame."""
    return frame.select(
        pl.col(name).cast(kind) if name in frame.columns else pl.lit(None, kind).alias(name)
        for name, kind in COLUMNS.items()
    ).sort("scene", "vehicle", "frame")


def numbered(names: Sequence[str]) -> list[tuple[int, str]]:
    """Keys that sort vehicle ids as numbers where all of them are such, else as texts."""
    whole = all(name.lstrip("-").isdigit() for name in names)
    return [(int(name) if whole else 0, name) for name in names]
