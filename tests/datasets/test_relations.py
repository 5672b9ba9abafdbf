"""Windows, pairs and labels against slow loops; the generator's promises; the datamodule on all kinds of data."""

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from moezoo.datasets.relations import PairsOfWindows, RelationsData, some_of_each
from moezoo.datasets.relations_formats import write_clips
from moezoo.datasets.relations_overlap import stack, viou, viou_in_common, viou_within
from moezoo.datasets.relations_render import render
from moezoo.datasets.relations_shapes import DRIVEN, OBJECTS, PREDICATES, make_clip, make_world, runs, scenes
from moezoo.datasets.relations_table import Clip, Instance, Track
from moezoo.datasets.relations_windows import (
    STRIDE,
    WINDOW,
    Labelling,
    Proposal,
    Scene,
    build,
    relative_position,
    window_begins,
)
from moezoo.errors import UserError

SMALL = {"train": 6, "valid": 2, "test": 3}


@pytest.fixture(scope="module")
def data():
    return RelationsData(files=SMALL, batch_size=4)


def one_viou(a, b, begin_a, begin_b):
    one = np.zeros(1, dtype=np.int64)
    return float(viou(stack([a], [begin_a]), stack([b], [begin_b]), one, one)[0])


def test_no_track_overlaps_nothing():
    nothing, none = stack([], []), np.zeros(0, dtype=np.int64)
    for overlap in (viou, viou_within, viou_in_common):
        assert overlap(nothing, nothing, none, none).shape == (0,)


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 2**31))
def test_cut_overlaps_are_plain_overlaps_of_cut_tracks(seed):
    rng = np.random.default_rng(seed)

    def track():
        corner = rng.uniform(0, 10, (int(rng.integers(1, 9)), 2))
        return np.concatenate([corner, corner + rng.uniform(1, 10, corner.shape)], 1), int(rng.integers(0, 6))

    (a, begin_a), (b, begin_b) = track(), track()
    whole = Track("", begin_b, b)
    one = np.zeros(1, dtype=np.int64)
    both = stack([a], [begin_a]), stack([b], [begin_b]), one, one
    cut = whole.during(begin_a, begin_a + len(a))
    assert viou_within(*both)[0] == pytest.approx(one_viou(a, cut, begin_a, begin_a))
    low, high = max(begin_a, begin_b), min(begin_a + len(a), begin_b + len(b))
    wanted = 0.0
    if low < high:
        wanted = one_viou(Track("", begin_a, a).during(low, high), whole.during(low, high), low, low)
    assert viou_in_common(*both)[0] == pytest.approx(wanted)


def test_windows_drop_the_tail_and_short_clips_have_none():
    assert list(window_begins(90)) == [0, 15, 30, 45, 60] and list(window_begins(89)) == [0, 15, 30, 45]
    assert list(window_begins(30)) == [0] and not window_begins(29)


def test_relative_position_is_the_codes_formula():
    s = torch.tensor([[[0.0, 0, 2, 4], [1, 1, 3, 5]]])
    o = torch.tensor([[[4.0, 2, 8, 10], [4, 2, 8, 10]]])
    got = relative_position(s, o, torch.tensor([[3.0, 29]]), torch.tensor([[0.0, 20]]))[0]
    half = float(np.log(0.5))
    expected = [-5 / 4, -4 / 8, half, half, 2 * half, 0.1, -4 / 4, -3 / 8, half, half, 2 * half, 0.3]
    torch.testing.assert_close(got, torch.tensor(expected))
    moved = relative_position(s * 7, o * 7, torch.zeros(1, 2), torch.zeros(1, 2))[0]
    torch.testing.assert_close(moved[[0, 1, 2, 6, 7]], got[[0, 1, 2, 6, 7]]), "no unit"


