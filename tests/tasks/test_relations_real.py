"""A1 to A3 and A5 to A8 of the spec: published evaluators, real pedestrians and the real relation list."""

from collections import Counter

import numpy as np
import polars as pl
import pytest
from moezoo.datasets.relations_formats import read_relations
from moezoo.datasets.relations_mot import read_mot
from moezoo.datasets.relations_overlap import stack, viou
from moezoo.datasets.relations_table import Relation, RelationSet
from moezoo.settings import real_data_dir
from moezoo.tasks.relations_eval import evaluate

pytestmark = pytest.mark.real
CLIP_SIZE = (1280, 576)  # ILSVRC2015_train_00005004, from the relation list


@pytest.fixture(scope="module")
def folder():
    root = real_data_dir()
    if root is None or not (root / "moevrd").is_dir():
        pytest.skip("no moevrd folder under MOEZOO_REAL_DATA")
    return root / "moevrd"


@pytest.fixture(scope="module")
def pair(folder):
    demo = folder / "diagnose_vrd_demo"
    return (
        read_relations(demo / "demo_gt.json.gz"),
        read_relations(demo / "demo_det_ILSVRC2015_train_00005004.json.gz"),
    )


def overlap(pair, prediction, instance, side, plus=0.0, scale=(1.0, 1.0)):
    truth, predictions = (next(iter(given.videos.values())) for given in pair)
    one = np.zeros(1, dtype=np.int64)
    a, b = predictions[prediction], truth[instance]
    tracks = (stack([getattr(r, side)], [r.begin], scale) for r in (a, b))
    return float(viou(*tracks, one, one, plus)[0])


@pytest.mark.parametrize(
    ("dialect", "expected"), [("exact", 0.646465), ("helper", 0.646465), ("legacy_normalized", 0.655556)]
)
def test_a1_to_a3_scores_of_the_real_pair(pair, dialect, expected):
    got = evaluate(*pair, dialect, size=CLIP_SIZE).metrics
    assert got["map"] == pytest.approx(expected, abs=1e-6)
    assert [got[f"recall_at_{k}"] for k in (50, 100)] == [1, 1]
    assert [got[f"precision_at_{k}"] for k in (1, 5, 10)] == pytest.approx([1, 0.4, 0.3])


def test_a1_to_a3_overlaps_of_the_real_pair(pair):
    shares = (1 / CLIP_SIZE[0], 1 / CLIP_SIZE[1])
    for plus, scale, expected in (
        (0.0, (1.0, 1.0), (0.6485, 0.8424)),
        (1.0, (1.0, 1.0), (0.6508, 0.8430)),
        (1.0, shares, (0.9325, 0.9581)),
    ):
        got = [overlap(pair, 0, 2, side, plus, scale) for side in ("subject", "object")]
        assert got == pytest.approx(expected, abs=5e-5)
    assert overlap(pair, 3, 0, "object") == pytest.approx(0.0876, abs=5e-5)
    assert overlap(pair, 3, 0, "object", 1.0, shares) == pytest.approx(0.7330, abs=5e-5)


def rules(tracks):
    """The relations of A5: for each ordered pair, runs of >= 15 common frames in which a predicate holds."""
    relations = []
    for i, s in tracks.items():
        for j, o in tracks.items():
            begin, end = max(s.begin, o.begin), min(s.end, o.end)
            if i == j or end <= begin:
                continue
            a, b = s.during(begin, end), o.during(begin, end)
            center = [(x[:, 0] + x[:, 2]) / 2 for x in (a, b)]
            width, height = ([x[:, k + 2] - x[:, k] for x in (a, b)] for k in (0, 1))
            holds = {
                "left": center[0] < center[1] - sum(width) / 4,
                "right": center[0] > center[1] + sum(width) / 4,
                "taller": height[0] > 1.15 * height[1],
                "front": a[:, 3] > b[:, 3] + 8,
                "behind": a[:, 3] < b[:, 3] - 8,
                "next_to": abs(center[0] - center[1]) < 0.5625 * sum(width),
            }
            for predicate, mask in holds.items():
                edges = np.flatnonzero(np.diff(np.concatenate([[0], mask.astype(int), [0]])))
                for first, last in zip(edges[::2], edges[1::2], strict=True):
                    if last - first >= 15:
                        span = (begin + int(first), begin + int(last))
                        boxes = (s.during(*span), o.during(*span))
                        relations.append(Relation(("person", predicate, "person"), *span, *boxes, float(last - first)))
    return relations


