"""Trajectories: the past seconds of a vehicle and its neighbours, where it drives next and whether it changes lanes.

Every source becomes one table in SI units (`trajectories_table`), is decimated by frame number, labelled from the
lanes that follow, split by vehicle and time, and cut into windows.
"""

from collections.abc import Callable, Mapping
from dataclasses import asdict
from functools import cached_property
from typing import Any, Literal

import polars as pl
import pytorch_lightning as lightning
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from ..errors import UserError
from .batches import IndexBatches
from .cache import cache_file, content_hash
from .sources import check_arguments
from .trajectories_build import Built, Cut, build
from .trajectories_cache import load_built, save_built
from .trajectories_commonroad import open_commonroad
from .trajectories_features import FEATURES
from .trajectories_formats import open_argoverse, open_fcd, open_table
from .trajectories_recorded import open_citysim, open_highd, open_ngsim
from .trajectories_simulated import open_numpy_weave, open_sumo_weave
from .trajectories_table import Source
from .trajectories_windows import Tracks, TrajectoryBatch

_MOST_FRAMES = 10.0  # frames a second that are kept unless more are asked for

SourceName = Literal[
    "sumo_weave", "numpy_weave", "ngsim", "highd", "citysim", "commonroad", "argoverse", "sumo_fcd", "table"
]

__all__ = ["TrajectoriesData", "TrajectoryBatch"]


