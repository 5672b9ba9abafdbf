"""Stock data: days of names with their windows of features, and the return that follows.

Day t is the day after whose close a score is given; the name is bought at the close of t+1, so the label is the
return from close t+1 to close t+1+horizon. The universe is that of day t.
"""

import logging
from collections.abc import Callable, Mapping, Sequence
from datetime import date
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import polars as pl
import pytorch_lightning as lightning
import torch
from torch.utils.data import DataLoader, Dataset

from ..errors import UserError
from . import stocks_planted
from .batches import IndexBatches
from .cache import cache_file, content_hash
from .sources import check_arguments
from .stocks_build import STYLES, build_panel
from .stocks_cache import load_panel, save_panel
from .stocks_features import feature_expressions
from .stocks_formats import Source, open_long, open_wide
from .stocks_panel import StockBatch, StockPanel
from .stocks_qlib import open_qlib
from .stocks_sp500 import open_sp500
from .stocks_splits import split_days
from .stocks_tables import Judge

_LOG = logging.getLogger(__name__)
_OPENERS: dict[str, Callable[..., Source]] = {
    "sp500": open_sp500,
    "long": open_long,
    "qlib": open_qlib,
    "wide": open_wide,
}

__all__ = ["StockBatch", "StockPanel", "StocksData"]


