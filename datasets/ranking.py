"""Ranking data: sessions of candidates, each with the user's behaviour before it.

A session is (user, query, candidates, labels). Its history is what the user did before the session's basket began.
Where a source brings no train sessions, they are drawn from the behaviour itself, anew each epoch: one bought item of
a (basket, query) against up to nine others of the same query in proportion to their train purchases.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from functools import cached_property
from typing import Any, Literal, NamedTuple

import numpy as np
import polars as pl
import pytorch_lightning as lightning
import torch
from jaxtyping import Bool, Float, Int
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from ..errors import UserError
from .batches import IndexBatches
from .ranking_catalogue import Catalogue
from .ranking_features import CrossFeatures, Ints, OccurrenceIndex, encode, standardiser
from .ranking_tables import RankingTables
from .sources import check_arguments

RECENCY_BUCKETS = 16
MIN_POOL = 5  # fewest other items of a query for a train session to be drawn
MAX_POOL = 256  # wider pools are thinned by popularity before negatives are drawn


class RankingBatch(NamedTuple):
    """A batch of sessions. Id 0 pads, 1 is unknown. Histories are left-padded, the latest row last."""

    candidates: Int[Tensor, "batch cands fields"]
    candidate_mask: Bool[Tensor, "batch cands"]
    history: Int[Tensor, "batch time history_fields"]  # the item fields, then the recency bucket
    history_mask: Bool[Tensor, "batch time"]
    query: Int[Tensor, "batch queries"]
    dense: Float[Tensor, "batch cands features"]  # cross features, standardised on train
    counts: Float[Tensor, "batch cands 2"]  # own purchases of the item so far; its train purchases by all
    labels: Float[Tensor, "batch cands"]
    user: Int[Tensor, " batch"]
    session: Int[Tensor, " batch"]  # row in the split's table of sessions
    slices: Bool[Tensor, "batch slices"]
    length: Int[Tensor, " batch"]  # all behaviour rows before the session, also those not in `history`


class RankingData(lightning.LightningDataModule):
    """Sessions of a split as `RankingBatch`es.

    Args:
        source: `completejourney` (ships), `completejourney_full` (extra `ranking`), or your own files: `long`,
            `recbole`, `fuxictr`.
        files: arguments of the source's reader, e.g. `events`, `items`, `sessions`, `query` for `long`.
        history_length: behaviour rows a model sees: the most recent ones.
        query_history: how many of them are instead the most recent ones with the session's query.
        negatives: drawn for each positive of a train session.
        cross_attributes: item attributes that get cross features; default: those that tell items of a query apart.
        cross_features: leave out to rank from ids alone.
        batch_size: train sessions a step.
        eval_batch_size: sessions a step of validation, test and prediction.
        epoch_sessions: train sessions an epoch (default: each once).
        num_workers: processes that prepare batches.

    Raises:
        UserError: a file is missing or wrong; nothing has been written by then.
    """

    def __init__(
        self,
        source: Literal["completejourney", "completejourney_full", "long", "recbole", "fuxictr"] = "completejourney",
        files: dict[str, Any] | None = None,
        history_length: int = 50,
        query_history: int = 0,
        negatives: int = 9,
        cross_attributes: list[str] | None = None,
        cross_features: bool = True,
        batch_size: int = 256,
        eval_batch_size: int = 1024,
        epoch_sessions: int | None = None,
        num_workers: int = 0,
    ) -> None:
        super().__init__()
        self.source, self.files = source, files or {}
        least = {"history_length": (history_length, 0), "negatives": (negatives, 1), "batch_size": (batch_size, 1)}
        least |= {"eval_batch_size": (eval_batch_size, 1), "num_workers": (num_workers, 0)}
        least |= {} if epoch_sessions is None else {"epoch_sessions": (epoch_sessions, 1)}
        for name, (value, bound) in least.items():
            if value < bound:
                raise UserError(f"data.{name}={value}: expected at least {bound}")
        if not 0 <= query_history <= history_length:
            raise UserError(f"data.query_history={query_history}: expected 0 to history_length={history_length}")
        self.history_length, self.query_history, self.negatives = history_length, query_history, negatives
        self.cross_attributes, self.cross_features = cross_attributes, cross_features
        self.batch_size, self.eval_batch_size = batch_size, eval_batch_size
        self.epoch_sessions, self.num_workers = epoch_sessions, num_workers

    @cached_property
    def tables(self) -> RankingTables:
        """The source's tables, read and checked once."""
        return read_source(self.source, self.files)

    @cached_property
    def catalogue(self) -> Catalogue:
        return Catalogue(self.tables)

    @property
    def schema(self) -> dict[str, Any]:
        """Sizes a model is built with (JSON-able): vocabularies, fields, query, dense features, slices."""
        catalogue = self.catalogue
        return {
            "dataset": self.tables.name,
            "fingerprint": self.tables.fingerprint,
            "fields": list(catalogue.sizes),
            "vocabulary": {**catalogue.sizes, "recency": RECENCY_BUCKETS + 2},
            "history_fields": [*catalogue.sizes, "recency"],
            "query": list(self.tables.query),
            "dense": self.features.names if self.features else [],
            "slices": list(self.slice_names),
        }

    @property
    def slice_names(self) -> tuple[str, ...]:
        """`tail1`: shortest tenth of histories; `tail2`: nothing of the query's kind in the history."""
        return ("tail1", "tail2") if self.tables.query else ("tail1",)

    @cached_property
    def features(self) -> CrossFeatures | None:
        if not self.cross_features:
            return None
        catalogue = self.catalogue
        names = self.cross_attributes
        if names is None:
            names = catalogue.telling_attributes()
        for name in names:
            if name not in catalogue.sizes:
                known = ", ".join(catalogue.sizes)
                raise UserError(f"data.cross_attributes: items have no attribute '{name}'; there are {known}")
        codes = {name: catalogue.codes[name] for name in names}
        return CrossFeatures(self.tables.events, len(self.tables.items), catalogue.query_code, codes)

    @cached_property
    def repeats(self) -> OccurrenceIndex:
        """Occurrences of (owner, item), for own purchase counts."""
        if self.features is not None:
            return self.features.by_item
        events = self.tables.events
        owner, item = (events[name].to_numpy().astype(np.int64) for name in ("owner", "item"))
        return OccurrenceIndex(owner, item, len(self.tables.items))

    @cached_property
    def by_query(self) -> OccurrenceIndex:
        """Occurrences of (owner, query)."""
        if self.features is not None:
            return self.features.by_query
        owner, item = (self.tables.events[name].to_numpy().astype(np.int64) for name in ("owner", "item"))
        code = self.catalogue.query_code
        return OccurrenceIndex(owner, code[item], int(code.max(initial=0)) + 1)

    @cached_property
    def popularity(self) -> Ints:
        """Train rows of each item."""
        events = self.tables.events.filter("is_train")
        return np.bincount(events["item"].to_numpy(), minlength=len(self.tables.items)).astype(np.int64)

    @cached_property
    def train_sessions(self) -> "DrawnSessions | ListedSessions":
        if (self.tables.sessions["split"] == "train").any():
            return ListedSessions(self, "train")
        return DrawnSessions(self)

    @cached_property
    def standard(self) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """Mean and scale of the dense features over a fixed sample of train sessions."""
        count = len(self.train_sessions)
        chosen = np.random.default_rng(0).choice(count, min(count, 5000), replace=False)
        sessions = self.train_sessions.draw(np.sort(chosen), np.random.default_rng(0))
        assert self.features is not None
        raw = self.features(self.features.windows(*sessions.window), sessions.candidates)
        return standardiser(raw[sessions.candidates >= 0])

    def setup(self, stage: str) -> None:
        """Read the tables and build the indices before the first batch (or the first worker) needs them."""
        if self.features is not None:
            _ = self.standard

    def train_dataloader(self) -> DataLoader[Any]:
        """Sessions in random order; drawn ones get new negatives each time."""
        count = len(self.train_sessions)
        wanted = min(self.epoch_sessions or count, count)
        return self._loader(self.train_sessions, IndexBatches(count, self.batch_size, wanted, shuffle=True))

    def val_dataloader(self) -> DataLoader[Any]:
        return self._eval_loader("valid")

    def test_dataloader(self) -> DataLoader[Any]:
        return self._eval_loader("test")

    def predict_dataloader(self) -> DataLoader[Any]:
        """Sessions of split `predict` where there are any, else the test sessions."""
        return self._eval_loader(self.predict_split)

    @property
    def predict_split(self) -> str:
        return "predict" if (self.tables.sessions["split"] == "predict").any() else "test"

    def _eval_loader(self, split: str) -> DataLoader[Any]:
        sessions = ListedSessions(self, split)
        return self._loader(sessions, IndexBatches(len(sessions), self.eval_batch_size))

    def _loader(self, sessions: "Sessions", batches: IndexBatches) -> DataLoader[Any]:
        # A batch is built at once from its indices: `sampler` yields whole batches and nothing is collated.
        return DataLoader(
            sessions, sampler=batches, batch_size=None, num_workers=self.num_workers,
            persistent_workers=self.num_workers > 0,
        )  # fmt: skip

    def names(self, field: str) -> list[str]:
        """What the codes of an item field stand for: pad, unknown, then its vocabulary."""
        known = self.catalogue.known[field].drop_nulls().unique().sort()
        return ["(pad)", "(unknown)", *known.cast(pl.String)]

    def decode(self, predictions: pl.DataFrame) -> pl.DataFrame:
        """Predictions by (session, place) with original ids: session_id, user_id, the query, item_id first."""
        sessions = self.split(self.predict_split).with_row_index("session").cast({"session": pl.Int64})
        ids = self.tables.items["item_id"]
        return (
            sessions.select("session", "session_id", "user_id", *self.tables.query, "candidates")
            .explode("candidates")
            .with_columns(
                place=pl.int_range(pl.len()).over("session"),
                item_id=pl.col("candidates").replace_strict(pl.int_range(len(ids), eager=True), ids),
            )
            .join(predictions, on=["session", "place"])
            .sort("session", "rank")
            .select(
                "session_id",
                "user_id",
                *self.tables.query,
                "item_id",
                pl.exclude("session", "place", "candidates", "session_id", "user_id", "item_id", *self.tables.query),
            )
        )

    def split(self, name: str) -> pl.DataFrame:
        """The listed sessions of a split."""
        return self.tables.sessions.filter(pl.col("split") == name)


