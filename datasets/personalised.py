"""Personalised classifiers: images of a large public, and of a few users whose images look different.

An epoch is of one of two kinds. At first the generic expert learns from the public. Then users' experts and gates
learn: from each user's few images, mixed with the public's that any user might meet.
"""

from collections.abc import Callable
from functools import cached_property
from typing import Any, Literal, NamedTuple

import polars as pl
import pytorch_lightning as lightning
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from ..errors import UserError
from .batches import IndexBatches
from .personalised_users import User, Users, open_fashion_styles, open_mnist_writers
from .robustness import channel_statistics
from .robustness_augment import random_bits
from .sources import check_arguments


class PersonalBatch(NamedTuple):
    """Images in [0, 1] and who looks at them.

    Attributes:
        user: whose experts serve the image; None while the generic expert is trained.
        own: whether the image is one of that user's, not the public's.
        place: of the image among all of the source's.
    """

    image: Float[Tensor, "batch channels height width"]
    label: Int[Tensor, " batch"]
    user: Int[Tensor, " batch"] | None
    own: Bool[Tensor, " batch"]
    place: Int[Tensor, " batch"]


class PersonalisedData(lightning.LightningDataModule):
    """Images as `PersonalBatch`es. The trainer must reload loaders every epoch (`reload_dataloaders_every_n_epochs`).

    In evaluation every user's held-back images are served by that user's experts, and the public's images by all
    users' in turn.

    Args:
        source: `fashion_styles`, the shipped cut of Fashion-MNIST with users who see it in a style of their own; or
            `mnist_writers`, MNIST of your own with the writers' table.
        files: arguments of the source's reader.
        generic_epochs: epochs in which the generic expert is trained.
        rehearsal: share of the public's images in what users' experts are trained on.
        repeats: times that a user's images are seen in an epoch.
        batch_size: images a step of the generic expert.
        user_batch_size: images a step of users' experts.
        eval_batch_size: images a batch of validation, test and prediction.

    Raises:
        UserError: a file is missing or wrong; nothing has been written by then.
    """

    def __init__(
        self,
        source: Literal["fashion_styles", "mnist_writers"] = "fashion_styles",
        files: dict[str, Any] | None = None,
        generic_epochs: int = 4,
        rehearsal: float = 0.5,
        repeats: int = 16,
        batch_size: int = 64,
        user_batch_size: int = 320,
        eval_batch_size: int = 1000,
    ) -> None:
        super().__init__()
        self.source, self.files = source, files or {}
        self.generic_epochs, self.rehearsal, self.repeats = generic_epochs, rehearsal, repeats
        self.batch_size, self.user_batch_size, self.eval_batch_size = batch_size, user_batch_size, eval_batch_size
        if not 0 <= rehearsal < 1:
            raise UserError(f"data.rehearsal={rehearsal}: expected a share of at least 0, below 1")
        positive = {"generic_epochs": generic_epochs, "repeats": repeats, "batch_size": batch_size}
        positive |= {"user_batch_size": user_batch_size, "eval_batch_size": eval_batch_size}
        for name, value in positive.items():
            if value < 1:
                raise UserError(f"data.{name}={value}: expected at least 1")

    @cached_property
    def opened(self) -> Users:
        """All images, read and checked once."""
        openers: dict[str, Callable[..., Users]] = {
            "fashion_styles": open_fashion_styles,
            "mnist_writers": open_mnist_writers,
        }
        return openers[self.source](**check_arguments(self.source, openers, self.files))

    @cached_property
    def schema(self) -> dict[str, Any]:
        """What a model or task is built with (JSON-able): dataset, fingerprint, channels, image_size (pixels),
        num_classes, class_names, users (names), and mean and std of the public's train images."""
        opened = self.opened
        mean, std = channel_statistics(opened.image[opened.generic["train"]])
        return {
            "dataset": opened.name,
            "fingerprint": opened.fingerprint(),
            "channels": opened.image.shape[1],
            "image_size": opened.image.shape[2],
            "num_classes": len(opened.classes),
            "class_names": list(opened.classes),
            "users": [user.name for user in (*opened.valid, *opened.test)],
            "mean": mean,
            "std": std,
        }

    def setup(self, stage: str) -> None:
        """Bring the images to the trainer's device, where batches are gathered."""
        device = torch.device("cpu") if self.trainer is None else self.trainer.strategy.root_device
        self.image, self.label = self.opened.image.to(device), self.opened.label.to(device)

    def train_dataloader(self) -> DataLoader[Any]:
        """The public's images for the first epochs, then those of all users and the public's in between."""
        trainer = self.trainer
        epoch = 0 if trainer is None else trainer.current_epoch
        if trainer is not None and getattr(trainer, "reload_dataloaders_every_n_epochs", 0) != 1:
            raise UserError("trainer.reload_dataloaders_every_n_epochs: expected 1, as epochs differ from each other")
        if epoch < self.generic_epochs:
            return self._loader(GenericBatches(self, "train"), self.batch_size, shuffle=True)
        size = max(1, round(self.user_batch_size * (1 - self.rehearsal)))
        return self._loader(UserBatches(self, epoch), size, shuffle=True)

    def val_dataloader(self) -> DataLoader[Any]:
        return self._loader(HeldBatches(self, "valid"), self.eval_batch_size)

    def test_dataloader(self) -> DataLoader[Any]:
        return self._loader(HeldBatches(self, "test"), self.eval_batch_size)

    def predict_dataloader(self) -> DataLoader[Any]:
        return self._loader(HeldBatches(self, "test"), self.eval_batch_size)

    def _loader(self, data: Any, batch_size: int, shuffle: bool = False) -> DataLoader[Any]:
        return DataLoader(data, sampler=IndexBatches(len(data), batch_size, shuffle=shuffle), batch_size=None)

    def batch(self, place: Tensor, user: Tensor | None, own: Tensor) -> PersonalBatch:
        """The images at these places."""
        return PersonalBatch(self.image[place].float() / 255, self.label[place], user, own, place)

    def users_of(self, split: str) -> tuple[User, ...]:
        """Those that tune (`valid`) or report (`test`)."""
        return self.opened.valid if split == "valid" else self.opened.test

    def decode(self, predictions: pl.DataFrame) -> pl.DataFrame:
        """Predictions with names in place of numbers."""
        names = {"user": self.schema["users"], **dict.fromkeys(("label", "prediction", "generic"), self.opened.classes)}
        found = [name for name in names if name in predictions.columns]
        return predictions.with_columns(pl.Series(names[name]).gather(predictions[name]).alias(name) for name in found)


