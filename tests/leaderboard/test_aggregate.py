"""IQM, bootstrap and curves against hand-worked cases and SciPy."""

import numpy as np
import polars as pl
import pytest
from moezoo.errors import UserError
from moezoo.leaderboard.aggregate import (
    AGGREGATES,
    iqm,
    median_of_tasks,
    optimality_gap,
    performance_profile,
    probability_of_improvement,
    read_curves,
    sample_efficiency,
    scores_at,
    stratified_bootstrap,
)
from moezoo.leaderboard.board import iqm_interval
from moezoo.leaderboard.curves import write_curves
from moezoo.leaderboard.report import interval
from moezoo.leaderboard.statistics import mean_interval
from scipy import stats

RNG = np.random.default_rng(0)


def test_iqm_by_hand():
    assert iqm(np.array([[0.0, 1.0], [2.0, 9.0]])) == 1.5  # of 0, 1, 2, 9 the middle two
    assert iqm(np.array([3.0, 100.0, 5.0])) == 36.0, "three runs are too few to cut"
    assert iqm(np.arange(10.0)) == np.mean(np.arange(2, 8))
    assert iqm(np.array([[1.0, np.nan], [3.0, 5.0]])) == 3.0


@pytest.mark.parametrize("shape", [(1, 1), (4, 3), (10, 26), (7, 1)])
def test_iqm_is_scipys_trimmed_mean(shape):
    scores = RNG.random(shape)
    assert iqm(scores) == pytest.approx(stats.trim_mean(scores, 0.25, axis=None))


def test_the_other_aggregates_by_hand():
    scores = np.array([[0.2, 1.4, 0.5], [0.4, 1.0, 0.7]])  # tasks' means 0.3, 1.2, 0.6
    assert median_of_tasks(scores) == pytest.approx(0.6) and AGGREGATES["mean"](scores) == pytest.approx(0.7)
    assert optimality_gap(scores) == pytest.approx(1 - (0.2 + 0.4 + 1 + 1 + 0.5 + 0.7) / 6)
    np.testing.assert_allclose(performance_profile(scores, np.array([0.0, 0.45, 2.0])), [1.0, 2 / 3, 0.0])
    better = np.array([[3.0, 5.0], [4.0, 5.0]]), np.array([[1.0, 5.0], [3.0, 9.0]])
    assert probability_of_improvement(*better) == pytest.approx(((2 + 1.5) / 4 + 0.25) / 2)


def test_runs_are_resampled_inside_their_task():
    far_apart = np.array([[0.0, 100.0], [0.0, 100.0], [0.0, 100.0]])
    found = stratified_bootstrap(far_apart, AGGREGATES["mean"], RNG, 100)
    assert (found.value, found.low, found.high) == (50.0, 50.0, 50.0), "a task's runs never stand for another's"
    uneven = np.array([[1.0, 5.0], [2.0, np.nan]])
    assert stratified_bootstrap(uneven, AGGREGATES["mean"], RNG, 50).value == pytest.approx(3.25)
    with pytest.raises(ValueError, match="a task has no run"):
        stratified_bootstrap(np.array([[1.0, np.nan]]), iqm, RNG)


def test_the_interval_of_a_mean_is_the_normal_one():
    scores = RNG.normal(size=(400, 1))
    found = stratified_bootstrap(scores, AGGREGATES["mean"], RNG)
    half = 1.96 * scores.std() / 20
    assert (found.low, found.high) == pytest.approx((scores.mean() - half, scores.mean() + half), abs=0.015)


def curves():
    rows = [
        {"agent": agent, "task": task, "seed": seed, "frame": frame, "episode_reward": base * frame / 1000}
        for agent, base in (("mentor", 2.0), ("drqv2", 1.0))
        for task in ("walk", "run")
        for seed in range(3)
        for frame in (1000, 2000, 4000)
    ]
    return pl.DataFrame(rows)


def test_curves_of_ours_and_drqv2s_load_together(tmp_path):
    ours = curves().filter(pl.col("agent") == "mentor").with_columns(success_rate=0.5, hour=0.1)
    ours.write_csv(tmp_path / "eval.csv")
    theirs = curves().filter(pl.col("agent") == "drqv2").with_columns(hour=1.0, frame=pl.col("frame").cast(pl.Float64))
    theirs.write_csv(tmp_path / "dmc_walk.csv")
    table = read_curves([tmp_path / "eval.csv", tmp_path / "dmc_walk.csv"])
    assert table.height == 36 and table["frame"].dtype == pl.Int64 and table["success_rate"].null_count() == 18
    scores = scores_at(table, 3000)
    np.testing.assert_allclose(scores["mentor"], np.full((3, 2), 6.0))  # between 4 at 2000 and 8 at 4000
    assert not scores_at(table, 5000), "no run is carried beyond its end"
    efficiency = sample_efficiency(table, [1000, 4000], RNG, resamples=20)
    assert efficiency["agent"].to_list() == ["drqv2", "drqv2", "mentor", "mentor"]
    assert (
        efficiency["iqm"].to_list() == pytest.approx([1.0, 4.0, 2.0, 8.0]) and efficiency["runs"].to_list() == [6] * 4
    )


def test_curves_are_drawn_with_their_numbers(tmp_path):
    curves().write_csv(tmp_path / "eval.csv")
    picture, numbers = write_curves([tmp_path / "eval.csv"], tmp_path / "out" / "curves.png", scale=2.0, resamples=10)
    table = pl.read_csv(numbers)
    assert picture.stat().st_size > 10_000 and set(table["agent"]) == {"mentor", "drqv2"}
    assert table.filter(agent="mentor", frame=4000)["iqm"].item() == 4.0
    with pytest.raises(UserError, match="no episode_reward of the tasks"):
        write_curves([tmp_path / "eval.csv"], tmp_path / "none.png", tasks=["swim"])


def test_the_board_shows_the_interquartile_mean_of_control():
    values = np.array([-150.0, -160.0, -140.0, -900.0])
    found = iqm_interval(values)
    assert found.mean == iqm(values) == -155.0 and found.low < -155.0 < found.high and found.n == 4
    assert interval(found).startswith("\N{MINUS SIGN}155.00 [") and iqm_interval(values[:1]).low is None
    assert interval(mean_interval(values[:3])).count("±") == 1


def test_a_file_that_is_no_curve_is_refused(tmp_path):
    (tmp_path / "other.csv").write_text("agent,task\nx,y\n")
    with pytest.raises(UserError, match=r"other.csv: column 'seed' is missing"):
        read_curves([tmp_path / "other.csv"])
    with pytest.raises(UserError, match="not a readable CSV"):
        read_curves([tmp_path / "none.csv"])
    with pytest.raises(UserError, match="no curves given"):
        read_curves([])
