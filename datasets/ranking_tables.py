"""What every ranking reader returns: one event log, its items and the sessions to rank, as polars tables."""

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import polars as pl
from jaxtyping import Int64


@dataclass(frozen=True)
class RankingTables:
    """A ranking dataset, ready for batching. Item and event indices are rows of `items` and `events`.

    Attributes:
        events: behaviour, sorted by (owner, time): `owner` (Int32, dense from 0: the user, or the session
            row where each row carries its own history), `item` (Int32), `time` (Int64, s), `basket` (Int32,
            rows bought or seen together share it), optional `price` (Float32), `is_train` (Boolean) and
            optional `is_target` (Boolean: the train rows that may be drawn as training targets; without it
            all of them).
        items: row = item index; `item_id` (original) and attribute columns, optional ones may hold nulls.
        sessions: `session_id`, `split` (train | valid | test | predict), `user_id` (original), `user`
            (Int32, dense), the query columns, `candidates` (List[Int32]), `labels` (List[UInt8]),
            `hist_start`, `hist_end` (Int64; the history is `events[hist_start:hist_end]`), `time` (Int64, s).
            Without train rows, training sessions are to be drawn from `events`.
        query: item attributes that serve as the query; each is a column of `sessions`. May be empty.
        name: dataset name on the leaderboard.
        fingerprint: `fingerprint` of (events, items, sessions), and of users where there are any.
        users: row = dense user; `user_id` and attribute columns, where the data has them.
    """

    events: pl.DataFrame
    items: pl.DataFrame
    sessions: pl.DataFrame
    query: tuple[str, ...]
    name: str
    fingerprint: str
    users: pl.DataFrame | None = None


def fingerprint(tables: Iterable[pl.DataFrame]) -> str:
    """sha256 (hex) of the names, values and nulls of `tables` in row order.

    Integers and floats are widened to 64 bits and strings taken as UTF-8, so that neither the file, nor the
    column's width, nor the platform or the version of polars changes it.

    Raises:
        TypeError: a column holds something else than numbers, booleans, strings or lists of these.
    """
    digest = hashlib.sha256()
    for table in tables:
        digest.update(f"table {table.height} x {table.width}\n".encode())
        for column in table:
            digest.update(f"column {column.name}\n".encode())
            _hash_values(digest, column)
    return digest.hexdigest()


def _hash_values(digest: "hashlib._Hash", column: pl.Series) -> None:
    dtype = column.dtype
    digest.update(np.packbits(column.is_null().to_numpy()).tobytes())
    column = column.drop_nulls()
    if dtype == pl.List:
        _hash_values(digest, column.list.len())
        _hash_values(digest, column.filter(column.list.len() > 0).explode())
    elif dtype == pl.String:
        _hash_values(digest, column.str.len_bytes())
        digest.update("".join(column.to_list()).encode())
    elif dtype.is_integer() or dtype == pl.Boolean:
        digest.update(b"int" + column.cast(pl.Int64).to_numpy().astype("<i8").tobytes())
    elif dtype.is_float():
        digest.update(b"float" + column.cast(pl.Float64).to_numpy().astype("<f8").tobytes())
    elif dtype == pl.Null:
        digest.update(b"null")
    else:
        raise TypeError(f"cannot fingerprint column '{column.name}' of type {dtype}")


def history_bounds(
    events: pl.DataFrame, user: pl.Series, time: pl.Series
) -> tuple[Int64[np.ndarray, "sessions"], Int64[np.ndarray, "sessions"]]:
    """First row and end row in `events` (sorted by owner, time) of what each user did strictly before `time`."""
    owners, times = (events[name].to_numpy().astype(np.int64) for name in ("owner", "time"))
    who, when = user.to_numpy().astype(np.int64), time.to_numpy().astype(np.int64)
    first, last = times.min(), times.max()
    span = last - first + 2
    start = np.searchsorted(owners, who)
    end = np.searchsorted(owners * span + times - first, who * span + np.clip(when, first, last + 1) - first)
    return start.astype(np.int64), end.astype(np.int64)