def read_source(source: str, files: Mapping[str, Any]) -> RankingTables:
    """Tables of a named source; `files` are its reader's arguments."""
    from . import completejourney, ranking_formats

    readers: dict[str, Callable[..., RankingTables]] = {
        "completejourney": lambda: completejourney.load_completejourney(),
        "completejourney_full": lambda: completejourney.load_completejourney(full=True),
        "long": ranking_formats.read_long,
        "recbole": ranking_formats.read_recbole,
        "fuxictr": ranking_formats.read_fuxictr,
    }
    return readers[source](**check_arguments(source, readers, files, none="none: it ships with moezoo"))


class Drawn(NamedTuple):
    """Sessions before they become tensors."""

    candidates: Ints  # [batch, cands] item rows, -1 pads
    labels: NDArray[np.float32]
    window: tuple[Ints, Ints, Ints, Ints]  # owner, start, end, time
    query: Tensor  # [batch, queries]
    user: Ints
    session: Ints
    slices: NDArray[np.bool_]


class Sessions(Dataset[RankingBatch], ABC):
    """Builds whole batches from session indices."""

    def __init__(self, data: RankingData) -> None:
        self.data = data
        events = data.tables.events
        self.item = events["item"].to_numpy().astype(np.int64)
        self.time = events["time"].to_numpy().astype(np.int64)

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def draw(self, index: Ints, rng: np.random.Generator) -> Drawn:
        """Candidates and windows of the sessions `index`."""

    def __getitem__(self, index: list[int]) -> RankingBatch:
        # Drawn from torch's generator so that `seed_everything` and the workers' seeds govern the negatives too.
        rng = np.random.default_rng(int(torch.randint(1 << 62, ()).item()))
        sessions = self.draw(np.asarray(index), rng)
        fields, features = self.data.catalogue.fields, self.data.features
        history, history_mask = self._history(sessions)
        dense = torch.zeros(*sessions.candidates.shape, 0)
        if features is not None:
            mean, scale = self.data.standard
            raw = features(features.windows(*sessions.window), sessions.candidates)
            dense = torch.from_numpy((raw - mean) / scale)
        return RankingBatch(
            candidates=fields[torch.from_numpy(sessions.candidates)],
            candidate_mask=torch.from_numpy(sessions.candidates >= 0),
            history=history,
            history_mask=history_mask,
            query=sessions.query,
            dense=dense,
            counts=torch.from_numpy(self._counts(sessions)),
            labels=torch.from_numpy(sessions.labels),
            user=torch.from_numpy(sessions.user),
            session=torch.from_numpy(sessions.session),
            slices=torch.from_numpy(sessions.slices),
            length=torch.from_numpy(sessions.window[2] - sessions.window[1]),
        )

    def _counts(self, sessions: Drawn) -> NDArray[np.float32]:
        owner, start, end, _ = (values[:, None] for values in sessions.window)
        items = np.maximum(sessions.candidates, 0)
        own = self.data.repeats.count(owner, start, end, items)
        return np.stack([own, self.data.popularity[items]], -1).astype(np.float32)

    def _history(self, sessions: Drawn) -> tuple[Tensor, Tensor]:
        _, start, end, time = (values[:, None] for values in sessions.window)
        alike = self._alike(sessions)
        rows = end - (self.data.history_length - alike.shape[1]) + np.arange(self.data.history_length - alike.shape[1])
        rows = np.where(rows >= start, rows, -1)
        # A recent row that `alike` shows already is not shown twice.
        rows = np.where((rows[..., None] == alike[:, None]).any(-1), -1, rows)
        rows = np.concatenate([alike, rows], 1)
        mask = rows >= 0
        if not len(self.item):
            rows, mask = rows[:, :0], mask[:, :0]
        items = np.where(mask, self.item[rows], -1)
        days = (time - self.time[rows]) / 86_400
        bucket = np.clip(np.log2(np.maximum(days, 0) * 4 + 1).astype(np.int64), 0, RECENCY_BUCKETS - 1) + 2
        recency = torch.from_numpy(np.where(mask, bucket, 0))
        fields = self.data.catalogue.fields[torch.from_numpy(items)]
        return torch.cat([fields, recency[..., None]], -1), torch.from_numpy(mask)

    def _alike(self, sessions: Drawn) -> Ints:
        """The latest rows with the session's query, [batch, query_history]; -1 where there are fewer."""
        code = self.data.catalogue.query_code[sessions.candidates[:, 0]]
        owner, start, end, _ = sessions.window
        return self.data.by_query.latest(owner, start, end, code, self.data.query_history)


