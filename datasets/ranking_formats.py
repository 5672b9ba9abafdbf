"""Readers for a user's own ranking data: long tables, RecBole's atomic files and FuxiCTR's rows.

All give `RankingTables`. A history is what its user did strictly before the session's time, so that neither the
session's own basket nor another one of the same second leaks into it.
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import polars as pl

from ..errors import UserError
from .ranking_columns import Table, common_ids, read_table
from .ranking_fuxictr import read_fuxictr
from .ranking_tables import RankingTables, draw_sessions, fingerprint, history_bounds

__all__ = ["RankingTables", "fingerprint", "read_fuxictr", "read_long", "read_recbole"]

_SPLITS = ("train", "valid", "test", "predict")
_RECBOLE_TYPES = ("token", "float", "token_seq", "float_seq")


def read_long(
    events: str | Path,
    items: str | Path | None = None,
    sessions: str | Path | None = None,
    query: Sequence[str] = (),
    split: str = "temporal",
    seed: int | np.random.Generator = 0,
    max_sessions: int | None = 10_000,
    name: str | None = None,
) -> RankingTables:
    """Reads one row per event, item and candidate (Parquet or CSV); rows may come in any order.

    Args:
        events: user_id, item_id, timestamp (seconds or ISO date and time); optional basket_id or session_id
            (else rows of a user at one time are a basket), price, label (rows of label 0 are no behaviour).
        items: item_id and attributes. Items of `events` that it lacks get null attributes.
        sessions: session_id, user_id, timestamp, item_id, label, one row per candidate; optional split (train,
            valid, test, predict); the columns in `query`. Without it evaluation sessions are drawn from
            `events`: one item of the basket and up to 9 others of the same query, by popularity in train.
        query: attributes of `items` that serve as the query.
        split: used where `sessions` has no column split: `temporal` cuts sessions (baskets) at the 0.8 and 0.9
            quantiles of their time; `leave_one_out` takes each user's last for test and the one before for
            validation, of users with at least three.
        seed: of the draw of sessions, or a generator for it. The sessions are part of the data: they stay the
            same for all seeds of training.
        max_sessions: at most so many are drawn per split; None sets no limit.
        name: dataset name; by default the name of the events' file.

    Raises:
        UserError: a file, column, row or session is wrong; the message names it.
    """
    log = read_table(events)
    catalogue = None if items is None else read_table(items)
    asked = None if sessions is None else read_table(sessions)
    name = name or log.file.stem
    return _assemble(name, log, catalogue, None, asked, tuple(query), split, seed, max_sessions)


def read_recbole(
    folder: str | Path,
    name: str,
    query: Sequence[str] = (),
    split: str = "temporal",
    seed: int | np.random.Generator = 0,
    max_sessions: int | None = 10_000,
) -> RankingTables:
    """Reads RecBole's atomic files `<name>.inter`, and `.item` and `.user` where they exist.

    Columns are tab-separated, headed name:type with type token, float, token_seq or float_seq (sequences are
    separated by spaces). Sessions are drawn as in `read_long`.

    Raises:
        UserError: as in `read_long`.
    """
    files = {kind: Path(folder) / f"{name}.{kind}" for kind in ("inter", "item", "user")}
    tables = {kind: _read_atomic(file) for kind, file in files.items() if kind == "inter" or file.exists()}
    log, catalogue, people = tables["inter"], tables.get("item"), tables.get("user")
    return _assemble(name, log, catalogue, people, None, tuple(query), split, seed, max_sessions)


def _assemble(
    name: str,
    log: Table,
    catalogue: Table | None,
    people: Table | None,
    asked: Table | None,
    query: tuple[str, ...],
    split: str,
    seed: int | np.random.Generator,
    max_sessions: int | None,
) -> RankingTables:
    if split not in ("temporal", "leave_one_out"):
        raise UserError(f"split is {split!r}; expected temporal or leave_one_out")
    if isinstance(seed, int) and seed < 0:
        raise UserError(f"data.files.seed={seed}: expected 0 or more")
    if max_sessions is not None and max_sessions < 1:
        raise UserError(f"data.files.max_sessions={max_sessions}: expected at least 1, or null for all")
    log.require("user_id", "item_id", "timestamp")
    tables = [table for table in (log, asked, people) if table is not None]
    user_ids = common_ids([_key(table, "user_id") for table in tables])
    item_ids = common_ids([_key(table, "item_id") for table in (log, asked, catalogue) if table is not None])
    items = _items(log, catalogue, item_ids[0], item_ids[-1], query)
    users = pl.DataFrame({"user_id": pl.concat(user_ids).unique().sort()}).with_row_index("user")
    users = users.cast({"user": pl.Int32})
    events = _events(log, user_ids[0], item_ids[0], users, items)
    if asked is None:
        baskets = events.group_by("basket").agg(pl.col("owner").first().alias("user"), pl.col("time").min())
        baskets = _assign_split(baskets.sort("basket"), split, log.file)
        events = events.with_columns(_is_train(events, baskets))
        sessions = draw_sessions(events, items, baskets, query, np.random.default_rng(seed), max_sessions)
        if sessions.is_empty():
            raise UserError(f"{log.file}: no session can be drawn: no query has two items bought in train")
    else:
        sessions = _sessions(asked, user_ids[1], item_ids[1], users, items, query)
        if "split" not in sessions.columns:
            sessions = _assign_split(sessions, split, asked.file)
        events = events.with_columns(_is_train(events, sessions))
        _refuse_own_basket_in_history(log, asked, events, sessions)
    start, end = history_bounds(events, sessions["user"], sessions["time"])
    sessions = sessions.join(users, on="user", maintain_order="left").select(
        "session_id",
        "split",
        "user_id",
        "user",
        *query,
        "candidates",
        "labels",
        pl.Series("hist_start", start),
        pl.Series("hist_end", end),
        "time",
    )
    price = [name for name in ("price",) if name in events.columns]
    events = events.select("owner", "item", "time", "basket", *price, "is_train")
    profile = None if people is None else _profile(people, user_ids[-1], users)
    tables_out = [events, items, sessions] if profile is None else [events, items, sessions, profile]
    return RankingTables(events, items, sessions, query, name, fingerprint(tables_out), profile)


def _key(table: Table, column: str) -> pl.Series:
    table.require(column)
    return table.ids(column)


def _items(
    log: Table, catalogue: Table | None, bought: pl.Series, listed: pl.Series, query: tuple[str, ...]
) -> pl.DataFrame:
    """The catalogue, sorted by id and completed by what only the log knows."""
    if catalogue is None:
        if query:
            raise UserError(f"{log.file}: query {', '.join(query)} needs a file of items with such columns")
        return pl.DataFrame({"item_id": bought.unique().sort()})
    catalogue.require(*query)
    catalogue.refuse(~listed.is_first_distinct(), "item_id", "every item once; drop the repeated row")
    if not bought.is_in(listed.implode()).any():
        raise UserError(
            f"{catalogue.file}: none of the items in {log.file} is listed (for example {bought[0]!r}); "
            "expected the same item ids in both"
        )
    names = [name for name in catalogue.frame.columns if name != "item_id"]
    attributes = pl.DataFrame([listed.alias("item_id"), *(catalogue.attribute(name) for name in names)])
    for name in query:
        if attributes[name].dtype.is_nested():
            raise UserError(f"{catalogue.file}: column '{name}' holds lists; a query needs one value per item")
    everything = pl.DataFrame({"item_id": pl.concat([bought, listed]).unique().sort()})
    return everything.join(attributes, on="item_id", how="left", maintain_order="left")


def _events(
    log: Table, user_id: pl.Series, item_id: pl.Series, users: pl.DataFrame, items: pl.DataFrame
) -> pl.DataFrame:
    """The log in the common form but for is_train, with `basket_key`, the basket's id as given."""
    time = log.seconds("timestamp")
    given = next((name for name in ("basket_id", "session_id") if name in log), None)
    key = time if given is None else common_ids([log.ids(given)])[0]
    columns = [user_id.alias("user_id"), item_id.alias("item_id"), time.alias("time"), key.alias("basket_key")]
    if "price" in log:
        columns.append(log.numbers("price").alias("price"))
    events = pl.DataFrame(columns)
    if "label" in log:
        labels = log.labels("label")
        log.refuse(labels.is_null(), "label", "0 or 1")
        events = events.filter(labels == 1)
        if events.is_empty():
            raise UserError(f"{log.file}: column 'label' is 0 in every row; expected some events with 1")
    index = items.select("item_id", pl.int_range(pl.len(), dtype=pl.Int32).alias("item"))
    events = events.join(users.rename({"user": "owner"}), on="user_id").join(index, on="item_id")
    begin = pl.col("time").min().over("owner", "basket_key")
    basket = pl.struct("owner", begin.alias("begin"), "basket_key").rank("dense").cast(pl.Int32) - 1
    order = ["owner", "time", "basket", "item", *(["price"] if "price" in log else [])]
    kept = [*order, "basket_key"]
    return events.with_columns(basket.alias("basket")).sort(order).select(kept)


