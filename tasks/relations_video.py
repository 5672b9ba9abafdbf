"""`moezoo relations video`: from the user's clip to relations, an overlay and a page, all or nothing."""

import json
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import polars as pl
import torch

from ..datasets.relations_formats import clip_as_json, write_predictions
from ..datasets.relations_progress import progress
from ..datasets.relations_table import Clip, Track
from ..datasets.relations_tracks import Detections, read_tracks
from ..datasets.relations_video import Video, open_video
from ..errors import UserError
from ..zoo import weights as zoo_weights
from ..zoo.base import ZooModel
from ..zoo.detectors import Detector
from .relations_answers import Answer, answer, fitness
from .relations_association import filled
from .relations_overlay import rank, write_overlay
from .relations_report import write_report
from .relations_tracking import LOW, track_detections

_JSON_ROWS = 1_000_000  # pairs of boxes in relations.json, about 60 MB
FILES = ("overlay.mp4", "relations.csv", "relations.json", "relations.parquet", "report.html", "tracks.json")


@dataclass(frozen=True)
class Request:
    """What the user asks for.

    Attributes:
        clip: the video.
        output: folder that comes to hold `FILES`.
        tracks: MOTChallenge or VidVRD file; None asks the detector.
        category: of tracks whose file names none.
        fps: make this constant rate of the video's.
        every: frames from one look of the detector to the next.
        detector, detector_weights: see `zoo.detectors.Detector`.
        threshold: score from which a detection begins a track.
        weights: a relation model's name or folder, `none` for geometry alone, None for whichever shipped one fits.
        overwrite: replace an earlier output.
    """

    clip: Path
    output: Path
    tracks: Path | None = None
    category: str = "person"
    fps: float | None = None
    every: int = 3
    detector: str = "fasterrcnn_mobilenet_v3_large_320_fpn"
    detector_weights: str | None = None
    threshold: float = 0.5
    weights: str | None = None
    overwrite: bool = False


@dataclass(frozen=True)
class Outcome:
    """What was found and where it lies."""

    output: Path
    clip: Clip
    answer: Answer


def run(request: Request) -> Outcome:
    """Carry out a request; the output folder appears when all of it is done.

    Raises:
        UserError: anything wrong with the video, the tracks, the weights or the output folder.
    """
    _check(request)
    model, name, why = _model(request.weights)
    video = open_video(request.clip, request.fps)
    tracks, origin = _tracks(request, video)
    seen = Clip(request.clip.stem, len(video), video.width, video.height, video.fps, tracks, [])
    if request.weights is None:
        model, name, why = _shipped(seen)
    found = answer(seen, model, name, why)
    clip = replace(seen, instances=found.instances)
    with _new_folder(request.output, request.overwrite) as folder:
        _write_tables(folder, clip, found)
        stills = write_overlay(video, clip, folder / "overlay.mp4", found.source)
        write_report(folder / "report.html", video, clip, found, origin, stills, folder / "overlay.mp4")
    return Outcome(request.output, clip, found)


def relations_table(clip: Clip, source: str) -> pl.DataFrame:
    """One row a relation, best first: video, subject_id, subject, predicate, object_id, object, begin_frame, end_frame
    (excluded), begin_seconds, end_seconds, score, source."""
    rows = [
        {
            "video": clip.name,
            "subject_id": i.subject,
            "subject": clip.tracks[i.subject].category,
            "predicate": i.predicate,
            "object_id": i.object,
            "object": clip.tracks[i.object].category,
            "begin_frame": i.begin,
            "end_frame": i.end,
            "begin_seconds": i.begin / clip.fps,
            "end_seconds": i.end / clip.fps,
            "score": i.score,
            "source": source,
        }
        for i in clip.instances
    ]
    text, whole = dict.fromkeys(("video", "subject", "predicate", "object", "source"), pl.String), pl.Int64
    numbers = dict.fromkeys(("begin_seconds", "end_seconds", "score"), pl.Float64)
    order = ["video", "subject_id", "subject", "predicate", "object_id", "object", "begin_frame", "end_frame",
             "begin_seconds", "end_seconds", "score", "source"]  # fmt: skip
    types = {name: text.get(name) or numbers.get(name) or whole for name in order}
    return pl.DataFrame(rows, schema=types)


def detect(video: Video, detector: Detector, every: int) -> tuple[Detections, range]:
    """What the detector sees in every so many frames, as far as a tracker uses it, and which frames those are."""
    frames = range(0, len(video), every)
    at, boxes, scores, names = [], [np.empty((0, 4))], [np.empty(0)], list[str]()
    for frame, picture in progress(video.pictures(every), len(frames), "detection"):
        seen = detector(picture)
        sure = int((seen.score >= LOW).sum())  # they come by falling score
        at += [frame] * sure
        boxes.append(seen.boxes[:sure])
        scores.append(seen.score[:sure])
        names += seen.category[:sure]
    return Detections(np.array(at, dtype=np.int64), np.concatenate(boxes), np.concatenate(scores), names), frames


