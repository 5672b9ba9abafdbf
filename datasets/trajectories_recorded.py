"""Recorded freeways in their publishers' files: NGSIM, the highD family, CitySim. Units and axes become ours."""

from collections.abc import Sequence
from pathlib import Path

import polars as pl

from ..errors import UserError
from .ranking_columns import Table, read_table
from .trajectories_formats import files_at, lanes, names, numbers, placed, stacked, whole
from .trajectories_table import Source, TrackTable

FOOT, MILE_AN_HOUR = 0.3048, 0.44704
_NGSIM_LANE = 12 * FOOT
_NGSIM = (
    "Vehicle_ID", "Frame_ID", "Total_Frames", "Global_Time", "Local_X", "Local_Y", "Global_X", "Global_Y", "v_Length",
    "v_Width", "v_Class", "v_Vel", "v_Acc", "Lane_ID", "Preceding", "Following", "Space_Headway", "Time_Headway",
)  # fmt: skip


def open_ngsim(path: str, lanes_kept: int = 6) -> Source:
    """NGSIM freeways: the 18-column text files, or the 25-column CSV (quoted thousands). Feet, 10 Hz.

    Args:
        path: a file, or a folder of them.
        lanes_kept: higher lanes (ramps and auxiliary ones) count as this one, as is usual for US-101.
    """
    files = files_at(path, (".txt", ".csv"))

    def read() -> TrackTable:
        return TrackTable(stacked([_read_ngsim(file, lanes_kept) for file in files]), 10.0)

    return Source(Path(path).stem, tuple(files), 10.0, read, _NGSIM_LANE)


def _read_ngsim(file: Path, lanes_kept: int) -> pl.DataFrame:
    table = _spaced(file) if file.suffix == ".txt" else read_table(file)
    plain = {column.lower(): column for column in table.frame.columns}
    plain["space_headway"] = plain.get("space_headway", plain.get("space_hdwy", ""))
    head = {name: plain.get(name.lower(), name) for name in _NGSIM[:14]}
    used = ("Vehicle_ID", "Frame_ID", "Local_X", "Local_Y", "v_Length", "v_Width", "v_Vel", "v_Acc", "Lane_ID")
    table.require(*(head[name] for name in used))
    length = numbers(table, head["v_Length"], FOOT)
    lane = lanes(table, head["Lane_ID"]).clip(None, lanes_kept)
    y = numbers(table, head["Local_X"], -FOOT)  # grows to the right
    text = pl.Series([file.stem]).new_from_index(0, len(table.frame))
    if "location" in plain:
        text = text + "/" + names(table, plain["location"])
    if head["Global_Time"] in table:  # ids are used again in every 15-minute file
        began = (numbers(table, head["Global_Time"]) / 1000 - whole(table, head["Frame_ID"]) / 10) / 60
        text = text + "/" + began.round().cast(pl.Int64).cast(pl.String)
    return placed(
        table, recording=text, scene=text, vehicle=names(table, head["Vehicle_ID"]),
        frame=whole(table, head["Frame_ID"]),
        x=numbers(table, head["Local_Y"], FOOT) - 0.5 * length, y=y,  # Local_Y is the front
        vx=numbers(table, head["v_Vel"], FOOT), ax=numbers(table, head["v_Acc"], FOOT), lane=lane,
        lateral=y + (lane.cast(pl.Float64) - 0.5) * _NGSIM_LANE, length=length,
        width=numbers(table, head["v_Width"], FOOT),
    )  # fmt: skip


def _spaced(file: Path) -> Table:
    """A text file of numbers between spaces, 18 of them a row, without a header."""
    if file.stat().st_size == 0:
        raise UserError(f"{file}: the file is empty; expected NGSIM's 18 columns")
    lines = pl.read_csv(file, has_header=False, separator="\n", infer_schema=False, new_columns=["line"])["line"]
    fields = lines.str.strip_chars().str.replace_all(r"[\s]+", " ").str.split(" ")
    table = Table(file, pl.DataFrame({"line": lines}))
    table.refuse(fields.list.len() != len(_NGSIM), "line", f"{len(_NGSIM)} numbers between spaces")
    return Table(file, pl.DataFrame({name: fields.list.get(i) for i, name in enumerate(_NGSIM)}))


def open_highd(path: str, frame_rate: float = 25.0) -> Source:
    """highD: `01_tracks.csv` beside `01_tracksMeta.csv` (and `01_recordingMeta.csv`). Metres, image axes, two
    directions: each becomes a scene of its own with x along its travel.

    Args:
        path: a *_tracks.csv, or a folder of them.
        frame_rate: where a recordingMeta does not say.
    """
    files = files_at(path, ("_tracks.csv",))
    for file in files:
        if not _beside(file, "tracksMeta").is_file():
            raise UserError(f"{_beside(file, 'tracksMeta')}: no such file; {file.name} needs it for the directions")
    rates = {file: _highd_rate(_beside(file, "recordingMeta"), frame_rate) for file in files}
    if len(set(rates.values())) > 1:
        raise UserError(f"{path}: recordings of {sorted(set(rates.values()))} Hz; expected one rate; read them apart")
    rate = rates[files[0]]
    content = [*files, *(_beside(file, "tracksMeta") for file in files)]

    def read() -> TrackTable:
        return TrackTable(stacked([_read_highd(file) for file in files]), rate)

    return Source(Path(path).stem, tuple(content), rate, read)


