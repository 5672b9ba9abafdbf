"""Tracks of one video from the user's file: MOTChallenge text or VidVRD JSON, or detections that wait for a tracker."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import polars as pl
from jaxtyping import Float64, Int64

from ..errors import UserError
from .relations_formats import read_clips
from .relations_mot import read_mot
from .relations_table import Track
from .relations_video import Video
from .relations_windows import WINDOW

_MOT = {1: "person", 2: "person", 3: "car", 4: "bicycle", 5: "motorcycle", 6: "vehicle", 7: "person"}  # MOT16, table 2
_MOT_IGNORED = range(8, 14)  # distractors, occluders, reflections, crowds
_FRAMES_OFF = 0.02  # share by which programs count the frames of one video differently
_WITH_CLASS = 9  # columns: MOT16 and later; the files of 2015 have 10, the last three of them metres


class Detections(NamedTuple):
    """Boxes (pixels) found in some frames, one behind the other by frame, with a score from 0 to 1 and a class."""

    frame: Int64[np.ndarray, " boxes"]
    boxes: Float64[np.ndarray, "boxes 4"]
    score: Float64[np.ndarray, " boxes"]
    category: Sequence[str]


def read_tracks(path: Path | str, video: Video, category: str = "person") -> dict[int, Track] | Detections:
    """The tracks of a video's frames, or detections where every id is -1; gaps of up to a second's window are filled.

    MOTChallenge rows are `frame,id,left,top,width,height[,confidence,class,...]`: a class is a name, or a number in
    files of nine columns (MOT16 on), and stands once for each track.

    Args:
        video: whose stored frames the file numbers.
        category: of MOTChallenge rows that name none.

    Raises:
        UserError: no such file, a wrong row, or tracks of another video (more frames, another size).
    """
    path = Path(path).expanduser()
    if path.name.endswith((".json", ".json.gz")):
        tracks = _of_json(path, video)
    else:
        if not path.is_file():
            raise UserError(f"{path}: no such file; expected MOTChallenge text or VidVRD JSON")
        table = _text(path)
        if _only_detections(table):
            return _detections(path, table, video, category)
        classes = _classes(table)
        tracks = {
            tid: track._replace(category=classes.get(tid, category))
            for tid, track in read_mot(path, category).items()
            if classes.get(tid, category)
        }
    _check(path, tracks, video)
    shown = {tid: fill_gaps(moved) for tid, track in tracks.items() if (moved := _moved(track, video)) is not None}
    if not shown:
        raise UserError(f"{path}: no track; expected one or more objects with boxes")
    return shown


def fill_gaps(track: Track, most: int = WINDOW) -> Track:
    """Boxes interpolated where up to `most` frames have none; the object is out of view for longer pauses."""
    missing = np.isnan(track.boxes[:, 0])
    if not missing.any():
        return track
    edges = np.flatnonzero(np.diff(np.concatenate([[False], missing, [False]]).astype(np.int8)))
    boxes, frames = track.boxes.copy(), np.arange(len(missing))
    for begin, end in zip(edges[::2].tolist(), edges[1::2].tolist(), strict=True):
        if begin > 0 and end < len(missing) and end - begin <= most:
            for side in range(4):
                boxes[begin:end, side] = np.interp(frames[begin:end], frames[~missing], track.boxes[~missing, side])
    return track._replace(boxes=boxes)


def _of_json(path: Path, video: Video) -> dict[int, Track]:
    clips = read_clips(path)
    if not path.is_file() or len(clips) != 1:
        raise UserError(f"{path}: {len(clips)} videos; expected the tracks of {video.path.name} alone")
    (clip,) = clips
    sizes = (clip.width, clip.height), (video.width, video.height)
    if all(sizes[0]) and sizes[0] != sizes[1]:
        raise UserError(
            f"{path}: tracks of a video of {clip.width}x{clip.height} pixels, {video.path} has "
            f"{video.width}x{video.height}; expected the tracks of that video"
        )
    if abs(clip.frames - video.stored) > max(_FRAMES_OFF * video.stored, 2):
        raise UserError(
            f"{path}: tracks of {clip.frames} frames, {video.path} has {video.stored}; expected that video's tracks"
        )
    return {tid: track for tid, track in clip.tracks.items() if len(track.boxes)}


def _text(path: Path) -> pl.DataFrame:
    """All cells as text, no row read as a header; short rows end in nulls."""
    try:
        rows = [[cell.strip() for cell in line.split(",")] for line in path.read_text("utf-8").splitlines() if line]
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: not readable as text ({error}); expected MOTChallenge rows") from error
    width = max((len(row) for row in rows), default=0)
    schema = {str(i): pl.String for i in range(width)}
    return pl.DataFrame([row + [None] * (width - len(row)) for row in rows], schema, orient="row")


def _only_detections(table: pl.DataFrame) -> bool:
    """MOTChallenge's `det.txt`: no row has an id."""
    if table.width < 6:
        return False
    ids = table["1"].cast(pl.Float64, strict=False)
    return bool((ids == -1).all()) and len(ids) > 0 and ids.null_count() == 0