class GenericBatches(Dataset[PersonalBatch]):
    """The public's images of a split."""

    def __init__(self, data: PersonalisedData, split: str) -> None:
        self.data, self.place = data, data.opened.generic[split].to(data.label.device)

    def __len__(self) -> int:
        return len(self.place)

    def __getitem__(self, index: list[int]) -> PersonalBatch:
        place = self.place[torch.tensor(index, device=self.place.device)]
        return self.data.batch(place, None, torch.zeros_like(place, dtype=torch.bool))


class UserBatches(Dataset[PersonalBatch]):
    """Images of all users, and for each a share of the public's, drawn by the epoch and given to users at random."""

    def __init__(self, data: PersonalisedData, epoch: int) -> None:
        users = [*data.opened.valid, *data.opened.test]
        device = data.label.device
        self.data, self.epoch, self.users = data, epoch, len(users)
        self.place = torch.cat([user.learn for user in users]).to(device)
        self.user = torch.cat([torch.full_like(user.learn, k) for k, user in enumerate(users)]).to(device)
        self.generic = data.opened.generic["train"].to(device)

    def __len__(self) -> int:
        return len(self.place) * self.data.repeats

    def __getitem__(self, index: list[int]) -> PersonalBatch:
        row = torch.tensor(index, device=self.place.device)
        extra = round(len(index) * self.data.rehearsal / (1 - self.data.rehearsal))
        key = row.repeat(1 + extra // len(index))[:extra] + len(self) * torch.arange(extra, device=row.device)
        seed = torch.initial_seed()
        drawn, host = (random_bits(key, self.epoch, 2 * seed + k) for k in range(2))
        own = row % len(self.place)
        place = torch.cat([self.place[own], self.generic[drawn % len(self.generic)]])
        user = torch.cat([self.user[own], host % self.users])
        return self.data.batch(place, user, torch.arange(len(place), device=row.device) < len(index))


class HeldBatches(Dataset[PersonalBatch]):
    """What a split's users hold back, then the public's images of that split, served by one user after the other."""

    def __init__(self, data: PersonalisedData, split: str) -> None:
        users, generic = data.users_of(split), data.opened.generic[split]
        first = 0 if split == "valid" else len(data.opened.valid)
        own = torch.cat([user.held for user in users])
        whose = torch.cat([torch.full_like(user.held, first + k) for k, user in enumerate(users)])
        device = data.label.device
        self.data, self.count = data, len(own)
        self.place = torch.cat([own, generic]).to(device)
        self.user = torch.cat([whose, first + torch.arange(len(generic)) % len(users)]).to(device)

    def __len__(self) -> int:
        return len(self.place)

    def __getitem__(self, index: list[int]) -> PersonalBatch:
        row = torch.tensor(index, device=self.place.device)
        return self.data.batch(self.place[row], self.user[row], row < self.count)
