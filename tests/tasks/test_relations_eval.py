"""The evaluator against closed forms, a slow reference written from the definitions, and the spec's golden numbers."""

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from moezoo.cli import main
from moezoo.datasets.relations_overlap import area, stack, viou
from moezoo.datasets.relations_table import Relation, RelationSet
from moezoo.errors import UserError
from moezoo.tasks.relations_eval import average_precision, evaluate, evaluate_zero_shot, match

A, B, C = ("dog", "chase", "ball"), ("ball", "left", "dog"), ("dog", "past", "ball")
SIZE = {"a": (100, 50)}


def still(triplet, begin=0, end=10, at=(10.0, 10.0, 30.0, 20.0), score=1.0):
    """Subject and object stand still in the same place."""
    boxes = np.tile(np.array(at, dtype=np.float64), (end - begin, 1))
    return Relation(triplet, begin, end, boxes, boxes, score)


def scores(truth, predictions, dialect="exact"):
    return evaluate(RelationSet({"a": truth}, SIZE), RelationSet({"a": predictions}), dialect)


# A4: the toy cases of the spec.
@pytest.mark.parametrize("dialect", ["exact", "helper", "legacy_normalized"])
def test_toy_cases(dialect):
    hit, miss = still(A, score=0.9), still(A, at=(60.0, 30.0, 90.0, 45.0), score=0.95)
    assert scores([still(A)], [hit], dialect).metrics["map"] == 1
    assert scores([still(A)], [hit, miss], dialect).metrics["map"] == 0.5, "the false one comes first"
    assert scores([still(A), still(B)], [hit], dialect).metrics["map"] == 0.5
    assert scores([still(A)], [still(A, end=5)], dialect).metrics["map"] == 1, "half the span: 0.5 is enough"
    assert scores([still(A)], [still(A, end=4)], dialect).metrics["map"] == 0
    empty = scores([still(A)], [], dialect)
    assert set(empty.metrics.values()) == {0.0} and empty.ceilings["map"] == 1
    expected = 1.0 if dialect == "helper" else 0.2
    assert scores([still(A)], [hit], dialect).metrics["precision_at_5"] == pytest.approx(expected)
    assert scores([still(A)], [hit], dialect).ceilings["precision_at_5"] == pytest.approx(expected)


def test_dialects_differ_in_the_pixel_alone():
    a, b = stack([np.array([[0.0, 0, 9, 9]])], [0]), stack([np.array([[5.0, 0, 14, 9]])], [0])
    one = np.zeros(1, dtype=np.int64)
    assert viou(a, b, one, one)[0] == pytest.approx(4 * 9 / (2 * 81 - 36))
    assert viou(a, b, one, one, 1.0)[0] == pytest.approx(5 * 10 / (2 * 100 - 50))
    small = [stack([x.boxes], [0], (0.01, 0.01)) for x in (a, b)]
    assert viou(*small, one, one)[0] == pytest.approx(viou(a, b, one, one)[0]), "exact vIoU knows no unit"
    assert viou(*small, one, one, 1.0)[0] > 0.9, "one whole frame is added to tiny boxes"


def slow_viou(a, begin_a, b, begin_b, plus):
    """Frame by frame, from the definition."""

    def box_area(box):
        return 0.0 if np.isnan(box).any() else max(box[2] - box[0] + plus, 0) * max(box[3] - box[1] + plus, 0)

    shared = 0.0
    for t in range(max(begin_a, begin_b), min(begin_a + len(a), begin_b + len(b))):
        p, q = a[t - begin_a], b[t - begin_b]
        shared += box_area(np.array([*np.maximum(p[:2], q[:2]), *np.minimum(p[2:], q[2:])]))
    union = sum(map(box_area, a)) + sum(map(box_area, b)) - shared
    return shared / union if union > 0 else 0.0


def random_track(rng, gaps=True):
    length = int(rng.integers(1, 9))
    corner = rng.integers(0, 12, (length, 2))
    boxes = np.concatenate([corner, corner + rng.integers(0, 12, (length, 2))], 1).astype(np.float64)
    if gaps and rng.random() < 0.3:
        boxes[rng.integers(length)] = np.nan
    return boxes, int(rng.integers(0, 8))


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 2**31), rows=st.integers(1, 30))
def test_all_pairs_at_once_equal_a_loop_over_frames(seed, rows):
    rng = np.random.default_rng(seed)
    some, others = ([random_track(rng) for _ in range(4)] for _ in range(2))
    left, right = (index.ravel() for index in np.mgrid[:4, :4])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("moezoo.datasets.relations_overlap._ROWS", rows)  # in parts as in one
        for plus in (0.0, 1.0):
            got = viou(stack(*zip(*some, strict=True)), stack(*zip(*others, strict=True)), left, right, plus)
            wanted = [slow_viou(*some[i], *others[j], plus) for i, j in zip(left, right, strict=True)]
            np.testing.assert_allclose(got, wanted, atol=1e-12)


