"""Your own prices: long tables (one row per date and symbol) and wide ones (one file per field, a column a symbol).

Column names of Yahoo, Qlib and the common vendors are understood; others are given with `columns`. Files are Parquet,
CSV or TSV. Unsorted rows are sorted; a day that a symbol lacks is a gap and stays one.
"""

import difflib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import date
from pathlib import Path

import numpy as np
import polars as pl
from jaxtyping import Float64
from numpy.typing import NDArray

from ..errors import UserError
from .ranking_columns import Table, read_table
from .stocks_tables import FIELDS, Grid, Judge, StockTables, checked, membership_mask

_ALIASES = {
    "date": ("datetime", "timestamp", "time", "day", "tradedate"),
    "symbol": ("ticker", "instrument", "code", "tscode", "tic", "name", "asset"),
    "volume": ("vol", "shares"),
    "amount": ("value", "turnover", "money", "dollarvolume"),
    "cap": ("marketcap", "marketvalue", "mktcap"),
    "adjclose": ("adjustedclose", "closeadj"),
    "sector": ("industry", "gics", "gicssector"),
    "start": ("startdate", "from", "begin", "first", "indate"),
    "end": ("enddate", "to", "last", "outdate"),
}
_DATE_FORMATS = {"YYYY-MM-DD": "%Y-%m-%d", "YYYYMMDD": "%Y%m%d", "YYYY/MM/DD": "%Y/%m/%d"}


@dataclass(frozen=True)
class Source:
    """A dataset before it is read.

    Attributes:
        name: on the leaderboard.
        content: the files whose bytes are the dataset.
        fields: price fields it has, known from headers alone.
        read: reads and checks all of it.
        splits: the usual ones, where the data has them.
        clip_return: bound of returns, where the data needs one.
    """

    name: str
    content: tuple[Path, ...]
    fields: tuple[str, ...]
    read: Callable[[Judge], StockTables]
    splits: Mapping[str, list[str]] | None = None
    clip_return: float | None = None


def open_long(
    prices: str,
    membership: str | None = None,
    benchmark: str | None = None,
    calendar: str | None = None,
    columns: dict[str, str] | None = None,
    name: str | None = None,
) -> Source:
    """Long tables: date, symbol, close, and of open, high, low, volume, vwap, amount, factor, cap, sector what exists.

    Args:
        prices: a file, or a folder of them; in a folder a file without a symbol column is one symbol's, named after it.
        membership: symbol, start, end: who is in the universe when. Default: whoever has a price.
        benchmark: a file with date and close (or `return`), or a symbol of `prices`, which then leaves the universe.
        calendar: a file of trading days; default: every day that some symbol has.
        columns: our name -> the file's, e.g. {close: px_last}.
        name: of the dataset on the leaderboard; default: the file's.
    """
    files = _price_files(Path(prices))
    for field, file in {"membership": membership, "calendar": calendar}.items():
        if file is not None and not Path(file).is_file():
            raise UserError(f"data.files.{field}={file}: no such file")
    extra = tuple(Path(file) for file in (membership, calendar) if file is not None)
    index = (Path(benchmark),) if benchmark is not None and Path(benchmark).is_file() else ()
    head = _columns(files[0], _header(files[0]), columns)
    fields = [field for field in FIELDS if field in head]
    if "close" not in fields and "adjclose" in head:
        fields.append("close")

    def read(judge: Judge) -> StockTables:
        return _read_long(files, membership, benchmark, calendar, columns, judge)

    return Source(name or Path(prices).stem, (*files, *extra, *index), tuple(fields), read)


