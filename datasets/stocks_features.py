"""Features of a day from the days up to it, as polars expressions over one symbol's rows of the whole calendar.

A row is a trading day of the exchange, with or without a price, so a window of 20 rows is 20 trading days for every
symbol; days without a price are left out of it. Nothing looks ahead. Prices enter as ratios alone: the level of
an adjusted price tells of the splits and dividends to come.
"""

from collections.abc import Collection, Mapping
from typing import Literal

import polars as pl

from ..errors import UserError

FeatureSet = Literal["light", "alpha158"]
_WINDOWS = (5, 10, 20, 30, 60)
_YEAR, _MONTH = 252, 21
_TINY = 1e-12


def feature_expressions(kind: FeatureSet, fields: Collection[str]) -> dict[str, pl.Expr]:
    """Name -> expression over `day` and the `fields` of one symbol, sorted by day.

    Raises:
        UserError: alpha158 without open, high, low or volume.
    """
    if kind == "light":
        return _light(fields)
    missing = [name for name in ("open", "high", "low", "close", "volume") if name not in fields]
    if missing:
        have = ", ".join(fields)
        raise UserError(
            f"data.features=alpha158 needs {', '.join(missing)}, and the source has {have}; use data.features=light"
        )
    return _alpha158("vwap" in fields)


def over_symbols(expressions: Mapping[str, pl.Expr]) -> list[pl.Expr]:
    """The expressions symbol by symbol, as Float32, null where undefined."""
    return [_finite(e).over("symbol").cast(pl.Float32).alias(name) for name, e in expressions.items()]


def _light(fields: Collection[str]) -> dict[str, pl.Expr]:
    """20 columns of close, 9 of volume, 2 of amount, 7 of the day's bar, each group where its fields exist."""
    close = pl.col("close")
    change = _finite(close / close.shift(1) - 1)
    out = {f"ret_{d}": close / close.shift(d) - 1 for d in (1, 2, 3, 5, 10, 20, 60)}
    out["momentum"] = close.shift(_MONTH) / close.shift(_YEAR) - 1
    for d in (5, 10, 20, 60):
        out[f"mean_{d}"] = _mean(close, d) / close - 1
        out[f"std_{d}"] = _std(change, d)
    for d in (20, 60):
        low, high = _min(close, d), _max(close, d)
        out[f"place_{d}"] = (close - low) / (high - low)
    out["best_20"], out["worst_20"] = _max(change, 20), _min(change, 20)
    if "volume" in fields:
        volume = pl.col("volume")
        level = volume.log1p()
        out |= {f"volume_{d}": level - _mean(level, d) for d in (5, 20, 60)}
        out["volume_change"] = level - level.shift(1)
        out |= {f"volume_std_{d}": _std(level, d) for d in (20, 60)}
        out |= {f"corr_{d}": _corr(change, level - level.shift(1), d) for d in (10, 20, 60)}
    if "amount" in fields:
        amount = pl.col("amount")
        out["amount"] = _mean(amount.log1p(), 20)
        out["impact"] = (_mean(change.abs() / (amount + 1), 20) + _TINY).log()
    if {"open", "high", "low"} <= set(fields):
        opened, high, low = pl.col("open"), pl.col("high"), pl.col("low")
        out |= {"gap": opened / close.shift(1) - 1, "body": close / opened - 1, "range": high / low - 1}
        out["upper"] = high / pl.max_horizontal(opened, close) - 1
        out["lower"] = pl.min_horizontal(opened, close) / low - 1
        out["shift"] = (2 * close - high - low) / (high - low)
        out["range_20"] = _mean(_finite(high / low - 1), 20)
    return out


def _alpha158(vwap: bool) -> dict[str, pl.Expr]:
    """Qlib's Alpha158 by its own names: 9 of the day's bar, 4 price ratios (3 without vwap), 29 for each window."""
    o, h, low, c = (pl.col(name) for name in ("open", "high", "low", "close"))
    top, bottom, length = pl.max_horizontal(o, c), pl.min_horizontal(o, c), h - low
    out = {
        "KMID": (c - o) / o,
        "KLEN": length / o,
        "KMID2": (c - o) / (length + _TINY),
        "KUP": (h - top) / o,
        "KUP2": (h - top) / (length + _TINY),
        "KLOW": (bottom - low) / o,
        "KLOW2": (bottom - low) / (length + _TINY),
        "KSFT": (2 * c - h - low) / o,
        "KSFT2": (2 * c - h - low) / (length + _TINY),
        "OPEN0": o / c,
        "HIGH0": h / c,
        "LOW0": low / c,
    }
    if vwap:
        out["VWAP0"] = pl.col("vwap") / c
    for d in _WINDOWS:
        out |= {f"{name}{d}": expression for name, expression in _alpha158_window(d).items()}
    return out


