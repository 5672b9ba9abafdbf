"""Reader for FuxiCTR's rows: point-wise samples, each with its own history."""

import hashlib
import logging
from pathlib import Path

import numpy as np
import polars as pl

from ..errors import UserError
from .ranking_columns import Table, common_ids, read_table
from .ranking_tables import RankingTables, fingerprint

_MD5 = {
    "AmazonElectronics_x1": {
        "train": "e9bf80b92985e463db18fdc753d347b5",
        "test": "57a20e82fe736dd495f2eaf0669bf6d0",
    }
}
_LOG = logging.getLogger(__name__)


def read_fuxictr(
    train: str | Path,
    valid: str | Path | None = None,
    test: str | Path | None = None,
    preset: str | None = None,
    check_md5: bool = True,
    seed: int | np.random.Generator = 0,
    name: str | None = None,
) -> RankingTables:
    """Reads FuxiCTR's rows (Parquet or CSV): one candidate each, with its own history; owner = row.

    Columns: label, user_id, item_id, item_history, and for each further attribute a pair such as cate_id,
    cate_history; histories are oldest first, joined by ^. Optional pair timestamp, time_history. Without
    times, an event's time is its place in the history and the row's is the history's length.

    Without `valid`, a tenth of the users of `train` is moved to validation and a log line says so. BARS stops
    early on the test file instead; its numbers are comparable, its protocol is not repeated here.

    Args:
        preset: name of a public split whose md5 sums are known: AmazonElectronics_x1.
        check_md5: compare the files to the preset's sums.
        seed: of the draw of validation users, or a generator for it; used without `valid`.

    Raises:
        UserError: a file, column or row is wrong, or the checksum differs.
    """
    files = {"train": Path(train)}
    files |= {part: Path(file) for part, file in (("valid", valid), ("test", test)) if file is not None}
    parts = {part: read_table(file) for part, file in files.items()}
    if preset is not None:
        _check_preset(files, preset, check_md5)
    rows = _fuxictr_rows(parts)
    if valid is None:
        rows = _hold_out_users(rows, np.random.default_rng(seed))
    return _fuxictr_tables(rows, files["train"], name or preset or Path(train).stem)


def _check_preset(files: dict[str, Path], preset: str, check_md5: bool) -> None:
    if preset not in _MD5:
        raise UserError(f"preset {preset!r} is unknown; expected {', '.join(_MD5)} or none")
    if not check_md5:
        return
    for part, expected in _MD5[preset].items():
        if part in files:
            with files[part].open("rb") as stream:
                found = hashlib.file_digest(stream, "md5").hexdigest()
            if found != expected:
                raise UserError(
                    f"{files[part]}: md5 is {found}; expected {expected} for {part} of {preset}; download it "
                    "again, or set check_md5: false (the results are then not comparable)"
                )


def _fuxictr_rows(parts: dict[str, Table]) -> pl.DataFrame:
    """All files below each other: split, user_id, item_id, label, time, <a>_id and lists <a>_history."""
    first = next(iter(parts.values()))
    pairs = [c.removesuffix("_history") for c in first.frame.columns if c.endswith("_history")]
    pairs = ["item", *(a for a in pairs if a not in ("item", "time"))]
    timed = "timestamp" in first and "time_history" in first
    for table in parts.values():
        table.require("label", "user_id", *(f"{a}{end}" for a in pairs for end in ("_id", "_history")))
    user_ids = common_ids([table.ids("user_id") for table in parts.values()])
    frames = []
    for (part, table), user_id in zip(parts.items(), user_ids, strict=True):
        label = table.labels("label")
        table.refuse(label.is_null(), "label", "0 or 1")
        histories = [_history(table, f"{a}_history") for a in pairs]
        length = histories[0].list.len()
        for history in histories[1:]:
            table.refuse(history.list.len() != length, history.name, "as many entries as item_history")
        columns = [user_id, label, *(table.ids(f"{a}_id").cast(pl.String) for a in pairs), *histories]
        if timed:
            table.require("timestamp", "time_history")
            past = _history(table, "time_history").cast(pl.List(pl.Int64), strict=False)
            table.refuse(past.list.len() != length, "time_history", "as many entries as item_history")
            wrong = past.list.eval(pl.element().is_null()).list.any()
            table.refuse(wrong, "time_history", "seconds joined by ^")
            time = table.seconds("timestamp")
            table.refuse((past.list.max() >= time), "time_history", "times before the row's timestamp")
        else:
            past = pl.select(pl.int_ranges(length.cast(pl.Int64))).to_series()
            time = length.cast(pl.Int64)
        columns += [time.alias("time"), past.alias("past")]
        frames.append(pl.DataFrame(columns).with_columns(split=pl.lit(part)))
    return pl.concat(frames)


