"""Tracks of one video from the user's file."""

from pathlib import Path

import numpy as np
import pytest
from moezoo.datasets.relations_formats import write_clips
from moezoo.datasets.relations_table import Clip, Track
from moezoo.datasets.relations_tracks import Detections, fill_gaps, read_tracks
from moezoo.datasets.relations_video import Video
from moezoo.errors import UserError


def video(frames=40, width=200, height=100, source=None):
    source = np.arange(frames) if source is None else np.array(source)
    return Video(Path("clip.mp4"), width, height, 25.0, source, frames)


def rows(tmp_path, *lines):
    path = tmp_path / "tracks.txt"
    path.write_text("\n".join(lines))
    return path


def test_mot_tracks_and_their_classes(tmp_path):
    lines = [f"{f},{tid},{10 + f},20,30,40,1,{name}" for tid, name in ((1, "dog"), (7, "cat")) for f in (1, 2, 3)]
    tracks = read_tracks(rows(tmp_path, *lines), video())
    assert {tid: track.category for tid, track in tracks.items()} == {1: "dog", 7: "cat"}
    assert tracks[1].begin == 0
    assert tracks[1].boxes.tolist() == [[11, 20, 41, 60], [12, 20, 42, 60], [13, 20, 43, 60]]


def test_a_class_number_counts_in_mot16_alone(tmp_path):
    sixteen = rows(tmp_path, *(f"{f},{tid},1,1,9,9,1,{c},1.0" for f in (1, 2) for tid, c in ((1, 3), (2, 1), (3, 8))))
    assert {tid: t.category for tid, t in read_tracks(sixteen, video()).items()} == {1: "car", 2: "person"}
    fifteen = rows(tmp_path, *(f"{f},1,1,1,9,9,1,3.0,5.5,0" for f in (1, 2)))  # metres, no class
    assert [t.category for t in read_tracks(fifteen, video(), "dog").values()] == ["dog"]


def test_rows_without_ids_are_detections(tmp_path):
    path = rows(tmp_path, "2,-1,5,6,10,20,0.9", "1,-1,1,2,3,4,0.5", "2,-1,50,6,10,20,0.4,car")
    found = read_tracks(path, video())
    assert isinstance(found, Detections)
    assert found.frame.tolist() == [0, 1, 1]
    assert found.boxes[1].tolist() == [5, 6, 15, 26]
    assert found.score.tolist() == [0.5, 0.9, 0.4]
    assert list(found.category) == ["person", "person", "car"]


def test_frames_of_a_resampled_video_show_the_boxes_of_the_stored_ones(tmp_path):
    path = rows(tmp_path, *(f"{f},1,{f},0,10,10" for f in range(1, 6)))
    (track,) = read_tracks(path, video(5, source=[0, 0, 1, 3, 3, 4])).values()
    assert track.boxes[:, 0].tolist() == [1, 1, 2, 4, 4, 5]
    found = read_tracks(rows(tmp_path, "1,-1,1,0,9,9,1", "4,-1,4,0,9,9,1"), video(5, source=[0, 0, 1, 3, 3, 4]))
    assert found.frame.tolist() == [0, 1, 3, 4]
    assert found.boxes[:, 0].tolist() == [1, 1, 4, 4]


def test_vidvrd_tracks_are_those_of_the_clip(tmp_path):
    boxes = np.stack([np.array([x, 5.0, x + 20, 30]) for x in range(40)])
    clip = Clip("clip", 40, 200, 100, 25.0, {3: Track("bird", 0, boxes), 9: Track("dog", 0, np.empty((0, 4)))}, [])
    write_clips(tmp_path, [clip])
    tracks = read_tracks(tmp_path / "clip.json", video())
    assert list(tracks) == [3]
    assert tracks[3].category == "bird"
    assert np.array_equal(tracks[3].boxes, boxes)


def test_short_gaps_are_filled_and_long_ones_are_not():
    boxes = np.full((60, 4), np.nan)
    boxes[[0, 10, 50, 59]] = np.array([[0], [10], [50], [59]]) + np.array([0.0, 0, 5, 5])
    filled = fill_gaps(Track("x", 3, boxes)).boxes[:, 0]
    assert filled[:11].tolist() == list(range(11))
    assert np.isnan(filled[11:50]).all()
    assert filled[50:].tolist() == list(range(50, 60))


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (["41,1,1,1,9,9"], "tracks up to frame 41, clip.mp4 has 40"),
        (["1,1,500,1,9,9", "2,1,500,1,9,9"], "100% of the boxes lie outside of the 200x100 pixels"),
        (["1,1,1,1,9"], "columns"),
        (["1,1,a,1,9,9"], "row 1"),
        (["1,1,1,1,9,9", "1,1,1,1,9,9"], "twice"),
        (["1,-1,1,1,9,9,1", "0,-1,1,1,9,9,1"], "row 2"),
        (["1,-1,1,1,9,9,1", "99,-1,1,1,9,9,1"], "frame 99"),
        (["1,1,1,1,9,9,1,8,1.0"], "no track"),
    ],
)
def test_one_line_for_tracks_that_do_not_fit(tmp_path, lines, message):
    path = rows(tmp_path, *lines)
    with pytest.raises(UserError, match=message) as error:
        read_tracks(path, video())
    assert str(path) in str(error.value)


def test_one_line_for_tracks_of_another_video(tmp_path):
    boxes = np.tile([1.0, 2, 30, 40], (10, 1))
    write_clips(tmp_path, [Clip("other", 10, 1280, 720, 25.0, {0: Track("dog", 0, boxes)}, [])])
    with pytest.raises(UserError, match=r"1280x720 pixels, clip\.mp4 has 200x100"):
        read_tracks(tmp_path / "other.json", video())
    write_clips(tmp_path, [Clip("short", 10, 200, 100, 25.0, {0: Track("dog", 0, boxes)}, [])])
    with pytest.raises(UserError, match=r"tracks of 10 frames, clip\.mp4 has 40"):
        read_tracks(tmp_path / "short.json", video())
    with pytest.raises(UserError, match="no such file"):
        read_tracks(tmp_path / "none.txt", video())
