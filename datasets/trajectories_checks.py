"""Is this a table of tracks in metres and seconds? One clear line if not; and tracks without holes."""

import polars as pl

from ..errors import UserError
from .trajectories_table import Source, TrackTable

_FASTEST = 80.0  # m/s; 288 km/h
_UNITS = {3.2808: "feet against metres", 2.2369: "mph against m/s", 3.6: "km/h against m/s"}


def located(table: TrackTable, unsorted: str, gaps: str, source: Source) -> pl.DataFrame:
    """The table with `track`, a number for each vehicle of each scene and, with gaps=split, each stretch of it.

    The table comes in the file's order of rows; `row` (optional, from 1) and `file` name the place in messages.

    Raises:
        UserError: NaN, frames that go back, are double or missing, units that cannot be metres, a single vehicle.
    """
    frame = table.frame
    if "row" not in frame.columns:
        frame = frame.with_row_index("row", 1)
    if "file" not in frame.columns:
        frame = frame.with_columns(file=pl.lit(source.name))
    _refuse_nan(frame)
    again = frame.filter(~pl.struct("scene", "vehicle", "frame").is_first_distinct())
    if len(again):
        raise UserError(
            f"{_place(again)}, column 'frame': vehicle {again['vehicle'][0]} has frame {again['frame'][0]} twice; "
            f"expected each frame once; remove the copy, or is the recording column missing?"
        )
    step = pl.col("frame").diff().over("scene", "vehicle")
    back = frame.filter(step < 0)
    if len(back) and unsorted == "raise":
        raise UserError(
            f"{_place(back)}, column 'frame': vehicle {back['vehicle'][0]} goes back to frame {back['frame'][0]}; "
            f"expected ascending frames; sort the file, or set data.unsorted=sort"
        )
    frame = frame.sort("scene", "vehicle", "frame")
    hole = frame.with_columns(step=step).filter(pl.col("step") > 1)
    if len(hole) and gaps == "raise":
        raise UserError(
            f"{_place(hole)}, column 'frame': vehicle {hole['vehicle'][0]} jumps from frame "
            f"{hole['frame'][0] - hole['step'][0]} to {hole['frame'][0]}; expected every frame at "
            f"{table.frame_rate:g} Hz; is the frame rate right? else set data.gaps=split"
        )
    vehicles = frame.select(pl.struct("recording", "vehicle").n_unique()).item()
    if vehicles < 2:
        raise UserError(
            f"{source.name}: one vehicle alone ({frame['vehicle'][0]}); expected several, since vehicles are split "
            f"into train, valid and test; is the vehicle column right?"
        )
    frame = frame.with_columns(track=pl.struct("scene", "vehicle").rle_id().cast(pl.Int64))
    _refuse_units(frame, table.frame_rate)
    return continuous(frame.lazy()).drop("row", "file").collect()


def continuous(frame: pl.LazyFrame) -> pl.LazyFrame:
    """Numbers tracks anew, each a stretch of frames that follow each other."""
    stretch = (pl.col("frame") - pl.int_range(pl.len())).alias("stretch")
    return frame.with_columns(track=pl.struct("scene", "vehicle", stretch).rle_id().cast(pl.Int64))


def _place(rows: pl.DataFrame) -> str:
    return f"{rows['file'][0]}: row {rows['row'][0]}"


def _refuse_nan(frame: pl.DataFrame) -> None:
    for name in ("x", "y", "vx", "vy", "ax", "lateral", "length", "width"):
        needed = name in ("x", "y")
        bad = frame.filter((pl.col(name).is_null() if needed else pl.lit(False)) | ~pl.col(name).is_finite())
        if len(bad):
            raise UserError(
                f"{_place(bad)}, column '{name}': {bad[name][0]}; expected a finite number; "
                f"fill the value in or remove the row (a gap then: data.gaps=split)"
            )


def _refuse_units(frame: pl.DataFrame, rate: float) -> None:
    """Speeds no vehicle drives, speeds that disagree with the positions, lengths no vehicle has."""
    measured = frame.with_columns(
        moved=(pl.col("x").diff().pow(2) + pl.col("y").diff().pow(2)).sqrt().over("track") * rate,
        step=pl.col("frame").diff().over("track"),
    ).with_columns(moved=pl.col("moved") / pl.col("step"))
    for name, what in (("moved", "moves at"), ("vx", "is said to drive")):
        # A jump of one frame is noise; a unit shows in many.
        share = measured.select((pl.col(name).abs() > _FASTEST).mean()).item()
        if share is not None and share > 0.02:
            row = measured.filter(pl.col(name).abs() > _FASTEST)
            column = "x" if name == "moved" else "speed"
            raise UserError(
                f"{_place(row)}, column '{column}': vehicle {row['vehicle'][0]} {what} {abs(row[name][0]):.0f} m/s; "
                f"expected metres, m/s and {rate:g} frames a second; are these feet, pixels or km/h?"
            )
    moving = measured.filter((pl.col("moved") > 2) & (pl.col("vx").abs() > 2))
    ratio = moving.select((pl.col("vx").abs() / pl.col("moved")).median()).item()
    if ratio is not None and not 0.7 < ratio < 1.4:
        near = min(_UNITS, key=lambda value: min(abs(ratio - value), abs(1 / ratio - value)))
        close = min(abs(ratio - near), abs(1 / ratio - near)) < 0.15
        guess = _UNITS[near] if close else "another unit, or another frame rate"
        raise UserError(
            f"{_place(moving)}, column 'speed': speeds are {ratio:.2f} times what positions and {rate:g} frames a "
            f"second give; expected m/s and metres; this looks like {guess}"
        )
    length = measured.filter(pl.col("length") > 0).select(pl.col("length").median()).item()
    if length is not None and not 1.5 < length < 12:
        rows = measured.filter(pl.col("length") > 0)
        raise UserError(
            f"{_place(rows)}, column 'length': the median vehicle is {length:.1f} m long; expected 3 to 6 m; "
            f"are the lengths in feet, or was a unit converted twice?"
        )
