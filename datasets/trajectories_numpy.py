"""The weaving section driven by IDM and MOBIL in NumPy: needs nothing, all worlds advance together.

Car following: Treiber, Hennecke, Helbing 2000 (IDM). Lane changes: Kesting, Treiber, Helbing 2007 (MOBIL), with a
growing urge for those who must leave their lane.
"""

from collections.abc import Sequence

import numpy as np
import polars as pl
from jaxtyping import Float64, Int64

from . import trajectories_weave as weave
from .trajectories_weave import DIVERGE, LANE_WIDTH, LANES, LENGTH, MERGE, RAMP, RAMP_LANE

_DT = 1 / weave.FRAME_RATE
_DECIDE_EVERY = 5  # steps between looks into the mirror
_INFLOW = 0.8  # of SUMO's: IDM and MOBIL weave less well, and more would only stand
_FAR = 1e4  # m: nobody ahead
_POLITENESS, _THRESHOLD, _SAFE = 0.2, 0.15, 3.5  # -, m/s^2, m/s^2
_URGE = 2.5  # m/s^2 at the end of the lane
_YIELD = 0.4  # m/s^2 that drivers beside the ramp give to let others in
_COURTESY = 2.0  # m/s^2 they brake at most for the same
_RUN_OUT = 120.0  # m before the end of the ramp's lane from where drivers mind it
_PAUSE = 3.0  # s between two changes of a driver
_ROOM = 2.5  # m that must stay free before and behind
_GROUP = 16  # lanes of a world, more than there are: nobody is beside lane 0 or 5

# Drivers: share, desired speed (m/s), its spread, time gap (s), acceleration, length, width
_CAR, _HASTY, _TRUCK = range(3)
_SHARE = (0.62, 0.28, 0.10)
_SPEED, _SPREAD = (28.0, 31.0, 23.0), (2.2, 2.5, 1.2)
_GAP, _PULL = (1.2, 0.8, 1.7), (1.4, 2.0, 0.8)
_LENGTH, _WIDTH = (4.6, 4.5, 11.0), (1.8, 1.8, 2.5)
_BRAKE, _STANDSTILL = 2.0, 2.0  # comfortable deceleration m/s^2, gap at rest m

Real = Float64[np.ndarray, " vehicles"]
Whole = Int64[np.ndarray, " vehicles"]
Present = Int64[np.ndarray, " present"]


def simulate(seeds: Sequence[int], seconds: float) -> dict[int, pl.DataFrame]:
    """Drives one world per seed; a world depends on its own seed alone.

    Returns:
        seed -> rows of `trajectories_table.COLUMNS` at 10 Hz.
    """
    world = _Worlds(seeds, seconds)
    records = [world.step(step) for step in range(round(seconds * weave.FRAME_RATE))]
    who, frame, x, plan, v, a = (np.concatenate(column) for column in zip(*records, strict=True))
    rows = pl.DataFrame(
        {
            "world": world.world[who],
            "vehicle": who - world.first[world.world[who]],
            "frame": frame,
            "x": x,
            "plan": plan,
            "vx": v,
            "ax": a,
            "length": world.length[who],
            "width": world.width[who],
        }
    )
    parts = rows.partition_by("world", as_dict=True, include_key=False)
    return {seed: weave.finished(parts[i,], seed, f"seed{seed}") for i, seed in enumerate(seeds)}


