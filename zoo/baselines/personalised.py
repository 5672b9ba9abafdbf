"""What GE/LE/GN must beat: one network for everybody, local experts without a gate, a whole network for each user."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from ..advmoe import RobustModel
from ..core import ConvExperts, MLPExperts
from ..core.dispatch import dispatch, make_plan, restore
from ..personalised import LeNet, PersonalOutput, check_sizes, feature_side, frozen, per_user_linear


class OneForAll(RobustModel):
    """A LeNet-5 that knows no users: the generic expert alone, or, trained on users' images too, the dense twin.

    Args:
        schema: as for `Personalised`.
        widths, hidden: of the LeNet.
    """

    def __init__(
        self, schema: Mapping[str, Any], widths: Sequence[int] = (6, 16), hidden: Sequence[int] = (120, 84)
    ) -> None:
        super().__init__(schema)
        sizes = (int(schema["channels"]), int(schema["image_size"]), int(schema["num_classes"]))
        self.network = LeNet(*sizes, widths, hidden)

    def forward(
        self, image: Float[Tensor, "batch channels height width"], user: Int[Tensor, " batch"] | None = None
    ) -> PersonalOutput:
        """Classify images in [0, 1], whoever the user is."""
        logits, _ = self.network(self.normalise(image))
        return PersonalOutput(logits, logits, None, {})

    def overhead(self) -> float:
        """Nothing is any user's own."""
        return 0.0


class LocalExperts(RobustModel):
    """`Personalised` without a gate: a user's local expert serves every image that the user meets.

    Args:
        schema, widths, hidden: as for `Personalised`.
    """

    def __init__(
        self, schema: Mapping[str, Any], widths: Sequence[int] = (6, 16), hidden: Sequence[int] = (120, 84)
    ) -> None:
        super().__init__(schema)
        sizes = (int(schema["channels"]), int(schema["image_size"]), int(schema["num_classes"]))
        self.users = len(schema["users"])
        self.generic = LeNet(*sizes, widths, hidden)
        self.correction = per_user_linear(self.users, self.generic.num_features, sizes[2])

    def forward(
        self, image: Float[Tensor, "batch channels height width"], user: Int[Tensor, " batch"] | None = None
    ) -> PersonalOutput:
        """As of `Personalised`."""
        if user is None:
            logits, _ = self.generic(self.normalise(image))
            return PersonalOutput(logits, logits, None, {})
        generic, features = frozen(self.generic, self.normalise(image), self.training)
        local = generic + self.correction(features, task_id=user)
        return PersonalOutput(local, generic, local, {})

    def overhead(self) -> float:
        """Parameters of one user over those of the generic expert."""
        own = sum(part.numel() for part in self.correction.parameters())
        return own / self.users / sum(part.numel() for part in self.generic.parameters())


class FineTuned(RobustModel):
    """The generic LeNet-5 copied for each user and fine-tuned: as many parameters again for every one of them.

    Args:
        schema, widths, hidden: as for `Personalised`.
    """

    started: Tensor

    def __init__(
        self, schema: Mapping[str, Any], widths: Sequence[int] = (6, 16), hidden: Sequence[int] = (120, 84)
    ) -> None:
        super().__init__(schema)
        channels, size, classes = (int(schema[name]) for name in ("channels", "image_size", "num_classes"))
        check_sizes(size, widths, hidden)
        self.users = len(schema["users"])
        self.generic = LeNet(channels, size, classes, widths, hidden)
        self.conv1 = ConvExperts(self.users, channels, widths[0], 5, padding=2)
        self.conv2 = ConvExperts(self.users, widths[0], widths[1], 5)
        features = widths[1] * feature_side(size) ** 2
        self.linear = MLPExperts(self.users, features, hidden, out=classes, act="relu")
        self.register_buffer("started", torch.tensor(False))

    def forward(
        self, image: Float[Tensor, "batch channels height width"], user: Int[Tensor, " batch"] | None = None
    ) -> PersonalOutput:
        """Classify images in [0, 1]: each by its user's own network; without users by the generic one."""
        x = self.normalise(image)
        if user is None:
            logits, _ = self.generic(x)
            return PersonalOutput(logits, logits, None, {})
        if self.training and not self.started:
            self.copy_generic()
        generic, _ = frozen(self.generic, x, self.training)
        plan = make_plan(user[:, None], self.users, dropless=True)
        y = F.max_pool2d(F.relu(self.conv1(dispatch(x, plan), plan)), 2)
        y = F.max_pool2d(F.relu(self.conv2(y, plan)), 2)
        local = restore(self.linear(y.flatten(1), plan), plan)
        return PersonalOutput(local, generic, local, {})

    @torch.no_grad()
    def copy_generic(self) -> None:
        """Every user's network becomes the generic one."""
        layers = [part for part in self.generic.modules() if isinstance(part, nn.Conv2d | nn.Linear)]
        for experts, layer in zip((self.conv1, self.conv2, *self.linear.layers), layers, strict=True):
            for own, shared in zip(experts.parameters(), layer.parameters(), strict=True):  # weight, bias
                own.view(self.users, *shared.shape).copy_(shared)
        self.started.fill_(True)

    def overhead(self) -> float:
        """One, and nothing shared."""
        return 1.0
