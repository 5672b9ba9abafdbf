"""From a source to windows: the one pipeline that simulated and recorded tracks take."""

from collections.abc import Mapping
from dataclasses import dataclass

import polars as pl
import torch
from torch import Tensor

from ..errors import UserError
from .trajectories_checks import continuous, located
from .trajectories_features import lane_centres, with_motion, with_neighbours, with_road
from .trajectories_labels import crossing_labels, cslstm_labels, decimated
from .trajectories_splits import SPLITS, split_of_vehicles, without_overlap
from .trajectories_table import Source
from .trajectories_windows import Tracks, class_counts, rows_of, windows

_CSLSTM_REACH = 4.0  # s


@dataclass(frozen=True)
class Cut:
    """How tracks become windows; lengths in frames of the windows' rate, of which the source has `every` times more."""

    every: int
    history: int
    horizon: int
    stride: int
    train_stride: int
    label: str
    label_horizon: int
    debounce: int
    ignore_band: int
    partial: bool
    split: str
    shares: tuple[float, ...]
    fold: int
    folds: int
    gaps: str
    unsorted: str


@dataclass
class Built:
    """Tracks, and of each split the rows at which its windows stand.

    Attributes:
        places: track, frame, recording, vehicle, x, y of every window.
    """

    tracks: Tracks
    rows: Mapping[str, Tensor]
    places: pl.DataFrame
    class_balance: dict[str, dict[str, int]]

    def to(self, device: torch.device) -> None:
        """Moves all tensors."""
        self.tracks = self.tracks.to(device)
        self.rows = {name: rows.to(device) for name, rows in self.rows.items()}


def build(source: Source, cut: Cut) -> Built:
    """Reads, checks, labels, splits and cuts.

    Raises:
        UserError: the data is wrong, or a split has no window.
    """
    table = source.read()
    rate = table.frame_rate / cut.every
    frame = located(table, cut.unsorted, cut.gaps, source)
    frame = continuous(decimated(with_motion(frame.lazy(), table.frame_rate), cut.every)).collect()
    vehicles = frame.group_by("recording", "vehicle").agg(start=pl.col("frame").min()).sort("recording", "vehicle")
    vehicles = split_of_vehicles(vehicles, cut.split, cut.shares, cut.fold, cut.folds, table.split_of).drop("start")
    rule = cslstm_labels if cut.label == "cslstm" else crossing_labels
    reach = round(_CSLSTM_REACH * rate) if cut.label == "cslstm" else cut.label_horizon
    frame = rule(frame.lazy(), reach, cut.debounce).collect()
    found = _windows(frame, vehicles, cut, purge=cut.split == "time" and not table.split_of)
    _refuse_empty(found, frame, cut, rate, source.name)
    train = frame.join(vehicles.filter(pl.col("split") == "train"), on=["recording", "vehicle"], how="semi")
    frame = with_neighbours(with_road(frame.lazy(), lane_centres(train.lazy()))).collect()
    rows = {name: rows_of(found, found["split"] == name) for name in SPLITS}
    tracks = Tracks.from_frame(frame, rate).normalised(rows["train"], cut.history)
    at = torch.cat(list(rows.values())).unique().numpy()
    places = frame[at].select("track", "frame", "recording", "vehicle", "x", "y")
    return Built(tracks, rows, places, class_counts(tracks.intention, rows))


def _windows(frame: pl.DataFrame, vehicles: pl.DataFrame, cut: Cut, purge: bool) -> pl.DataFrame:
    """All windows with their split, at most `train_stride` apart for train and `stride` elsewhere."""
    parts = []
    for stride, splits in ((cut.train_stride, ["train"]), (cut.stride, ["valid", "test"])):
        found = windows(frame, cut.history, cut.horizon, stride, cut.partial, cut.ignore_band)
        found = found.join(vehicles, on=["recording", "vehicle"], how="left", maintain_order="left")
        parts.append(found.filter(pl.col("split").is_in(splits)))
    found = pl.concat(parts).sort("row")
    return without_overlap(found) if purge else found


def _refuse_empty(found: pl.DataFrame, frame: pl.DataFrame, cut: Cut, rate: float, name: str) -> None:
    longest = int(frame.group_by("track").len()["len"].max() or 0)  # type: ignore[arg-type]
    need = cut.history + (1 if cut.partial else cut.horizon)
    if longest < need:
        raise UserError(
            f"{name}: the longest track has {longest} frames at {rate:g} Hz ({longest / rate:.1f} s); expected at "
            f"least {need} ({need / rate:.1f} s) for a window; shorten data.history or data.horizon"
        )
    for split in SPLITS:
        if not (found["split"] == split).any():
            raise UserError(
                f"{name}: no window of {need} frames ({need / rate:.1f} s) falls into split '{split}'; give more "
                f"tracks, shorten data.history or data.horizon, or set data.split or data.shares"
            )