def _names(table: pl.DataFrame) -> list[str | None]:
    """The class of each row: "" where MOTChallenge says to ignore it, None where the row has none."""
    if table.width < 8 or not len(table):
        return [None] * len(table)
    numbers = {str(n): name for n, name in _MOT.items()} | {str(n): "" for n in _MOT_IGNORED}
    known = numbers if table.width == _WITH_CLASS else {}
    found: list[str | None] = []
    for cell in table["7"]:
        text = cell or ""
        number = text.lstrip("+-").replace(".", "", 1).isdecimal()
        found.append(known.get(text) if number else text or None)
    return found


def _classes(table: pl.DataFrame) -> dict[int, str]:
    """Of each track the class that most of its rows name."""
    if table.width < 8:
        return {}
    rows = pl.DataFrame(
        {"id": table["1"].cast(pl.Float64, strict=False), "name": _names(table)},
        schema_overrides={"name": pl.String},
    ).drop_nulls()
    counted = rows.group_by("id", "name").len().sort("len", "name", descending=[False, True])
    return {int(tid): name for tid, name, _ in counted.iter_rows()}


def _detections(path: Path, table: pl.DataFrame, video: Video, category: str) -> Detections:
    wanted = ["0", "2", "3", "4", "5", *(["6"] if table.width > 6 else [])]
    values = table.select(pl.col(wanted).cast(pl.Float64, strict=False)).to_numpy()
    wrong = ~np.isfinite(values).all(1) | (values[:, 0] < 1) | (values[:, 0] % 1 != 0) | (values[:, 3:5] < 0).any(1)
    if wrong.any():
        row = int(np.flatnonzero(wrong)[0])
        raise UserError(
            f"{path}: row {row + 1}: {','.join(str(cell) for cell in table.row(row)[:7])}; expected "
            f"frame,-1,left,top,width,height,confidence with frames from 1"
        )
    frame = values[:, 0].astype(np.int64) - 1
    if frame.max() >= video.stored:
        raise UserError(_too_long(path, int(frame.max()) + 1, video))
    score = values[:, 5] if values.shape[1] > 5 else np.ones(len(values))
    if not ((score >= 0) & (score <= 1)).all():  # detectors of MOT15 and MOT16 give logits or percent
        low, high = float(score.min()), float(score.max())
        score = (score - low) / (high - low) if high > low else np.ones(len(score))
    names = [name if name is not None else category for name in _names(table)]
    # A stored frame may be shown several times, or never.
    order = np.argsort(frame, kind="stable")
    first, last = (np.searchsorted(frame[order], video.source, side) for side in ("left", "right"))
    rows = np.concatenate([order[a:b] for a, b in zip(first.tolist(), last.tolist(), strict=True)])
    shown = np.repeat(np.arange(len(video)), last - first)
    kept = np.array([bool(names[row]) for row in rows.tolist()], dtype=bool)
    rows, shown = rows[kept], shown[kept]
    left_top = values[rows, 1:3]
    boxes = np.concatenate([left_top, left_top + values[rows, 3:5]], 1)
    return Detections(shown, boxes, score[rows], [names[row] for row in rows.tolist()])


def _check(path: Path, tracks: Mapping[int, Track], video: Video) -> None:
    last = max((track.end for track in tracks.values()), default=0)
    if last > video.stored:
        raise UserError(_too_long(path, last, video))
    boxes = np.concatenate([np.empty((0, 4)), *(t.boxes[np.isfinite(t.boxes[:, 0])] for t in tracks.values())])
    centre = (boxes[:, :2] + boxes[:, 2:]) / 2
    inside = ((centre >= 0) & (centre <= [video.width, video.height])).all(1)
    if len(inside) and inside.mean() < 0.5:
        raise UserError(
            f"{path}: {1 - inside.mean():.0%} of the boxes lie outside of the {video.width}x{video.height} pixels of "
            f"{video.path}; expected pixels of that video"
        )


def _too_long(path: Path, frames: int, video: Video) -> str:
    return f"{path}: tracks up to frame {frames}, {video.path} has {video.stored}; expected tracks of that video"


def _moved(track: Track, video: Video) -> Track | None:
    """The track in the frames that are shown; None if it is in none."""
    if np.array_equal(video.source, np.arange(video.stored)):
        return track
    boxes = track.during(0, video.stored)[video.source]
    seen = np.flatnonzero(np.isfinite(boxes[:, 0]))
    return Track(track.category, int(seen[0]), boxes[seen[0] : seen[-1] + 1]) if len(seen) else None
