"""GE/LE/GN: a generic expert, for each user a small local expert, and a gate that picks one of the two.

arXiv 1811.00056: the generic expert (GE) is a LeNet-5 that serves everybody; a local expert (LE) learns from a few
images of one user what the generic expert gets wrong; a gating network (GN) decides image by image. Every user has a
local expert and a gate of their own.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from ..errors import UserError
from .advmoe import RobustModel
from .core import FixedRouter, Gate, LinearExperts, MoE, Routing, StraightThroughRouter


class PersonalOutput(NamedTuple):
    """Class logits: those of the expert that was picked, of the generic expert, and of the user's local expert.

    Without a user there is no local expert. In evaluation the local expert serves only images that the gate gives
    it; for the others `local` repeats the generic logits.
    """

    logits: Float[Tensor, "batch classes"]
    generic: Float[Tensor, "batch classes"]
    local: Float[Tensor, "batch classes"] | None
    routing: dict[str, Routing]


class LeNet(nn.Module):
    """LeNet-5 (LeCun et al. 1998) with ReLU and max-pooling: 61,706 parameters for 28x28 grey pixels, ten classes.

    Args:
        channels, image_size, num_classes: of the data.
        widths: of the two convolutions.
        hidden: of the two linear layers before the last.

    Raises:
        UserError: images too small for two 5x5 convolutions.
    """

    def __init__(
        self,
        channels: int,
        image_size: int,
        num_classes: int,
        widths: Sequence[int] = (6, 16),
        hidden: Sequence[int] = (120, 84),
    ) -> None:
        super().__init__()
        check_sizes(image_size, widths, hidden)
        first, second = widths
        self.convolutions = nn.Sequential(
            nn.Conv2d(channels, first, 5, padding=2),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Conv2d(first, second, 5),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Flatten(),
        )
        self.num_features = second * feature_side(image_size) ** 2
        self.classifier = nn.Sequential(
            nn.Linear(self.num_features, hidden[0]),
            nn.ReLU(),
            nn.Linear(hidden[0], hidden[1]),
            nn.ReLU(),
            nn.Linear(hidden[1], num_classes),
        )

    def forward(
        self, x: Float[Tensor, "batch channels height width"]
    ) -> tuple[Float[Tensor, "batch classes"], Float[Tensor, "batch features"]]:
        """Logits, and the features that the linear layers read."""
        features: Tensor = self.convolutions(x)
        return self.classifier(features), features


def check_sizes(image_size: int, widths: Sequence[int], hidden: Sequence[int]) -> None:
    """`UserError` unless a LeNet can be built of these."""
    if image_size < 12:
        raise UserError(f"schema: image_size={image_size}; LeNet needs at least 12 pixels a side")
    if len(widths) != 2 or len(hidden) != 2 or min(*widths, *hidden) < 1:
        raise UserError(f"widths={list(widths)}, hidden={list(hidden)}: expected two numbers of at least 1 each")


def feature_side(image_size: int) -> int:
    """Pixels a side of LeNet's last feature map."""
    return (image_size // 2 - 4) // 2


class UserGate(Gate):
    """A linear gate for each user between two experts: the generic one has logit 0; learned from 0, an even chance."""

    def __init__(self, dim: int, users: int) -> None:
        super().__init__(2)
        self.layer = per_user_linear(users, dim, 1)

    def forward(
        self, x: Float[Tensor, "tokens features"], task_id: Int[Tensor, "tokens *slots"] | None = None
    ) -> Float[Tensor, "tokens experts"]:
        logit = self.layer(x, task_id=task_id)
        logit = logit.to(torch.promote_types(logit.dtype, torch.float32))
        return torch.cat([torch.zeros_like(logit), logit], 1)


def per_user_linear(users: int, dim: int, out: int) -> MoE:
    """A linear layer for each user, chosen by `task_id`, all zero at first; a `task_id` of -1 gives zero."""
    layer = MoE(FixedRouter(users), LinearExperts(users, dim, out))
    for parameter in layer.parameters():
        nn.init.zeros_(parameter)
    return layer


class Personalised(RobustModel):
    """A generic LeNet-5, and for each user a local expert and a gate: two experts, of which an image takes one.

    The local expert is a linear layer on the generic expert's convolutions, whose output corrects the generic
    logits: it begins as the generic expert. While users' parts learn, the generic expert gets no gradient.

    Args:
        schema: the data's sizes: `channels`, `image_size`, `num_classes`, `users`, and `mean` and `std`.
        widths, hidden: of the generic LeNet.
    """

    def __init__(
        self, schema: Mapping[str, Any], widths: Sequence[int] = (6, 16), hidden: Sequence[int] = (120, 84)
    ) -> None:
        super().__init__(schema)
        sizes = (int(schema["channels"]), int(schema["image_size"]), int(schema["num_classes"]))
        self.users = len(schema["users"])
        self.generic = LeNet(*sizes, widths, hidden)
        self.correction = per_user_linear(self.users, self.generic.num_features, sizes[2])
        self.router = StraightThroughRouter(0, 2, UserGate(self.generic.num_features, self.users))

    def forward(
        self, image: Float[Tensor, "batch channels height width"], user: Int[Tensor, " batch"] | None = None
    ) -> PersonalOutput:
        """Classify images in [0, 1] of these users (numbers from 0); without users by the generic expert alone."""
        if user is None:
            logits, _ = self.generic(self.normalise(image))
            return PersonalOutput(logits, logits, None, {})
        generic, features = frozen(self.generic, self.normalise(image), self.training)
        routing = self.router(features, task_id=user)
        picked = routing.indices[:, 0] == 1
        served = user if self.training else user.masked_fill(~picked, -1)
        local = generic + self.correction(features, task_id=served)
        return PersonalOutput(torch.where(picked[:, None], local, generic), generic, local, {"gate": routing})

    def overhead(self) -> float:
        """Parameters of one user over those of the generic expert."""
        own = sum(part.numel() for layer in (self.correction, self.router) for part in layer.parameters())
        return own / self.users / sum(part.numel() for part in self.generic.parameters())


def frozen(generic: nn.Module, x: Tensor, training: bool) -> tuple[Tensor, Tensor]:
    """The generic expert's logits and features; without gradient in training. Attacks, in eval, get theirs."""
    with torch.set_grad_enabled(torch.is_grad_enabled() and not training):
        logits, features = generic(x)
    return logits, features
