"""Folders in Qlib's binary form: calendars/day.txt, instruments/<universe>.txt, features/<symbol>/<field>.day.bin.

A .bin file holds little-endian float32: the position in the calendar of its first day, then a value a day.
"""

from datetime import date
from pathlib import Path

import numpy as np

from ..errors import UserError
from .stocks_formats import Source, finish, read_days, read_spans
from .stocks_tables import FIELDS, Grid, Judge, StockTables, checked

_SUFFIX = ".day.bin"


def open_qlib(folder: str, universe: str = "all", benchmark: str | None = None, name: str | None = None) -> Source:
    """A Qlib folder.

    Args:
        folder: holds calendars, instruments and features.
        universe: a file of instruments/, e.g. csi300: symbol, first and last day of each membership.
        benchmark: a symbol of the folder, e.g. SH000300, or a file with date and close.
        name: of the dataset on the leaderboard; default: the universe's.
    """
    root = Path(folder)
    for part in ("calendars", "instruments", "features"):
        if not (root / part).is_dir():
            raise UserError(f"{root}: no folder '{part}'; expected a Qlib folder: calendars, instruments, features")
    calendar, spans = root / "calendars" / "day.txt", root / "instruments" / f"{universe}.txt"
    if not spans.is_file():
        have = ", ".join(sorted(file.stem for file in spans.parent.glob("*.txt"))) or "none"
        raise UserError(f"data.files.universe={universe}: {spans} does not exist; the folder has {have}")
    wanted = sorted({symbol for symbol, _, _ in read_spans(spans)})
    if benchmark is not None and not Path(benchmark).is_file():
        if not (root / "features" / benchmark.lower()).is_dir():
            raise UserError(f"data.files.benchmark={benchmark}: neither a file nor a symbol of {root}/features")
        wanted = sorted({*wanted, benchmark})
    folders = {s: root / "features" / s.lower() for s in wanted if (root / "features" / s.lower()).is_dir()}
    if not folders:
        raise UserError(f"{spans}: none of its {len(wanted)} symbols has a folder in {root}/features")
    files = {symbol: {f.name.removesuffix(_SUFFIX): f for f in sorted(d.glob(f"*{_SUFFIX}"))}
             for symbol, d in folders.items()}  # fmt: skip
    fields = tuple(field for field in FIELDS if any(field in have for have in files.values()))
    if "close" not in fields:
        raise UserError(f"{root}/features: no close{_SUFFIX}; expected daily data")
    content = [calendar, spans, *(have[field] for have in files.values() for field in fields if field in have)]
    if benchmark is not None and Path(benchmark).is_file():
        content.append(Path(benchmark))

    def read(judge: Judge) -> StockTables:
        days = tuple(read_days(calendar).to_list())
        symbols = tuple(files)
        grids = {field: np.full((len(symbols), len(days)), np.nan) for field in fields}
        for i, symbol in enumerate(symbols):
            for field in fields:
                if field in files[symbol]:
                    first, values = _read_bin(files[symbol][field], days)
                    grids[field][i, first : first + len(values)] = values

        def where(field: str, i: int, j: int) -> str:
            return str(files[symbols[i]][field].relative_to(root))

        checked_grids: dict[str, Grid] = checked(str(root), days, symbols, grids, where, judge)
        return finish(str(root), days, symbols, checked_grids, str(spans), benchmark, judge)

    return Source(name or universe, tuple(content), fields, read)


def _read_bin(file: Path, days: tuple[date, ...]) -> tuple[int, np.ndarray]:
    """Position of the first day, and the values."""
    size = file.stat().st_size
    if size < 4 or size % 4:
        raise UserError(f"{file}: {size} bytes; expected float32 values, 4 bytes each, the first one a position")
    values = np.fromfile(file, "<f4")
    first = values[0]
    if not (np.isfinite(first) and first >= 0 and first == int(first) and int(first) + len(values) - 1 <= len(days)):
        raise UserError(
            f"{file}: {len(values) - 1} values from position {first:g} leave the calendar of {len(days)} days; "
            f"expected calendars/day.txt of the same download"
        )
    return int(first), values[1:]
