"""Statistics of the leaderboard: intervals over seeds and paired tests over units. NumPy alone."""

import math
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float

LEVEL = 0.95
RESAMPLES = 1000


@dataclass(frozen=True)
class MeanInterval:
    """Mean of `n` values with a Student t interval; a single value has none."""

    mean: float
    low: float | None
    high: float | None
    n: int


@dataclass(frozen=True)
class PairedTest:
    """Mean difference over `n` units, its bootstrap interval, two-sided p value of "no difference"."""

    difference: float
    low: float
    high: float
    p: float
    n: int


def mean_interval(values: Float[np.ndarray, "n"], level: float = LEVEL) -> MeanInterval:
    """Mean and its two-sided Student t interval with n - 1 degrees of freedom."""
    n = len(values)
    mean = float(np.mean(values))
    if n < 2:
        return MeanInterval(mean, None, None, n)
    half = student_t_quantile((1 + level) / 2, n - 1) * float(np.std(values, ddof=1)) / math.sqrt(n)
    return MeanInterval(mean, mean - half, mean + half, n)


def paired_bootstrap(
    first: Float[np.ndarray, "units"],
    second: Float[np.ndarray, "units"],
    generator: np.random.Generator,
    resamples: int = RESAMPLES,
    level: float = LEVEL,
) -> PairedTest:
    """Percentile bootstrap of mean(first - second), resampling units.

    The p value is twice the smaller share of resampled differences on either side of zero, with one added to
    both counts so that it is never 0 (Davison and Hinkley, 1997, eq. 4.11).

    Raises:
        ValueError: no units, or arrays of different lengths.
    """
    if first.shape != second.shape or not len(first):
        raise ValueError(f"expected two equally long, non-empty arrays, got {first.shape} and {second.shape}")
    differences = np.asarray(first - second, dtype=np.float64)
    n = len(differences)
    means = np.empty(resamples)
    rows = max(1, 2_000_000 // n)  # 16 MB of indices at a time
    for start in range(0, resamples, rows):
        stop = min(start + rows, resamples)
        means[start:stop] = differences[generator.integers(0, n, (stop - start, n))].mean(axis=1)
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
    smaller_tail = int(min(np.count_nonzero(means <= 0), np.count_nonzero(means >= 0)))
    p = min(1.0, 2 * (smaller_tail + 1) / (resamples + 1))
    return PairedTest(float(differences.mean()), float(low), float(high), p, n)


def student_t_quantile(probability: float, degrees: int) -> float:
    """Quantile of Student's t distribution, by bisection on the exact distribution function.

    Raises:
        ValueError: a probability outside (0, 1) or fewer than one degree of freedom.
    """
    if not 0 < probability < 1 or degrees < 1:
        raise ValueError(f"expected a probability in (0, 1) and degrees >= 1, got {probability} and {degrees}")
    if probability < 0.5:
        return -student_t_quantile(1 - probability, degrees)
    low, high = 0.0, 1.0
    while student_t_cdf(high, degrees) < probability:
        low, high = high, high * 2
    while high - low > 1e-13 * high:
        middle = (low + high) / 2
        if middle in (low, high):
            break
        low, high = (middle, high) if student_t_cdf(middle, degrees) < probability else (low, middle)
    return (low + high) / 2


def student_t_cdf(t: float, degrees: int) -> float:
    """P(T <= t): the finite sum for whole degrees of freedom (Abramowitz and Stegun, 26.7.3 and 26.7.4)."""
    theta = math.atan(t / math.sqrt(degrees))
    sine, cosine = math.sin(theta), math.cos(theta)
    odd = degrees % 2
    term, total = (cosine, 0.0) if odd else (1.0, 0.0)
    for j in range(degrees // 2):
        total += term
        term *= cosine**2 * ((2 * j + 2) / (2 * j + 3) if odd else (2 * j + 1) / (2 * j + 2))
    between = 2 / math.pi * (theta + sine * total) if odd else sine * total  # P(-t < T < t)
    return 0.5 + between / 2