def noisy_scene(rng):
    """Tracks, detections of all degrees of overlap, relations of all lengths."""
    frames = int(rng.integers(30, 70))
    tracks = {}
    for tid in rng.choice(20, int(rng.integers(1, 4)), replace=False).tolist():
        begin = int(rng.integers(0, frames - 10))
        length = int(rng.integers(5, frames - begin + 1))
        corner = rng.uniform(0, 50, 2) + np.cumsum(rng.normal(0, 0.5, (length, 2)), 0)
        boxes = np.concatenate([corner, corner + rng.uniform(10, 30, 2)], 1)
        tracks[tid] = Track(OBJECTS[rng.integers(8)], begin, boxes)
    instances = []
    for s, o in itertools.permutations(tracks, 2):
        low, high = max(tracks[s].begin, tracks[o].begin), min(tracks[s].end, tracks[o].end)
        if high - low > 2 and rng.random() < 0.8:
            instances.append(Instance(s, PREDICATES[rng.integers(14)], o, low, int(rng.integers(low + 1, high + 1))))
    windows = []
    for begin in window_begins(frames):
        some = []
        for track in tracks.values():
            low, high = max(track.begin, begin), min(track.end, begin + WINDOW)
            if low < high:
                shift = rng.choice([0.0, 2.0, 8.0, 40.0])
                some.append(Proposal(low, track.during(low, high) + shift, rng.standard_normal(5).astype(np.float32)))
        windows.append(some)
    return Scene(Clip("v", frames, 100, 100, 30.0, tracks, instances), windows, 2)


def slow_labels(scene, labelling):
    """(window, i, j) -> (class, class, predicates) or None where not clear; from the definition."""
    labels = {}
    for w, begin in enumerate(window_begins(scene.clip.frames)):
        matched = []
        for p in scene.windows[w]:
            overlaps = {}
            for tid, track in scene.clip.tracks.items():
                inside = track.during(p.begin, p.begin + len(p.boxes))
                if np.isfinite(track.during(begin, begin + WINDOW)).any():
                    overlaps[tid] = one_viou(p.boxes, inside, p.begin, p.begin)
            best = max(overlaps, key=overlaps.get, default=None)
            matched.append((best, overlaps.get(best, 0.0)))
        for i, j in itertools.permutations(range(len(matched)), 2):
            sides = [
                (tid if most > labelling.positive else None, most < labelling.negative)
                for tid, most in (matched[i], matched[j])
            ]
            (s, no_s), (o, no_o) = sides
            positive = s is not None and o is not None and s != o
            if not (positive or no_s or no_o):
                labels[w, i, j] = None
                continue
            classes = [8 if t is None else OBJECTS.index(scene.clip.tracks[t].category) for t in (s, o)]
            held = np.zeros(len(PREDICATES))
            for r in scene.clip.instances:
                common = min(r.end, begin + WINDOW) - max(r.begin, begin)
                if (r.subject, r.object) == (s, o) and common >= labelling.frames:
                    held[PREDICATES.index(r.predicate)] = 1
            labels[w, i, j] = (*classes, held)
    return labels


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 2**31))
def test_pairs_and_labels_equal_a_slow_loop(seed):
    rng = np.random.default_rng(seed)
    two = [noisy_scene(rng) for _ in range(2)]
    labelling = Labelling(frames=10)
    got = build(two, OBJECTS, PREDICATES, labelling, train=False, num_features=5)
    wanted = [slow_labels(scene, labelling) for scene in two]
    assert len(got.subject) == sum(map(len, wanted))
    assert got.count.sum() == len(got.subject) and len(got) == sum(len(s.windows) for s in two)
    flat = [p for scene in two for some in scene.windows for p in some]
    position = {id(p): (c, w, i) for c, s in enumerate(two) for w, some in enumerate(s.windows)
                for i, p in enumerate(some)}  # fmt: skip
    batch = got.batch(torch.arange(len(got.subject)))
    for row in range(len(got.subject)):
        s, o = flat[got.subject[row]], flat[got.object[row]]
        (clip, w, i), (_, _, j) = position[id(s)], position[id(o)]
        assert int(got.clip[got.pair_window[row]]) == clip and int(got.window_begin[got.pair_window[row]]) == w * STRIDE
        expected = wanted[clip][w, i, j]
        classes = (int(batch.subject_class[row]), int(batch.object_class[row]))
        np.testing.assert_array_equal(batch.subject[row], s.feature)
        if expected is None:
            assert classes == (-1, -1)
        else:
            assert classes == expected[:2]
            np.testing.assert_array_equal(batch.predicate[row], expected[2])
    # Training: clear pairs of windows in which something is related, without annotated tracks the same ones.
    train = build(two, OBJECTS, PREDICATES, Labelling(frames=10, add_truth=False), True, 5)
    busy = {
        (c, w)
        for c, scene in enumerate(two)
        for w, b in enumerate(window_begins(scene.clip.frames))
        if any(min(r.end, b + WINDOW) - max(r.begin, b) >= 10 for r in scene.clip.instances)
    }
    clear = sum((c, w) in busy and v is not None for c, some in enumerate(wanted) for (w, *_), v in some.items())
    assert len(train.subject) == clear