def _assign_split(units: pl.DataFrame, split: str, file: Path) -> pl.DataFrame:
    """Adds `split` to sessions or baskets given by (user, time)."""
    if split == "leave_one_out":
        from_last = pl.int_range(pl.len(), 0, -1).over("user", order_by="time")
        from_last = pl.when(pl.len().over("user") >= 3).then(from_last)
        part = from_last.replace_strict({1: "test", 2: "valid"}, default="train")
        units = units.with_columns(part.alias("split"))
        if (units["split"] == "train").all():
            raise UserError(f"{file}: no user has three baskets or sessions; leave_one_out needs such users")
        return units
    times = units["time"].sort()
    first_valid, first_test = times[int(0.8 * len(times))], times[int(0.9 * len(times))]
    if not times[0] < first_valid < first_test:
        raise UserError(
            f"{file}: {len(times)} baskets or sessions at {times.n_unique()} times cannot be cut by time at 80 % "
            "and 90 %; give more of them, a column 'split', or split: leave_one_out"
        )
    later = pl.when(pl.col("time") < first_test).then(pl.lit("valid")).otherwise(pl.lit("test"))
    part = pl.when(pl.col("time") < first_valid).then(pl.lit("train")).otherwise(later)
    return units.with_columns(part.alias("split"))


