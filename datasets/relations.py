"""Relations: pairs of tracklets in windows of video, what the two are and what one does to the other.

Every source becomes scenes (`relations_windows.Scene`): a clip's annotation and what was detected in each window. The
default is generated; VidVRD and VidOR annotations are read as the field distributes them.
"""

from functools import cached_property
from typing import Any, Literal

import polars as pl
import pytorch_lightning as lightning
import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from ..errors import UserError
from .batches import IndexBatches
from .cache import content_hash
from .relations_shapes import ShapesOptions
from .relations_sources import OPENERS, Source
from .relations_table import Clip, RelationSet, Triplet, as_set
from .relations_windows import STRIDE, WINDOW, Labelling, RelationBatch, Scene, Windows, build
from .sources import check_arguments

SourceName = Literal["moving_shapes", "vidvrd", "vidor"]
FeatureKind = Literal["visual", "geom", "pixels"]

__all__ = ["RelationBatch", "RelationsData"]


class RelationsData(lightning.LightningDataModule):
    """Pairs of tracklets as `RelationBatch`es: windows in random order for training, by clip and time otherwise.

    Args:
        source: `moving_shapes` is generated; `vidvrd` and `vidor` read annotation folders.
        files: arguments of the source: for `moving_shapes` `train`, `valid`, `test` (clips), `frames`, `domains`,
            `test_domains` (seen, withheld), `noise`, `world`; for folders `train`, `test`, `objects`, `predicates` and,
            if wanted, `valid` and `tracks`.
        features: what a tracklet looks like: `visual` (an appearance vector), `geom` (class posterior and motion, all
            that annotations alone allow) or `pixels` (colours of the crop in rendered frames).
        positive, negative: overlap above which a tracklet shows an annotated object, below which it shows none.
        pairs_per_window: pairs of a training window and step, drawn at random.
        add_truth: annotated tracks join the tracklets of training windows; never those of validation and test.
        batch_size: training windows a step.
        eval_batch_size: windows a batch of validation, test and prediction.

    Raises:
        UserError: a file is missing or wrong; nothing has been written by then.
    """

    def __init__(
        self,
        source: SourceName = "moving_shapes",
        files: dict[str, Any] | None = None,
        features: FeatureKind = "visual",
        positive: float = 0.6,
        negative: float = 0.3,
        pairs_per_window: int = 64,
        add_truth: bool = True,
        batch_size: int = 32,
        eval_batch_size: int = 256,
    ) -> None:
        super().__init__()
        self.source, self.files, self.features = source, files or {}, features
        self.positive, self.negative, self.add_truth = positive, negative, add_truth
        self.pairs_per_window, self.batch_size, self.eval_batch_size = pairs_per_window, batch_size, eval_batch_size
        if not 0 < negative <= positive < 1:
            raise UserError(
                f"data.negative={negative}, data.positive={positive}: expected 0 < negative <= positive < 1"
            )
        for name in ("pairs_per_window", "batch_size", "eval_batch_size"):
            if getattr(self, name) < 1:
                raise UserError(f"data.{name}={getattr(self, name)}: expected at least 1")
        self._scenes: dict[str, list[Scene]] = {}
        self._windows: dict[str, Windows] = {}

    @cached_property
    def opened(self) -> Source:
        """The source's vocabularies and files; no annotation has been read."""
        return open_source(self.source, self.files, self.features)

    @cached_property
    def schema(self) -> dict[str, Any]:
        """What a model or task is built with (JSON-able): dataset, fingerprint, features, num_features, objects and
        predicates (names; background is the class after the last object), window and stride (frames)."""
        words = self.files if self.source == "moving_shapes" else {}  # the others take paths, whose content counts
        return {
            "dataset": self.opened.name,
            "fingerprint": content_hash(self.opened.content, [self.opened.name, words]),
            "features": self.features,
            "num_features": self.opened.num_features,
            "objects": list(self.opened.objects),
            "predicates": list(self.opened.predicates),
            "window": WINDOW,
            "stride": STRIDE,
        }

    def scenes(self, split: str) -> list[Scene]:
        """Clips and detections of a split, read once."""
        if split not in self._scenes:
            self._scenes[split] = self.opened.read(split)
        return self._scenes[split]

    def clips(self, split: str) -> list[Clip]:
        """Annotations of a split; `windows(split).clip` indexes them."""
        return [scene.clip for scene in self.scenes(split)]

    def truth(self, split: str) -> RelationSet:
        """What an evaluator compares predictions with."""
        return as_set(self.clips(split))

    @property
    def train_triplets(self) -> set[Triplet]:
        """Triplets of the training clips: all others are zero-shot."""
        return {triplet for clip in self.clips("train") for triplet in clip.triplets}

    def windows(self, split: str) -> Windows:
        """Tracklets, pairs and labels of a split, built once."""
        if split not in self._windows:
            labelling = Labelling(
                self.positive, self.negative, self.opened.frames, self.add_truth and self.opened.add_truth
            )
            vocabulary = self.opened.objects, self.opened.predicates
            scenes = self.scenes(split)
            built = build(scenes, *vocabulary, labelling, split == "train", self.opened.num_features)
            if not len(built.subject):
                what = "a labelled pair of tracks" if split == "train" else "a pair of tracks"
                raise UserError(
                    f"{self.opened.name}: no window of {WINDOW} frames in the {len(scenes)} videos of {split} holds "
                    f"{what}; expected longer videos with two objects or more"
                )
            self._windows[split] = built
        return self._windows[split]

    def setup(self, stage: str) -> None:
        """Build what the stage needs and bring it to the trainer's device, where batches are gathered."""
        device = torch.device("cpu") if self.trainer is None else self.trainer.strategy.root_device
        for split in {"fit": ("train", "valid"), "validate": ("valid",)}.get(stage, ("test",)):
            self._windows[split] = self.windows(split).to(device)

    def train_dataloader(self) -> DataLoader[Any]:
        """Some pairs of windows in random order, others each epoch."""
        return self._loader("train", self.batch_size, self.pairs_per_window)

    def val_dataloader(self) -> DataLoader[Any]:
        return self._loader("valid", self.eval_batch_size)

    def test_dataloader(self) -> DataLoader[Any]:
        return self._loader("test", self.eval_batch_size)

    def predict_dataloader(self) -> DataLoader[Any]:
        return self._loader("test", self.eval_batch_size)

    def _loader(self, split: str, batch_size: int, pairs: int | None = None) -> DataLoader[Any]:
        data = PairsOfWindows(self.windows(split), pairs)
        sampler: Sampler[list[int]] = IndexBatches(len(data), batch_size, shuffle=pairs is not None)
        return DataLoader(data, sampler=sampler, batch_size=None)

    def decode(self, predictions: pl.DataFrame) -> pl.DataFrame:
        """Predictions by `clip` (index) with the video's name in its stead."""
        names = [clip.name for clip in self.clips("test")]
        return predictions.select(
            pl.col("clip").replace_strict(list(range(len(names))), names, return_dtype=pl.String).alias("video"),
            pl.exclude("clip"),
        )