class _Worlds:
    """All vehicles of all worlds in flat arrays, present or still to come."""

    def __init__(self, seeds: Sequence[int], seconds: float) -> None:
        drawn = [_arrivals(seed, seconds) for seed in seeds]
        self.first = np.cumsum([0, *(len(one["due"]) for one in drawn[:-1])])
        self.world = np.repeat(np.arange(len(seeds)), [len(one["due"]) for one in drawn])
        joined = {name: np.concatenate([one[name] for one in drawn]) for name in drawn[0]}
        kind = joined["kind"].astype(np.int64)
        self.due, self.lane = joined["due"], joined["lane"].astype(np.int64)
        self.exits = joined["exits"] > 0
        self.wish = np.take(_SPEED, kind) + np.take(_SPREAD, kind) * joined["spread"]
        self.gap, self.pull = np.take(_GAP, kind), np.take(_PULL, kind)
        self.length, self.width = np.take(_LENGTH, kind), np.take(_WIDTH, kind)
        self.x = np.where(self.lane == RAMP_LANE, MERGE - RAMP, 0.0)
        self.v, self.a = np.zeros(len(kind)), np.zeros(len(kind))
        self.y = (0.5 - self.lane) * LANE_WIDTH
        self.rest = np.zeros(len(kind))
        self.present = np.zeros(len(kind), bool)
        # Queues at the four entrances of each world, in order of arrival.
        self.entrance = self.world * (RAMP_LANE + 1) + self.lane
        order = np.lexsort((self.due, self.entrance))
        self.queue, starts = order, np.searchsorted(self.entrance[order], np.arange(len(seeds) * (RAMP_LANE + 1) + 1))
        self.head, self.tail = starts[:-1].copy(), starts[1:]

    def step(self, step: int) -> tuple[Whole, Whole, Real, Real, Real, Real]:
        """One tenth of a second; returns id, frame, x, planned y, speed, acceleration of those on the road."""
        self._enter(step * _DT)
        on = np.flatnonzero(self.present)
        if step % _DECIDE_EVERY == 0:
            self._change_lanes(on)
        lead, _ = self._around(on, self.lane[on])
        self.a[on] = np.minimum(self._follow(on, lead), self._courtesy(on))
        speed = np.maximum(self.v[on] + self.a[on] * _DT, 0.0)
        self.x[on] += 0.5 * (self.v[on] + speed) * _DT
        self.v[on] = speed
        sideways = LANE_WIDTH / weave.LANE_CHANGE_SECONDS * _DT
        self.y[on] += np.clip((0.5 - self.lane[on]) * LANE_WIDTH - self.y[on], -sideways, sideways)
        self.rest[on] -= _DT
        end = np.where(self.lane[on] == RAMP_LANE, DIVERGE + RAMP, LENGTH)
        self.present[on[self.x[on] >= end]] = False
        on = on[self.x[on] < end]
        return on, np.full(len(on), step), self.x[on], self.y[on], self.v[on], self.a[on]

    def _enter(self, now: float) -> None:
        """At each entrance the first in the queue, where there is room."""
        waiting = np.flatnonzero(self.head < self.tail)
        who = self.queue[self.head[waiting]]
        due = self.due[who] <= now
        who, waiting = who[due], waiting[due]
        if not len(who):
            return
        on = np.flatnonzero(self.present)
        lead = self._search(on, self.world[who], self.lane[who], self.x[who])[0]
        ahead, speed = self._gap_to(who, lead), np.where(lead >= 0, self.v[lead], _FAR)
        limit = np.where(self.lane[who] == RAMP_LANE, weave.RAMP_LIMIT, weave.ROAD_LIMIT)
        v = np.minimum(np.minimum(self.wish[who], limit), speed + 2.0)
        room = ahead > _STANDSTILL + 0.7 * self.gap[who] * v
        self.head[waiting[room]] += 1
        self.present[who[room]] = True
        self.v[who[room]] = v[room]

    def _search(self, on: Present, world: Whole, lane: Whole, x: Real) -> tuple[Whole, Whole]:
        """Vehicles ahead of and behind each place, -1 where there is none."""
        if not len(on):
            nobody = np.full(len(x), -1)
            return nobody, nobody
        keys = (self.world[on] * _GROUP + self.lane[on]) * _FAR + self.x[on]
        order = np.argsort(keys, kind="stable")
        sorted_ids, place = on[order], (world * _GROUP + lane) * _FAR + x
        after = np.searchsorted(keys[order], place, "right")
        before = np.searchsorted(keys[order], place, "left") - 1
        ahead = sorted_ids[np.minimum(after, len(on) - 1)]
        behind = sorted_ids[np.maximum(before, 0)]
        here = world * _GROUP + lane
        ahead_ok = (after < len(on)) & (self.world[ahead] * _GROUP + self.lane[ahead] == here)
        behind_ok = (before >= 0) & (self.world[behind] * _GROUP + self.lane[behind] == here)
        return np.where(ahead_ok, ahead, -1), np.where(behind_ok, behind, -1)

    def _around(self, who: Whole, lane: Whole) -> tuple[Whole, Whole]:
        """Leader and follower of each vehicle, were it in that lane."""
        return self._search(np.flatnonzero(self.present), self.world[who], lane, self.x[who])

    def _gap_to(self, who: Whole, lead: Whole) -> Real:
        """Bumper to bumper, m."""
        between = self.x[lead] - self.x[who] - 0.5 * (self.length[lead] + self.length[who])
        return np.where(lead >= 0, between, _FAR)

    def _idm(self, who: Whole, gap: Real, ahead: Real) -> Real:
        """Acceleration behind somebody at speed `ahead` over `gap`."""
        v = self.v[who]
        limit = np.where((self.lane[who] == RAMP_LANE) & (self.x[who] < MERGE), weave.RAMP_LIMIT, np.inf)
        wish = np.minimum(self.wish[who], limit)
        desired = self.gap[who] * v + v * (v - ahead) / (2 * np.sqrt(self.pull[who] * _BRAKE))
        ratio = (_STANDSTILL + np.maximum(desired, 0)) / np.maximum(gap, 0.1)
        slowed: Real = np.clip(self.pull[who] * (1 - (v / wish) ** 4 - ratio**2), -8.0, None)
        return slowed

    def _follow(self, who: Whole, lead: Whole) -> Real:
        """IDM behind the leader, and before the end of the lane for those who must not leave the road with it."""
        free = self._idm(who, self._gap_to(who, lead), np.where(lead >= 0, self.v[lead], _FAR))
        left = np.where((self.lane[who] == RAMP_LANE) & ~self.exits[who], DIVERGE - self.x[who], _FAR)
        ends = self._idm(who, np.maximum(left, 0.1), np.zeros(len(who)))
        return np.where(left < _RUN_OUT, np.minimum(free, ends), free)

    def _courtesy(self, who: Whole) -> Real:
        """In the weaving section drivers beside the ramp's lane let in whoever is ahead in it, without hard braking."""
        beside = (self.lane[who] == LANES) & (self.x[who] > MERGE - 50) & (self.x[who] < DIVERGE)
        ahead, _ = self._around(who, np.full(len(who), RAMP_LANE))
        merging = beside & (ahead >= 0) & ~self.exits[ahead]
        kind = self._idm(who, np.maximum(self._gap_to(who, ahead), 1.0), self.v[ahead])
        return np.where(merging, np.maximum(kind, -_COURTESY), _FAR)

    def _change_lanes(self, on: Whole) -> None:
        """MOBIL: go where one's own gain, less what others lose, exceeds the threshold, if nobody must brake hard."""
        settled = (self.rest[on] <= 0) & (self.x[on] > 20)
        self.exits[on] &= ~((self.x[on] > DIVERGE - 20) & (self.lane[on] != RAMP_LANE))  # missed it
        best, target = np.full(len(on), _THRESHOLD), self.lane[on].copy()
        lead, behind = self._around(on, self.lane[on])
        stay = self._follow(on, lead)
        relief = self._loss(behind, lead, on, entering=False)
        for side in (-1, 1):
            lane = self.lane[on] + side
            in_weave = (self.x[on] > MERGE) & (self.x[on] < DIVERGE - 10)
            allowed = settled & (lane >= 1) & ((lane <= LANES) | ((lane == RAMP_LANE) & in_weave & self.exits[on]))
            allowed &= (self.lane[on] != RAMP_LANE) | in_weave
            ahead, follower = self._around(on, lane)
            gain = self._idm(on, self._gap_to(on, ahead), np.where(ahead >= 0, self.v[ahead], _FAR)) - stay
            brake = self._braking(follower, on)
            room = (self._gap_to(on, ahead) > _ROOM) & (self._gap_behind(follower, on) > _ROOM)
            cost = self._loss(follower, ahead, on, entering=True)
            score = gain + _POLITENESS * (relief - cost) + self._urge(on, side)
            patience = _SAFE + np.maximum(self._urge(on, side), 0.0)
            better = allowed & room & (brake > -patience) & (score > best)
            best, target = np.where(better, score, best), np.where(better, lane, target)
        self._go(on, target)

    def _go(self, on: Whole, target: Whole) -> None:
        """Of two that would enter the same gap, the one behind waits."""
        moves = np.flatnonzero(target != self.lane[on])
        who, lane = on[moves], target[moves]
        order = np.lexsort((-self.x[who], lane, self.world[who]))
        who, lane = who[order], lane[order]
        same = (self.world[who][1:] == self.world[who][:-1]) & (lane[1:] == lane[:-1])
        close = np.zeros(len(who), bool)
        close[1:] = same & (self.x[who][:-1] - self.x[who][1:] < 25.0)
        self.lane[who[~close]] = lane[~close]
        self.rest[who[~close]] = _PAUSE

    def _urge(self, on: Whole, side: int) -> Real:
        """What those who must change lanes gain by it, m/s^2, and those who must stay lose."""
        leave = self.exits[on]
        close = np.clip((self.x[on] - 100) / (DIVERGE - 100), 0.2, 1.0)
        merge = (self.lane[on] == RAMP_LANE) & ~leave
        urge = np.where(leave, side * close, 0.0) + np.where(merge, -side * np.maximum(close, 0.4), 0.0)
        beside = (self.lane[on] == LANES) & (self.x[on] > MERGE - 200) & (self.x[on] < DIVERGE) & ~leave
        return _URGE * urge + np.where(beside & (side < 0), _YIELD, 0.0)

    def _braking(self, follower: Whole, on: Whole) -> Real:
        """The new follower's acceleration behind us."""
        there = self._idm(np.maximum(follower, 0), self._gap_behind(follower, on), self.v[on])
        return np.where(follower >= 0, there, 0.0)

    def _gap_behind(self, follower: Whole, on: Whole) -> Real:
        between = self.x[on] - self.x[follower] - 0.5 * (self.length[on] + self.length[follower])
        return np.where(follower >= 0, between, _FAR)

    def _loss(self, follower: Whole, lead: Whole, on: Whole, entering: bool) -> Real:
        """What the follower loses when we come between it and its leader, or gains when we go."""
        speed = np.where(lead >= 0, self.v[lead], _FAR)
        without = self._idm(
            np.maximum(follower, 0), np.where(lead >= 0, self._gap_to(np.maximum(follower, 0), lead), _FAR), speed
        )
        change = without - self._braking(follower, on)
        return np.where(follower >= 0, change if entering else np.clip(change, 0, 5), 0.0)


def _arrivals(seed: int, seconds: float) -> dict[str, Float64[np.ndarray, " vehicles"]]:
    """Poisson arrivals of one world: when, in which lane, what kind of driver, and whether they leave."""
    rng = np.random.default_rng([seed, 0])
    columns: dict[str, list[Float64[np.ndarray, " some"]]] = {n: [] for n in ("due", "lane", "kind", "spread", "exits")}
    for lane in range(1, RAMP_LANE + 1):
        rate = (weave.RAMP_FLOW if lane == RAMP_LANE else weave.ROAD_FLOW / LANES) * _INFLOW / 3600
        due = np.cumsum(rng.exponential(1 / rate, int(rate * seconds * 2) + 20))
        due = due[due < seconds]
        columns["due"].append(due)
        columns["lane"].append(np.full(len(due), float(lane)))
        columns["kind"].append(rng.choice(3, len(due), p=_SHARE).astype(float))
        columns["spread"].append(rng.standard_normal(len(due)).clip(-2, 2))
        columns["exits"].append((rng.random(len(due)) < (0.0 if lane == RAMP_LANE else weave.EXITS)).astype(float))
    return {name: np.concatenate(parts) for name, parts in columns.items()}
