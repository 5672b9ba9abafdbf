"""What every stock reader returns: prices on a grid of symbols and trading days, and who was a member when."""

import difflib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import date
from typing import Literal

import numpy as np
from jaxtyping import Bool, Float64

from ..errors import UserError

BadRows = Literal["raise", "drop"]
Grid = Float64[np.ndarray, "symbols calendar"]
Mask = Bool[np.ndarray, "symbols calendar"]
Where = Callable[[str, int, int], str]  # (field, symbol, day) -> the place in the user's files
PRICES = ("open", "high", "low", "close", "vwap")
FIELDS = (*PRICES, "volume", "amount", "factor", "cap")
_ROUNDING = 1e-4  # relative; prices adjusted in single precision do not agree better


@dataclass(frozen=True)
class StockTables:
    """A stock dataset as read and checked.

    Attributes:
        calendar: trading days, ascending.
        symbols: names, sorted.
        fields: `close`, and of the other `FIELDS` those the source has; NaN where there is no row. Prices are
            adjusted for splits and dividends, or all of them are not; `amount` is money traded, `factor` the
            adjusted price over the paid one, `cap` market value.
        member: who belongs to the universe on which day.
        market: return of the market index from the close before to the day's close; NaN where unknown.
        sectors: symbol -> sector; empty where the source has none.
        notes: what the user must be told, a line each.
    """

    calendar: tuple[date, ...]
    symbols: tuple[str, ...]
    fields: Mapping[str, Grid]
    member: Mask
    market: Float64[np.ndarray, " calendar"]
    sectors: Mapping[str, str] = field(default_factory=dict)
    notes: Sequence[str] = ()


class Judge:
    """Decides on rows that cannot be right, and keeps what the user must be told about the data.

    Args:
        bad_rows: `raise` at the first kind of them, or `drop` them and say how many.
    """

    def __init__(self, bad_rows: BadRows = "raise") -> None:
        self.bad_rows = bad_rows
        self.notes: list[str] = []

    def settle(self, file: str, what: str, expected: str, places: Sequence[str], count: int) -> None:
        """`count` rows are wrong, the first ones at `places`: one line, as UserError or as a note."""
        examples = "; ".join(places[:2])
        rows = f"{count:,} row{'s' * (count > 1)}"
        if self.bad_rows == "raise":
            raise UserError(
                f"{file}: {rows} {what} ({examples}); expected {expected}; correct them, or leave them out with "
                f"data.bad_rows=drop"
            )
        self.notes.append(f"{file}: dropped {rows} {what} ({examples})")


def checked(
    name: str, calendar: tuple[date, ...], symbols: tuple[str, ...], fields: dict[str, Grid], where: Where,
    judge: Judge, today: date | None = None,
) -> dict[str, Grid]:  # fmt: skip
    """The grids without impossible rows.

    Args:
        name: of the source in messages.
        where: tells a place in the user's files.
        judge: of rows that cannot be right.

    Raises:
        UserError: one symbol alone, prices <= 0, high below low, negative volume, rows dated in the future, one
            series repeated under several names.
    """
    if len(symbols) < 2:
        raise UserError(
            f"{name}: one symbol alone ({', '.join(symbols)}); expected several, since the names of a day are ranked "
            f"against each other; is the symbol column right?"
        )
    bad = np.zeros((len(symbols), len(calendar)), bool)

    def look(column: str, rows: Mask, what: str, expected: str) -> None:
        rows = rows & ~bad  # a row is told of once
        count = int(rows.sum())
        if count:
            places = [
                f"{where(column, i, j)}: {symbols[i]} on {calendar[j]}, {fields[column][i, j]:g}"
                for i, j in np.argwhere(rows)[:2].tolist()
            ]
            judge.settle(name, f"with {what}", expected, places, count)
            np.logical_or(bad, rows, out=bad)

    for column in (*PRICES, "factor", "cap"):
        if column in fields:
            look(column, fields[column] <= 0, f"{column} <= 0", f"{column} > 0")
            look(column, np.isinf(fields[column]), f"infinite {column}", "numbers")
    for column in ("volume", "amount"):
        if column in fields:
            look(column, fields[column] < 0, f"{column} < 0", f"{column} >= 0")
    if {"high", "low"} <= set(fields):
        look("high", fields["high"] < fields["low"] * (1 - _ROUNDING), "high < low", "high >= low")
    late = np.array([day > (today or date.today()) for day in calendar])
    if late.any():
        look("close", late & np.isfinite(fields["close"]), "a date in the future", "days up to today")
    if bad.any():
        fields = {column: np.where(bad, np.nan, grid) for column, grid in fields.items()}
    known = np.isfinite(fields["close"])
    if not known.any():
        raise UserError(f"{name}: no row has a close; expected a price in column 'close'")
    _refuse_repeated(name, symbols, fields["close"])
    return fields


def _refuse_repeated(name: str, symbols: Sequence[str], close: Grid) -> None:
    """One series under two names: a loader's or a vendor's mistake that makes every cross-section a lie."""
    seen: dict[bytes, list[str]] = {}
    for symbol, series in zip(symbols, close, strict=True):
        if np.isfinite(series).sum() > 1:
            seen.setdefault(series.tobytes(), []).append(symbol)
    repeated = [names for names in seen.values() if len(names) > 1]
    if repeated:
        count, first = sum(len(names) for names in repeated), repeated[0]
        raise UserError(
            f"{name}: {count} symbols share their prices with another one ({', '.join(first[:3])} have the same "
            f"close on every day); expected each symbol's own prices; read the files again from their source"
        )


def membership_mask(
    file: str, spans: Sequence[tuple[str, date | None, date | None]], symbols: Sequence[str],
    calendar: Sequence[date], judge: Judge,
) -> Mask:  # fmt: skip
    """Who is a member on which day.

    Args:
        spans: symbol, first day, last day (both included; None is open).

    Raises:
        UserError: a span ends before it begins, a symbol has no prices, no span meets the calendar.
    """
    row = {symbol: i for i, symbol in enumerate(symbols)}
    days = np.array(calendar, "datetime64[D]")
    member = np.zeros((len(symbols), len(calendar)), bool)
    unknown = []
    for number, (symbol, start, end) in enumerate(spans, 1):
        if start is not None and end is not None and end < start:
            raise UserError(f"{file}: row {number}: {symbol} from {start} to {end}; expected start <= end")
        if symbol not in row:
            unknown.append((number, symbol))
            continue
        first = 0 if start is None else int(np.searchsorted(days, np.datetime64(start)))
        last = len(days) if end is None else int(np.searchsorted(days, np.datetime64(end), "right"))
        member[row[symbol], first:last] = True
    if unknown:
        missing = list(dict.fromkeys(symbol for _, symbol in unknown))
        near = difflib.get_close_matches(missing[0], symbols, 1, 0.5)
        hint = f"; the prices have e.g. {near[0] if near else symbols[0]}"
        if len(missing) == len({symbol for symbol, _, _ in spans}):
            raise UserError(f"{file}: none of its {len(missing)} symbols ({missing[0]}, ...) has prices{hint}")
        places = [f"row {number}: {symbol}" for number, symbol in unknown[:2]]
        what = f"naming {len(missing)} symbols without prices"
        judge.settle(file, what, "symbols of the price file" + hint, places, len(unknown))
    if not member.any():
        raise UserError(
            f"{file}: nobody is a member on any day from {calendar[0]} to {calendar[-1]}; expected spans that meet the "
            f"prices' days"
        )
    return member