def _is_train(events: pl.DataFrame, units: pl.DataFrame) -> pl.Series:
    """Events before anything is evaluated; before their own user's where train and evaluation overlap in time."""
    evaluated = units.filter(pl.col("split") != "train")
    if evaluated.is_empty():
        return pl.repeat(True, events.height, eager=True).alias("is_train")
    first = evaluated["time"].min()
    overlap = (units.filter(pl.col("split") == "train")["time"] >= first).any()
    if not overlap:
        return (events["time"] < first).alias("is_train")
    firsts = evaluated.group_by(pl.col("user").alias("owner")).agg(pl.col("time").min().alias("first"))
    before = (pl.col("time") < pl.col("first")).fill_null(True)
    own = events.join(firsts, on="owner", how="left", maintain_order="left")
    return own.select(before.alias("is_train")).to_series()


def _sessions(
    asked: Table,
    user_id: pl.Series,
    item_id: pl.Series,
    users: pl.DataFrame,
    items: pl.DataFrame,
    query: tuple[str, ...],
) -> pl.DataFrame:
    """Sessions as given, in order of first appearance, one row each."""
    asked.require("session_id", "timestamp", *query)
    ids = common_ids([asked.ids("session_id")])[0].alias("session_id")
    columns = [ids, user_id.alias("user_id"), item_id.alias("item_id"), asked.seconds("timestamp").alias("time")]
    if "split" in asked:
        given = asked.frame["split"].cast(pl.String)
        asked.refuse(~given.is_in(_SPLITS) | given.is_null(), "split", f"one of {', '.join(_SPLITS)}")
        columns.append(given.alias("split"))
    columns += [_query_column(asked, name, items[name]) for name in query]
    rows = pl.DataFrame(columns)
    predict = rows["split"] == "predict" if "split" in rows.columns else pl.repeat(False, rows.height, eager=True)
    if "label" not in asked and not predict.all():
        asked.require("label")
    if "label" in asked:
        labels = asked.labels("label")
        asked.refuse(labels.is_null() & ~predict, "label", "0 or 1; only rows of split predict may lack it")
    else:
        labels = pl.repeat(0, rows.height, dtype=pl.UInt8, eager=True)
    index = items.select("item_id", pl.int_range(pl.len(), dtype=pl.Int32).alias("candidates"))
    rows = rows.with_columns(labels.fill_null(0).alias("labels"))
    rows = rows.join(index, on="item_id", how="left", maintain_order="left")
    asked.refuse(rows["candidates"].is_null(), "item_id", "an item of the items or events file; add it there")
    repeated = ~rows.select(pl.struct("session_id", "item_id").is_first_distinct()).to_series()
    asked.refuse(repeated, "item_id", "every item once in a session; drop the repeated row")
    for name, column in (
        ("user_id", "user_id"),
        ("time", "timestamp"),
        ("split", "split"),
        *zip(query, query, strict=True),
    ):
        if name in rows.columns:
            differs = rows.select(pl.col(name).ne_missing(pl.col(name).first()).over("session_id")).to_series()
            asked.refuse(differs, column, "one value in all rows of a session")
    constant = [name for name in rows.columns if name not in ("session_id", "item_id", "candidates", "labels")]
    sessions = rows.group_by("session_id", maintain_order=True).agg(pl.col(constant).first(), "candidates", "labels")
    empty = sessions.filter(pl.col("labels").list.max() == 0)
    if "split" in sessions.columns:
        empty = empty.filter(pl.col("split") != "predict")
    if empty.height:
        raise UserError(
            f"{asked.file}: session {empty['session_id'][0]!r} has no row with label 1; "
            "expected a positive in every session, drop it or use split predict"
        )
    return sessions.join(users, on="user_id", maintain_order="left").drop("user_id")