def open_wide(
    close: str,
    open: str | None = None,
    high: str | None = None,
    low: str | None = None,
    volume: str | None = None,
    vwap: str | None = None,
    amount: str | None = None,
    cap: str | None = None,
    membership: str | None = None,
    benchmark: str | None = None,
    name: str | None = None,
) -> Source:
    """Wide tables: a file for each field, its first column the date, every other column a symbol.

    Args:
        close, open, high, low, volume, vwap, amount, cap: the files.
        membership, benchmark, name: as for long tables.
    """
    given = {"close": close, "open": open, "high": high, "low": low, "volume": volume, "vwap": vwap, "amount": amount}
    files = {field: Path(file) for field, file in (given | {"cap": cap}).items() if file is not None}
    extra = [Path(file) for file in (membership, benchmark) if file is not None and Path(file).is_file()]
    for file in files.values():
        _header(file)

    def read(judge: Judge) -> StockTables:
        calendar, symbols, fields, rows = read_wide_grids(files)

        def where(field: str, i: int, j: int) -> str:
            return f"{files[field].name}, column '{symbols[i]}', row {rows[field][j] + 1}"

        folder = str(files["close"].parent)
        fields = checked(folder, calendar, symbols, fields, where, judge)
        return finish(folder, calendar, symbols, fields, membership, benchmark, judge)

    return Source(name or files["close"].parent.name or "wide", (*files.values(), *extra), tuple(files), read)


def finish(
    name: str, calendar: tuple[date, ...], symbols: tuple[str, ...], fields: dict[str, Grid], membership: str | None,
    benchmark: str | None, judge: Judge, sectors: Mapping[str, str] | None = None,
) -> StockTables:  # fmt: skip
    """Adds the universe and the index to checked prices."""
    spans = None if membership is None else read_spans(Path(membership))
    everyone = np.ones((len(symbols), len(calendar)), bool)
    member = everyone if spans is None else membership_mask(str(membership), spans, symbols, calendar, judge)
    market = np.full(len(calendar), np.nan)
    if benchmark is not None and benchmark not in symbols and benchmark.isdigit():  # YAML takes 000300 for 300
        same = [symbol for symbol in symbols if symbol.isdigit() and int(symbol) == int(benchmark)]
        benchmark = same[0] if len(same) == 1 else benchmark
    if benchmark in symbols:
        row = symbols.index(str(benchmark))
        market, member[row] = _changes(fields["close"][row]), False
    elif benchmark is not None:
        if not Path(benchmark).is_file():
            raise UserError(f"data.files.benchmark={benchmark}: neither a file nor a symbol of {name}")
        market = _read_index(Path(benchmark), calendar)
    return StockTables(calendar, symbols, fields, member, market, sectors or {}, tuple(judge.notes))


def read_wide_grids(
    files: Mapping[str, Path],
) -> tuple[tuple[date, ...], tuple[str, ...], dict[str, Grid], dict[str, NDArray[np.int64]]]:
    """Calendar and symbols of `files["close"]`, every field on them, and for each field the file's row of a day."""
    tables = {field: read_table(file) for field, file in files.items()}
    calendar: tuple[date, ...] = ()
    symbols: tuple[str, ...] = ()
    grids, rows = {}, {}
    for field, table in tables.items():
        first = table.frame.columns[0]
        days = dates(table, first)
        again = days.is_duplicated()
        table.refuse(again, first, "each date once")
        order = days.arg_sort()
        if field == "close":
            calendar = tuple(days.gather(order).to_list())
            symbols = tuple(sorted(table.frame.columns[1:]))
        elif unknown := sorted(set(table.frame.columns[1:]) - set(symbols)):
            raise UserError(
                f"{table.file}: column '{unknown[0]}' is no symbol of {files['close']}; remove or rename it"
            )
        found = pl.DataFrame({"day": pl.Series(calendar, dtype=pl.Date)}).join(
            pl.DataFrame({"day": days, "row": np.arange(len(days))}), on="day", how="left", maintain_order="left"
        )["row"]
        rows[field] = found.fill_null(-1).to_numpy()
        have = set(table.frame.columns)
        absent = np.full(len(calendar), np.nan)
        grids[field] = np.stack(
            [numbers(table, s).gather(found).fill_null(np.nan).to_numpy() if s in have else absent for s in symbols]
        )
    traded = np.isfinite(grids["close"]).any(0)  # a row without any price is a holiday
    calendar = tuple(day for day, is_open in zip(calendar, traded, strict=True) if is_open)
    grids = {field: grid[:, traded] for field, grid in grids.items()}
    return calendar, symbols, grids, {field: places[traded] for field, places in rows.items()}


