"""Files of the field: VidVRD and VidOR annotations, prediction JSON of versions 1.0 to 3.0, relation lists.

An annotation is one JSON a video, in a folder (VidVRD) or folders of folders (VidOR); predictions are one JSON
`{"version": "VERSION 1.0", "results": {video: [{triplet, score, duration, sub_traj, obj_traj}]}}`. Versions from 2.1 on
hold boxes as shares of the frame, version 3.0 a graph of the annotations' form. All are read, 1.0 is written; a file
may be gzipped.
"""

import gzip
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl

from ..errors import UserError
from .relations_table import Boxes, Clip, Instance, Relation, RelationSet, Track, Triplet, as_set

_SIDES = ("xmin", "ymin", "xmax", "ymax")
_NORMALISED_FROM = 2.1


def read_clips(path: Path | str) -> list[Clip]:
    """The annotations under a folder (VidVRD's `train`, VidOR's `training`), sorted by file, or of one file.

    Raises:
        UserError: nothing there, a file that is no annotation, a video twice.
    """
    path = Path(path).expanduser()
    files = annotation_files(path)
    seen: dict[str, Path] = {}
    clips = []
    for file in _progress(files):
        clip = clip_of(read_json(file), str(file), file.name.split(".")[0])
        if clip.name in seen:
            raise UserError(f"{file}: video {clip.name} is in {seen[clip.name]} too; remove one of them")
        seen[clip.name] = file
        clips.append(clip)
    return clips


def annotation_files(path: Path) -> list[Path]:
    """The JSON files at or under a path.

    Raises:
        UserError: there are none.
    """
    if path.is_file():
        return [path]
    files = sorted(file for pattern in ("*.json", "*.json.gz") for file in path.rglob(pattern))
    if not files:
        what = "no *.json in this folder or below" if path.is_dir() else "no such file or folder"
        raise UserError(f"{path}: {what}; expected VidVRD or VidOR annotations, one JSON a video")
    return files


def read_relations(path: Path | str) -> RelationSet:
    """Relations of any form: an annotation folder or file, a prediction file, or `{video: [relation]}`.

    Raises:
        UserError: none of these, or a value that is wrong, named with its place.
    """
    path = Path(path).expanduser()
    if path.is_dir():
        return as_set(read_clips(path))
    content = read_json(annotation_files(path)[0])
    if not isinstance(content, dict):
        raise UserError(f"{path}: a JSON {type(content).__name__}, expected an object: annotations or predictions")
    if "trajectories" in content:
        return as_set([clip_of(content, str(path), path.name.split(".")[0])])
    version = _version(content.get("version", "VERSION 1.0"), path)
    results = content.get("results", content if "version" not in content else None)
    if not isinstance(results, dict):
        raise UserError(f"{path}: no object 'results'; expected {{'version': ..., 'results': {{video: [relation]}}}}")
    videos = {}
    for video, relations in results.items():
        place = f"{path}: results[{video!r}]"
        if isinstance(relations, dict):
            videos[video] = clip_of(relations, place, video).relations()
        elif isinstance(relations, list):
            videos[video] = [_relation(r, f"{place}[{i}]") for i, r in enumerate(relations)]
        else:
            raise UserError(f"{place}: a {type(relations).__name__}, expected a list of relations")
    return RelationSet(videos, normalised=version >= _NORMALISED_FROM)


def write_predictions(path: Path, predictions: Mapping[str, Sequence[Relation]]) -> None:
    """Predictions as the field's evaluators read them: VERSION 1.0, boxes in pixels; the file appears whole or not.

    Frames without a box must have been filled before: the form has no word for them.
    """
    results = {
        video: [
            {
                "triplet": list(r.triplet),
                "score": r.score,
                "duration": [r.begin, r.end],
                "sub_traj": r.subject.tolist(),
                "obj_traj": r.object.tolist(),
            }
            for r in relations
        ]
        for video, relations in predictions.items()
    }
    partial = path.with_name(f".{path.name}.partial")
    try:
        partial.write_text(json.dumps({"version": "VERSION 1.0", "results": results}, allow_nan=False))
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def write_clips(folder: Path, clips: Sequence[Clip]) -> None:
    """Annotations in VidVRD's form, one JSON a video, into a folder that is made if need be."""
    folder.mkdir(parents=True, exist_ok=True)
    for clip in clips:
        (folder / f"{clip.name}.json").write_text(json.dumps(clip_as_json(clip)), encoding="utf-8")


def clip_as_json(clip: Clip) -> dict[str, Any]:
    """A clip in VidVRD's annotation form."""
    frames: list[list[dict[str, Any]]] = [[] for _ in range(clip.frames)]
    for tid, track in clip.tracks.items():
        for frame, box in enumerate(track.boxes.tolist(), track.begin):
            if not math.isnan(box[0]):
                frames[frame].append({"tid": tid, "bbox": dict(zip(_SIDES, box, strict=True)), "generated": 0})
    return {
        "video_id": clip.name,
        "frame_count": clip.frames,
        "fps": clip.fps,
        "width": clip.width,
        "height": clip.height,
        "subject/objects": [{"tid": tid, "category": track.category} for tid, track in clip.tracks.items()],
        "trajectories": frames,
        "relation_instances": [
            {
                "subject_tid": i.subject,
                "object_tid": i.object,
                "predicate": i.predicate,
                "begin_fid": i.begin,
                "end_fid": i.end,
            }
            for i in clip.instances
        ],
    }