class StocksData(lightning.LightningDataModule):
    """Days of a split as `StockBatch`es: shuffled for training, in order for validation, test and prediction.

    Args:
        source: `sp500` (extra `stocks`), `planted`, or your own files: `long`, `qlib`, `wide`.
        files: arguments of the source's reader, e.g. `prices`, `membership` for `long`.
        features: `light` (from close and volume alone where only these exist) or `alpha158`.
        normalise: `robust` (median and MAD of the train days), or `rank`, `zscore` among the names of each day.
        lookback: days of a window, the last one being day t.
        horizon: days the label spans.
        splits: name -> [first day, last day], both included; default: the source's own, else 60/20/20 % of the days.
            The last horizon + 1 days of train and valid are left out (purge): their labels reach into what follows.
        clip_return: bound of |label| and |next_return|; default: 0.5 for sp500, none for your own files.
        bad_rows: what to do with impossible rows (prices <= 0, high < low): `raise`, or `drop` and say how many.
        days_per_year: for annualised numbers; default: 252.
        days_per_batch: train days a step.
        eval_days_per_batch: days a batch of validation, test and prediction.
        cache: keep the finished panel under MOEZOO_CACHE.

    After `setup`: `calendar`, `symbols`, `sectors`, `panel`.

    Raises:
        UserError: a file is missing or wrong; nothing has been written by then.
    """

    def __init__(
        self,
        source: Literal["sp500", "planted", "long", "qlib", "wide"] = "sp500",
        files: dict[str, Any] | None = None,
        features: Literal["light", "alpha158"] = "light",
        normalise: Literal["robust", "rank", "zscore"] = "robust",
        lookback: int = 8,
        horizon: int = 5,
        splits: dict[str, list[str]] | None = None,
        clip_return: float | None = None,
        bad_rows: Literal["raise", "drop"] = "raise",
        days_per_year: int = 252,
        days_per_batch: int = 8,
        eval_days_per_batch: int = 32,
        cache: bool = True,
    ) -> None:
        super().__init__()
        self.source, self.files = source, files or {}
        self.feature_set, self.normalise = features, normalise
        self.lookback, self.horizon = lookback, horizon
        self.splits, self.clip_return, self.bad_rows = splits, clip_return, bad_rows
        self.days_per_year, self.cache = days_per_year, cache
        self.days_per_batch, self.eval_days_per_batch = days_per_batch, eval_days_per_batch
        least = {"lookback": lookback, "horizon": horizon, "days_per_batch": days_per_batch}
        least |= {"eval_days_per_batch": eval_days_per_batch, "days_per_year": days_per_year}
        for name, value in least.items():
            if value < 1:
                raise UserError(f"data.{name}={value}: expected at least 1")
        if clip_return is not None and clip_return <= 0:
            raise UserError(f"data.clip_return={clip_return}: expected more than 0, or null")
        if source == "planted" and horizon != 1:
            raise UserError(f"data.horizon={horizon}: the planted market has one-day labels; set data.horizon=1")
        if source == "planted":
            readers: dict[str, Callable[..., Any]] = {"planted": stocks_planted.planted_panel, **_OPENERS}
            self.files = check_arguments("planted", readers, self.files, hidden=["lookback"])

    @cached_property
    def opened(self) -> Source:
        """The source's files and headers; no row is read."""
        return open_source(self.source, self.files)

    @cached_property
    def fingerprint(self) -> str:
        """Of the bytes the data is made of and of how they are read."""
        if self.source == "planted":
            return content_hash([Path(stocks_planted.__file__)], [self.lookback, self.files])
        words = {name: value for name, value in self.files.items() if not Path(str(value)).exists()}
        return content_hash(self.opened.content, [self.source, words, self.bad_rows])

    @cached_property
    def schema(self) -> dict[str, Any]:
        """What a model or task is built with (JSON-able): dataset, fingerprint, num_features, features, lookback,
        horizon, styles, days_per_year. Computes no feature."""
        names: Sequence[str] = stocks_planted.FEATURES
        styles: Sequence[str] = stocks_planted.STYLES
        if self.source != "planted":
            fields = {*self.opened.fields, *(("volume",) if "amount" in self.opened.fields else ())}
            names, styles = list(feature_expressions(self.feature_set, fields)), STYLES
        return {
            "dataset": "planted" if self.source == "planted" else self.opened.name,
            "fingerprint": self.fingerprint,
            "num_features": len(names),
            "features": list(names),
            "lookback": self.lookback,
            "horizon": self.horizon,
            "styles": list(styles),
            "days_per_year": self.days_per_year,
        }

    @cached_property
    def panel(self) -> StockPanel:
        """Read, checked and built once; from the cache where an earlier run has left it."""
        if self.source == "planted":
            return stocks_planted.planted_panel(self.lookback, **self.files)
        file = cache_file("stocks", self.fingerprint, self._recipe())
        panel = load_panel(file) if self.cache else None
        if panel is None:
            tables = self.opened.read(Judge(self.bad_rows))
            days = self._split_days(tables.calendar)
            panel = build_panel(
                tables, self.feature_set, self.normalise, self.lookback, self.horizon, days["train"], self._clip()
            )
            if self.cache:
                save_panel(panel, file)
        for note in panel.notes:
            _LOG.warning(note)
        return panel

    @property
    def calendar(self) -> list[date]:
        return list(self.panel.calendar)

    @property
    def symbols(self) -> list[str]:
        return list(self.panel.symbols)

    @property
    def sectors(self) -> dict[str, str]:
        """Symbol -> sector; empty where the source has none."""
        return self.panel.sectors

    @cached_property
    def days(self) -> dict[str, list[int]]:
        """Indices of the days of train, valid, test and predict that have names to score; the first two purged."""
        listed = self.panel.valid.any(1).cpu().tolist()
        days = {name: [i for i in some if listed[i]] for name, some in self._split_days(self.panel.calendar).items()}
        for name, some in days.items():
            if not some:
                raise UserError(
                    f"{self.schema['dataset']}: no day of split '{name}' has a member with a window of "
                    f"{self.lookback} days; move data.splits.{name} or shorten data.lookback"
                )
        return days

    def _split_days(self, calendar: Sequence[date]) -> dict[str, list[int]]:
        if self.source == "planted":
            return stocks_planted.split_days(self.lookback, self.horizon)
        splits = self.splits or self.opened.splits
        return split_days(calendar, splits, self.lookback, self.horizon, self.opened.name)

    def _clip(self) -> float | None:
        return self.opened.clip_return if self.clip_return is None else self.clip_return

    def _recipe(self) -> list[Any]:
        """What else than the data decides about the panel."""
        splits = self.splits or self.opened.splits
        return [self.feature_set, self.normalise, self.lookback, self.horizon, splits, self._clip()]

    def setup(self, stage: str) -> None:
        """Build the panel and bring it to the trainer's device, where windows are gathered."""
        device = torch.device("cpu") if self.trainer is None else self.trainer.strategy.root_device
        self.__dict__["panel"] = self.panel.to(device)  # the cached property's value
        _ = self.days

    def train_dataloader(self) -> DataLoader[Any]:
        """Days in random order."""
        return self._loader("train", self.days_per_batch, shuffle=True)

    def val_dataloader(self) -> DataLoader[Any]:
        return self._loader("valid", self.eval_days_per_batch)

    def test_dataloader(self) -> DataLoader[Any]:
        return self._loader("test", self.eval_days_per_batch)

    def predict_dataloader(self) -> DataLoader[Any]:
        """The test days and all later ones, also those whose label is not known yet."""
        return self._loader("predict", self.eval_days_per_batch)

    def _loader(self, split: str, days_per_batch: int, shuffle: bool = False) -> DataLoader[Any]:
        days = Days(self.panel, self.days[split], self.lookback)
        return DataLoader(days, sampler=IndexBatches(len(days), days_per_batch, shuffle=shuffle), batch_size=None)

    def decode(self, predictions: pl.DataFrame) -> pl.DataFrame:
        """Predictions by (day, symbol) index with the date and the symbol's name in their place."""
        names = pl.Series(self.symbols)
        dates = pl.Series(self.calendar)
        return predictions.with_columns(
            date=dates.gather(predictions["day"]), symbol=names.gather(predictions["symbol"])
        ).select("date", "symbol", pl.exclude("date", "symbol", "day"))


class Days(Dataset[StockBatch]):
    """Builds whole batches from positions in a list of days, all padded to the fullest of them."""

    def __init__(self, panel: StockPanel, days: list[int], lookback: int) -> None:
        self.panel, self.days, self.lookback = panel, days, lookback
        # Known once, so that no batch waits for the device, and every batch has the same shape.
        self.names = int(panel.valid[days].sum(1).max())

    def __len__(self) -> int:
        return len(self.days)

    def __getitem__(self, index: list[int]) -> StockBatch:
        return self.panel.batch([self.days[i] for i in index], self.lookback, self.names)


def open_source(source: str, files: Mapping[str, Any]) -> Source:
    """A named source; `files` are its reader's arguments."""
    none = "none: its files come with the extra 'stocks'"
    return _OPENERS[source](**check_arguments(source, _OPENERS, files, none=none))
