"""From tables to the panel: features, their scaling, labels, weights and styles."""

from collections.abc import Sequence
from typing import Literal

import numpy as np
import polars as pl
import torch
from jaxtyping import Bool, Float32, Float64
from torch import Tensor

from .stocks_features import FeatureSet, feature_expressions, over_symbols
from .stocks_panel import StockPanel
from .stocks_tables import StockTables

Normalise = Literal["robust", "rank", "zscore"]
STYLES = ("size", "volatility", "momentum")
_AT_ONCE = 16  # features computed in one query: bounds the memory beside the panel
_MAD = 1.4826  # makes the median absolute deviation a standard deviation under a normal law
_BOUND = 3.0
_RANK_SCALE = 3.46  # makes centred ranks about as wide as a unit normal


def build_panel(
    tables: StockTables, features: FeatureSet, normalise: Normalise, lookback: int, horizon: int,
    train_days: Sequence[int], clip_return: float | None = None,
) -> StockPanel:  # fmt: skip
    """Computes everything once.

    Args:
        train_days: the only days that the robust scaling is fitted on.
        clip_return: bound of |label| and |next_return|.
    """
    close = tables.fields["close"]
    priced = np.isfinite(close)
    listed = np.where(priced.any(1), priced.argmax(1), close.shape[1])[:, None]
    valid = tables.member & priced & (np.arange(close.shape[1]) - listed >= lookback - 1)
    frame = _long_frame(tables)
    next_return = _forward(close, 1)
    if "volume" in tables.fields:  # a price that nobody paid cannot be bought at
        next_return[:, :-1][tables.fields["volume"][:, 1:] == 0] = np.nan
    weight, style = _weights_and_styles(tables, frame, valid)
    return StockPanel(
        features=_features(frame, tables, features, normalise, priced, train_days),
        label=_by_day(_clip(_forward(close, horizon), clip_return)),
        valid=torch.from_numpy(np.ascontiguousarray(valid.T)),
        next_return=_by_day(_clip(next_return, clip_return)),
        weight=_by_day(weight),
        style=style,
        benchmark=_benchmark(tables, weight, next_return),
        calendar=tables.calendar,
        symbols=tables.symbols,
        styles=STYLES,
        sectors=dict(tables.sectors),
        notes=tuple(tables.notes),
    )


def raw_features(tables: StockTables, features: FeatureSet) -> dict[str, Float32[np.ndarray, "symbols calendar"]]:
    """The features before scaling, NaN where undefined."""
    frame = _long_frame(tables)
    expressions = feature_expressions(features, frame.columns)
    found = frame.lazy().select(over_symbols(expressions)).collect()
    shape = tables.fields["close"].shape
    return {column.name: column.fill_null(np.nan).to_numpy().reshape(shape) for column in found}


def _long_frame(tables: StockTables) -> pl.DataFrame:
    """symbol, day and the fields, a row for each symbol and trading day, null where there is no price."""
    symbols, days = tables.fields["close"].shape
    fields = dict(tables.fields)
    if "volume" not in fields and "amount" in fields:
        fields["volume"] = fields["amount"] / fields["close"]
    frame = pl.DataFrame(
        {
            "symbol": np.repeat(np.arange(symbols, dtype=np.uint32), days),
            "day": np.tile(np.arange(days, dtype=np.float64), symbols),
            **{name: np.ascontiguousarray(grid).ravel() for name, grid in fields.items()},
        }
    )
    return frame.with_columns(pl.when(pl.col(name).is_finite()).then(pl.col(name)) for name in fields)


def _features(
    frame: pl.DataFrame, tables: StockTables, kind: FeatureSet, normalise: Normalise,
    priced: Bool[np.ndarray, "symbols calendar"], train_days: Sequence[int],
) -> Tensor:  # fmt: skip
    """[symbols, calendar, features], scaled, 0 where undefined."""
    expressions = feature_expressions(kind, frame.columns)
    in_train = np.zeros(priced.shape[1], bool)
    in_train[list(train_days)] = True
    members = tables.member & priced
    fit = (members & in_train).ravel()
    names = list(expressions)
    panel = np.empty((*priced.shape, len(names)), np.float32)
    for first in range(0, len(names), _AT_ONCE):
        some = names[first : first + _AT_ONCE]
        found = frame.lazy().select("day", *over_symbols({name: expressions[name] for name in some})).collect()
        if normalise != "robust":
            found = found.with_columns(member=members.ravel())
            found = found.with_columns(_within_day(name, normalise) for name in some)
        for place, name in enumerate(some, first):
            values = np.where(priced.ravel(), found[name].fill_null(np.nan).to_numpy(), np.nan)
            if normalise == "robust":
                values = _robust(values, fit)
            panel[..., place] = np.nan_to_num(values, copy=False).reshape(priced.shape)
    return torch.from_numpy(panel)