def _check(request: Request) -> None:
    if request.every < 1:
        raise UserError(f"--every {request.every}: expected 1 or more frames")
    if not 0 < request.threshold < 1:
        raise UserError(f"--threshold {request.threshold:g}: expected a score between 0 and 1")
    _check_folder(request.output, request.overwrite)


def _tracks(request: Request, video: Video) -> tuple[dict[int, Track], str]:
    """Tracks in frames of the video, and in words where they are from."""
    if request.tracks is not None:
        given = read_tracks(request.tracks, video, request.category)
        if not isinstance(given, Detections):
            return given, f"tracks of {request.tracks.name}"
        tracks = track_detections(given, range(len(video)), video.fps, request.threshold)
        origin = f"detections of {request.tracks.name}, tracked by ByteTrack"
    else:
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        detector = Detector(request.detector, request.detector_weights, device)
        found, frames = detect(video, detector, request.every)
        tracks = track_detections(found, frames, video.fps, request.threshold)
        origin = f"{detector.name} ({detector.file.name}) on every {_ordinal(request.every)}frame, tracked by ByteTrack"
    if not tracks:
        raise UserError(
            f"{request.clip}: no object seen for two looks with a score of {request.threshold:g}; expected some: "
            f"lower --threshold or give --tracks"
        )
    return tracks, origin


def _ordinal(n: int) -> str:
    return (
        "" if n == 1 else f"{n}{ {1: 'st', 2: 'nd', 3: 'rd'}.get(n % 10 if n % 100 not in (11, 12, 13) else 0, 'th') } "
    )


def _model(given: str | None) -> tuple[ZooModel | None, str, str]:
    """The relation model asked for, its name, and why there is none."""
    if given is None:
        return None, "", ""
    if given == "none":
        return None, "", "--weights none asked for it"
    return zoo_weights.load(given), given, ""


def _shipped(clip: Clip) -> tuple[ZooModel | None, str, str]:
    """The first of the relation models that came with the package which knows all classes of the clip."""
    root = zoo_weights.Places.from_settings().shipped / "relations"
    reasons = []
    for folder in sorted(path for path in root.glob("*") if (path / "config.json").is_file()):
        model, name = zoo_weights.load_folder(folder), f"relations/{folder.name}"
        fits, why = fitness(clip, model, name)
        if fits:
            return model, name, ""
        reasons.append(why)
    return None, "", next((why for why in reasons if "knows" in why), "no trained model for videos is shipped")


def _write_tables(folder: Path, clip: Clip, found: Answer) -> None:
    relations = [
        r._replace(subject=filled(r.subject).round(2), object=filled(r.object).round(2))
        for r in _within(clip, found.source).relations()
    ]
    write_predictions(folder / "relations.json", {clip.name: relations})
    table = relations_table(clip, found.source)
    table.write_parquet(folder / "relations.parquet")
    table.write_csv(folder / "relations.csv")
    (folder / "tracks.json").write_text(json.dumps(clip_as_json(clip), allow_nan=False), encoding="utf-8")


def _within(clip: Clip, source: str) -> Clip:
    """The clip with the relations that a JSON of boxes can hold: long videos have more than a text file should."""
    kept, rows = set(), 0
    for i in sorted(clip.instances, key=lambda i: (rank(i.predicate, source), -i.score)):
        rows += i.end - i.begin
        if rows > _JSON_ROWS:
            break
        kept.add(i)
    return replace(clip, instances=[i for i in clip.instances if i in kept])


def _check_folder(folder: Path, overwrite: bool) -> None:
    if not folder.exists():
        return
    if not folder.is_dir():
        raise UserError(f"--output {folder}: a file; expected a folder")
    there = {entry.name for entry in folder.iterdir()}
    if foreign := sorted(there - set(FILES)):
        raise UserError(f"--output {folder}: holds {foreign[0]!r}, which is not ours; give another folder")
    if there and not overwrite:
        raise UserError(f"--output {folder}: holds an earlier output; add --overwrite to replace it")


@contextmanager
def _new_folder(folder: Path, overwrite: bool) -> Iterator[Path]:
    """A folder that takes its place when the block ends well, and vanishes when it does not."""
    new = folder.with_name(f".{folder.name}.new-{uuid.uuid4().hex[:8]}")
    try:
        new.mkdir(parents=True)
    except OSError as error:
        raise UserError(f"--output {folder}: not writable ({error.strerror})") from error
    try:
        yield new
        _check_folder(folder, overwrite)
        if folder.exists():
            shutil.rmtree(folder)
        new.rename(folder)
    finally:
        shutil.rmtree(new, ignore_errors=True)