def clip_of(content: Any, place: str, name: str) -> Clip:
    """A clip from a JSON object of VidVRD's or VidOR's form; `place` stands in messages, `name` where none is given.

    Raises:
        UserError: a key is missing or a value wrong.
    """
    if not isinstance(content, dict):
        raise UserError(f"{place}: a JSON {type(content).__name__}, expected an object, a VidVRD or VidOR annotation")
    for key in ("subject/objects", "trajectories", "relation_instances"):
        if not isinstance(content.get(key), list):
            raise UserError(f"{place}: key {key!r} is no list; is this a VidVRD or VidOR annotation?")
    frames = content["trajectories"]
    categories = {}
    for i, entity in enumerate(content["subject/objects"]):
        where = f"{place}: subject/objects[{i}]"
        categories[_whole(entity, "tid", where)] = _word(entity, "category", where)
    instances = [
        _instance(value, f"{place}: relation_instances[{i}]", categories, len(frames))
        for i, value in enumerate(content["relation_instances"])
    ]
    tracks = _tracks(frames, categories, place)
    for i, instance in enumerate(instances):
        for side, tid in (("subject", instance.subject), ("object", instance.object)):
            seen = tid in tracks and np.isfinite(tracks[tid].during(instance.begin, instance.end)).any()
            if not seen:
                raise UserError(
                    f"{place}: relation_instances[{i}]: {side}_tid {tid} has no box in frames "
                    f"[{instance.begin}, {instance.end}); expected a trajectory there"
                )
    width, height = (_size(content, key, place) for key in ("width", "height"))
    fps = content.get("fps", 0.0)
    return Clip(
        name=str(content.get("video_id", name)),
        frames=len(frames),
        width=width,
        height=height,
        fps=float(fps) if _is_number(fps) else 0.0,
        tracks={tid: tracks.get(tid, Track(c, 0, np.empty((0, 4)))) for tid, c in categories.items()},
        instances=instances,
    )


def read_triplets(path: Path | str) -> set[Triplet]:
    """Triplets of a training split: of annotations, or of a CSV or Parquet table with subject, predicate, object.

    With a column `split`, rows of `train` or `training` count alone.
    """
    path = Path(path).expanduser()
    if path.suffix not in (".csv", ".parquet"):
        if path.is_dir():
            return {t for clip in read_clips(path) for t in clip.triplets}
        return read_relations(path).triplets
    if not path.is_file():
        raise UserError(f"{path}: no such file")
    try:
        table = pl.read_csv(path) if path.suffix == ".csv" else pl.read_parquet(path)
    except (OSError, pl.exceptions.PolarsError) as error:
        raise UserError(f"{path}: not readable as {path.suffix[1:]} ({' '.join(str(error).split())[:200]})") from error
    columns = ("subject", "predicate", "object")
    if missing := [name for name in columns if name not in table.columns]:
        raise UserError(f"{path}: no column '{missing[0]}'; expected subject, predicate and object")
    if "split" in table.columns:
        table = table.filter(pl.col("split").is_in(["train", "training"]))
    return {(str(s), str(p), str(o)) for s, p, o in table.select(columns).unique().iter_rows()}


def read_json(path: Path) -> Any:
    """The content of a JSON file, gzipped or not.

    Raises:
        UserError: it is missing or no JSON; the message has the line.
    """
    try:
        with gzip.open(path, "rb") if path.suffix == ".gz" else path.open("rb") as file:
            return json.load(file)
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except json.JSONDecodeError as error:
        raise UserError(f"{path}: line {error.lineno}, column {error.colno}: no JSON ({error.msg})") from error
    except (OSError, EOFError, UnicodeDecodeError, RecursionError) as error:
        raise UserError(f"{path}: not readable as JSON ({error})") from error


def _relation(value: Any, place: str) -> Relation:
    if not isinstance(value, dict):
        raise UserError(f"{place}: a {type(value).__name__}, expected an object with triplet, score, duration, boxes")
    triplet = value.get("triplet")
    if not (isinstance(triplet, list) and len(triplet) == 3 and all(isinstance(word, str) for word in triplet)):
        raise UserError(f"{place}.triplet: {triplet!r}, expected [subject, predicate, object], three names")
    score = value.get("score", 1.0)
    if not _is_number(score):
        raise UserError(f"{place}.score: {score!r}, expected a finite number")
    duration = value.get("duration")
    if not (isinstance(duration, list) and len(duration) == 2 and all(_is_whole(frame) for frame in duration)):
        raise UserError(f"{place}.duration: {duration!r}, expected two frames [begin, end)")
    begin, end = (int(frame) for frame in duration)
    if not 0 <= begin < end:
        raise UserError(f"{place}.duration: [{begin}, {end}), expected 0 <= begin < end")
    subject, other = (_boxes(value.get(key), f"{place}.{key}", end - begin) for key in ("sub_traj", "obj_traj"))
    return Relation((triplet[0], triplet[1], triplet[2]), begin, end, subject, other, float(score))


