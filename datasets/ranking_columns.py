"""A user's table, column by column: read, typed and checked, with errors that name file, column and row."""

import difflib
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path

import polars as pl

from ..errors import UserError

_MILLISECONDS = 10**11  # as seconds, the year 5138


@dataclass(frozen=True)
class Table:
    """One file as given, rows in the file's order; text files hold strings until a column is asked for.

    Rows in messages count from 1 without the header.
    """

    file: Path
    frame: pl.DataFrame

    def __contains__(self, column: str) -> bool:
        return column in self.frame.columns

    def require(self, *columns: str, known: Collection[str] | None = None) -> None:
        """Raises UserError for the first column that is missing, naming the nearest that is there.

        Args:
            columns: those that must be there.
            known: columns with a meaning of their own, where `data.files.columns` can name others.
        """
        for column in columns:
            if column in self:
                continue
            free = [one for one in self.frame.columns if one not in (*columns, *(known or ()))]
            near = difflib.get_close_matches(column, free, 1, 0.5)
            hint = f"rename '{near[0]}'" if near else f"it has {', '.join(self.frame.columns[:12])}"
            if known is not None:
                hint += f", or give --data.files.columns '{{{column}: {near[0] if near else 'YOURS'}}}'"
            raise UserError(f"{self.file}: column '{column}' is missing; {hint}")

    def refuse(self, bad: pl.Series, column: str, expected: str) -> None:
        """Raises UserError for the first row where `bad` is true."""
        row = bad.fill_null(False).arg_max()
        if row is not None and bad[row]:
            given = self.frame[column][row]
            value = "empty" if given is None else repr(given)
            raise UserError(f"{self.file}: column '{column}', row {row + 1}: {value}; expected {expected}")

    def ids(self, column: str) -> pl.Series:
        """The column without nulls: Int64 or String. Which of them, `common_ids` settles between files."""
        values = self.frame[column]
        self.refuse(values.is_null(), column, "an id in every row; drop the row or fill it in")
        if values.dtype.is_integer() or values.dtype == pl.String:
            return values
        if values.dtype in (pl.Categorical, pl.Enum):
            return values.cast(pl.String)
        if values.dtype.is_float():
            whole = values.cast(pl.Int64, strict=False)
            same = (whole.cast(values.dtype) == values).fill_null(False)
            self.refuse(~same, column, "a whole number or a text as id")
            return whole
        raise UserError(f"{self.file}: column '{column}' is {values.dtype}; expected integers or texts as ids")

    def seconds(self, column: str) -> pl.Series:
        """Int64 seconds since 1970 (UTC where no offset is given); fractions are cut off."""
        values = self.frame[column]
        expected = "seconds since 1970 or an ISO date and time such as 2024-05-31T18:00:00"
        self.refuse(values.is_null(), column, expected)
        if values.dtype in (pl.Date, pl.Datetime):
            return values.cast(pl.Datetime("us") if values.dtype == pl.Date else values.dtype).dt.epoch("s")
        if values.dtype == pl.String:
            numbers = values.cast(pl.Float64, strict=False)
            if numbers[0] is None:
                moments = _moments(values)
                self.refuse(moments.is_null(), column, expected)
                return moments.dt.epoch("s")
            self.refuse(numbers.is_null(), column, expected)
            whole = values.cast(pl.Int64, strict=False)  # large integers lose digits as Float64
            values = numbers if whole.null_count() else whole
        if not values.dtype.is_numeric():
            raise UserError(f"{self.file}: column '{column}' is {values.dtype}; expected {expected}")
        if values.dtype.is_float():
            self.refuse(~values.is_finite(), column, expected)
            values = values.cast(pl.Float64).floor()
        else:
            values = values.cast(pl.Int64, strict=False).fill_null(_MILLISECONDS)
        too_late = (values >= _MILLISECONDS) | (values <= -_MILLISECONDS)
        self.refuse(too_late, column, "seconds, this looks like milliseconds or less: divide it")
        return values.cast(pl.Int64)

    def numbers(self, column: str) -> pl.Series:
        """Float32, nulls kept."""
        values = self.frame[column]
        found = values.cast(pl.Float32, strict=False)
        self.refuse(found.is_null() & values.is_not_null(), column, "a number")
        return found

    def labels(self, column: str) -> pl.Series:
        """UInt8, 0 or 1, nulls kept."""
        found = self.numbers(column)
        self.refuse(~found.is_in([0.0, 1.0]), column, "0 or 1")
        return found.cast(pl.UInt8)

    def attribute(self, column: str) -> pl.Series:
        """The column as given; from a text file as Int64 or Float64 where every value is such a number."""
        values = self.frame[column]
        if values.dtype in (pl.Categorical, pl.Enum):
            return values.cast(pl.String)
        if values.dtype != pl.String:
            return values
        whole = _as_integers(values)
        if whole is not None and whole.null_count() < len(whole):
            return whole
        numbers = values.cast(pl.Float64, strict=False)
        a_text = numbers.is_null() & values.is_not_null() | values.str.contains(r"^0\d")  # such as zip codes
        return values if a_text.any() or numbers.null_count() == len(numbers) else numbers


