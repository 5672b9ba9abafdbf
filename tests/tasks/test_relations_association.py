"""Candidates against an exhaustive loop, suppression, and greedy association in cases worked out by hand."""

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from moezoo.datasets.relations import RelationsData
from moezoo.datasets.relations_formats import read_relations, write_predictions
from moezoo.datasets.relations_table import RelationSet
from moezoo.tasks.relations_association import (
    Candidates,
    Tracklet,
    WindowRelation,
    associate,
    by_clip,
    candidates,
    filled,
    suppress,
)
from moezoo.tasks.relations_eval import evaluate

T = ("dog", "chase", "ball")


def track(begin, end, left=0.0, size=10.0):
    return Tracklet(begin, np.tile([left, 0.0, left + size, size], (end - begin, 1)))


def relation(begin, end, score=0.5, left=0.0, triplet=T, other=100.0):
    return WindowRelation(triplet, score, track(begin, end, left), track(begin, end, other))


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 2**31), threshold=st.sampled_from([0.0, 0.2, 0.5]))
def test_candidates_equal_an_exhaustive_loop(seed, threshold):
    g = torch.Generator().manual_seed(seed)
    s, o = ((torch.randn(9, 4, generator=g) * 2).softmax(1) for _ in range(2))
    p = torch.rand(9, 3, generator=g)
    window = torch.tensor([0, 0, 0, 1, 1, 1, 1, 3, 3])
    got = candidates(s, p, o, window, threshold, threshold, most=5)
    wanted = []
    for w in (0, 1, 3):
        some = []
        for i in (window == w).nonzero().flatten().tolist():
            if s[i].argmax() == 3 or o[i].argmax() == 3:
                continue
            for a, b, c in itertools.product(range(3), range(3), range(3)):
                if s[i, a] > threshold and p[i, b] > threshold and o[i, c] > threshold:
                    some.append((float(s[i, a] * p[i, b] * o[i, c]), (i, a, b, c)))
        wanted += sorted(some, reverse=True)[:5]
    assert [row for _, row in wanted] == list(
        zip(got.pair.tolist(), got.subject.tolist(), got.predicate.tolist(), got.object.tolist(), strict=True)
    )
    torch.testing.assert_close(got.score, torch.tensor([score for score, _ in wanted]))


def test_windows_become_one_relation_and_scores_add_up():
    windows = [[relation(0, 30, 0.9)], [relation(15, 45, 0.5)], [relation(30, 60, 0.4)]]
    (whole,) = associate(windows)
    assert (whole.begin, whole.end) == (0, 60) and whole.score == pytest.approx(1.8) and len(whole.subject) == 60
    assert associate(windows, score="mean")[0].score == pytest.approx(0.6)
    (apart, _, _) = associate(windows, threshold=1.0)
    assert (apart.begin, apart.end) == (0, 30)


def test_both_sides_and_the_triplet_must_agree():
    first = [relation(0, 30)]
    for other in (
        relation(15, 45, left=50),
        relation(15, 45, other=160),
        relation(15, 45, triplet=("dog", "past", "ball")),
        relation(15, 45, left=4),  # overlap 6 / 14
    ):
        assert len(associate([first, [other]])) == 2
    assert len(associate([first, [relation(15, 45, left=3)]])) == 1  # overlap 7 / 13


def test_boxes_are_averaged_where_both_have_one_and_interpolated_over_a_gap():
    (joined,) = associate([[relation(0, 20)], [relation(10, 30, left=2)]])
    assert joined.subject[:, 0].tolist() == [0.0] * 10 + [1.0] * 10 + [2.0] * 10
    (over_gap,) = associate([[relation(0, 10)], [relation(14, 24, left=2.5)]])
    np.testing.assert_allclose(over_gap.subject[9:15, 0], [0, 0.5, 1, 1.5, 2, 2.5])
    assert len(associate([[relation(0, 10)], [relation(40, 50)]])) == 2, "a gap of a window is too long"


def test_only_what_the_last_window_touched_goes_on():
    windows = [[relation(0, 30)], [relation(15, 45, triplet=("a", "b", "c"))], [relation(30, 60)]]
    assert sorted((r.begin, r.end) for r in associate(windows)) == [(0, 30), (15, 45), (30, 60)]


def test_the_best_old_one_takes_the_best_new_one_and_each_goes_on_once():
    old = [relation(0, 30, 0.4, left=1), relation(0, 30, 0.9)]
    new = [relation(15, 45, 0.8), relation(15, 45, 0.3, left=1)]
    got = associate([old, new])
    assert [r.score for r in got] == pytest.approx([1.7, 0.7])


def test_output_is_cut_to_both_sides_and_limited():
    odd = WindowRelation(T, 0.5, track(0, 20), track(5, 30, 100))
    (cut,) = associate([[odd]])
    assert (cut.begin, cut.end, len(cut.subject), len(cut.object)) == (5, 20, 15, 15)
    assert associate([[WindowRelation(T, 0.5, track(0, 10), track(9, 30, 100))]]) == [], "one common frame"
    many = [relation(0, 30, i / 100, left=20.0 * i) for i in range(20)]
    assert [r.score for r in associate([many], most_per_window=5, most=3)] == pytest.approx([0.19, 0.18, 0.17])
    assert associate([]) == []


def test_gaps_are_filled():
    boxes = np.array([[0.0] * 4, [np.nan] * 4, [4.0] * 4])
    assert filled(boxes)[:, 2].tolist() == [0, 2, 4] and filled(boxes[:1]) is not None


@pytest.fixture(scope="module")
def data():
    return RelationsData(files={"train": 2, "valid": 1, "test": 12})


def certain(windows):
    """Candidates of a model that knows the labels."""
    held = windows.table[windows.truth]
    pair, predicate = (held * (windows.subject_class[:, None] >= 0)).nonzero().unbind(1)
    return Candidates(pair, windows.subject_class[pair], predicate, windows.object_class[pair], torch.ones(len(pair)))


@pytest.mark.parametrize("score", ["sum", "mean"])
def test_true_labels_on_detected_boxes_reach_the_ceiling(data, tmp_path, score):
    windows, clips = data.windows("test"), data.clips("test")
    named = by_clip(certain(windows), windows, data.schema["objects"], data.schema["predicates"])
    found = {clips[i].name: associate(some, score=score) for i, some in named.items()}
    scores = evaluate(data.truth("test"), RelationSet(found))
    assert scores.metrics["map"] > 0.97 and scores.metrics["recall_at_50"] > 0.97
    assert scores.metrics["precision_at_1"] == 1
    write_predictions(tmp_path / "p.json", found)
    again = evaluate(data.truth("test"), read_relations(tmp_path / "p.json"))
    assert again.metrics == scores.metrics


def test_repeats_are_suppressed(data):
    windows = data.windows("test")
    sure = certain(windows)
    twice = Candidates(*(torch.cat([values, values]) for values in sure))
    assert suppress(twice, windows).pair.tolist() == sure.pair.tolist()
    apart = twice._replace(predicate=torch.cat([sure.predicate, sure.predicate + 20]))
    assert len(suppress(apart, windows).pair) == len(twice.pair), "another triplet is no repeat"