def test_annotated_tracks_join_training_with_the_features_of_what_shows_them():
    boxes = np.tile([10.0, 10, 40, 40], (30, 1))
    tracks = {0: Track("disk", 0, boxes), 1: Track("star", 0, boxes + 50), 2: Track("bar", 0, boxes + 100)}
    features = np.eye(3, dtype=np.float32)
    some = [
        Proposal(0, boxes + 1, features[0]),
        Proposal(0, boxes + 2, features[1]),
        Proposal(0, boxes + 51, features[2]),
    ]
    clip = Clip("v", 30, 200, 200, 30.0, tracks, [Instance(0, "left", 1, 0, 30)])
    got = build([Scene(clip, [some])], OBJECTS, PREDICATES, Labelling(), True, 3)
    assert len(got.first) == 5, "the bar is seen by nobody"
    np.testing.assert_allclose(got.feature[3], [0.5, 0.5, 0])
    np.testing.assert_allclose(got.feature[4], features[2])
    evaluated = build([Scene(clip, [some])], OBJECTS, PREDICATES, Labelling(), False, 3)
    assert len(evaluated.first) == 3, "never in a test"


def test_each_group_keeps_its_lowest_lots():
    count, lot = torch.tensor([3, 0, 1, 4]), torch.tensor([0.5, 0.1, 0.9, 0.7, 0.4, 0.3, 0.2, 0.1])
    assert some_of_each(count, 2, lot).tolist() == [0, 1, 3, 6, 7]


def test_batches_cover_windows_in_order_and_training_draws_anew(data):
    seen = torch.cat([batch.pair for batch in data.val_dataloader()])
    assert seen.tolist() == list(range(len(data.windows("valid").subject)))
    few = PairsOfWindows(data.windows("train"), 5)
    torch.manual_seed(0)
    first, second = few[[0, 1, 2]].pair, few[[0, 1, 2]].pair
    assert len(first) == 15 and first.tolist() != second.tolist() and first.unique().numel() == 15
    assert (few[[0, 1, 2]].subject_class >= 0).all()


def test_the_generator_keeps_its_promises():
    world = make_world(0, 5)
    assert len(world.withheld) == 8 and all(b in world.allowed[s, o] for s, b, o in world.withheld)
    train, test = (scenes(world, k, range(60), range(4), 90, 0.5, new_triplets=k == 2) for k in (0, 2))
    withheld = {(OBJECTS[s], DRIVEN[b], OBJECTS[o]) for s, b, o in world.withheld}
    shown = [{t for scene in some for t in scene.clip.triplets} for some in (train, test)]
    assert not shown[0] & withheld and shown[1] & withheld
    grammar = {(OBJECTS[s], DRIVEN[b], OBJECTS[o]) for s in range(8) for o in range(8) for b in world.allowed[s, o]}
    assert {t for t in shown[0] | shown[1] if t[1] in DRIVEN} <= grammar
    assert {scene.domain for scene in train} == {0, 1, 2, 3}
    assert not {s.clip.name for s in train} & {s.clip.name for s in test}
    for scene in train[:20]:
        for track in scene.clip.tracks.values():
            assert track.boxes.min() >= 0 and (track.boxes <= np.array([240, 180, 240, 180]) + 1e-9).all()
    again = scenes(world, 0, range(3), range(4), 90, 0.5)
    np.testing.assert_array_equal(again[1].windows[2][0].feature, train[1].windows[2][0].feature)


def test_static_predicates_follow_from_the_boxes():
    clip = make_clip(make_world(3, 1), 0, 4, 120, False)
    share = {k: t.boxes / np.array([240, 180] * 2) for k, t in clip.tracks.items()}
    for s, o in itertools.permutations(share, 2):
        gap = (share[o][:, 0] + share[o][:, 2] - share[s][:, 0] - share[s][:, 2]) / 2
        wanted = runs(gap > 0.15, 30)
        got = [(i.begin, i.end) for i in clip.instances if (i.subject, i.predicate, i.object) == (s, "left", o)]
        assert got == wanted