def slow_scores(truth, predictions, dialect):
    """mAP, R@50 and P@K of one video after the field's definition, one prediction at a time."""
    plus = 0.0 if dialect == "exact" else 1.0
    scale = np.array([1 / 100, 1 / 50] * 2) if dialect == "legacy_normalized" else np.ones(4)
    ranked = sorted(predictions, key=lambda r: r.score, reverse=True)
    taken, hits = set(), []
    for p in ranked:
        best, chosen = -1.0, None
        for i, t in enumerate(truth):
            if i in taken or t.triplet != p.triplet:
                continue
            overlap = min(
                slow_viou(getattr(p, side) * scale, p.begin, getattr(t, side) * scale, t.begin, plus)
                for side in ("subject", "object")
            )
            if overlap >= 0.5 and overlap > best:
                best, chosen = overlap, i
        hits.append(chosen is not None)
        taken.add(chosen)
    recall = np.cumsum(hits) / len(truth)
    precision = np.cumsum(hits) / np.arange(1, len(hits) + 1)
    r, p = np.concatenate([[0.0], recall, [1.0]]), np.concatenate([[0.0], precision, [0.0]])
    for i in range(len(p) - 1, 0, -1):
        p[i - 1] = max(p[i - 1], p[i])
    tags = [triplet in {t.triplet for t in truth} for triplet in dict.fromkeys(r.triplet for r in ranked)]
    out = {"map": float(np.sum(np.diff(r) * p[1:])), "recall_at_50": sum(hits[:50]) / len(truth)}
    for k in (1, 5, 10):
        among = min(k, len(tags)) if dialect == "helper" else k
        out[f"precision_at_{k}"] = sum(tags[:k]) / among if tags else 0.0
    return out


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 2**31), dialect=st.sampled_from(["exact", "helper", "legacy_normalized"]))
def test_scores_equal_the_slow_reference(seed, dialect):
    rng = np.random.default_rng(seed)

    def relation(near=None):
        if near is not None and rng.random() < 0.7:
            shift = rng.integers(0, 3, near.subject.shape)
            return near._replace(subject=near.subject + shift, object=near.object + shift, score=float(rng.integers(9)))
        triplet = (A, B, C)[rng.integers(3)]
        (subject, begin), (other, _) = random_track(rng, gaps=False), random_track(rng, gaps=False)
        frames = min(len(subject), len(other))
        return Relation(triplet, begin, begin + frames, subject[:frames], other[:frames], float(rng.integers(9)))

    truth = [relation() for _ in range(rng.integers(1, 8))]
    predictions = [relation(truth[rng.integers(len(truth))]) for _ in range(rng.integers(0, 20))]
    got = scores(truth, predictions, dialect).metrics
    for name, value in slow_scores(truth, predictions, dialect).items():
        assert got[name] == pytest.approx(value), name


def test_a_prediction_takes_the_instance_it_overlaps_most_and_each_is_found_once():
    near, exact = still(A, end=8), still(A)
    assert match([near, exact], [still(A)]).tolist() == [1]
    assert match([near, exact], [still(A), still(A), still(A)]).tolist() == [1, 0, -1]
    assert match([still(A)], [still(B)]).tolist() == [-1]
    assert average_precision(np.array([True, False, True]), 2) == pytest.approx((1 + 2 / 3) / 2)


def test_means_are_over_videos_and_recall_is_over_instances():
    truth = RelationSet({"one": [still(A)], "many": [still(A, end=k + 2) for k in range(3)], "none": []})
    predictions = RelationSet({"one": [still(A)], "stranger": [still(A)], "none": [still(A)]})
    got = evaluate(truth, predictions)
    assert got.metrics["map"] == 0.5 and got.metrics["recall_at_50"] == 0.25 and got.metrics["precision_at_1"] == 0.5
    assert got.videos["video"].to_list() == ["one", "many"]
    with pytest.raises(UserError, match="no relation instance"):
        evaluate(RelationSet({"none": []}), predictions)


