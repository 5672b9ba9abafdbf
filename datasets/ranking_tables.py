"""What every ranking reader returns: one event log, its items and the sessions to rank, as polars tables."""

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import polars as pl


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
        fingerprint: `fingerprint` of (events, items, sessions).
    """

    events: pl.DataFrame
    items: pl.DataFrame
    sessions: pl.DataFrame
    query: tuple[str, ...]
    name: str
    fingerprint: str


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
