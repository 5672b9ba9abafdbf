"""Trajectory metrics against plain loops, av2's formulas re-derived, scikit-learn, and lead times by hand."""

import math

import numpy as np
import polars as pl
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from moezoo.leaderboard.results import check_units
from moezoo.tasks.trajectories_metrics import (
    Windows,
    ade,
    distance,
    each_once,
    evaluate,
    fde,
    intention_metrics,
    lead_times,
    missed,
    rmse,
    seconds_to_steps,
)
from sklearn.metrics import average_precision_score, balanced_accuracy_score, f1_score, precision_recall_fscore_support

RATE = 5.0


def make_windows(count=60, horizon=10, seed=0, experts=3):
    rng = torch.Generator().manual_seed(seed)
    future = torch.randn(count, horizon, 2, generator=rng).cumsum(1)
    known = torch.randint(1, horizon + 1, (count,), generator=rng)
    known[: count // 2] = horizon
    future[torch.arange(horizon) >= known[:, None]] = math.nan
    intention = torch.randint(-1, 3, (count,), generator=rng)
    crossing = torch.where(intention > 0, torch.rand(count, generator=rng) * 3, math.nan)
    track = torch.arange(count) // 6
    return Windows(
        position=future.nan_to_num(nan=0.0) + torch.randn(count, horizon, 2, generator=rng),
        future=future,
        probability=torch.randn(count, 3, generator=rng).softmax(-1),
        intention=intention,
        crossing=crossing,
        lateral=torch.zeros(count),
        velocity=torch.randn(count, 2, generator=rng),
        gates=torch.rand(count, 3, experts, generator=rng),
        track=track,
        frame=torch.arange(count) % 6 * 2,
    )


def av2_metrics(predicted, real, threshold=2.0):
    """ADE, FDE and miss of one track as Argoverse 2 defines them (its K=1 case), written out step by step."""
    errors = [math.hypot(p[0] - r[0], p[1] - r[1]) for p, r in zip(predicted, real, strict=True)]
    return sum(errors) / len(errors), errors[-1], float(errors[-1] > threshold)


def test_displacement_errors_equal_av2s_definitions():
    windows = make_windows()
    error = distance(windows.position, windows.future)
    for i in range(30):  # whole futures
        expected = av2_metrics(windows.position[i].tolist(), windows.future[i].tolist())
        got = (ade(error)[i], fde(error)[i], missed(error)[i])
        np.testing.assert_allclose([float(v) for v in got], expected, rtol=1e-5)


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10_000), st.integers(2, 20), st.integers(1, 12))
def test_masked_errors_equal_a_loop(seed, count, horizon):
    windows = make_windows(count, horizon, seed)
    error = distance(windows.position.double(), windows.future.double())
    squares = [[] for _ in range(horizon)]
    for i in range(count):
        steps = []
        for t in range(horizon):
            if not math.isnan(float(windows.future[i, t, 0])):
                dx, dy = (windows.position[i, t] - windows.future[i, t]).double().tolist()
                steps.append(math.hypot(dx, dy))
                squares[t].append(dx * dx + dy * dy)
        assert float(ade(error)[i]) == pytest.approx(sum(steps) / len(steps), rel=1e-5)
        assert math.isnan(float(fde(error)[i])) == (len(steps) < horizon) == math.isnan(float(missed(error)[i]))
    for t, values in enumerate(squares):
        if values:
            assert float(rmse(error[:, t])) == pytest.approx(math.sqrt(sum(values) / len(values)), rel=1e-5)


def test_joint_rmse_squared_is_the_sum_of_both_axes():
    metrics = evaluate(make_windows(200), RATE).metrics
    for second in (1, 2):
        joint, along, across = (metrics[f"rmse{axis}_{second}s"] for axis in ("", "_lon", "_lat"))
        assert joint**2 == pytest.approx(along**2 + across**2, rel=1e-6)


def test_seconds_are_the_right_steps():
    assert seconds_to_steps(25, 5.0) == [(1, 4), (2, 9), (3, 14), (4, 19), (5, 24)]  # as in CS-LSTM
    assert seconds_to_steps(30, 10.0) == [(1, 9), (2, 19), (3, 29)]
    assert seconds_to_steps(9, 10.0) == []


def test_one_metre_off_is_one_metre_everywhere():
    windows = make_windows(300)
    off = windows.future.nan_to_num(nan=0.0) + torch.tensor([0.6, 0.8])
    metrics = evaluate(windows._replace(position=off), RATE).metrics
    for name in ("ade", "fde", "rmse_1s", "rmse_2s"):
        assert metrics[name] == pytest.approx(1.0, abs=1e-5)
    for name, value in (("rmse_lon", 0.6), ("mae_lon", 0.6), ("rmse_lat_1s", 0.8), ("mae_lat", 0.8), ("miss_rate", 0)):
        assert metrics[name] == pytest.approx(value, abs=1e-5)
    assert evaluate(windows._replace(position=off + 3), RATE).metrics["miss_rate"] == 1.0