def numbers(table: Table, column: str) -> pl.Series:
    """Float64, NaN where there is nothing."""
    values = table.frame[column]
    if not (values.dtype.is_numeric() or values.dtype in (pl.String, pl.Null)):
        raise UserError(f"{table.file}: column '{column}' is {values.dtype}; expected numbers")
    found = values.cast(pl.Float64, strict=False)
    table.refuse(found.is_null() & values.is_not_null(), column, "a number such as 1234.5, without unit or separator")
    return found.fill_null(np.nan)


def dates(table: Table, column: str) -> pl.Series:
    """Days of the column, which are all written alike."""
    values = table.frame[column]
    expected = "a date such as 2024-05-31"
    table.refuse(values.is_null(), column, expected)
    if values.dtype in (pl.Date, pl.Datetime):
        return values.cast(pl.Date)
    if not (values.dtype == pl.String or values.dtype.is_integer()):
        raise UserError(f"{table.file}: column '{column}' is {values.dtype}; expected dates such as 2024-05-31")
    text = values.cast(pl.String).str.strip_chars().str.replace(r"^(\d{4}[-/]\d{2}[-/]\d{2})[T ].*$", "${1}")
    for shown, form in _DATE_FORMATS.items():
        days = text.str.to_date(form, strict=False)
        if days[0] is not None:
            table.refuse(days.is_null(), column, f"{shown} as in the first row, since dates must not be mixed")
            return days
    table.refuse(pl.Series([True] + [False] * (len(values) - 1)), column, expected)
    raise AssertionError


def _header(file: Path) -> list[str]:
    """Column names, without reading the rows."""
    if not file.is_file() or file.stat().st_size == 0 or file.suffix not in (".parquet", ".pq", ".csv", ".tsv"):
        return read_table(file).frame.columns  # says what is wrong
    try:
        if file.suffix in (".parquet", ".pq"):
            return pl.scan_parquet(file).collect_schema().names()
        separator = "\t" if file.suffix == ".tsv" else ","
        return pl.read_csv(file, separator=separator, n_rows=0, infer_schema=False).columns
    except (OSError, pl.exceptions.PolarsError) as error:
        raise UserError(f"{file}: cannot be read; expected Parquet or CSV with one header") from error


def _price_files(path: Path) -> list[Path]:
    if not path.is_dir():
        return [path]
    files = sorted(file for file in path.iterdir() if file.suffix in (".parquet", ".pq", ".csv", ".tsv"))
    if not files:
        raise UserError(f"{path}: no .parquet, .csv or .tsv file in this folder")
    return files


def _columns(file: Path, header: Sequence[str], given: Mapping[str, str] | None) -> dict[str, str]:
    """Our name -> the file's column."""
    ours: dict[str, str] = {}
    known = {alias: name for name, aliases in _ALIASES.items() for alias in aliases}
    plain = {column: "".join(c for c in column.lower() if c.isalnum()) for column in header}
    for column in header:  # a column's own name goes before the names it may also bear
        if plain[column] in (*FIELDS, *_ALIASES, "return"):
            ours.setdefault(plain[column], column)
    for column in header:
        if (name := known.get(plain[column])) is not None:
            ours.setdefault(name, column)
    for name, column in (given or {}).items():
        if name not in (*FIELDS, "date", "symbol", "sector", "adjclose"):
            takes = ", ".join(("date", "symbol", *FIELDS, "sector"))
            raise UserError(f"data.files.columns.{name}: unknown; expected one of {takes}")
        if column not in header:
            near = difflib.get_close_matches(column, header, 1, 0.5)
            hint = f"did you mean '{near[0]}'" if near else f"it has {', '.join(header[:12])}"
            raise UserError(f"{file}: column '{column}', given for {name}, is missing; {hint}")
        ours[name] = column
    return ours