def _robust(values: Float32[np.ndarray, " rows"], fit: Bool[np.ndarray, " rows"]) -> Float32[np.ndarray, " rows"]:
    """(x - median) / (1.4826 MAD) of the rows `fit`, within ±3; the deviation where more than half are equal."""
    known = values[fit]
    known = known[np.isfinite(known)]
    if not len(known):
        return np.zeros_like(values)
    median = np.median(known)
    scale = np.float32(np.median(np.abs(known - median)) * _MAD or known.std(dtype=np.float64) or 1.0)
    scaled: Float32[np.ndarray, " rows"] = np.clip((values - median) / scale, -_BOUND, _BOUND)
    return scaled


def _within_day(name: str, normalise: Normalise) -> pl.Expr:
    """Rank or z-score among the members of the day; null for the others."""
    x = pl.when(pl.col("member")).then(pl.col(name))
    if normalise == "rank":
        scaled = (x.rank().over("day") / x.count().over("day") - 0.5) * _RANK_SCALE
    else:
        scaled = ((x - x.mean().over("day")) / x.std().over("day")).clip(-_BOUND, _BOUND)
    return pl.when(scaled.is_finite()).then(scaled).cast(pl.Float32).alias(name)


def _forward(close: Float64[np.ndarray, "symbols calendar"], horizon: int) -> Float64[np.ndarray, "symbols calendar"]:
    """Return from close t+1 to close t+1+horizon; NaN where either is unknown."""
    out = np.full_like(close, np.nan)
    out[:, : -1 - horizon] = close[:, 1 + horizon :] / close[:, 1:-horizon] - 1
    return out


def _clip(
    returns: Float64[np.ndarray, "symbols calendar"], bound: float | None
) -> Float64[np.ndarray, "symbols calendar"]:
    return returns if bound is None else np.clip(returns, -bound, bound)


def _by_day(grid: Float64[np.ndarray, "symbols calendar"]) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(grid.T, np.float32))


def _weights_and_styles(
    tables: StockTables, frame: pl.DataFrame, valid: Bool[np.ndarray, "symbols calendar"]
) -> tuple[Float64[np.ndarray, "symbols calendar"], Tensor]:
    """Weights that sum to 1 over the day's valid names, and [calendar, symbols, styles] percentiles among them."""
    close = pl.col("close")
    change = close / close.shift(1) - 1
    long = len(tables.calendar) > 252
    measures = frame.lazy().select(
        "day",
        size=_size(frame.columns).over("symbol"),
        volatility=pl.when(change.is_finite()).then(change).rolling_std(20, min_samples=10).over("symbol"),
        # A year's return without its last month, or a quarter's where there is no year.
        momentum=((close.shift(21) / close.shift(252)) if long else (close / close.shift(60))).over("symbol"),
        valid=pl.lit(pl.Series(valid.ravel())),
    )
    size = measures.select(pl.when(pl.col("valid")).then("size").fill_null(0)).collect().to_series().to_numpy()
    size = size.reshape(valid.shape)
    total = size.sum(0)
    weight = np.where(total > 0, size / np.where(total > 0, total, 1), valid / np.maximum(valid.sum(0), 1))
    percentiles = measures.select(
        (_percentile(pl.when(pl.col("valid")).then(pl.col(name))).over("day")).cast(pl.Float32).alias(name)
        for name in STYLES
    ).collect()
    style = np.stack([percentiles[name].to_numpy().reshape(valid.shape).T for name in STYLES], -1)
    return weight, torch.from_numpy(np.ascontiguousarray(style))


def _size(fields: Sequence[str]) -> pl.Expr:
    """Market value, else the mean of 20 days' traded money, else nothing."""
    if "cap" in fields:
        return pl.col("cap").forward_fill()
    if "amount" in fields:
        money = pl.col("amount")
    elif "volume" in fields:
        paid = pl.col("close") / pl.col("factor") if "factor" in fields else pl.col("close")
        money = pl.col("volume") * paid
    else:
        money = pl.lit(None, pl.Float64)
    return money.rolling_mean(20, min_samples=1)


def _percentile(x: pl.Expr) -> pl.Expr:
    """Rank from 0 to 1, 0.5 where unknown or alone."""
    place = (x.rank() - 1) / (x.count() - 1)
    return pl.when(place.is_finite()).then(place).otherwise(0.5)


def _benchmark(
    tables: StockTables, weight: Float64[np.ndarray, "symbols calendar"],
    next_return: Float64[np.ndarray, "symbols calendar"],
) -> Tensor:  # fmt: skip
    """The index's return close t+1 -> t+2; where it is unknown, the universe's by weight."""
    known = np.isfinite(next_return)
    held = np.where(known, weight, 0)
    total = held.sum(0)
    mean = np.where(total > 0, (held * np.where(known, next_return, 0)).sum(0) / np.where(total > 0, total, 1), np.nan)
    index = np.append(tables.market[2:], [np.nan, np.nan])
    return torch.from_numpy(np.where(np.isfinite(index), index, mean).astype(np.float32))