def _beside(tracks: Path, kind: str) -> Path:
    return tracks.with_name(tracks.name.replace("_tracks.csv", f"_{kind}.csv"))


def _highd_rate(meta: Path, default: float) -> float:
    if not meta.is_file():
        return default
    table = read_table(meta)
    table.require("frameRate")
    return float(numbers(table, "frameRate")[0])


def _read_highd(file: Path) -> pl.DataFrame:
    table, meta = read_table(file), read_table(_beside(file, "tracksMeta"))
    table.require("frame", "id", "x", "y", "width", "height", "xVelocity", "yVelocity", "xAcceleration", "laneId")
    meta.require("id", "drivingDirection")
    ids = names(table, "id")
    directions = dict(zip(names(meta, "id"), whole(meta, "drivingDirection"), strict=True))
    direction = ids.replace_strict(directions, default=None, return_dtype=pl.Int64)
    table.refuse(direction.is_null(), "id", f"an id of {_beside(file, 'tracksMeta').name}")
    # 1 drives to the left of the image (its y points down), 2 to the right.
    sign = direction.replace_strict({1: -1.0, 2: 1.0}, default=None, return_dtype=pl.Float64)
    meta.refuse(~whole(meta, "drivingDirection").is_in([1, 2]), "drivingDirection", "1 or 2")
    lane = numbers(table, "laneId").cast(pl.Int32) * sign.cast(pl.Int32)
    recording = pl.Series([file.name.split("_")[0]]).new_from_index(0, len(ids))
    length, width = numbers(table, "width"), numbers(table, "height")
    rows = placed(
        table, recording=recording, scene=recording + "/" + direction.cast(pl.String), vehicle=ids,
        frame=whole(table, "frame"), x=(numbers(table, "x") + 0.5 * length) * sign,
        y=(numbers(table, "y") + 0.5 * width) * -sign, vx=numbers(table, "xVelocity") * sign,
        vy=numbers(table, "yVelocity") * -sign, ax=numbers(table, "xAcceleration") * sign, lane=lane,
        length=length, width=width,
    )  # fmt: skip
    # From 1, the leftmost; the directions' lanes are told apart, so that the recording's lane centres are.
    low = pl.col("lane").min().over("scene")
    return rows.with_columns(lane=(pl.col("lane") - low + 1).cast(pl.Int32))


_CITYSIM = ("frameNum", "carId", "carCenterXft", "carCenterYft", "speed", "laneId")


def open_citysim(path: str, direction: Sequence[float] = (1.0, 0.0)) -> Source:
    """CitySim: a row per vehicle and frame, 30 Hz, feet (columns *ft) and mph, image axes.

    Args:
        path: a CSV, or a folder of them.
        direction: of travel in the image, x to the right and y down.
    """
    files = files_at(path, (".csv",))
    size = (direction[0] ** 2 + direction[1] ** 2) ** 0.5 if len(direction) == 2 else 0.0
    if size == 0:
        raise UserError(f"data.files.direction={list(direction)}: expected two numbers that are not both 0")
    along = (direction[0] / size, direction[1] / size)

    def read() -> TrackTable:
        return TrackTable(stacked([_read_citysim(file, along) for file in files]), 30.0)

    return Source(Path(path).stem, tuple(files), 30.0, read)


def _read_citysim(file: Path, along: tuple[float, float]) -> pl.DataFrame:
    table = read_table(file)
    table.require(*_CITYSIM)
    text = pl.Series([file.stem]).new_from_index(0, len(table.frame))
    right, down = numbers(table, "carCenterXft", FOOT), numbers(table, "carCenterYft", FOOT)
    columns: dict[str, pl.Series | pl.Expr] = {
        "recording": text, "scene": text, "vehicle": names(table, "carId"), "frame": whole(table, "frameNum"),
        "x": right * along[0] + down * along[1],
        "y": right * along[1] - down * along[0],  # y of an image points down; left of travel is positive
        "vx": numbers(table, "speed", MILE_AN_HOUR),
        "lane": lanes(table, "laneId"),
    }  # fmt: skip
    corners = [f"boundingBox{i}{axis}ft" for i in (1, 2, 3) for axis in "XY"]
    if all(corner in table for corner in corners):
        x1, y1, x2, y2, x3, y3 = (numbers(table, corner, FOOT) for corner in corners)
        columns["length"] = ((x1 - x2) ** 2 + (y1 - y2) ** 2).sqrt()
        columns["width"] = ((x2 - x3) ** 2 + (y2 - y3) ** 2).sqrt()
    rows = placed(table, **columns)
    sizes = [name for name in ("length", "width") if name in rows.columns]
    return rows.with_columns(pl.col(sizes).median().over("vehicle")) if sizes else rows