def _require(table: Table, ours: Mapping[str, str], *names: str) -> None:
    """Raises UserError for the first of our names that no column bears."""
    for name in names:
        if name not in ours:
            table.require(name, known=ours.values())


def _read_long(
    files: list[Path], membership: str | None, benchmark: str | None, calendar_file: str | None,
    columns: Mapping[str, str] | None, judge: Judge,
) -> StockTables:  # fmt: skip
    name = str(files[0] if len(files) == 1 else files[0].parent)
    rows = pl.concat(
        [_read_prices(file, columns, len(files) > 1).with_columns(file=pl.lit(str(file))) for file in files],
        how="diagonal",
    )
    if calendar_file is not None:
        rows = _within(rows, read_days(Path(calendar_file)), calendar_file, judge)
    rows = _without_repeats(rows, judge)
    backwards = pl.col("date").diff().over("symbol") < pl.duration()
    if rows.select(backwards.any()).item():
        judge.notes.append(f"{name}: rows are not in order of date; they have been sorted")
    days = rows["date"].unique().sort() if calendar_file is None else read_days(Path(calendar_file))
    symbols = tuple(rows["symbol"].unique().sort().to_list())
    row = rows["symbol"].cast(pl.Enum(symbols)).to_physical().to_numpy().astype(np.int64)
    column = days.search_sorted(rows["date"]).to_numpy().astype(np.int64)
    grids = {}
    for field in [field for field in FIELDS if field in rows.columns]:
        grids[field] = np.full((len(symbols), len(days)), np.nan)
        grids[field][row, column] = rows[field].fill_null(np.nan).to_numpy()

    def where(field: str, i: int, j: int) -> str:
        place = int(np.flatnonzero((row == i) & (column == j))[0])
        file = f"{Path(rows['file'][place]).name}, " if len(files) > 1 else ""
        return f"{file}row {rows['row'][place]}"

    calendar = tuple(days.to_list())
    grids = checked(name, calendar, symbols, grids, where, judge)
    sectors: dict[str, str] = {}
    if "sector" in rows.columns:
        last = rows.drop_nulls("sector").group_by("symbol").agg(pl.col("sector").last())
        sectors = dict(last.select("symbol", pl.col("sector").cast(pl.String)).iter_rows())
    return finish(name, calendar, symbols, grids, membership, benchmark, judge, sectors)


def _read_prices(file: Path, columns: Mapping[str, str] | None, named_by_file: bool) -> pl.DataFrame:
    """date, symbol, the price fields adjusted, sector, row (from 1)."""
    table = read_table(file)
    ours = _columns(file, table.frame.columns, columns)
    if "close" not in ours and "adjclose" in ours:
        ours["close"] = ours.pop("adjclose")
    if "symbol" not in ours and named_by_file:
        symbol = pl.Series("symbol", [file.stem]).new_from_index(0, len(table.frame))
    else:
        _require(table, ours, "symbol")
        symbol = table.frame[ours["symbol"]]
        table.refuse(symbol.is_null(), ours["symbol"], "a symbol in every row")
        symbol = symbol.cast(pl.String).str.strip_chars()
    _require(table, ours, "date", "close")
    out = pl.DataFrame({"date": dates(table, ours["date"]), "symbol": symbol})
    out = out.with_columns(**{field: numbers(table, ours[field]) for field in FIELDS if field in ours})
    if "adjclose" in ours:  # Yahoo adjusts the close alone
        factor = numbers(table, ours["adjclose"]) / out["close"]
        adjusted = [field for field in ("open", "high", "low", "close", "vwap") if field in ours]
        out = out.with_columns(pl.col(adjusted) * factor)
    if "sector" in ours:
        out = out.with_columns(sector=table.frame[ours["sector"]])
    return out.with_row_index("row", 1)


