"""Your own tracks as one long table: our columns, SUMO's floating car data, Argoverse 2 scenarios.

Rows stay in the file's order; `trajectories_checks` judges them. Other names of a column are understood, others still
are given with `columns`.
"""

import difflib
from collections.abc import Mapping, Sequence
from pathlib import Path

import polars as pl

from ..errors import UserError
from .ranking_columns import Table, read_table
from .trajectories_table import COLUMNS, REQUIRED, Source, TrackTable

_ALIASES = {
    "vehicle": ("vehicle_id", "track_id", "car_id", "carid", "id"),
    "scene": ("segment",),
    "frame": ("frame_id", "framenum", "timestep"),
    "ax": ("accel", "acceleration"),
    "speed": ("velocity", "v"),
    "lane": ("lane_id", "laneid"),
}


def files_at(path: str, endings: Sequence[str]) -> list[Path]:
    """A file, or those of a folder.

    Raises:
        UserError: there is none.
    """
    place = Path(path)
    if not place.is_dir():
        if not place.is_file():
            raise UserError(f"{place}: no such file or folder")
        return [place]
    found = sorted(file for file in place.rglob("*") if file.name.endswith(tuple(endings)) and file.is_file())
    if not found:
        raise UserError(f"{place}: no {' or '.join(endings)} file in this folder")
    return found


def numbers(table: Table, column: str, scale: float = 1.0) -> pl.Series:
    """Float64 in SI units; thousands may be quoted with commas; null where there is nothing."""
    values = table.frame[column]
    if values.dtype == pl.String:
        values = values.str.replace_all(",", "").str.strip_chars()
        values = values.set(values.is_in(["", "NA"]), None)
    found = values.cast(pl.Float64, strict=False)
    table.refuse(found.is_null() & values.is_not_null(), column, "a number such as 1234.5")
    return found * scale


def whole(table: Table, column: str) -> pl.Series:
    """Int64 without nulls."""
    found = numbers(table, column)
    table.refuse(found.is_null() | ~found.is_finite() | (found != found.round()), column, "a whole number")
    return found.cast(pl.Int64)


def lanes(table: Table, column: str) -> pl.Series:
    """Int32 from 1; null where the file says 0, -1 or nothing: outside every lane."""
    found = numbers(table, column).cast(pl.Int32, strict=False)
    return found.set((found < 1).fill_null(False), None)


def names(table: Table, column: str) -> pl.Series:
    """Ids as texts; 12 and 12.0 are the same."""
    values = table.frame[column]
    table.refuse(values.is_null(), column, "an id in every row")
    return table.ids(column).cast(pl.String).str.strip_chars()


def stacked(parts: Sequence[pl.DataFrame]) -> pl.DataFrame:
    """All files' rows with every column, in their order."""
    rows = pl.concat(parts, how="diagonal")
    return rows.select(
        *(pl.col(n).cast(kind) if n in rows.columns else pl.lit(None, kind).alias(n) for n, kind in COLUMNS.items()),
        "row", "file",
    )  # fmt: skip


def placed(table: Table, **columns: pl.Series | pl.Expr) -> pl.DataFrame:
    """Columns of one file with the place of each row."""
    rows = pl.DataFrame({name: values for name, values in columns.items() if isinstance(values, pl.Series)})
    rows = rows.with_columns(**{name: values for name, values in columns.items() if isinstance(values, pl.Expr)})
    return rows.with_row_index("row", 1).with_columns(file=pl.lit(str(table.file)))


def open_table(path: str, frame_rate: float, columns: dict[str, str] | None = None, name: str | None = None) -> Source:
    """Our own columns in SI units, Parquet or CSV: vehicle, frame, x, y, and of recording, scene, vx or speed, vy, ax,
    lane (1 the leftmost, 0 none), lateral, left_lane, right_lane, length, width what exists.

    Args:
        path: a file, or a folder of them, each a recording where there is no such column.
        frame_rate: frames a second.
        columns: our name -> the file's.
        name: on the leaderboard; default: the file's.
    """
    files = files_at(path, (".parquet", ".csv"))
    if not frame_rate > 0:
        raise UserError(f"data.files.frame_rate={frame_rate}: expected frames a second, more than 0")

    def read() -> TrackTable:
        return TrackTable(stacked([_read_table(file, columns) for file in files]), frame_rate)

    return Source(name or Path(path).stem, tuple(files), frame_rate, read)


def _read_table(file: Path, given: Mapping[str, str] | None) -> pl.DataFrame:
    table = read_table(file)
    ours = _ours(table, given)
    for column in ("vehicle", "frame", "x", "y"):
        if column not in ours:
            table.require(column, known=ours.values())
    text = pl.Series([file.stem]).new_from_index(0, len(table.frame))
    recording = names(table, ours["recording"]) if "recording" in ours else text
    scene = recording + "/" + names(table, ours["scene"]) if "scene" in ours else recording
    read: dict[str, pl.Series | pl.Expr] = {
        "recording": recording, "scene": scene, "vehicle": names(table, ours["vehicle"]),
        "frame": whole(table, ours["frame"]),
    }  # fmt: skip
    for column, kind in COLUMNS.items():
        if column in ours and column not in read:
            if column == "lane":
                read[column] = lanes(table, ours[column])
            elif kind == pl.Boolean:
                read[column] = numbers(table, ours[column]) > 0.5
            else:
                read[column] = numbers(table, ours[column])
    if "vx" not in ours and "speed" in ours:
        read["vx"] = numbers(table, ours["speed"])
    return placed(table, **read)


