"""The weaving section that both generators drive on, and what they share: lateral motion, lanes, the finished table.

Three lanes 1.1 km long; an on-ramp joins on the right at 300 m as a fourth lane, which leaves as an off-ramp at 700 m.
The ramps run parallel to the road, so x is the distance along the road everywhere.
"""

import math

import numpy as np
import polars as pl

from .trajectories_table import TrackTable, completed

FRAME_RATE = 10.0
LENGTH, MERGE, DIVERGE = 1100.0, 300.0, 700.0  # m
RAMP = 200.0  # m of on-ramp before the merge and of off-ramp after the diverge
LANES, RAMP_LANE = 3, 4
LANE_WIDTH = 3.66  # m
ROAD_LIMIT, RAMP_LIMIT = 31.0, 24.0  # m/s
ROAD_FLOW, RAMP_FLOW, EXITS = 5000.0, 1100.0, 0.25  # vehicles an hour, share of the road's vehicles that leave
LANE_CHANGE_SECONDS = 4.0

_STEERING = 2.5  # 1/s, of the critically damped answer to the wheel
_WANDER, _WANDER_SECONDS = 0.17, 1.5  # m and s: how drivers miss the middle; 0.13 m are left after the steering


def centre_of(lane: pl.Expr) -> pl.Expr:
    """y of the middle of a lane; y = 0 is the left edge of the road."""
    return (0.5 - lane) * LANE_WIDTH


def finished(frame: pl.DataFrame, seed: int, split: str) -> pl.DataFrame:
    """Adds the drivers' imprecision and everything that follows from the positions.

    The lateral position is an AR(1) wander around the planned one, then steered with a critically damped second-order
    lag: both run forward in time, so that nothing moves before its cause.

    Args:
        frame: vehicle, frame, x (centre), plan (y of a driver without fault), vx, ax, length, width.
        seed: of the world; the same seed gives the same noise.
        split: name of the recording.
    """
    dt = 1 / FRAME_RATE
    frame = frame.sort("vehicle", "frame")
    drawn = np.random.default_rng([seed, 1]).standard_normal(len(frame))
    follow, wander = 1 - math.exp(-_STEERING * dt), 1 - math.exp(-dt / _WANDER_SECONDS)
    stationary = math.sqrt(wander / (2 - wander))
    first = pl.int_range(pl.len()).over("vehicle") == 0
    shock = pl.col("drawn") * _WANDER * pl.when(first).then(1.0).otherwise(1 / stationary)
    lane = pl.col("lane")
    in_weave = pl.col("x").is_between(MERGE, DIVERGE)
    out = (
        frame.lazy()
        .with_columns(drawn=pl.Series(drawn))
        .with_columns(shock=shock)
        .with_columns(aim=pl.col("plan") + _lag("shock", wander))
        .with_columns(aim=_lag("aim", follow))
        .with_columns(y=_lag("aim", follow))
        .with_columns(vy=(pl.col("y").diff().over("vehicle") / dt).fill_null(0.0))
        .with_columns(lane=((-pl.col("y") / LANE_WIDTH).floor() + 1).clip(1, RAMP_LANE).cast(pl.Int32))
        .with_columns(
            lateral=pl.col("y") - centre_of(lane),
            left_lane=(lane > 1) & ((lane < RAMP_LANE) | in_weave),
            right_lane=(lane < LANES) | ((lane == LANES) & in_weave),
            recording=pl.lit(split),
            scene=pl.lit(split),
        )
        .collect()
    )
    return completed(out)


def _lag(column: str, share: float) -> pl.Expr:
    """First-order lag of each vehicle: moves by `share` of what is left."""
    return pl.col(column).ewm_mean(alpha=share, adjust=False).over("vehicle")


def joined(worlds: dict[int, pl.DataFrame], splits: dict[str, list[int]]) -> TrackTable:
    """All worlds as one table whose recordings are the seeds, each in its split."""
    split_of = {f"seed{seed}": name for name, seeds in splits.items() for seed in seeds}
    return TrackTable(pl.concat(worlds.values()).sort("scene", "vehicle", "frame"), FRAME_RATE, split_of)