def test_pictures_show_the_objects_and_domains_differ():
    clip = make_clip(make_world(0, 2), 0, 0, 30, False)
    frames = [render(clip, domain, np.random.default_rng(0)) for domain in (0, 1)]
    assert frames[0].shape == (30, 180, 240, 3) and (frames[0] != frames[1]).mean() > 0.5
    track = clip.tracks[len(clip.tracks) - 1]  # the last is painted over the others
    box = track.boxes[10]
    x, y = int(box[[0, 2]].mean()), int(box[[1, 3]].mean())
    corner = frames[0][10, 0, 0].astype(int)
    if track.category != "ring":
        assert abs(frames[0][10, y, x].astype(int) - corner).sum() > 60


@pytest.mark.parametrize("features", ["visual", "geom", "pixels"])
def test_schema_tells_the_sizes_and_what_the_data_is(features):
    data = RelationsData(files={"train": 2, "valid": 1, "test": 1}, features=features)
    batch = next(iter(data.train_dataloader()))
    assert batch.subject.shape[1] == data.schema["num_features"] and batch.subject.dtype == torch.float32
    assert batch.predicate.shape[1] == len(data.schema["predicates"]) == 14
    other = RelationsData(files={"train": 2, "valid": 1, "test": 1, "world": 1}, features=features)
    assert other.schema["fingerprint"] != data.schema["fingerprint"]


def test_annotation_folders_have_fixed_vocabularies(tmp_path):
    world = make_world(0, 2)
    write_clips(tmp_path / "train", [make_clip(world, 0, i, 45, False) for i in range(4)])
    write_clips(tmp_path / "test", [make_clip(world, 1, i, 45, False) for i in range(2)])
    (tmp_path / "objects.txt").write_text("\n".join(["zebra", *OBJECTS]))
    (tmp_path / "predicates.txt").write_text("\n".join(PREDICATES))
    paths = {name: str(tmp_path / name) for name in ("train", "test")}
    files = paths | {"objects": str(tmp_path / "objects.txt"), "predicates": str(tmp_path / "predicates.txt")}
    data = RelationsData("vidvrd", files, features="geom")
    assert data.schema["dataset"] == "vidvrd-oracle" and data.schema["objects"][0] == "zebra"
    assert data.schema["num_features"] == 9 + 6
    assert len(data.clips("train")) == 3 and len(data.clips("valid")) == 1
    batch = next(iter(data.test_dataloader()))
    classes = batch.subject[:, :9].argmax(1)
    assert (classes == batch.subject_class).all() and (classes > 0).all(), "ids are lines of the vocabulary"
    # The same tracks, called a detector's.
    tracked = RelationsData("vidvrd", files | {"tracks": str(tmp_path)}, features="geom")
    assert tracked.schema["dataset"] == "vidvrd"
    assert len(tracked.windows("test").subject) == len(data.windows("test").subject)
    for change, features, message in (
        ({}, "visual", "features=geom"),
        ({"objects": str(tmp_path / "predicates.txt")}, "geom", "is not in the vocabulary"),
        ({"tracks": str(tmp_path / "train")}, "geom", "expected the tracks of each video"),
        ({"train": str(tmp_path / "none")}, "geom", "no such file"),
        ({"colour": 1}, "geom", "no such argument"),
    ):
        with pytest.raises(UserError, match=message):
            wrong = RelationsData("vidvrd", files | change, features=features)
            assert wrong.schema and wrong.windows("test")
    with pytest.raises(UserError, match=r"data.files.train: source 'vidor' needs it"):
        assert RelationsData("vidor", {}, features="geom").schema


def test_wrong_arguments_get_one_line():
    for arguments, message in (
        ({"negative": 0.7}, "negative"),
        ({"batch_size": 0}, "batch_size"),
        ({"files": {"frames": 20}}, "frames=20"),
        ({"files": {"train": 0}}, "train=0"),
        ({"files": {"noise": -1}}, "noise=-1"),
        ({"files": {"test_domains": "all"}}, "test_domains"),
        ({"files": {"path": "x"}}, "no such argument"),
    ):
        with pytest.raises(UserError, match=message):
            assert RelationsData(**arguments).schema
