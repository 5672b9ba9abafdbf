"""Intervals and paired tests against closed forms and SciPy."""

import numpy as np
import pytest
from moezoo.leaderboard.statistics import mean_interval, paired_bootstrap, student_t_cdf, student_t_quantile
from scipy import stats


@pytest.mark.parametrize("degrees", [1, 2, 3, 4, 7, 29, 200])
def test_student_t_is_scipys(degrees):
    for p in (0.6, 0.9, 0.975, 0.999):
        assert student_t_quantile(p, degrees) == pytest.approx(stats.t.ppf(p, degrees), rel=1e-9)
        assert student_t_quantile(1 - p, degrees) == pytest.approx(-stats.t.ppf(p, degrees), rel=1e-9)
    for t in (-2.0, 0.0, 0.3, 5.0):
        assert student_t_cdf(t, degrees) == pytest.approx(stats.t.cdf(t, degrees), abs=1e-12)


def test_an_interval_is_scipys_and_one_seed_has_none():
    values = np.array([0.78, 0.80, 0.79, 0.81, 0.805])
    got = mean_interval(values)
    low, high = stats.t.interval(0.95, 4, loc=values.mean(), scale=stats.sem(values))
    assert (got.mean, got.low, got.high, got.n) == pytest.approx((values.mean(), low, high, 5))
    assert mean_interval(values[:1]).low is None


def test_a_planted_difference_is_found_and_its_interval_is_the_normal_one():
    rng = np.random.default_rng(0)
    base, noise = rng.random(4000), rng.normal(0.01, 0.1, 4000)
    test = paired_bootstrap(base + noise, base, np.random.default_rng(1))
    half = 1.96 * noise.std() / np.sqrt(4000)
    assert test.difference == pytest.approx(noise.mean())
    assert (test.low, test.high) == pytest.approx((noise.mean() - half, noise.mean() + half), abs=half / 5)
    assert test.p < 0.01 and test.n == 4000


def test_no_difference_is_rarely_called_one():
    rng = np.random.default_rng(0)
    p = [paired_bootstrap(*rng.random((2, 300)), rng).p for _ in range(200)]
    assert np.mean(np.array(p) < 0.05) < 0.1
    assert 0.35 < np.median(p) < 0.65


def test_the_same_generator_gives_the_same_test_and_empty_units_are_refused():
    first, second = np.random.default_rng(0).random((2, 50))
    runs = [paired_bootstrap(first, second, np.random.default_rng(3)) for _ in range(2)]
    assert runs[0] == runs[1]
    with pytest.raises(ValueError, match="non-empty"):
        paired_bootstrap(first[:0], second[:0], np.random.default_rng(0))