def test_ceilings_are_what_perfect_predictions_score():
    rng = np.random.default_rng(0)
    names = [("s", f"p{i}", "o") for i in range(30)]
    videos = {}
    for v in range(4):
        count = int(rng.integers(1, 140))
        videos[f"v{v}"] = [still(names[rng.integers(30)], begin=20 * i, end=20 * i + 9) for i in range(count)]
    for dialect in ("exact", "helper"):
        got = evaluate(RelationSet(videos), RelationSet(videos), dialect)
        assert got.metrics == pytest.approx(got.ceilings)
        assert got.ceilings["recall_at_50"] < 1


def test_zero_shot_and_generalised():
    truth = RelationSet({"a": [still(A), still(C)], "b": [still(B)]})
    predictions = RelationSet({"a": [still(A, score=0.9), still(C, score=0.5)], "b": [still(B)]})
    strict = evaluate_zero_shot(truth, predictions, {A, B})
    assert strict.videos["video"].to_list() == ["a"] and strict.metrics["map"] == 1
    general = evaluate_zero_shot(truth, predictions, {A, B}, generalised=True)
    assert general.metrics["map"] == 0.5, "a seen triplet stands before the new one"
    assert evaluate_zero_shot(truth, predictions, {A, B, C}) is None


def test_ap_of_each_predicate_pools_videos_by_score():
    truth = RelationSet({"a": [still(A)], "b": [still(A), still(B)]})
    wrong = still(A, at=(60.0, 30.0, 90.0, 45.0), score=0.7)
    predictions = RelationSet({"a": [wrong], "b": [still(A, score=0.9), still(C)]})
    rows = {row["predicate"]: row for row in evaluate(truth, predictions).predicates.iter_rows(named=True)}
    assert rows["chase"]["ap"] == 0.5 and rows["chase"]["hits"] == 1 and rows["chase"]["recall"] == 0.5
    assert rows["left"]["ap"] == 0 and rows["past"]["ap"] is None and rows["past"]["instances"] == 0


def test_units_are_brought_together_or_asked_for():
    pixels, shares = still(A), still(A, at=(0.1, 0.2, 0.3, 0.4))
    for dialect in ("exact", "helper", "legacy_normalized"):
        got = evaluate(RelationSet({"a": [pixels]}, SIZE), RelationSet({"a": [shares]}, normalised=True), dialect)
        assert got.metrics["map"] == 1
        with pytest.raises(UserError, match="--size"):
            evaluate(RelationSet({"a": [pixels]}), RelationSet({"a": [shares]}, normalised=True), dialect)
    assert area(np.array([[0.0, 0.0, 2.0, 3.0], [3.0, 0.0, 1.0, 5.0], [np.nan] * 4])).tolist() == [6.0, 0.0, 0.0]


def test_the_command_prints_scores_beside_ceilings(tmp_path, capsys):
    relation = {"triplet": list(A), "duration": [0, 2], "sub_traj": [[0, 0, 4, 4]] * 2, "obj_traj": [[5, 5, 9, 9]] * 2}
    truth, predictions, train = tmp_path / "gt.json", tmp_path / "pred.json", tmp_path / "train.csv"
    truth.write_text(json.dumps({"v": [relation, relation | {"triplet": list(B)}]}))
    found = {"v": [relation | {"score": 0.5}], "w": []}
    predictions.write_text(json.dumps({"version": "VERSION 1.0", "results": found}))
    train.write_text("subject,predicate,object\ndog,chase,ball\n")
    words = ["relations", "eval", str(truth), str(predictions)]
    assert main([*words, "--train", str(train), "--predicates", "--json", str(tmp_path / "out.json")]) == 0
    told = capsys.readouterr()
    assert "ceiling" in told.out and "50.00" in told.out and "zero-shot" in told.out and "chase" in told.out
    assert "1 predicted videos are not annotated" in told.err
    written = json.loads((tmp_path / "out.json").read_text())
    assert written["all triplets"]["metrics"]["map"] == 0.5 and written["zero-shot"]["metrics"]["map"] == 0
    assert written["all triplets"]["ceilings"]["precision_at_5"] == pytest.approx(0.4)
    for change, message in (
        (["--dialect", "legacy_normalized"], "--size"),
        (["--threshold", "0"], "--threshold"),
        (["--json", str(tmp_path / "no" / "out.json")], "no folder"),
        (["--train", str(tmp_path / "none.csv")], "no such file"),
    ):
        assert main([*words, *change]) == 2
        told = capsys.readouterr().err
        assert message in told and told.count("\n") <= 2