def read_table(file: str | Path, separator: str | None = None) -> Table:
    """Reads Parquet, or CSV / TSV with every column as text.

    Args:
        file: *.parquet, *.pq, *.csv or *.tsv; another ending needs `separator`.
        separator: reads a text file with it, whatever its ending.

    Raises:
        UserError: the file is missing, empty, unreadable or of an unknown kind.
    """
    path = Path(file)
    if not path.is_file():
        raise UserError(f"{path}: no such file")
    if path.stat().st_size == 0:
        raise UserError(f"{path}: the file is empty; expected a header and rows")
    separator = separator or {".csv": ",", ".tsv": "\t"}.get(path.suffix)
    try:
        if separator:
            quote = '"' if separator == "," else None  # tab-separated formats of the field do not quote
            lazy = pl.scan_csv(path, separator=separator, infer_schema=False, quote_char=quote)
        elif path.suffix in (".parquet", ".pq"):
            lazy = pl.scan_parquet(path)
        else:
            raise UserError(f"{path}: unknown kind of file; expected .parquet, .csv or .tsv")
        frame = lazy.collect(engine="streaming")
    except (OSError, pl.exceptions.PolarsError) as error:
        reason = str(error).strip().splitlines()[0]
        raise UserError(f"{path}: cannot be read ({reason}); expected Parquet or CSV with one header") from error
    if frame.is_empty():
        raise UserError(f"{path}: no rows; expected at least one below the header")
    return Table(path, frame)


def common_ids(columns: Sequence[pl.Series]) -> list[pl.Series]:
    """The same kind of id in all columns: Int64 if every value is a plain integer, else String."""
    whole = [_as_integers(column) for column in columns]
    if any(column is None for column in whole):
        return [column.cast(pl.String) for column in columns]
    return [column for column in whole if column is not None]


def _as_integers(values: pl.Series) -> pl.Series | None:
    """Int64, or None if some value is not an integer as Python would print it (007 stays a text)."""
    whole = values.cast(pl.Int64, strict=False)
    if whole.null_count() > values.null_count():
        return None
    if values.dtype == pl.String and not (whole.cast(pl.String) == values).all():
        return None
    return whole


def _moments(values: pl.Series) -> pl.Series:
    """ISO 8601 texts as UTC datetimes, null where they are none. Missing time is midnight, no offset is UTC."""
    text = values.str.strip_chars().str.replace(" ", "T", literal=True).str.replace("Z$", "+00:00")
    text = text.str.replace(r"^(\d{4}-\d{2}-\d{2})$", "${1}T00:00:00")
    text = text.str.replace(r"(T\d{2}:\d{2})($|[+-])", "${1}:00${2}")
    text = text.str.replace(r"(T[\d:.]+)$", "${1}+00:00")
    return text.str.to_datetime("%Y-%m-%dT%H:%M:%S%.f%z", time_unit="us", time_zone="UTC", strict=False)