def _ours(table: Table, given: Mapping[str, str] | None) -> dict[str, str]:
    """Our name -> the file's column."""
    plain = {column.lower(): column for column in table.frame.columns}
    ours = {}
    for name in (*COLUMNS, "speed"):
        column = next((plain[other] for other in (name, *_ALIASES.get(name, ())) if other in plain), None)
        if column is not None:
            ours[name] = column
    for name, column in (given or {}).items():
        if name not in (*COLUMNS, "speed"):
            near = difflib.get_close_matches(name, [*COLUMNS, "speed"], 1, 0.0)
            raise UserError(
                f"data.files.columns.{name}: unknown; did you mean {near[0]}? we need {', '.join(REQUIRED)}"
            )
        table.require(column)
        ours[name] = column
    return ours


def open_fcd(path: str, step: float = 0.1, length: float = 5.0, lane_width: float = 3.2) -> Source:
    """SUMO's floating car data as Parquet, of straight roads along x; positions are front bumpers.

    Args:
        path: a file with timestep_time, vehicle_id, vehicle_x, vehicle_y, vehicle_speed, vehicle_lane.
        step: seconds between frames.
        length: of the vehicles, m.
        lane_width: m.
    """
    files = files_at(path, (".parquet",))

    def read() -> TrackTable:
        return TrackTable(stacked([_read_fcd(file, step, length) for file in files]), 1 / step)

    return Source(Path(path).stem, tuple(files), 1 / step, read, lane_width)


def _read_fcd(file: Path, step: float, length: float) -> pl.DataFrame:
    table = read_table(file)
    table.require("timestep_time", "vehicle_id", "vehicle_x", "vehicle_y", "vehicle_speed", "vehicle_lane")
    table = Table(file, table.frame.filter(pl.col("vehicle_id").is_not_null()))  # empty steps are a row of nulls
    frame = numbers(table, "timestep_time") / step
    table.refuse(
        (frame - frame.round()).abs() > 0.01, "timestep_time", f"a multiple of {step:g} s; set data.files.step"
    )
    parts = table.frame["vehicle_lane"].cast(pl.String).str.extract_groups(r"^(.*)_(\d+)$").struct.unnest()
    edge, index = parts["1"], parts["2"].cast(pl.Int32)
    # SUMO counts lanes from the right.
    most = pl.DataFrame({"edge": edge, "index": index}).select(pl.col("index").max().over("edge")).to_series()
    text = pl.Series([file.stem]).new_from_index(0, len(edge))
    speed, front = numbers(table, "vehicle_speed"), numbers(table, "vehicle_x")
    optional = {"ax": numbers(table, "vehicle_acceleration")} if "vehicle_acceleration" in table else {}
    return placed(
        table, recording=text, scene=text, vehicle=names(table, "vehicle_id"), frame=frame.round().cast(pl.Int64),
        x=front - 0.5 * length, y=numbers(table, "vehicle_y"), vx=speed, lane=most - index + 1,
        length=pl.lit(length), **optional,
    )  # fmt: skip


def open_argoverse(path: str) -> Source:
    """Argoverse 2 motion forecasting scenarios (10 Hz Parquet): each a recording, in the frame of each track's heading
    at its first moment. There are no lanes, so intentions are unknown.

    Args:
        path: a scenario_*.parquet, or a folder of them.
    """
    files = files_at(path, (".parquet",))

    def read() -> TrackTable:
        return TrackTable(stacked([_read_argoverse(file) for file in files]), 10.0)

    return Source(Path(path).stem, tuple(files), 10.0, read, split="recording" if len(files) > 2 else "vehicle")


def _read_argoverse(file: Path) -> pl.DataFrame:
    table = read_table(file)
    table.require("track_id", "timestep", "position_x", "position_y", "heading", "velocity_x", "velocity_y")
    if "object_type" in table:
        kinds = ["vehicle", "bus", "motorcyclist"]
        table = Table(file, table.frame.filter(pl.col("object_type").cast(pl.String).is_in(kinds)))
        if table.frame.is_empty():
            raise UserError(f"{file}: no object_type of {', '.join(kinds)}; expected vehicles")
    text = pl.Series([file.stem]).new_from_index(0, len(table.frame))
    rows = placed(
        table, recording=text, scene=text, vehicle=names(table, "track_id"), frame=whole(table, "timestep"),
        px=numbers(table, "position_x"), py=numbers(table, "position_y"), turn=numbers(table, "heading"),
        wx=numbers(table, "velocity_x"), wy=numbers(table, "velocity_y"),
    )  # fmt: skip
    first = pl.col("turn").first().over("vehicle")
    cos, sin = first.cos(), first.sin()
    return rows.with_columns(
        x=pl.col("px") * cos + pl.col("py") * sin,
        y=pl.col("py") * cos - pl.col("px") * sin,
        vx=pl.col("wx") * cos + pl.col("wy") * sin,
        vy=pl.col("wy") * cos - pl.col("wx") * sin,
    ).drop("px", "py", "turn", "wx", "wy")
