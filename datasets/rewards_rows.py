"""A user's file of preferences as rows: JSON Lines, JSON, Parquet, CSV; mistakes name the file and the row."""

import gzip
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

from ..errors import UserError
from .ranking_columns import read_table

ENDINGS = (".jsonl", ".jsonl.gz", ".ndjson", ".json", ".parquet", ".pq", ".csv", ".tsv")
_SPLITS = {"train": "train", "valid": "valid", "val": "valid", "validation": "valid", "dev": "valid", "test": "test"}


@dataclass(frozen=True)
class Rows:
    """The objects of one file, in order. Rows in messages count from 1."""

    file: Path
    rows: Sequence[Mapping[str, Any]]

    def fail(self, row: int, message: str) -> NoReturn:
        """Raises UserError that names file and row (from 0)."""
        raise UserError(f"{self.file}, row {row + 1}: {message}")

    def text(self, row: int, value: Any, field: str) -> str:
        """A text that is there; it may be empty."""
        if not isinstance(value, str):
            self.fail(row, f"'{field}' is {shown(value)}; expected a text")
        try:
            value.encode()
        except UnicodeEncodeError as error:
            self.fail(row, f"'{field}' holds half a character ({shown(value[error.start])}); expected Unicode text")
        return value

    def texts(self, row: int, value: Any, field: str) -> list[str]:
        """A list of texts, not empty."""
        if not isinstance(value, list) or not value:
            self.fail(row, f"'{field}' is {shown(value)}; expected a list of texts")
        return [self.text(row, part, field) for part in value]

    def number(self, row: int, value: Any, field: str) -> float:
        """A finite number."""
        try:
            found = float(value)
        except (TypeError, ValueError):
            found = float("nan")
        if isinstance(value, bool) or not abs(found) < float("inf"):
            self.fail(row, f"'{field}' is {shown(value)}; expected a number")
        return found

    def split(self, row: int, value: Any) -> str | None:
        """train, valid or test, by any of their usual names; None where there is none."""
        if value is None:
            return None
        found = _SPLITS.get(str(value).lower())
        if found is None:
            self.fail(row, f"'split' is {shown(value)}; expected {', '.join(_SPLITS)}")
        return found


def shown(value: Any) -> str:
    """A value for a message, cut short."""
    if value is None:
        return "empty"
    text = " ".join(repr(value).split())
    return text if len(text) <= 60 else text[:57] + "..."


def files_of(path: str | Sequence[str]) -> list[Path]:
    """The files that one or several paths stand for; of a folder all that can be read, by name.

    Raises:
        UserError: one is missing, or a folder holds none.
    """
    found: list[Path] = []
    for place in map(Path, [path] if isinstance(path, str) else path):
        if place.is_dir():
            inside = sorted(file for file in place.rglob("*") if file.name.endswith(ENDINGS) and file.is_file())
            if not inside:
                raise UserError(f"{place}: no {', '.join(ENDINGS)} file in this folder")
            found += inside
        elif place.is_file():
            found.append(place)
        else:
            raise UserError(f"{place}: no such file or folder")
    if not found:
        raise UserError("data.files.path: no file given; expected one or a list of them")
    return found


def read_rows(file: Path, columns: Mapping[str, str] | None = None) -> Rows:
    """All rows of a file.

    Args:
        columns: our name -> the file's, for files with other names.

    Raises:
        UserError: the file is missing, empty, of an unknown kind, or a line is not a JSON object.
    """
    if not file.is_file():
        raise UserError(f"{file}: no such file")
    if file.name.endswith((".jsonl", ".ndjson", ".jsonl.gz")):
        rows = _json_lines(file)
    elif file.suffix == ".json":
        rows = _json(file)
    elif file.name.endswith(ENDINGS):
        rows = read_table(file).frame.to_dicts()
    else:
        raise UserError(f"{file}: unknown kind of file; expected {', '.join(ENDINGS)}")
    if not rows:
        raise UserError(f"{file}: no rows; expected at least one")
    if columns:
        names = dict.fromkeys(name for row in rows for name in row)
        if unknown := [theirs for theirs in columns.values() if theirs not in names]:
            raise UserError(f"{file}: no '{unknown[0]}' as named in data.files.columns; it has {', '.join(names)}")
        rows = [_renamed(row, columns) for row in rows]
    return Rows(file, rows)


def _json_lines(file: Path) -> list[dict[str, Any]]:
    rows = []
    open_as_text: Any = partial(gzip.open, mode="rt") if file.suffix == ".gz" else open
    try:
        with open_as_text(file, encoding="utf-8-sig") as lines:
            for number, line in enumerate(lines, 1):
                if line.strip():
                    rows.append(_object(file, f"line {number}", line))
    except (UnicodeDecodeError, OSError, EOFError) as error:
        raise UserError(f"{file}: cannot be read ({error}); expected JSON Lines in UTF-8") from error
    return rows


def _object(file: Path, place: str, text: str) -> dict[str, Any]:
    try:
        found = json.loads(text)
    except json.JSONDecodeError as error:
        raise UserError(
            f"{file}, {place}: not JSON ({error.msg} at column {error.colno}); expected one object"
        ) from error
    if not isinstance(found, dict):
        raise UserError(f"{file}, {place}: {shown(found)}; expected a JSON object")
    return found


def _json(file: Path) -> list[dict[str, Any]]:
    """A list of objects; or an object that holds one list of them."""
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise UserError(f"{file}: not JSON ({error.msg}, line {error.lineno}); expected a list of objects") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{file}: cannot be read ({error}); expected JSON in UTF-8") from error
    if isinstance(found, dict):
        lists = [value for value in found.values() if isinstance(value, list)]
        found = lists[0] if len(lists) == 1 else found
    if not isinstance(found, list) or not all(isinstance(row, dict) for row in found):
        raise UserError(f"{file}: {shown(found)}; expected a list of objects")
    return found


def _renamed(row: Mapping[str, Any], columns: Mapping[str, str]) -> dict[str, Any]:
    theirs_of = set(columns.values())
    kept = {name: value for name, value in row.items() if name not in theirs_of}
    return kept | {ours: row[theirs] for ours, theirs in columns.items() if theirs in row}