class ListedSessions(Sessions):
    """Sessions that a source lists, candidates and labels included."""

    def __init__(self, data: RankingData, split: str) -> None:
        super().__init__(data)
        table = data.split(split)
        if table.is_empty():
            have = ", ".join(data.tables.sessions["split"].unique().sort())
            raise UserError(f"{data.tables.name}: no sessions in split '{split}'; the source has {have}")
        self._table = table
        lengths = table["candidates"].list.len().to_numpy().astype(np.int64)
        self._candidates = _pad(table["candidates"], lengths, -1)
        self._labels = _pad(table["labels"], lengths, 0).astype(np.float32)
        self._user, start, end, time = (
            table[c].to_numpy().astype(np.int64) for c in ("user", "hist_start", "hist_end", "time")
        )
        owner = self._user.copy()
        owner[end > start] = data.tables.events["owner"].to_numpy()[start[end > start]]
        self._window = owner, start, end, time
        self._query = _query_codes(data, table)
        self._slices = self._tails(data)

    def _tails(self, data: RankingData) -> NDArray[np.bool_]:
        owner, start, end, _ = self._window
        length = end - start
        slices = [length <= np.quantile(length, 0.1, method="higher")]
        if data.tables.query:
            code = data.catalogue.query_code[self._candidates[:, 0]]
            slices.append(data.by_query.count(owner, start, end, code) == 0)
        return np.stack(slices, 1)

    def __len__(self) -> int:
        return len(self._user)

    def draw(self, index: Ints, rng: np.random.Generator) -> Drawn:
        width = max(int((self._candidates[index] >= 0).sum(1).max()), 1)
        owner, start, end, time = (values[index] for values in self._window)
        return Drawn(
            self._candidates[index, :width], self._labels[index, :width], (owner, start, end, time),
            self._query[index], self._user[index], index, self._slices[index],
        )  # fmt: skip


