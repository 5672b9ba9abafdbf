"""The page of one video: one file without a network, with the overlay, a timeline of relations and how they came."""

import base64
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jinja2 import Environment, FileSystemLoader, StrictUndefined

from .. import __version__
from ..datasets.relations_table import Clip, Instance
from ..datasets.relations_video import Video
from .relations_answers import Answer
from .relations_geometry import RULES
from .relations_overlay import Stills, colours, name_of, rank

_EMBEDDED = 12 << 20  # bytes of an overlay that the page carries itself
_TICKS = 8
_STEPS = (0.1, 0.2, 0.5, 1, 2, 5, 10, 15, 30, 60, 120, 300, 600, 1800, 3600)  # seconds between ticks


@dataclass(frozen=True)
class Row:
    """All spans of one triplet of two tracks; `spans` are (left, width) in thousandths of the video, and seconds."""

    subject: int
    predicate: str
    object: int
    score: float
    seconds: float
    spans: list[tuple[float, float, float, float]]


def write_report(
    path: Path, video: Video, clip: Clip, found: Answer, origin: str, stills: Stills, overlay: Path
) -> None:
    """Write the page.

    Args:
        clip: tracks and relations.
        found: where the relations are from.
        origin: in words, where the tracks are from.
        stills: pictures of the objects and of a frame.
        overlay: the mp4 beside the page; embedded up to 12 MB.
    """
    rows = timeline(clip, found.source)
    predicates = sorted({row.predicate for row in rows}, key=lambda p: (rank(p, found.source), p))
    context = {
        "clip": clip,
        "source": video.path.name,
        "seconds": clip.frames / clip.fps,
        "stored": video.stored,
        "answer": found,
        "origin": origin,
        "rows": rows,
        "objects": _objects(clip, stills),
        "predicates": _predicates(rows, predicates),
        "names": {tid: name_of(tid, track) for tid, track in clip.tracks.items()},
        "object_colour": colours(clip),
        "rules": {rule.predicate: rule.says for rule in RULES} if found.source == "geometry" else {},
        "ticks": _ticks(clip.frames / clip.fps),
        "poster": stills.poster,
        "film": _film(overlay),
        "version": __version__,
    }
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent / "templates"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["clock"] = clock
    text = environment.get_template("relations_report.html.jinja").render(context)
    path.write_text(text.rstrip() + "\n", encoding="utf-8")


def timeline(clip: Clip, source: str) -> list[Row]:
    """The relations by pair and predicate, in the overlay's order."""
    spans: dict[tuple[int, str, int], list[Instance]] = defaultdict(list)
    for i in clip.instances:
        spans[i.subject, i.predicate, i.object].append(i)
    rows = []
    for (s, p, o), parts in spans.items():
        parts = sorted(parts, key=lambda i: i.begin)
        bars = [
            (1000 * i.begin / clip.frames, 1000 * (i.end - i.begin) / clip.frames, i.begin / clip.fps, i.end / clip.fps)
            for i in parts
        ]
        held = sum(i.end - i.begin for i in parts) / clip.fps
        rows.append(Row(s, p, o, max(i.score for i in parts), held, bars))
    return sorted(rows, key=lambda row: (rank(row.predicate, source), -row.score, row.subject, row.object))


def clock(seconds: float) -> str:
    """Seconds as 0:07.3."""
    tenths = round(seconds * 10)
    return f"{tenths // 600}:{tenths // 10 % 60:02d}.{tenths % 10}"


def _objects(clip: Clip, stills: Stills) -> list[dict[str, Any]]:
    """Of each track its picture, and when it is in view, in thousandths of the video."""
    found: list[dict[str, Any]] = []
    for tid, track in clip.tracks.items():
        seen = np.concatenate([[False], np.isfinite(track.boxes[:, 0]), [False]])
        edges = (np.flatnonzero(np.diff(seen.astype(np.int8))) + track.begin).tolist()
        spans = [(1000 * a / clip.frames, 1000 * (b - a) / clip.frames)
                 for a, b in zip(edges[::2], edges[1::2], strict=True)]  # fmt: skip
        found.append({
            "id": tid,
            "picture": stills.crops.get(tid),
            "begin": edges[0] / clip.fps,
            "end": edges[-1] / clip.fps,
            "spans": spans,
        })  # fmt: skip
    return found


def _predicates(rows: list[Row], names: list[str]) -> list[tuple[str, int, float]]:
    """Of each predicate its pairs and seconds."""
    return [
        (name, sum(row.predicate == name for row in rows), sum(row.seconds for row in rows if row.predicate == name))
        for name in names
    ]


def _ticks(seconds: float) -> list[tuple[float, str]]:
    """Positions in thousandths and labels of the time axis."""
    step = next((step for step in _STEPS if seconds / step <= _TICKS), seconds / _TICKS)
    digits = 1 if step < 1 else 0
    times = np.arange(0, seconds, step).tolist()
    return [
        (1000 * time / seconds, f"{time:.{digits}f} s" if seconds < 120 else clock(time).partition(".")[0])
        for time in times
        if time <= 0.95 * seconds  # a later label would leave the page
    ]


def _film(overlay: Path) -> str:
    """The overlay as the page's own, or by name where it is too large."""
    if overlay.stat().st_size > _EMBEDDED:
        return overlay.name
    return f"data:video/mp4;base64,{base64.b64encode(overlay.read_bytes()).decode()}"
