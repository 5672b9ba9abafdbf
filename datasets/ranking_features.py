"""Causal cross features of a user and a candidate: own repeats, brand habits, price, popularity.

Every feature of a session is computed from the owner's rows before the session's basket and from statistics of
the train rows, so nothing of the basket itself or of the future leaks in. All look-ups are binary searches in
arrays sorted once: no loop over sessions or users.
"""

from typing import NamedTuple

import numpy as np
import polars as pl
from numpy.typing import NDArray

from ..errors import UserError

Ints = NDArray[np.int64]
Floats = NDArray[np.float64]
DAY = 86_400
DECAYS_DAYS = (7.0, 30.0, 90.0)
RECENT_DAYS = 60


class Windows(NamedTuple):
    """Histories of a batch of sessions: rows `start:end` of the owner's events, seen at `time` (seconds)."""

    owner: Ints
    start: Ints
    end: Ints
    time: Ints
    recent: Ints  # first row not older than RECENT_DAYS


class History(NamedTuple):
    """What an index says of (owner, code) pairs inside windows, each of shape [batch, cands]."""

    times: Floats
    recent: Floats
    last: Ints  # row of the latest occurrence, -1 where there is none
    mean_log_price: Floats


class OccurrenceIndex:
    """Counts, latest rows and mean prices of (owner, code) in any window of rows, by binary search."""

    def __init__(self, owner: Ints, code: Ints, num_codes: int, log_price: Floats | None = None) -> None:
        self._rows_plus_one, self._num_codes = len(owner) + 1, num_codes
        if (int(owner.max(initial=0)) + 1) * num_codes * self._rows_plus_one >= 1 << 63:
            raise UserError(
                f"{len(owner):,} behaviour rows x {num_codes:,} values are too many for cross features: "
                "set data.cross_features to false or name fewer data.cross_attributes"
            )
        keys = (owner * num_codes + code) * self._rows_plus_one + np.arange(len(owner))
        self._row = np.argsort(keys)
        self._keys = keys[self._row]
        price = np.zeros(len(owner)) if log_price is None else log_price
        self._price_sum = np.concatenate([[0.0], np.cumsum(price[self._row])])

    def _place(self, owner: Ints, code: Ints, row: Ints) -> Ints:
        """How many occurrences sort before (owner, code) at `row`."""
        keys = (owner * self._num_codes + code) * self._rows_plus_one + row
        return np.searchsorted(self._keys, keys).astype(np.int64)

    def count(self, owner: Ints, start: Ints, end: Ints, code: Ints) -> Ints:
        """Occurrences of `code` in rows `start:end` of `owner`; all of one shape."""
        return self._place(owner, code, end) - self._place(owner, code, start)

    def latest(self, owner: Ints, start: Ints, end: Ints, code: Ints, count: int) -> Ints:
        """The last `count` rows of `code` in rows `start:end` of `owner`, [batch, count], -1 where there are fewer."""
        low, high = self._place(owner, code, start)[:, None], self._place(owner, code, end)[:, None]
        place = high - count + np.arange(count)
        if not len(self._row):
            return np.full(place.shape, -1)
        return np.where(place >= low, self._row[np.maximum(place, 0)], -1)

    def __call__(self, windows: Windows, code: Ints) -> History:
        """Look up codes [batch, cands] of the windows' owners."""
        owner, start, end, _, since = (values[:, None] for values in windows)
        low, high = self._place(owner, code, start), self._place(owner, code, end)
        recent = high - self._place(owner, code, since)
        count = high - low
        last = np.where(count > 0, self._row[np.maximum(high - 1, 0)], -1) if len(self._row) else count - 1
        mean_price = (self._price_sum[high] - self._price_sum[low]) / np.maximum(count, 1)
        return History(count.astype(float), recent.astype(float), last, mean_price)


