"""From boxes in single frames to tracks, with the trackers package: ByteTrack, one tracker a class."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from ..datasets.relations_table import Track
from ..datasets.relations_tracks import Detections, fill_gaps
from ..errors import UserError

_LOST = 30  # frames at 30 a second, the package's unit: a track waits a second
LOW = 0.1  # score from which a box may continue a track


def track_detections(
    found: Detections, frames: Sequence[int] | range, fps: float, threshold: float = 0.5
) -> dict[int, Track]:
    """Tracks of each class, numbered from 1 in order of their first frame; boxes between detections are interpolated.

    ByteTrack (Zhang et al., ECCV 2022): sure boxes are linked first, then unsure ones continue what is left. Classes
    have trackers of their own, so that a rider never becomes the bicycle.

    Args:
        found: detections; those below 0.1 take no part.
        frames: that were looked at, in order.
        fps: of the video, from whose clock the tracker takes how far things move between two looks.
        threshold: score that begins a track.

    Raises:
        UserError: the package or a library of it is missing.
    """
    trackers, supervision = _libraries()
    seen: dict[tuple[str, int], tuple[list[int], list[np.ndarray]]] = {}
    names = np.array(found.category, dtype=object)
    for category in sorted(set(found.category)):
        rows = np.flatnonzero((names == category) & (found.score >= LOW))
        if not (found.score[rows] >= threshold).any():
            continue
        tracker = trackers.ByteTrackTracker(
            lost_track_buffer=_LOST,
            frame_rate=fps,
            track_activation_threshold=threshold,
            high_conf_det_threshold=threshold,
        )
        first, last = (np.searchsorted(found.frame[rows], frames, side) for side in ("left", "right"))
        for frame, a, b in zip(frames, first.tolist(), last.tolist(), strict=True):
            some = rows[a:b]
            detections = supervision.Detections(xyxy=found.boxes[some].reshape(-1, 4), confidence=found.score[some])
            result = tracker.update(detections, timestamp=frame / fps)
            for number, box in zip(result.tracker_id.tolist(), result.xyxy, strict=True):
                if number >= 0:
                    at, boxes = seen.setdefault((category, number), ([], []))
                    at.append(frame)
                    boxes.append(np.asarray(box, dtype=np.float64))
    ordered = sorted(seen.items(), key=lambda item: (item[1][0][0], item[0]))
    return {tid: _track(category, *rows) for tid, ((category, _), rows) in enumerate(ordered, 1)}


def _track(category: str, at: list[int], boxes: list[np.ndarray]) -> Track:
    full = np.full((at[-1] + 1 - at[0], 4), np.nan)
    full[np.array(at) - at[0]] = np.stack(boxes)
    return fill_gaps(Track(category, at[0], full), len(full))


def _libraries() -> tuple[Any, Any]:
    try:
        import supervision
        import trackers
    except ImportError as error:  # opencv, which it brings, needs libGL of the system
        hint = "apt-get install libgl1 libglib2.0-0" if "libG" in str(error) else "pip install 'moezoo[relations]'"
        raise UserError(f"detections are tracked with the trackers package ({error}); {hint}") from error
    return trackers, supervision
