"""Which vehicles train, validate and test: no vehicle is on two sides, by default no moment either."""

from collections.abc import Mapping, Sequence

import polars as pl

from ..errors import UserError
from .trajectories_table import numbered

SPLITS = ("train", "valid", "test")
_ROUNDING = 1e-9  # 0.7 + 0.1 is less than 0.8


def split_of_vehicles(
    vehicles: pl.DataFrame, kind: str, shares: Sequence[float], fold: int, folds: int, split_of: Mapping[str, str]
) -> pl.DataFrame:
    """Adds `split` to one row per vehicle: recording, vehicle, start (its first frame).

    Args:
        kind: `time` orders the vehicles of each recording by their first frame, `vehicle` by their id, and cuts at
            `shares`; `recording` cuts the list of recordings; `fold` tests on ids with id % folds == fold and
            validates on the next fold.
        split_of: recording -> split where the source decides.
    """
    if split_of:
        return vehicles.with_columns(split=pl.col("recording").replace_strict(split_of))
    first, second = shares[0] + _ROUNDING, shares[0] + shares[1] + _ROUNDING
    last = (pl.len().over("recording") - 1).clip(1, None)
    if kind == "fold":
        return vehicles.with_columns(split=pl.Series(_fold(vehicles, fold, folds)))
    if kind == "recording":
        names = vehicles["recording"].unique().sort().to_list()
        if len(names) < 3:
            raise UserError(
                f"data.split=recording: {len(names)} recording(s); expected at least 3, one for each split; "
                f"use data.split=time or vehicle"
            )
        place = pl.col("recording").replace_strict({name: i / (len(names) - 1) for i, name in enumerate(names)})
    elif kind == "vehicle":
        keys = numbered(vehicles["vehicle"].to_list())
        rank = {name: i for i, (_, name) in enumerate(sorted(set(keys)))}
        order = pl.col("vehicle").replace_strict(rank, return_dtype=pl.Int64)
        place = (order.rank("ordinal").over("recording") - 1) / last
    else:
        order = pl.struct("start", "vehicle").rank("ordinal").over("recording")
        place = (order - 1) / last
    split = pl.when(place <= first).then(pl.lit("train")).when(place <= second).then(pl.lit("valid"))
    return vehicles.with_columns(split=split.otherwise(pl.lit("test")))


def without_overlap(windows: pl.DataFrame) -> pl.DataFrame:
    """Windows of each recording that end before the first window of a later split begins.

    Args:
        windows: recording, split, first and last frame touched.
    """
    begins = windows.group_by("recording").agg(
        (pl.col("first").filter(pl.col("split") == name).min()).alias(name) for name in ("valid", "test")
    )
    end = (
        pl.when(pl.col("split") == "train")
        .then(pl.min_horizontal("valid", "test"))
        .when(pl.col("split") == "valid")
        .then("test")
    )
    kept = windows.join(begins, on="recording", how="left", maintain_order="left")
    return kept.filter(end.is_null() | (pl.col("last") < end)).drop("valid", "test")


def _fold(vehicles: pl.DataFrame, fold: int, folds: int) -> list[str]:
    """By id where ids are numbers, else by their order."""
    keys = numbered(vehicles["vehicle"].to_list())
    if any(name != str(number) for number, name in keys):
        rank = {name: i for i, name in enumerate(sorted({name for _, name in keys}))}
        keys = [(rank[name], name) for _, name in keys]
    names = {fold: "test", (fold + 1) % folds: "valid"}
    return [names.get(number % folds, "train") for number, _ in keys]
