"""Files of the field: read as written, and one line for each mistake, with its place."""

import gzip
import json

import numpy as np
import pytest
from moezoo.datasets.relations_formats import (
    clip_as_json,
    read_clips,
    read_relations,
    read_triplets,
    write_clips,
    write_predictions,
)
from moezoo.datasets.relations_mot import read_mot
from moezoo.datasets.relations_shapes import make_clip, make_world
from moezoo.datasets.relations_sources import read_vocabulary
from moezoo.datasets.relations_table import Clip, Instance, Track
from moezoo.errors import UserError


@pytest.fixture
def clip():
    gap = np.arange(24.0).reshape(6, 4) + np.array([0, 0, 9, 9])
    gap[2] = np.nan
    tracks = {3: Track("dog", 2, gap), 7: Track("ball", 0, np.tile([1.0, 2.0, 5.0, 8.0], (9, 1)))}
    return Clip("v1", 10, 100, 50, 30.0, tracks, [Instance(3, "chase", 7, 3, 8), Instance(7, "left", 3, 2, 4)])


def annotation(clip, **changes):
    return clip_as_json(clip) | changes


def test_annotations_survive_writing_and_reading(tmp_path, clip):
    world = make_world(0, 2)
    clips = [clip, *(make_clip(world, 0, i, 45, False) for i in range(2))]
    write_clips(tmp_path / "0001", clips)  # VidOR has folders in folders
    back = {c.name: c for c in read_clips(tmp_path)}
    for one in clips:
        other = back[one.name]
        assert (one.frames, one.width, one.height, list(one.instances)) == (
            other.frames,
            other.width,
            other.height,
            list(other.instances),
        )
        for tid, track in one.tracks.items():
            assert (other.tracks[tid].category, other.tracks[tid].begin) == (track.category, track.begin)
            np.testing.assert_array_equal(other.tracks[tid].boxes, track.boxes)
    relations = read_relations(tmp_path).videos["v1"]
    assert relations[0].triplet == ("dog", "chase", "ball") and len(relations[0].subject) == 5
    assert np.isnan(relations[0].subject[1]).all(), "out of view"
    assert read_triplets(tmp_path) >= {("dog", "chase", "ball"), ("ball", "left", "dog")}


def test_predictions_survive_writing_and_reading(tmp_path, clip):
    relations = [r for r in clip.relations() if not np.isnan(r.subject).any() and not np.isnan(r.object).any()]
    relations = [r._replace(score=0.25) for r in relations] or [
        clip.relations()[1]._replace(object=np.ones((2, 4)), score=0.25)
    ]
    write_predictions(tmp_path / "p.json", {"v1": relations, "v2": []})
    written = json.loads((tmp_path / "p.json").read_text())
    assert written["version"] == "VERSION 1.0" and set(written["results"]["v1"][0]) == {
        "triplet",
        "score",
        "duration",
        "sub_traj",
        "obj_traj",
    }
    back = read_relations(tmp_path / "p.json")
    assert not back.normalised and back.videos["v2"] == []
    for one, other in zip(relations, back.videos["v1"], strict=True):
        assert one[:3] == other[:3] and one.score == other.score
        np.testing.assert_array_equal(one.subject, other.subject)
    with pytest.raises(ValueError):
        write_predictions(tmp_path / "q.json", {"v1": clip.relations()})
    assert [f.name for f in tmp_path.iterdir()] == ["p.json"], "nothing half-written stays"


def test_all_versions_are_read(tmp_path, clip):
    relation = {"triplet": ["a", "b", "c"], "score": 1, "duration": [0, 1], "sub_traj": [[0, 0, 1, 1]]}
    relation["obj_traj"] = relation["sub_traj"]
    for version, normalised in (("VERSION 1.0", False), ("VERSION 2.1", True), ("VERSION 3.0", True)):
        results = {"v": annotation(clip)} if version == "VERSION 3.0" else {"v": [relation]}
        path = tmp_path / "p.json.gz"
        path.write_bytes(gzip.compress(json.dumps({"version": version, "results": results}).encode()))
        got = read_relations(path)
        assert got.normalised is normalised and len(got.videos["v"]) in (1, 2)