class TrajectoriesData(lightning.LightningDataModule):
    """Windows of a split as `TrajectoryBatch`es: shuffled for training, by track and time otherwise.

    Args:
        source: the simulated weaving section, by SUMO (`sumo_weave`, extra `trajectories`; where libsumo is absent the
            next) or IDM and MOBIL (`numpy_weave`); or your own files: `ngsim`, `highd` (also exiD, inD, rounD),
            `citysim`, `commonroad`, `argoverse`, `sumo_fcd`, `table` (our own columns).
        files: arguments of the source's reader, e.g. `path`; for simulations `train`, `valid`, `test` (seeds) and
            `seconds`.
        history: seconds of past; a window has history * frame_rate + 1 frames.
        horizon: seconds of future.
        frame_rate: of the windows, Hz; the source's divided by a whole number. Default: the most that is <= 10.
        stride: seconds between windows of a track; train windows may stand closer with `train_stride`.
        train_stride: the same for the train windows; default: `stride`.
        label: `crossing` looks for the first lane crossing in the next `label_horizon` seconds; `cslstm` compares
            lanes 4 s ahead and back, for comparison with CS-LSTM.
        label_horizon: seconds; default: the shorter of `horizon` and 3.
        debounce: seconds within which a crossing that is undone does not count.
        ignore_band: windows so many seconds after a crossing are left out.
        partial_future: take windows whose track ends within the horizon; what is missing is NaN.
        split: `time` cuts each recording by vehicles in order of appearance and leaves out windows that overlap a
            later split in time; `vehicle` cuts by id alone (the NGSIM convention); `recording` by whole recordings;
            `fold` by id % folds. Default: the source's. Simulations split by seed.
        shares: of vehicles that train, validate and test.
        fold, folds: which of how many, for `split: fold`. Default: the run's seed modulo folds, so that the seeds 0, 1,
            2, ... of a leaderboard row are the folds.
        gaps: a frame missing inside a track: `raise`, or `split` the track there.
        unsorted: frames of a vehicle not in order: `raise`, or `sort` them.
        batch_size: train windows a step.
        eval_batch_size: windows a batch of validation, test and prediction.
        cache: keep the finished windows under MOEZOO_CACHE.

    Raises:
        UserError: a file is missing or wrong; nothing has been written by then.
    """

    def __init__(
        self,
        source: SourceName = "sumo_weave",
        files: dict[str, Any] | None = None,
        history: float = 3.0,
        horizon: float = 3.0,
        frame_rate: float | None = None,
        stride: float = 0.5,
        train_stride: float | None = None,
        label: Literal["crossing", "cslstm"] = "crossing",
        label_horizon: float | None = None,
        debounce: float = 1.0,
        ignore_band: float = 0.0,
        partial_future: bool = False,
        split: Literal["time", "vehicle", "recording", "fold"] | None = None,
        shares: tuple[float, float, float] = (0.7, 0.1, 0.2),
        fold: int | None = None,
        folds: int = 5,
        gaps: Literal["raise", "split"] = "raise",
        unsorted: Literal["raise", "sort"] = "raise",
        batch_size: int = 256,
        eval_batch_size: int = 1024,
        cache: bool = True,
    ) -> None:
        super().__init__()
        self.source, self.files = source, files or {}
        self.history, self.horizon, self.wanted_rate = history, horizon, frame_rate
        self.stride, self.train_stride = stride, train_stride or stride
        self.label, self.debounce, self.ignore_band = label, debounce, ignore_band
        self.label_horizon = min(horizon, 3.0) if label_horizon is None else label_horizon
        self.partial_future, self.split, self.shares = partial_future, split, tuple(shares)
        self.fold, self.folds = torch.initial_seed() % max(folds, 1) if fold is None else fold, folds
        self.gaps, self.unsorted = gaps, unsorted
        self.batch_size, self.eval_batch_size, self.cache = batch_size, eval_batch_size, cache
        positive = {"history": history, "horizon": horizon, "stride": stride, "label_horizon": self.label_horizon}
        for name, value in (positive | {"batch_size": batch_size, "eval_batch_size": eval_batch_size}).items():
            if not value > 0:
                raise UserError(f"data.{name}={value}: expected more than 0")
        if debounce < 0 or ignore_band < 0:
            raise UserError(f"data.debounce={debounce}, data.ignore_band={ignore_band}: expected 0 s or more")
        if len(self.shares) != 3 or min(self.shares) <= 0 or abs(sum(self.shares) - 1) > 1e-6:
            raise UserError(f"data.shares={list(self.shares)}: expected three shares > 0 that sum to 1")
        if folds < 3 or not 0 <= self.fold < folds:
            raise UserError(f"data.fold={fold} of data.folds={folds}: expected at least 3 folds and 0 <= fold < folds")

    @cached_property
    def opened(self) -> Source:
        """The source's files, looked at as far as the frame rate needs."""
        return open_source(self.source, self.files)

    @cached_property
    def every(self) -> int:
        """Frames of the source for each of ours."""
        native = self.opened.frame_rate
        wanted = self.wanted_rate
        if wanted is None:
            return next(k for k in range(1, 10_000) if native / k <= _MOST_FRAMES + 1e-9)
        every = round(native / wanted) if wanted > 0 else 0
        if every < 1 or abs(native / every - wanted) > 1e-6 * native:
            some = ", ".join(f"{native / k:g}" for k in (1, 2, 3, 5))
            raise UserError(
                f"data.frame_rate={wanted:g}: {self.opened.name} has {native:g} Hz and frames are taken whole; "
                f"expected it divided by a whole number, e.g. {some}"
            )
        return every

    @property
    def rate(self) -> float:
        """Frames of a window each second."""
        return self.opened.frame_rate / self.every

    @cached_property
    def schema(self) -> dict[str, Any]:
        """What a model or task is built with (JSON-able): dataset, fingerprint, num_features, features, history and
        horizon (frames), frame_rate (Hz), label, label_horizon (s), lane_width (m or None). Reads no row."""
        words = {name: value for name, value in self.files.items() if "path" not in name}
        return {
            "dataset": self.opened.name,
            "fingerprint": content_hash(self.opened.content, [self.opened.name, words]),
            "num_features": len(FEATURES),
            "features": list(FEATURES),
            "history": self._frames(self.history) + 1,
            "horizon": self._frames(self.horizon),
            "frame_rate": self.rate,
            "label": self.label,
            "label_horizon": self.label_horizon,
            "lane_width": self.opened.lane_width,
        }

    @cached_property
    def built(self) -> Built:
        """Read, checked, labelled and cut into windows once; from the cache where an earlier run has left it."""
        cut = Cut(
            every=self.every,
            history=self.schema["history"],
            horizon=self.schema["horizon"],
            stride=self._frames(self.stride),
            train_stride=self._frames(self.train_stride),
            label=self.label,
            label_horizon=self._frames(self.label_horizon),
            debounce=round(self.debounce * self.rate),
            ignore_band=round(self.ignore_band * self.rate),
            partial=self.partial_future,
            split=self.split or self.opened.split,
            shares=self.shares,
            fold=self.fold if (self.split or self.opened.split) == "fold" else 0,  # else no part of the cache's key
            folds=self.folds,
            gaps=self.gaps,
            unsorted=self.unsorted,
        )
        file = cache_file("trajectories", self.schema["fingerprint"], asdict(cut))
        built = load_built(file) if self.cache else None
        if built is None:
            built = build(self.opened, cut)
            if self.cache:
                save_built(built, file)
        return built

    @property
    def rows(self) -> Mapping[str, Tensor]:
        """Of each split the current frames of its windows, as rows of `tracks`."""
        return self.built.rows

    @property
    def tracks(self) -> Tracks:
        return self.built.tracks

    @property
    def class_balance(self) -> dict[str, dict[str, int]]:
        """Windows of each split that keep, go left, go right or are unknown."""
        return self.built.class_balance

    def _frames(self, seconds: float) -> int:
        frames = round(seconds * self.rate)
        if frames < 1 or abs(frames - seconds * self.rate) > 0.01:
            raise UserError(
                f"{seconds:g} s are {seconds * self.rate:g} frames at {self.rate:g} Hz; expected whole frames: choose "
                f"data.history, horizon, stride and label_horizon as multiples of {1 / self.rate:g} s"
            )
        return frames

    def setup(self, stage: str) -> None:
        """Build the windows and bring the tracks to the trainer's device, where batches are gathered."""
        device = torch.device("cpu") if self.trainer is None else self.trainer.strategy.root_device
        self.built.to(device)

    def train_dataloader(self) -> DataLoader[Any]:
        """Windows in random order."""
        return self._loader("train", self.batch_size, shuffle=True)

    def val_dataloader(self) -> DataLoader[Any]:
        return self._loader("valid", self.eval_batch_size)

    def test_dataloader(self) -> DataLoader[Any]:
        return self._loader("test", self.eval_batch_size)

    def predict_dataloader(self) -> DataLoader[Any]:
        return self._loader("test", self.eval_batch_size)

    def _loader(self, split: str, batch_size: int, shuffle: bool = False) -> DataLoader[Any]:
        data = Windows(self.tracks, self.rows[split], self.schema["history"], self.schema["horizon"])
        return DataLoader(data, sampler=IndexBatches(len(data), batch_size, shuffle=shuffle), batch_size=None)

    def decode(self, predictions: pl.DataFrame) -> pl.DataFrame:
        """Predictions by (track, frame) with recording, vehicle, the source's frame number, seconds and the place
        (x, y in the source's road frame, m) in their stead."""
        places = self.built.places
        keys: Any = {name: places.schema[name] for name in ("track", "frame")}
        found = predictions.cast(keys).join(places, on=["track", "frame"], how="left", maintain_order="left")
        found = found.with_columns(frame=pl.col("frame") * self.every, time=pl.col("frame") / self.rate)
        first = ["recording", "vehicle", "frame", "time", "x", "y"]
        return found.select(*first, pl.exclude(*first, "track"))


class Windows(Dataset[TrajectoryBatch]):
    """Builds whole batches from positions in a list of rows."""

    def __init__(self, tracks: Tracks, rows: Tensor, history: int, horizon: int) -> None:
        self.tracks, self.rows, self.history, self.horizon = tracks, rows, history, horizon

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: list[int]) -> TrajectoryBatch:
        rows = self.rows[torch.tensor(index, device=self.rows.device)]
        return self.tracks.batch(rows, self.history, self.horizon)


def open_source(source: str, files: Mapping[str, Any]) -> Source:
    """A named source; `files` are its reader's arguments."""
    openers: dict[str, Callable[..., Source]] = {
        "sumo_weave": open_sumo_weave,
        "numpy_weave": open_numpy_weave,
        "ngsim": open_ngsim,
        "highd": open_highd,
        "citysim": open_citysim,
        "commonroad": open_commonroad,
        "argoverse": open_argoverse,
        "sumo_fcd": open_fcd,
        "table": open_table,
    }
    return openers[source](**check_arguments(source, openers, files))