def _history(table: Table, column: str) -> pl.Series:
    """List[String] from a list column or from values joined by ^; nothing and null are the empty list."""
    values = table.frame[column]
    if values.dtype == pl.List:
        return values.cast(pl.List(pl.String)).fill_null([])
    text = values.cast(pl.String).fill_null("")
    table.refuse(text.str.contains(r"(^\^|\^\^|\^$)"), column, "values joined by ^, none of them empty")
    return text.str.extract_all(r"[^\^]+")


def _hold_out_users(rows: pl.DataFrame, generator: np.random.Generator) -> pl.DataFrame:
    users = rows.filter(pl.col("split") == "train")["user_id"].unique().sort()
    if len(users) < 2:
        raise UserError("the train file has one user; expected two or more, or a file for validation")
    held = users.gather(generator.permutation(len(users))[: max(1, len(users) // 10)])
    _LOG.warning("no validation file: %d of %d train users validate; test stays apart", len(held), len(users))
    moved = (pl.col("split") == "train") & pl.col("user_id").is_in(held.implode())
    return rows.with_columns(pl.when(moved).then(pl.lit("valid")).otherwise("split").alias("split"))


def _fuxictr_tables(rows: pl.DataFrame, file: Path, name: str) -> RankingTables:
    rows = rows.with_row_index("owner").cast({"owner": pl.Int32})
    histories = [column for column in rows.columns if column.endswith("_history")]
    attributes = [column.removesuffix("_history") + "_id" for column in histories if column != "item_history"]
    past = (
        rows.select("owner", "split", "past", *histories)
        .filter(pl.col("past").list.len() > 0)
        .explode("past", *histories)
        .rename({column: column.removesuffix("_history") + "_id" for column in histories})
    )
    for column in ("item_id", *attributes):
        shown, seen = common_ids([rows[column], past[column]])
        rows, past = rows.with_columns(shown.alias(column)), past.with_columns(seen.alias(column))
    items = pl.concat([rows.select("item_id", *attributes), past.select("item_id", *attributes)]).unique()
    items = items.sort("item_id", *attributes)
    twice = items.filter(~pl.col("item_id").is_first_distinct())
    if twice.height:
        values = items.filter(pl.col("item_id") == twice["item_id"][0]).rows()
        raise UserError(f"{file}: one item with two attributes, {values[0]} and {values[1]}; expected one of each")
    index = items.select("item_id", pl.int_range(pl.len(), dtype=pl.Int32).alias("item"))
    users = pl.DataFrame({"user_id": rows["user_id"].unique().sort()}).with_row_index("user")
    events = (
        past.join(index, on="item_id", how="left", maintain_order="left")
        .sort("owner", "past", maintain_order=True)
        .select(
            "owner",
            "item",
            pl.col("past").cast(pl.Int64).alias("time"),
            pl.int_range(pl.len(), dtype=pl.Int32).alias("basket"),
            (pl.col("split") == "train").alias("is_train"),
        )
    )
    end = rows["past"].list.len().cast(pl.Int64).cum_sum()
    sessions = (
        rows.join(index, on="item_id", how="left", maintain_order="left")
        .join(users.cast({"user": pl.Int32}), on="user_id", how="left", maintain_order="left")
        .select(
            pl.col("owner").cast(pl.Int64).alias("session_id"),
            "split",
            "user_id",
            "user",
            pl.concat_list("item").alias("candidates"),
            pl.concat_list("label").alias("labels"),
            (end - rows["past"].list.len()).cast(pl.Int64).alias("hist_start"),
            end.alias("hist_end"),
            "time",
        )
    )
    return RankingTables(events, items, sessions, (), name, fingerprint((events, items, sessions)))