@pytest.mark.parametrize(
    ("name", "relations", "ceiling", "tracker_map", "tracker_recall"),
    [("TUD-Campus", 91, 0.549, 0.047, 0.099), ("TUD-Stadtmitte", 219, 0.228, 0.034, 0.032)],
)
def test_a5_a6_rules_on_real_pedestrians(folder, name, relations, ceiling, tracker_map, tracker_recall):
    truth, tracker = (rules(read_mot(folder / "mot_tud" / f"{name}-{kind}.txt")) for kind in ("gt", "test"))
    assert len(truth) == relations
    perfect = evaluate(RelationSet({name: truth}), RelationSet({name: truth}))
    assert perfect.metrics["map"] == 1
    assert perfect.metrics["recall_at_50"] == pytest.approx(ceiling, abs=5e-4)
    assert perfect.metrics == pytest.approx(perfect.ceilings)
    real = evaluate(RelationSet({name: truth}), RelationSet({name: tracker})).metrics
    assert real["map"] == pytest.approx(tracker_map, abs=5e-4)
    assert real["recall_at_50"] == pytest.approx(tracker_recall, abs=5e-4)


@pytest.fixture(scope="module")
def listed(folder):
    return pl.read_parquet(folder / "vidvrd_relations.parquet")


def as_relations(rows):
    """Relations with a stretch of frames of their own, since the list has neither spans nor boxes."""
    box = np.array([[0.0, 0.0, 1.0, 1.0]])
    videos = {}
    for video, *triplet in rows.select("video_id", "subject", "predicate", "object").iter_rows():
        some = videos.setdefault(video, [])
        some.append(Relation(tuple(triplet), len(some), len(some) + 1, box, box))
    return RelationSet(videos)


def test_a7_the_real_list_and_its_ceilings(folder, listed):
    train, test = (listed.filter(pl.col("split") == split) for split in ("train", "test"))
    assert (len(train), len(test)) == (25_917, 4_835)
    triplets = [set(rows.select("subject", "predicate", "object").iter_rows()) for rows in (train, test)]
    assert (len(triplets[0]), len(triplets[1]), len(triplets[1] - triplets[0])) == (2_961, 1_011, 258)
    words = [(folder / "vocab" / f"vidvrd_{kind}.txt").read_text().split() for kind in ("objects", "predicates")]
    assert (len(words[0]), len(words[1])) == (35, 132)
    truth = as_relations(test)
    got = evaluate(truth, truth)
    assert got.metrics == pytest.approx(got.ceilings)
    percent = {name: 100 * value for name, value in got.ceilings.items()}
    assert percent["precision_at_1"] == 100 and percent["map"] == 100
    assert percent["precision_at_5"] == pytest.approx(87.8, abs=0.05)
    assert percent["precision_at_10"] == pytest.approx(69.55, abs=0.005)
    assert percent["recall_at_50"] == pytest.approx(69.43, abs=0.005)
    assert percent["recall_at_100"] == pytest.approx(84.69, abs=0.005)


def test_a8_frequency_priors(listed):
    train, test = (listed.filter(pl.col("split") == split) for split in ("train", "test"))
    counts = Counter(train.select("subject", "predicate", "object").iter_rows())
    ranked = [triplet for triplet, _ in counts.most_common()]  # of equals the first in the list
    truth = as_relations(test)
    box = np.zeros((1, 4))
    everywhere = [Relation(t, 0, 1, box, box, float(counts[t])) for t in ranked[:10]]
    fixed = evaluate(truth, RelationSet(dict.fromkeys(truth.videos, everywhere))).metrics
    known = {}
    for video, relations in truth.videos.items():
        classes = {name for r in relations for name in (r.triplet[0], r.triplet[2])}
        best = [t for t in ranked if t[0] in classes and t[2] in classes][:10]
        known[video] = [Relation(t, 0, 1, box, box, float(counts[t])) for t in best]
    given = evaluate(truth, RelationSet(known)).metrics
    for got, expected in ((fixed, (2.0, 12.0, 7.35)), (given, (64.5, 43.2, 32.9))):
        for k, value in zip((1, 5, 10), expected, strict=True):
            assert 100 * got[f"precision_at_{k}"] == pytest.approx(value, abs=0.1)