class DrawnSessions(Sessions):
    """Train sessions drawn from behaviour: (basket, query) with one of its items against sampled others."""

    def __init__(self, data: RankingData) -> None:
        super().__init__(data)
        events, query = data.tables.events, data.catalogue.query_code
        rows = events.with_row_index("row").with_columns(query=query[self.item])
        target = "is_target" if "is_target" in events.columns else "is_train"
        owners = rows.group_by("owner").agg(first=pl.col("row").min())
        baskets = rows.group_by("owner", "basket").agg(end=pl.col("row").min(), time=pl.col("time").min())
        self._pools(data.popularity, query)
        wanted = rows.filter(pl.col(target)).join(baskets, on=["owner", "basket"], suffix="_basket")
        groups = (
            wanted.group_by("owner", "basket", "query")
            .agg(pl.col("item").unique(), pl.col("end").first(), pl.col("time_basket").first())
            .join(owners, on="owner")
            .sort("end", "query")
        )
        enough = self._pool_size[groups["query"].to_numpy()] - groups["item"].list.len().to_numpy() >= MIN_POOL
        groups = groups.filter(pl.Series(enough))
        if groups.is_empty():
            raise UserError(
                f"{data.tables.name}: no train session can be drawn: no basket item has {MIN_POOL} other items of "
                f"its query ({', '.join(data.tables.query) or 'none'}) with train purchases; use a coarser query"
            )
        self._count = groups["item"].list.len().to_numpy().astype(np.int64)
        self._first = np.cumsum(self._count) - self._count
        self._bought = groups["item"].explode().to_numpy().astype(np.int64)
        owner, start, end, time = (
            groups[c].to_numpy().astype(np.int64) for c in ("owner", "first", "end", "time_basket")
        )
        self._window = owner, start, end, time
        group = np.repeat(np.arange(len(groups)), self._count)
        self._bought_keys = np.append(np.sort(group * len(query) + self._bought), np.iinfo(np.int64).max)
        self._query = groups["query"].to_numpy().astype(np.int64)

    def _pools(self, popularity: NDArray[Any], query: Ints) -> None:
        """Items with train purchases, grouped by query, with their cumulative popularity."""
        known = np.flatnonzero(popularity > 0)
        self._pool = known[np.argsort(query[known], kind="stable")]
        self._pool_size = np.bincount(query[known], minlength=int(query.max()) + 1)
        self._pool_first = np.cumsum(self._pool_size) - self._pool_size
        self._weight = popularity[self._pool].astype(float)
        self._cumulative = np.concatenate([[0.0], np.cumsum(self._weight)])

    def __len__(self) -> int:
        return len(self._query)

    def draw(self, index: Ints, rng: np.random.Generator) -> Drawn:
        positive = self._bought[self._first[index] + rng.integers(self._count[index])]
        negative = self._negatives(index, rng)
        candidates = np.concatenate([positive[:, None], negative], 1)
        labels = np.zeros(candidates.shape, np.float32)
        labels[:, 0] = 1
        owner, start, end, time = (values[index] for values in self._window)
        query = self.data.catalogue.query_fields[torch.from_numpy(positive)]
        slices = np.zeros((len(index), len(self.data.slice_names)), bool)
        return Drawn(candidates, labels, (owner, start, end, time), query, owner, index, slices)

    def _negatives(self, index: Ints, rng: np.random.Generator) -> Ints:
        """Weighted draws without replacement (Gumbel top-k) from each query's pool, the basket's items left out."""
        query = self._query[index]
        size, first = self._pool_size[query][:, None], self._pool_first[query][:, None]
        width = min(int(size.max()), MAX_POOL)
        place = first + np.arange(width)
        listed = np.arange(width) < size
        place = np.where(listed, place, first)
        score = np.log(self._weight[place]) + rng.gumbel(size=place.shape)
        wide = size[:, 0] > MAX_POOL
        if wide.any():
            place[wide], score[wide] = self._thin(first[wide], size[wide], width, rng)
        pool = self._pool[place]
        key = index[:, None] * len(self.data.catalogue.query_code) + pool
        bought = self._bought_keys[np.searchsorted(self._bought_keys, key)] == key
        score = np.where(listed & ~bought, score, -np.inf)
        take = min(self.data.negatives, width)
        best = np.argpartition(-score, take - 1, axis=1)[:, :take]
        return np.where(np.take_along_axis(score, best, 1) > -np.inf, np.take_along_axis(pool, best, 1), -1)

    def _thin(self, first: Ints, size: Ints, width: int, rng: np.random.Generator) -> tuple[Ints, NDArray[Any]]:
        """Draws with replacement; a repeat is barred, so the first distinct ones are draws without replacement."""
        low, high = self._cumulative[first], self._cumulative[first + size]
        u = low + rng.random((len(first), width)) * (high - low)
        place = np.clip(np.searchsorted(self._cumulative, u, side="right") - 1, first, first + size - 1)
        order = np.argsort(place, axis=1, kind="stable")
        ordered = np.take_along_axis(place, order, 1)
        repeated = np.zeros_like(place, bool)
        np.put_along_axis(repeated, order[:, 1:], ordered[:, 1:] == ordered[:, :-1], 1)
        return place, np.where(repeated, -np.inf, -np.arange(width, dtype=float))


def _pad(lists: pl.Series, lengths: Ints, value: int) -> Ints:
    """Ragged lists -> [rows, longest], right-padded."""
    out = np.full((len(lists), max(int(lengths.max(initial=0)), 1)), value, np.int64)
    out[np.arange(out.shape[1]) < lengths[:, None]] = lists.explode(empty_as_null=False).to_numpy()
    return out


def _query_codes(data: RankingData, table: pl.DataFrame) -> Tensor:
    """Query ids of listed sessions, in the vocabulary of the items' attribute of the same name."""
    columns = [encode(table[name], data.catalogue.known[name])[0] for name in data.tables.query]
    return torch.from_numpy(np.stack(columns, 1) if columns else np.zeros((len(table), 0), np.int64))