def broken(clip, path, value):
    content = annotation(clip)
    at = content
    for key in path[:-1]:
        at = at[key]
    at[path[-1]] = value
    return content


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        (["trajectories"], None, "'trajectories' is no list"),
        (["subject/objects", 0, "category"], "", "subject/objects[0]: category is ''"),
        (["subject/objects", 1, "tid"], 99, "object_tid 7 is not in subject/objects"),
        (["trajectories", 1, 0, "bbox"], {}, "trajectories[1]: expected"),
        (["trajectories", 4, 0, "bbox", "xmax"], -5, "trajectories"),
        (["trajectories", 5, 0, "tid"], 7, "tid 7 twice"),
        (["trajectories", 1, 0, "tid"], 11, "tid 11 is not in subject/objects"),
        (["relation_instances", 0, "end_fid"], 11, "relation_instances[0]: frames [3, 11)"),
        (["relation_instances", 1, "predicate"], 5, "relation_instances[1]: predicate is 5"),
        (["relation_instances", 0, "begin_fid"], "3", "begin_fid is '3'"),
        (["relation_instances", 1], {"subject_tid": 3, "object_tid": 7, "predicate": "x", "begin_fid": 8,
                                     "end_fid": 10}, "subject_tid 3 has no box"),
        (["width"], -1, "width is -1"),
    ],
)  # fmt: skip
def test_a_wrong_annotation_gets_one_line(tmp_path, clip, path, value, message):
    (tmp_path / "a.json").write_text(json.dumps(broken(clip, path, value)))
    with pytest.raises(UserError) as caught:
        read_clips(tmp_path)
    assert message in str(caught.value) and "a.json" in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"triplet": ["a", "b"]}, "triplet: ['a', 'b'], expected"),
        ({"score": float("nan")}, "score"),
        ({"duration": [2, 2]}, "[2, 2), expected 0 <= begin < end"),
        ({"duration": [0, 3]}, "2 boxes, expected 3"),
        ({"sub_traj": [[0, 0, 1]] * 2}, "sub_traj: expected a list of boxes"),
        ({"obj_traj": None}, "obj_traj: expected a list of boxes"),
    ],
)
def test_a_wrong_prediction_gets_one_line(tmp_path, change, message):
    relation = {"triplet": ["a", "b", "c"], "score": 1, "duration": [0, 2], "sub_traj": [[0, 0, 1, 1]] * 2}
    relation |= {"obj_traj": [[0, 0, 1, 1]] * 2} | change
    path = tmp_path / "p.json"
    path.write_text(json.dumps({"version": "VERSION 1.0", "results": {"v": [relation]}}))
    with pytest.raises(UserError, match=r"p\.json: results") as caught:
        read_relations(path)
    assert message in str(caught.value)


def test_what_is_no_file_of_the_field_gets_one_line(tmp_path, clip):
    (tmp_path / "empty").mkdir()
    write_clips(tmp_path / "twice" / "a", [clip])
    write_clips(tmp_path / "twice" / "b", [clip])
    (tmp_path / "cut.json").write_text('{"v": [')
    (tmp_path / "list.json").write_text("[]")
    (tmp_path / "version.json").write_text('{"version": "new", "results": {}}')
    (tmp_path / "zip.json.gz").write_bytes(b"no gzip")
    for name, message in (
        ("empty", "no *.json"),
        ("none", "no such file"),
        ("twice", "video v1 is in"),
        ("cut.json", "line 1, column"),
        ("list.json", "a JSON list"),
        ("version.json", "version 'new'"),
        ("zip.json.gz", "not readable"),
    ):
        with pytest.raises(UserError) as caught:
            read_relations(tmp_path / name)
        assert message in str(caught.value) and name.split(".")[0] in str(caught.value)


def test_vocabularies_and_triplets(tmp_path):
    (tmp_path / "plain.txt").write_text("dog\n\nball\n")
    (tmp_path / "tree.csv").write_text("id,value\nobject,\nobject.pet,\nobject.pet.dog,\nobject.hamster/rat,\n")
    (tmp_path / "twice.txt").write_text("dog\ndog\n")
    assert read_vocabulary(tmp_path / "plain.txt") == ("dog", "ball")
    assert read_vocabulary(tmp_path / "tree.csv") == ("dog", "hamster/rat")
    for name, message in (("twice.txt", "twice"), ("none.txt", "no such file")):
        with pytest.raises(UserError, match=message):
            read_vocabulary(tmp_path / name)
    (tmp_path / "t.csv").write_text("split,subject,predicate,object\ntrain,a,b,c\ntest,d,e,f\n")
    assert read_triplets(tmp_path / "t.csv") == {("a", "b", "c")}
    (tmp_path / "u.csv").write_text("subject,object\na,b\n")
    with pytest.raises(UserError, match="no column 'predicate'"):
        read_triplets(tmp_path / "u.csv")


def test_mot_tracks(tmp_path):
    path = tmp_path / "t.txt"
    path.write_text("1,5,10,20,4,6,-1\n3,5,12,20,4,6,-1\n2,1,0,0,1,1,-1\n")
    tracks = read_mot(path)
    assert (tracks[5].begin, tracks[5].category, tracks[1].begin) == (0, "person", 1)
    np.testing.assert_array_equal(tracks[5].boxes, [[10, 20, 14, 26], [np.nan] * 4, [12, 20, 16, 26]])
    for text, message in (
        ("1,5,10\n", "3 columns"),
        ("1,5,10,20,4,6\n1,5,10,20,4,6\n", "row 2: id 5 twice"),
        ("1,5,10,20,4,6\n2,x,10,20,4,6\n", "row 2: 2,x,10,20,4,6"),
        ("0,5,10,20,4,6\n", "row 1"),
        ("1,5,10,20,-4,6\n", "row 1"),
    ):
        path.write_text(text)
        with pytest.raises(UserError) as caught:
            read_mot(path)
        assert message in str(caught.value)