def draw_sessions(
    events: pl.DataFrame,
    items: pl.DataFrame,
    baskets: pl.DataFrame,
    query: tuple[str, ...],
    generator: np.random.Generator,
    max_sessions: int | None = None,
    negatives: int = 9,
) -> pl.DataFrame:
    """Draws sessions to evaluate: of a basket and query, one item bought and up to `negatives` that were not.

    Negatives are items of the same query, drawn in proportion to their train events without repetition;
    candidates stand in random order. Sessions for which none is found are left out.

    Args:
        events: as in `RankingTables`.
        baskets: basket, user, time, split; those of split train are not used.
        query: item attributes; with none every item is of the same query.

    Returns:
        session_id (row number), split, user, time, the query columns, candidates, labels, basket.
    """
    kind = _kinds(items, query)
    train = events.filter("is_train")["item"].to_numpy()
    counts = np.bincount(train, minlength=items.height).astype(np.int64)

    facts = pl.DataFrame({"item": np.arange(items.height, dtype=np.int32), "kind": kind, "count": counts})
    targets = (
        events.select("basket", "item")
        .unique()
        .join(baskets.filter(pl.col("split") != "train"), on="basket")
        .join(facts, on="item")
        .sort("basket", "item")
        .group_by("basket", "kind", maintain_order=True)
        .agg(pl.col("split", "user", "time").first(), pl.col("item").alias("bought"), pl.col("count").sum())
    )
    # Of the train events of the query, some must be of items outside the basket.
    total = np.bincount(kind, weights=counts).astype(np.int64)[targets["kind"].to_numpy()]
    targets = targets.filter(pl.Series(total) > pl.col("count"))
    targets = targets[generator.permutation(targets.height)].sort("split", descending=True, maintain_order=True)
    if max_sessions is not None:
        targets = targets.filter(pl.int_range(pl.len()).over("split") < max_sessions)
    targets = targets.drop("count").with_row_index("session")

    others = _draw_others(targets, kind, counts, generator, negatives)
    pick = generator.integers(0, targets["bought"].list.len().to_numpy())
    targets = targets.with_columns(pl.Series("pick", pick))
    positives = targets.select("session", pl.col("bought").list.get(pl.col("pick")).alias("candidates"))
    rows = pl.concat(
        [
            positives.join(others, on="session", how="semi", maintain_order="left").with_columns(labels=1),
            others.with_columns(labels=0),
        ],
    )
    rows = rows.with_columns(pl.Series("place", generator.random(rows.height))).sort("session", "place")
    lists = rows.group_by("session", maintain_order=True).agg("candidates", pl.col("labels").cast(pl.UInt8))
    drawn = lists.join(targets, on="session", maintain_order="left").join(
        positives.rename({"candidates": "positive"}), on="session", maintain_order="left"
    )
    return drawn.select(
        pl.int_range(pl.len(), dtype=pl.Int64).alias("session_id"),
        "split",
        "user",
        "time",
        *(items[name].gather(drawn["positive"]) for name in query),
        "candidates",
        "labels",
        "basket",
    )


def _kinds(items: pl.DataFrame, query: tuple[str, ...]) -> Int64[np.ndarray, "items"]:
    """Number of each item's query, dense from 0."""
    if not query:
        return np.zeros(items.height, dtype=np.int64)
    return items.select(pl.struct(query).rank("dense")).to_series().to_numpy().astype(np.int64) - 1


def _draw_others(
    targets: pl.DataFrame,
    kind: Int64[np.ndarray, "items"],
    counts: Int64[np.ndarray, "items"],
    generator: np.random.Generator,
    negatives: int,
) -> pl.DataFrame:
    """session, candidates: up to `negatives` distinct items of each target's query that were not bought.

    Draws with repetition, eight times as many as asked for, and keeps the first distinct ones: the same law as
    drawing without repetition, at worst a few less.
    """
    order = np.argsort(kind, kind="stable")
    upto = np.concatenate([[0], np.cumsum(counts[order])])
    wanted = targets["kind"].to_numpy()
    low, high = (upto[np.searchsorted(kind[order], wanted, side)] for side in ("left", "right"))
    ticket = generator.integers(low[:, None], high[:, None], (len(wanted), 8 * negatives))
    drawn = order[np.searchsorted(upto[1:], ticket, side="right")]
    others = pl.DataFrame(
        {
            "session": np.repeat(targets["session"].to_numpy(), drawn.shape[1]),
            "candidates": drawn.ravel().astype(np.int32),
        }
    )
    bought = targets.select("session", pl.col("bought").alias("candidates")).explode("candidates")
    return (
        others.unique(maintain_order=True)
        .join(bought, on=["session", "candidates"], how="anti", maintain_order="left")
        .filter(pl.int_range(pl.len()).over("session") < negatives)
    )
