"""Tracks in the MOTChallenge form: `frame,id,left,top,width,height[,confidence,class,...]`, frames from 1, pixels."""

from pathlib import Path

import numpy as np
import polars as pl

from ..errors import UserError
from .relations_table import Track

_COLUMNS = ("frame", "id", "left", "top", "width", "height")


def read_mot(path: Path | str, category: str = "person") -> dict[int, Track]:
    """The tracks of a MOTChallenge file by id; frames count from 0, NaN where a track pauses.

    Args:
        path: comma-separated, without a header.
        category: of every track: the form names none.

    Raises:
        UserError: the file is missing, empty, or a row is wrong.
    """
    path = Path(path).expanduser()
    try:
        table = pl.read_csv(path, has_header=False, infer_schema=False, truncate_ragged_lines=True)
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except (OSError, pl.exceptions.PolarsError) as error:
        raise UserError(f"{path}: not readable as CSV ({' '.join(str(error).split())[:200]})") from error
    if table.width < len(_COLUMNS):
        raise UserError(f"{path}: {table.width} columns, expected {', '.join(_COLUMNS)} and no header")
    rows = table.select(
        pl.col(table.columns[i]).str.strip_chars().cast(pl.Float64, strict=False).alias(name)
        for i, name in enumerate(_COLUMNS)
    ).with_row_index("row", 1)
    numbers = pl.all_horizontal(pl.col(_COLUMNS).is_finite().fill_null(False))
    whole = (pl.col("frame") % 1 == 0) & (pl.col("id") % 1 == 0) & (pl.col("frame") >= 1)
    wrong = rows.filter(~(numbers & whole & (pl.col("width") >= 0) & (pl.col("height") >= 0)))
    if len(wrong):
        found = ",".join(str(value) for value in table.row(wrong["row"][0] - 1)[: len(_COLUMNS)])
        raise UserError(
            f"{path}: row {wrong['row'][0]}: {found}; expected {','.join(_COLUMNS)} with frames from 1 and whole ids"
        )
    twice = rows.filter(~pl.struct("frame", "id").is_first_distinct())
    if len(twice):
        raise UserError(f"{path}: row {twice['row'][0]}: id {twice['id'][0]:g} twice in frame {twice['frame'][0]:g}")
    tracks = {}
    for key, part in rows.sort("id", "frame").group_by("id", maintain_order=True):
        at = part["frame"].to_numpy().astype(np.int64) - 1
        left, top, width, height = (part[name].to_numpy() for name in _COLUMNS[2:])
        boxes = np.full((at[-1] + 1 - at[0], 4), np.nan)
        boxes[at - at[0]] = np.stack([left, top, left + width, top + height], 1)
        tracks[int(key[0])] = Track(category, int(at[0]), boxes)
    return tracks