def _boxes(value: Any, place: str, frames: int) -> Boxes:
    try:
        boxes = np.asarray(value, dtype=np.float64)
    except (TypeError, ValueError):
        boxes = np.empty(0)
    if boxes.ndim != 2 or boxes.shape[1] != 4 or not np.isfinite(boxes).all():
        raise UserError(f"{place}: expected a list of boxes [left, top, right, bottom], finite numbers")
    if len(boxes) != frames:
        raise UserError(f"{place}: {len(boxes)} boxes, expected {frames} as the duration says")
    return boxes


def _instance(value: Any, place: str, categories: Mapping[int, str], frames: int) -> Instance:
    subject, other = (_whole(value, key, place) for key in ("subject_tid", "object_tid"))
    begin, end = (_whole(value, key, place) for key in ("begin_fid", "end_fid"))
    for key, tid in (("subject_tid", subject), ("object_tid", other)):
        if tid not in categories:
            raise UserError(f"{place}: {key} {tid} is not in subject/objects, which has {sorted(categories)}")
    if not 0 <= begin < end <= frames:
        raise UserError(
            f"{place}: frames [{begin}, {end}), expected 0 <= begin_fid < end_fid <= {frames} (trajectories)"
        )
    score = value.get("score", 1.0)
    if not _is_number(score):
        raise UserError(f"{place}: score {score!r}, expected a finite number")
    return Instance(subject, _word(value, "predicate", place), other, begin, end, float(score))


def _tracks(frames: list[Any], categories: Mapping[int, str], place: str) -> dict[int, Track]:
    rows: dict[int, tuple[list[int], list[list[float]]]] = {}
    for number, frame in enumerate(frames):
        try:
            for region in frame:
                box = region["bbox"]
                at, boxes = rows.setdefault(region["tid"], ([], []))
                if at and at[-1] == number:
                    raise UserError(f"{place}: trajectories[{number}]: tid {region['tid']} twice; remove one box")
                at.append(number)
                boxes.append([float(box[side]) for side in _SIDES])
        except (TypeError, KeyError, ValueError) as error:
            if isinstance(error, UserError):
                raise
            raise UserError(
                f"{place}: trajectories[{number}]: expected [{{tid, bbox: {{xmin, ymin, xmax, ymax}}}}]; {error!r}"
            ) from error
    tracks = {}
    for tid, (at, boxes) in rows.items():
        if tid not in categories:
            raise UserError(
                f"{place}: trajectories[{at[0]}]: tid {tid!r} is not in subject/objects, which has {sorted(categories)}"
            )
        values = np.array(boxes)
        if len(bad := np.flatnonzero(~np.isfinite(values).all(1) | (values[:, 2:] < values[:, :2]).any(1))):
            raise UserError(
                f"{place}: trajectories[{at[bad[0]]}]: tid {tid} has the box {values[bad[0]].tolist()}; expected "
                f"finite numbers with xmin <= xmax and ymin <= ymax"
            )
        full = np.full((at[-1] + 1 - at[0], 4), np.nan)
        full[np.array(at) - at[0]] = values
        tracks[tid] = Track(categories[tid], at[0], full)
    return tracks


def _version(value: Any, path: Path) -> float:
    try:
        return float(str(value).upper().removeprefix("VERSION").strip())
    except ValueError:
        raise UserError(f"{path}: version {value!r}, expected such as 'VERSION 1.0'") from None


def _whole(value: Any, key: str, place: str) -> int:
    found = value.get(key) if isinstance(value, dict) else None
    if not _is_whole(found):
        raise UserError(f"{place}: {key} is {found!r}, expected a whole number")
    return int(found)  # type: ignore[arg-type]


def _word(value: Any, key: str, place: str) -> str:
    found = value.get(key) if isinstance(value, dict) else None
    if not isinstance(found, str) or not found:
        raise UserError(f"{place}: {key} is {found!r}, expected a name")
    return found


def _size(content: Mapping[str, Any], key: str, place: str) -> int:
    found = content.get(key, 0)
    if not _is_whole(found) or found < 0:
        raise UserError(f"{place}: {key} is {found!r}, expected pixels")
    return int(found)


def _is_whole(value: Any) -> bool:
    return _is_number(value) and int(value) == value


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _progress(files: Sequence[Path]) -> Iterator[Path]:
    """The files, with a bar on a terminal where there are many."""
    if len(files) < 100:
        yield from files
        return
    from rich.progress import track

    yield from track(files, description="annotations", transient=True)
