"""Relations that boxes alone tell."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from moezoo.datasets.relations_table import Track
from moezoo.tasks.relations_geometry import RULES, geometry_relations

FPS, FRAMES = 25.0, 50


def track(x, y, width=20.0, height=30.0, begin=0):
    """Centres by frame."""
    x, y = np.broadcast_arrays(np.asarray(x, dtype=float), np.asarray(y, dtype=float))
    return Track("thing", begin, np.stack([x - width / 2, y - height / 2, x + width / 2, y + height / 2], 1))


def held(a, b, frames=FRAMES):
    """Predicates of a to b."""
    return {i.predicate for i in geometry_relations({1: a, 2: b}, frames, FPS) if i.subject == 1}


STILL = np.zeros(FRAMES)
T = np.arange(FRAMES)


def test_where_they_are():
    middle = track(STILL + 100, 100)
    assert held(track(STILL + 40, 100), middle) == {"left"}
    assert held(track(STILL + 160, 100), middle) == {"right"}
    assert held(track(STILL + 100, 60), middle) == {"above"}
    assert held(track(STILL + 100, 140), middle) == {"beneath"}
    assert held(track(STILL + 105, 100), middle) == {"next_to"}
    assert held(track(STILL + 40, 100, 40, 60), middle) == {"left", "larger", "taller"}


def test_how_they_move():
    middle = track(STILL + 200, 100)
    assert "toward" in held(track(2.0 * T, 100), middle)
    assert "away" in held(track(190 - 2.0 * T, 100), middle)
    assert not {"toward", "away", "move_with"} & held(track(STILL + 40, 100), middle)
    assert "toward" not in held(track(2.0 * T, 200 - 4.0 * T), middle)  # it heads past it
    # What stands still moves to nothing, though the other comes.
    assert not {"toward", "away"} & held(middle, track(2.0 * T, 100))
    assert "move_with" in held(track(2.0 * T, 100), track(2.0 * T + 40, 100))
    assert "move_with" not in held(track(2.0 * T, 100), track(140 - 2.0 * T, 100))
    assert "move_with" not in held(track(2.0 * T, 100), track(2.0 * T + 400, 100))


def test_a_relation_lasts_half_a_second_and_its_score_is_its_share():
    x = np.where(T < 30, 40.0, 100.0)
    (left,) = (i for i in geometry_relations({1: track(x, 100), 2: track(STILL + 100, 100)}, FRAMES, FPS)
               if (i.subject, i.predicate) == (1, "left"))  # fmt: skip
    assert (left.begin, left.end, left.score) == (0, 30, pytest.approx(0.6))
    x = np.where(T < 11, 40.0, 100.0)  # 11 frames are less than half a second
    assert "left" not in held(track(x, 100), track(STILL + 100, 100))


def test_a_short_pause_does_not_end_it_and_being_out_of_view_does():
    x = np.where((T >= 20) & (T < 23), 100.0, 40.0)
    spans = {(i.begin, i.end) for i in geometry_relations({1: track(x, 100), 2: track(STILL + 100, 100)}, FRAMES, FPS)
             if (i.subject, i.predicate) == (1, "left")}  # fmt: skip
    assert spans == {(0, 50)}
    hidden = track(STILL + 40, 100)
    hidden.boxes[20:23] = np.nan
    spans = {(i.begin, i.end) for i in geometry_relations({1: hidden, 2: track(STILL + 100, 100)}, FRAMES, FPS)
             if (i.subject, i.predicate) == (1, "left")}  # fmt: skip
    assert spans == {(0, 20), (23, 50)}


@given(
    st.integers(0, 2**32 - 1),
    st.floats(0.25, 4),
    st.floats(-50, 50),
)
@settings(max_examples=10, deadline=None)
def test_neither_the_size_of_the_picture_nor_its_origin_matters(seed, scale, shift):
    rng = np.random.default_rng(seed)
    boxes = []
    for _ in range(3):
        centre = np.cumsum(rng.normal(0, 2, (FRAMES, 2)), 0) + rng.uniform(0, 200, 2)
        size = rng.uniform(10, 60, 2)
        boxes.append(np.concatenate([centre - size, centre + size], 1))
    found = geometry_relations({n: Track("x", 0, b) for n, b in enumerate(boxes)}, FRAMES, FPS)
    moved = geometry_relations({n: Track("x", 0, b * scale + shift) for n, b in enumerate(boxes)}, FRAMES, FPS)
    agree = len(set(found) & set(moved)) / max(len(set(found) | set(moved)), 1)
    assert agree > 0.9  # all but spans whose edge lies within rounding of a threshold


def test_left_and_right_above_and_beneath_turn_each_other_around():
    rng = np.random.default_rng(1)
    tracks = {n: track(np.cumsum(rng.normal(0, 3, FRAMES)) + 100, rng.uniform(50, 150)) for n in range(4)}
    found = geometry_relations(tracks, FRAMES, FPS)
    for one, other in (("left", "right"), ("above", "beneath"), ("next_to", "next_to"), ("move_with", "move_with")):
        a = {(i.subject, i.object, i.begin, i.end) for i in found if i.predicate == one}
        assert a == {(i.object, i.subject, i.begin, i.end) for i in found if i.predicate == other}
    assert {i.predicate for i in found} <= {rule.predicate for rule in RULES}