def _within(rows: pl.DataFrame, days: pl.Series, calendar: str, judge: Judge) -> pl.DataFrame:
    inside = rows["date"].is_in(days.implode())
    outside = rows.filter(~inside)
    if len(outside):
        places = [f"row {r}: {s} on {d}" for r, s, d in outside.select("row", "symbol", "date")[:2].iter_rows()]
        judge.settle(
            outside["file"][0], f"dated outside the calendar {calendar}", "its days only", places, len(outside)
        )
    return rows.filter(inside)


def _without_repeats(rows: pl.DataFrame, judge: Judge) -> pl.DataFrame:
    again = ~rows.select(pl.struct("date", "symbol").is_first_distinct()).to_series()
    if again.any():
        repeated = rows.filter(again)
        places = [f"row {r}: {s} on {d}" for r, s, d in repeated.select("row", "symbol", "date")[:2].iter_rows()]
        judge.settle(repeated["file"][0], "repeating a date and symbol", "each pair once", places, len(repeated))
    return rows.filter(~again)


def read_days(file: Path) -> pl.Series:
    if file.suffix != ".txt":
        table = read_table(file)
        return (
            dates(table, _columns(file, table.frame.columns, None).get("date", table.frame.columns[0])).unique().sort()
        )
    if not file.is_file():
        raise UserError(f"{file}: no such file")
    lines = [line.strip() for line in file.read_text().splitlines() if line.strip()]
    if not lines:
        raise UserError(f"{file}: the file is empty; expected a trading day a line")
    return dates(Table(file, pl.DataFrame({"date": lines})), "date").unique().sort()


def read_spans(file: Path) -> list[tuple[str, date | None, date | None]]:
    if file.suffix == ".txt":  # Qlib's instruments: no header
        if not file.is_file():
            raise UserError(f"{file}: no such file")
        lines = [line.split("\t") for line in file.read_text().splitlines() if line.strip()]
        for number, line in enumerate(lines, 1):
            if len(line) < 3:
                raise UserError(f"{file}: row {number}: {line}; expected symbol, start and end separated by tabs")
        parts = {"symbol": [x[0] for x in lines], "start": [x[1] for x in lines], "end": [x[2] for x in lines]}
        table = Table(file, pl.DataFrame(parts))
    else:
        table = read_table(file)
    ours = _columns(file, table.frame.columns, None)
    _require(table, ours, "symbol", "start", "end")
    symbols = table.frame[ours["symbol"]]
    table.refuse(symbols.is_null(), ours["symbol"], "a symbol in every row")
    bounds = []
    for column in (ours["start"], ours["end"]):
        known = table.frame.with_row_index("place").drop_nulls(column)
        days = pl.Series([None], dtype=pl.Date).new_from_index(0, len(table.frame))
        if len(known):
            days = days.scatter(known["place"], dates(Table(file, known), column))
        bounds.append(days.to_list())
    return list(zip(symbols.cast(pl.String).to_list(), *bounds, strict=True))


def _read_index(file: Path, calendar: Sequence[date]) -> Float64[np.ndarray, " calendar"]:
    """The index's return of each day of the calendar."""
    table = read_table(file)
    ours = _columns(file, table.frame.columns, None)
    _require(table, ours, "date")
    column = ours.get("return") or ours.get("adjclose") or ours.get("close")
    if column is None:
        _require(table, ours, "close")
    days, values = dates(table, ours["date"]), numbers(table, str(column))
    table.refuse(days.is_duplicated(), ours["date"], "each date once: the file holds one index")
    wanted = pl.DataFrame({"date": pl.Series(calendar, dtype=pl.Date)})
    series = wanted.join(pl.DataFrame({"date": days, "x": values}), on="date", how="left", maintain_order="left")["x"]
    if series.null_count() == len(series):
        raise UserError(f"{file}: none of its days is one of the prices', {calendar[0]} to {calendar[-1]}")
    known = series.fill_null(np.nan).to_numpy()
    return known if "return" in ours else _changes(known)


def _changes(level: Float64[np.ndarray, " calendar"]) -> Float64[np.ndarray, " calendar"]:
    return np.concatenate([[np.nan], level[1:] / level[:-1] - 1])
