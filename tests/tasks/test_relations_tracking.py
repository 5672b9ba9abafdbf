"""From boxes in single frames to tracks."""

import numpy as np
import pytest
from moezoo.datasets.relations_tracks import Detections
from moezoo.tasks.relations_tracking import track_detections

pytest.importorskip(
    "trackers", reason="trackers is not installed: pip install 'moezoo[relations]'", exc_type=ImportError
)


def detections(paths, frames, noise=0.5, seed=0):
    """Of objects (class, boxes by frame) in the frames looked at, shaken, in a random order within a frame."""
    rng = np.random.default_rng(seed)
    rows = []
    for frame in frames:
        for index in rng.permutation(len(paths)):
            category, boxes = paths[index]
            if np.isfinite(boxes[frame, 0]):
                rows.append((frame, boxes[frame] + rng.normal(0, noise, 4), 0.9, category))
    frame, boxes, score, category = zip(*rows, strict=True)
    return Detections(np.array(frame), np.array(boxes), np.array(score), list(category))


def moving(x0, x1, y, frames=60, size=20.0):
    x = np.linspace(x0, x1, frames)
    return np.stack([x, np.full(frames, y), x + size, np.full(frames, y + size)], 1)


def test_each_object_becomes_one_track_that_follows_it():
    paths = [("dog", moving(0, 150, 10)), ("dog", moving(150, 0, 60)), ("cat", moving(20, 80, 100))]
    for every in (1, 3):
        tracks = track_detections(detections(paths, range(0, 60, every)), range(0, 60, every), 25.0)
        assert sorted(t.category for t in tracks.values()) == ["cat", "dog", "dog"]
        for category, boxes in paths:
            # It is confirmed by the second look.
            fits = [t for t in tracks.values() if t.category == category
                    and np.abs(t.boxes - boxes[t.begin : t.end]).max() < 4]  # fmt: skip
            assert len(fits) == 1
            assert fits[0].begin <= every
            assert fits[0].end == 60 - (59 % every)
            assert np.isfinite(fits[0].boxes).all()


def test_a_rider_never_becomes_the_bicycle():
    path = moving(0, 100, 10)
    tracks = track_detections(detections([("person", path), ("bicycle", path + 2)], range(60)), range(60), 25.0)
    assert sorted(t.category for t in tracks.values()) == ["bicycle", "person"]


def test_a_short_absence_is_bridged():
    path = moving(0, 100, 10)
    path[25:33] = np.nan
    (track,) = track_detections(detections([("dog", path)], range(60)), range(60), 25.0).values()
    assert track.end == 60
    assert np.isfinite(track.boxes).all()


def test_unsure_boxes_continue_a_track_and_begin_none():
    found = detections([("dog", moving(0, 60, 10)), ("cat", moving(0, 60, 80))], range(60))
    score = np.where((found.frame >= 20) & (found.frame < 30), 0.2, found.score)
    score[np.array(found.category) == "cat"] = 0.3
    (track,) = track_detections(found._replace(score=score), range(60), 25.0).values()
    assert (track.category, track.end) == ("dog", 60)
    assert not track_detections(Detections(np.zeros(0, int), np.empty((0, 4)), np.empty(0), []), range(9), 25.0)