class PairsOfWindows(Dataset[RelationBatch]):
    """Builds whole batches from windows: all their pairs, or `most` of each, drawn with torch's random numbers."""

    def __init__(self, windows: Windows, most: int | None = None) -> None:
        self.windows, self.most = windows, most
        start, count = windows.start.cpu(), windows.count.cpu()
        self.busy = count.nonzero().squeeze(1)
        self.start, self.count = start[self.busy], count[self.busy]

    def __len__(self) -> int:
        return len(self.busy)

    def __getitem__(self, index: list[int]) -> RelationBatch:
        chosen = torch.tensor(index)
        start, count = self.start[chosen], self.count[chosen]
        # On the host, where the number of pairs is known without waiting for the device.
        rows = torch.repeat_interleave(start - count.cumsum(0) + count, count) + torch.arange(int(count.sum()))
        if self.most is not None and int(count.max()) > self.most:
            rows = rows[some_of_each(count, self.most, torch.rand(len(rows)))]
        return self.windows.batch(rows)


def some_of_each(count: Int[Tensor, " groups"], most: int, lot: Float[Tensor, " members"]) -> Int[Tensor, " chosen"]:
    """Positions of the `most` members of each group that drew the lowest lots, in order."""
    group = torch.repeat_interleave(torch.arange(len(count)), count)
    order = (group + lot.clamp(max=0.999)).argsort()
    rank = torch.arange(len(lot)) - (count.cumsum(0) - count)[group]
    return order[rank < most].sort().values


def open_source(source: str, files: dict[str, Any], features: str) -> Source:
    """A named source; `files` are its arguments."""
    files = check_arguments(source, {**OPENERS, "moving_shapes": ShapesOptions}, files, hidden=["features"])
    return OPENERS[source](features=features, **files)