class CrossFeatures:
    """Computes the dense features [batch, cands, features] that `names` lists.

    Args:
        events: `RankingTables.events` with columns owner, item, time, is_train and optionally price.
        num_items: size of the catalogue.
        query_code: code of each item's query attribute, [items]; zeros where there is no query.
        attributes: codes of further item attributes, name -> [items].
    """

    def __init__(self, events: pl.DataFrame, num_items: int, query_code: Ints, attributes: dict[str, Ints]) -> None:
        self._owner = events["owner"].to_numpy().astype(np.int64)
        self._item = events["item"].to_numpy().astype(np.int64)
        self._time = events["time"].to_numpy().astype(np.int64)
        train = events["is_train"].to_numpy()
        price = events["price"].to_numpy().astype(float) if "price" in events.columns else None
        self._has_price = price is not None
        log_price = np.zeros(len(events)) if price is None else np.log(np.clip(price, 0.05, None))
        self._query = query_code
        self._attributes = attributes
        self._owner_time = self._owner * (1 << 34) + self._time
        self._statistics(num_items, train, log_price)

        def index(code: Ints) -> OccurrenceIndex:
            return OccurrenceIndex(self._owner, code[self._item], int(code.max(initial=0)) + 1, log_price)

        self.by_item, self.by_query = index(np.arange(num_items)), index(query_code)
        self._pair_codes = {
            name: np.unique(query_code * (int(code.max(initial=0)) + 1) + code, return_inverse=True)[1]
            for name, code in attributes.items()
        }
        self._by_pair = {name: index(code) for name, code in self._pair_codes.items()}
        self._by_attribute = {name: index(code) for name, code in attributes.items()}
        self.names = self._names()

    def _statistics(self, num_items: int, train: NDArray[np.bool_], log_price: Floats) -> None:
        """Popularity, repeat rate, cycle and price of each item, from train rows alone."""
        item, owner, time = self._item[train], self._owner[train], self._time[train]
        rows = pl.DataFrame({"item": item, "owner": owner, "time": time, "price": log_price[train]})
        gap = pl.col("time").diff().over("owner", "item", order_by="time") / DAY
        per_item = (
            rows.lazy()
            .with_columns(gap=gap)
            .group_by("item")
            .agg(
                count=pl.len(),
                owners=pl.col("owner").n_unique(),
                price=pl.col("price").mean(),
                cycle=pl.col("gap").filter(pl.col("gap") > 0.5).median(),
            )
            .collect()
        )

        def column(name: str, default: float) -> Floats:
            values = np.full(num_items, default)
            values[per_item["item"].to_numpy()] = per_item[name].fill_null(default).to_numpy()
            return values

        self.popularity = column("count", 0.0)
        self._owners = column("owners", 0.0)
        self._price = column("price", 0.0)
        self._cycle = column("cycle", 30.0)
        groups = int(self._query.max(initial=0)) + 1
        weight = np.maximum(np.bincount(self._query, self.popularity, minlength=groups), 1.0)
        self._query_price = np.bincount(self._query, self.popularity * self._price, minlength=groups) / weight
        pairs = rows.group_by("owner", "item").len()
        key = (pairs["owner"].to_numpy() * num_items + pairs["item"].to_numpy()).astype(np.int64)
        order = np.argsort(key)
        self._own_keys = np.append(key[order], np.iinfo(np.int64).max)
        self._own_counts = np.append(pairs["len"].to_numpy()[order], 0)

    def _names(self) -> list[str]:
        names = ["repeat_log", "repeat_share", "repeat_recent_log", "repeat_recent_share", "repeat_any"]
        names += [f"recency_{int(days)}d" for days in DECAYS_DAYS]
        names += [
            "last_of_query",
            "cycle_gap",
            "cycle_near",
            "popularity_log",
            "popularity_share",
            "repeat_rate",
        ]
        for attribute in self._attributes:
            names += [f"{attribute}_log", f"{attribute}_in_query_log", f"{attribute}_in_query_share"]
            names += [f"{attribute}_in_query_recency"]
        if self._has_price:
            names += ["price_to_query", "price_to_own", "price_to_own_distance"]
        return names

    def windows(self, owner: Ints, start: Ints, end: Ints, time: Ints) -> Windows:
        """Windows of sessions, each of shape [batch]."""
        recent = np.searchsorted(self._owner_time, owner * (1 << 34) + np.maximum(time - RECENT_DAYS * DAY, 0))
        return Windows(owner, start, end, time, np.clip(recent, start, end))

    def __call__(self, windows: Windows, candidates: Ints) -> NDArray[np.float32]:
        """Features of candidates [batch, cands] (item rows; -1 pads) -> [batch, cands, features]."""
        items = np.maximum(candidates, 0)
        query = self._query[items]
        own, typed = self.by_item(windows, items), self.by_query(windows, query)
        bought = own.times > 0
        days = np.where(bought, (windows.time[:, None] - self._time[own.last]) / DAY, np.inf)
        columns = [
            np.log1p(own.times),
            own.times / (typed.times + 1),
            np.log1p(own.recent),
            own.recent / (typed.recent + 1),
            bought,
            *(np.exp(-days / scale) for scale in DECAYS_DAYS),
            bought & (self._time[own.last] == self._time[typed.last]),
        ]
        gap = np.log((np.where(bought, days, 1.0) + 1) / (self._cycle[items] + 1))
        columns += [np.where(bought, gap, 0.0), np.where(bought, np.exp(-np.square(gap)), 0.0)]
        columns += self._popular(windows, candidates, items)
        for name, code in self._attributes.items():
            pair = self._by_pair[name](windows, self._pair_codes[name][items])
            overall = self._by_attribute[name](windows, code[items])
            seen = pair.times > 0
            age = np.where(seen, (windows.time[:, None] - self._time[pair.last]) / DAY, np.inf)
            columns += [np.log1p(overall.times), np.log1p(pair.times), pair.times / (typed.times + 1)]
            columns += [np.exp(-age / DECAYS_DAYS[1])]
        if self._has_price:
            relative = self._price[items] - self._query_price[query]
            usual = np.where(typed.times > 0, typed.mean_log_price - self._query_price[query], 0.0)
            columns += [relative, relative - usual, np.abs(relative - usual) * (typed.times > 0)]
        return np.stack(columns, -1).astype(np.float32)

    def _popular(self, windows: Windows, candidates: Ints, items: Ints) -> list[Floats]:
        """Popularity among the *other* owners: a train session's own purchase must not vote for itself."""
        position = np.searchsorted(self._own_keys, windows.owner[:, None] * len(self.popularity) + items)
        found = self._own_keys[position] == windows.owner[:, None] * len(self.popularity) + items
        others = self.popularity[items] - np.where(found, self._own_counts[position], 0)
        others = np.maximum(others, 0.0) * (candidates >= 0)
        owners = np.maximum(self._owners[items] - found, 0.0)
        share = others / np.maximum(others.sum(-1, keepdims=True), 1.0)
        return [np.log1p(others), share, np.log1p(others) - np.log1p(owners)]


def standardiser(sample: NDArray[np.float32]) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Mean and scale of features from a sample of train candidates [rows, features]; constant ones keep scale 1."""
    mean, std = sample.mean(0), sample.std(0)
    return mean.astype(np.float32), np.where(std > 1e-6, std, 1.0).astype(np.float32)


def encode(values: pl.Series, known: pl.Series) -> tuple[Ints, int]:
    """Integer codes of a column and the vocabulary size: 0 pads, 1 is unknown, 2… are `known` values in order."""
    vocabulary = known.drop_nulls().unique().sort()
    code = values.replace_strict(vocabulary, pl.int_range(2, len(vocabulary) + 2, eager=True), default=1)
    return code.fill_null(1).to_numpy().astype(np.int64), len(vocabulary) + 2