def _query_column(asked: Table, name: str, like: pl.Series) -> pl.Series:
    """A query column of the sessions, as the items' attribute `like` holds it."""
    values, dtype = asked.attribute(name), like.dtype
    same_kind = values.dtype == dtype or (values.dtype.is_integer() and dtype.is_integer())
    if not same_kind and dtype != pl.String:
        raise UserError(f"{asked.file}: column '{name}' is {values.dtype}; expected {dtype} as in the items file")
    return values.cast(dtype)


def _refuse_own_basket_in_history(log: Table, asked: Table, events: pl.DataFrame, sessions: pl.DataFrame) -> None:
    """A session that is also in the log must not come after its own first event."""
    if "session_id" not in log or "basket_id" in log:
        return
    key = pl.col("basket_key").cast(pl.String).alias("key")
    begun = events.group_by(pl.col("owner").alias("user"), key).agg(pl.col("time").min().alias("begin"))
    late = (
        sessions.with_columns(pl.col("session_id").cast(pl.String).alias("key"))
        .join(begun, on=["user", "key"], maintain_order="left")
        .filter(pl.col("begin") < pl.col("time"))
    )
    if late.height:
        session = late.row(0, named=True)
        raise UserError(
            f"{asked.file}: session {session['session_id']!r} is at {session['time']} s, but its own events in "
            f"{log.file} begin at {session['begin']} s and would be in its history; set its timestamp to that"
        )


def _profile(people: Table, user_id: pl.Series, users: pl.DataFrame) -> pl.DataFrame:
    people.refuse(~user_id.is_first_distinct(), "user_id", "every user once; drop the repeated row")
    names = [name for name in people.frame.columns if name != "user_id"]
    attributes = pl.DataFrame([user_id.alias("user_id"), *(people.attribute(name) for name in names)])
    return users.drop("user").join(attributes, on="user_id", how="left", maintain_order="left")


def _read_atomic(file: Path) -> Table:
    raw = read_table(file, separator="\t")
    columns = []
    for header in raw.frame.columns:
        column, _, kind = header.partition(":")
        if kind not in _RECBOLE_TYPES:
            raise UserError(
                f"{file}: column '{header}'; expected name:type in the header with type {', '.join(_RECBOLE_TYPES)}"
            )
        values = raw.frame[header]
        if kind.endswith("_seq"):
            values = values.str.split(" ")
        if kind.startswith("float"):
            dtype = pl.List(pl.Float64) if kind == "float_seq" else pl.Float64
            numbers = values.cast(dtype, strict=False)
            bad = numbers.is_null() & values.is_not_null()
            raw.refuse(bad, header, "a number")
            values = values if column == "timestamp" else numbers  # keeps the digits of large integers
        columns.append(values.alias(column))
    return Table(file, pl.DataFrame(columns))