def _alpha158_window(d: int) -> dict[str, pl.Expr]:
    h, low, c, v = (pl.col(name) for name in ("high", "low", "close", "volume"))
    move, flow = c - c.shift(1), v - v.shift(1)
    change = _finite(c / c.shift(1))
    traded = _finite((change - 1).abs() * v)
    highest, lowest = _max(h, d), _min(low, d)
    slope, r_squared, residual = _regression(c, d)
    age_high, age_low = _age(h, d), _age(-low, d)
    gain, loss, path = _sum(move.clip(0), d), _sum((-move).clip(0), d), _sum(move.abs(), d) + _TINY
    inflow, outflow, flows = _sum(flow.clip(0), d), _sum((-flow).clip(0), d), _sum(flow.abs(), d) + _TINY
    up, down = _mean((move > 0).cast(pl.Float64), d), _mean((move < 0).cast(pl.Float64), d)
    return {
        "ROC": c.shift(d) / c,
        "MA": _mean(c, d) / c,
        "STD": _std(c, d) / c,
        "BETA": slope / c,
        "RSQR": r_squared,
        "RESI": residual / c,
        "MAX": highest / c,
        "MIN": lowest / c,
        "QTLU": c.rolling_quantile(0.8, interpolation="linear", window_size=d, min_samples=1) / c,
        "QTLD": c.rolling_quantile(0.2, interpolation="linear", window_size=d, min_samples=1) / c,
        "RANK": c.rolling_rank(d, min_samples=1) / _known(c, d),
        "RSV": (c - lowest) / (highest - lowest + _TINY),
        "IMAX": (d - age_high) / d,
        "IMIN": (d - age_low) / d,
        "IMXD": (age_low - age_high) / d,
        "CORR": _corr(c, v.log1p(), d),
        "CORD": _corr(change, _finite(v / v.shift(1)).log1p(), d),
        "CNTP": up,
        "CNTN": down,
        "CNTD": up - down,
        "SUMP": gain / path,
        "SUMN": loss / path,
        "SUMD": (gain - loss) / path,
        "VMA": _mean(v, d) / (v + _TINY),
        "VSTD": _std(v, d) / (v + _TINY),
        "WVMA": _std(traded, d) / (_mean(traded, d) + _TINY),
        "VSUMP": inflow / flows,
        "VSUMN": outflow / flows,
        "VSUMD": (inflow - outflow) / flows,
    }


def _regression(y: pl.Expr, d: int) -> tuple[pl.Expr, pl.Expr, pl.Expr]:
    """Slope, R² and last residual of a line through the window's known values against the day."""
    x = pl.col("day").cast(pl.Float64)
    known = pl.when(y.is_not_null()).then(x)
    slope = pl.rolling_cov(known, y, window_size=d, min_samples=2) / known.rolling_var(d, min_samples=2)
    residual = y - _mean(y, d) - slope * (x - _mean(known, d))
    return slope, _corr(known, y, d) ** 2, residual


def _age(x: pl.Expr, d: int) -> pl.Expr:
    """How many rows ago the window's largest value stood, the first of equals."""
    # Order and place in one exact number, rank * 2^20 - day: among equal values the earlier day is the larger.
    key = x.rank("dense").cast(pl.Float64) * 2.0**20 - pl.col("day")
    largest = _max(key, d) / 2.0**20
    return pl.col("day") - (largest.ceil() - largest) * 2.0**20


def _finite(x: pl.Expr) -> pl.Expr:
    return pl.when(x.is_finite()).then(x)


def _known(x: pl.Expr, d: int) -> pl.Expr:
    return x.is_not_null().cast(pl.Float64).rolling_sum(d, min_samples=1)


def _sum(x: pl.Expr, d: int) -> pl.Expr:
    return x.rolling_sum(d, min_samples=1)


def _mean(x: pl.Expr, d: int) -> pl.Expr:
    return x.rolling_mean(d, min_samples=1)


def _std(x: pl.Expr, d: int) -> pl.Expr:
    return x.rolling_std(d, min_samples=2)


def _max(x: pl.Expr, d: int) -> pl.Expr:
    return x.rolling_max(d, min_samples=1)


def _min(x: pl.Expr, d: int) -> pl.Expr:
    return x.rolling_min(d, min_samples=1)


def _corr(x: pl.Expr, y: pl.Expr, d: int) -> pl.Expr:
    """Null where either side does not move: rounding alone would speak there."""
    moves = (_max(x, d) > _min(x, d)) & (_max(y, d) > _min(y, d))
    return pl.when(moves).then(pl.rolling_corr(x, y, window_size=d, min_samples=2).clip(-1, 1))