def test_intention_metrics_equal_scikit_learn():
    rng = torch.Generator().manual_seed(0)
    label = torch.randint(0, 3, (300,), generator=rng)
    probability = (torch.randn(300, 3, generator=rng) + torch.nn.functional.one_hot(label, 3)).softmax(-1)
    metrics, said = intention_metrics(probability, label), probability.argmax(-1)
    precision, recall, f1, _ = precision_recall_fscore_support(label, said)
    for c, name in enumerate(("keep", "left", "right")):
        assert metrics[f"precision_{name}"] == pytest.approx(precision[c], abs=1e-6)
        assert metrics[f"recall_{name}"] == pytest.approx(recall[c], abs=1e-6)
        assert metrics[f"f1_{name}"] == pytest.approx(f1[c], abs=1e-6)
        area = average_precision_score(label == c, probability[:, c])
        assert metrics[f"auprc_{name}"] == pytest.approx(area, abs=1e-5)
    assert metrics["macro_f1"] == pytest.approx(f1_score(label, said, average="macro"), abs=1e-6)
    assert metrics["balanced_accuracy"] == pytest.approx(balanced_accuracy_score(label, said), abs=1e-6)
    assert metrics["accuracy"] == pytest.approx(float((said == label).float().mean()), abs=1e-6)


def test_always_keep_is_accurate_and_worthless():
    """The fact sheet's accuracy trap: 0.980 accuracy with macro-F1 0.330."""
    label = torch.tensor([0] * 980 + [1] * 12 + [2] * 8)
    metrics = intention_metrics(torch.tensor([[0.9, 0.05, 0.05]]).expand(1000, 3), label)
    assert metrics["accuracy"] == pytest.approx(0.98) and metrics["macro_f1"] == pytest.approx(0.330, abs=1e-3)
    assert metrics["balanced_accuracy"] == pytest.approx(1 / 3)


def test_a_class_that_never_occurs_has_no_score():
    metrics = intention_metrics(torch.tensor([[0.2, 0.7, 0.1], [0.8, 0.1, 0.1]]), torch.tensor([1, 0]))
    assert "f1_right" not in metrics and metrics["macro_f1"] == 1.0
    assert intention_metrics(torch.zeros(0, 3), torch.zeros(0, dtype=torch.long)) == {}


def lead(right, crossing, frame, track=None, intention=None):
    label = torch.ones(len(right), dtype=torch.long) if intention is None else torch.tensor(intention)
    said = torch.where(torch.tensor(right), label, 0)
    probability = torch.nn.functional.one_hot(said, 3).float()
    track = torch.zeros(len(right), dtype=torch.long) if track is None else torch.tensor(track)
    return lead_times(probability, label, torch.tensor(crossing), track, torch.tensor(frame), 10.0)


def test_lead_time_is_where_the_right_class_starts_to_stay():
    frame, crossing = [0, 5, 10, 15, 20], [2.5, 2.0, 1.5, 1.0, 0.5]
    assert lead([True, False, True, True, True], crossing, frame).seconds.tolist() == [1.5]
    assert lead([False, False, False, False, True], crossing, frame).seconds.tolist() == [0.5]
    assert lead([True] * 5, crossing, frame).seconds.tolist() == [2.5]
    assert lead([True, True, True, True, False], crossing, frame).seconds.tolist() == [0.0]


def test_every_crossing_is_an_event_of_its_own():
    # One vehicle goes left at frame 25 and right at 60; another goes left at 25, its windows in another order.
    found = lead(
        [True, True, False, True, True, False],
        [1.5, 0.5, 2.0, 1.0, 0.5, 1.0],
        [10, 20, 40, 50, 20, 15],
        [0, 0, 0, 0, 1, 1],
        [1, 1, 2, 2, 1, 1],
    )
    assert sorted(zip(found.track.tolist(), found.seconds.tolist(), strict=True)) == [(0, 1.0), (0, 1.5), (1, 0.5)]


def test_keeping_windows_and_crossings_that_are_over_make_no_event():
    nothing = lead([True, True], [math.nan, -0.5], [0, 5], intention=[0, 1])
    assert len(nothing.seconds) == 0


def test_metrics_say_how_many_units_they_average():
    windows = make_windows()
    result = evaluate(windows, RATE)
    assert set(result.metrics) == set(result.info)
    assert result.info["ade"].n == 60 and result.info["ade"].goal == "min" and result.info["ade"].unit == "m"
    assert result.info["fde"].n == int((~windows.future[:, -1, 0].isnan()).sum())
    assert result.info["macro_f1"].n == int((windows.intention >= 0).sum()) and result.info["macro_f1"].goal == "max"
    for second in (1, 2):
        known = ~windows.future[:, 5 * second - 1, 0].isnan()
        assert result.info[f"rmse_{second}s"].n == int(known.sum())


def test_units_are_tracks_with_their_mean_scores():
    windows = make_windows()
    units = evaluate(windows, RATE).units
    check_units(units)
    assert units["unit"].to_list() == list(range(10))
    error = ade(distance(windows.position.double(), windows.future.double()))
    for track in range(10):
        row = units.filter(pl.col("unit") == track)
        assert row["ade"].item() == pytest.approx(float(error[windows.track == track].mean()), rel=1e-6)
        own = windows.intention[windows.track == track]
        assert row["changes_lane"].item() == bool((own > 0).any())
        hit = (windows.probability[windows.track == track].argmax(-1) == own)[own >= 0]
        assert row["accuracy"].item() == pytest.approx(float(hit.float().mean()), rel=1e-6)


def test_order_and_repeats_of_windows_do_not_matter():
    windows = make_windows()
    order = torch.cat([torch.randperm(60), torch.arange(7)])
    moved = Windows(*(values[order] for values in windows))
    once = each_once(moved)
    for one, other in zip(once, each_once(windows), strict=True):
        torch.testing.assert_close(one, other, equal_nan=True)
    first, second = evaluate(windows, RATE), evaluate(moved, RATE)
    assert first.metrics == pytest.approx(second.metrics) and first.units.equals(second.units)
