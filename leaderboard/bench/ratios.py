"""Ratios of times measured in the same rounds. NumPy alone."""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

LEVEL = 0.95
RESAMPLES = 2000


@dataclass(frozen=True)
class Ratio:
    """A ratio of best times with its bootstrap interval."""

    value: float
    low: float
    high: float


def ratio(first: Mapping[int, float], second: Mapping[int, float], seed: int = 0) -> Ratio | None:
    """min(first) / min(second) over the rounds that both have; None when there is no such round.

    Both hold seconds by round. The interval is the percentile bootstrap over rounds, drawn in pairs: it shows
    how far the ratio depends on the luck of single rounds, and is no wider than the extremes of the sample.
    """
    rounds = sorted(first.keys() & second.keys())
    if not rounds:
        return None
    pairs = np.array([[first[r], second[r]] for r in rounds])
    drawn = np.random.default_rng(seed).integers(0, len(rounds), (RESAMPLES, len(rounds)))
    best = pairs[drawn].min(axis=1)
    low, high = np.quantile(best[:, 0] / best[:, 1], [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    value = pairs[:, 0].min() / pairs[:, 1].min()
    return Ratio(float(value), float(low), float(high))
