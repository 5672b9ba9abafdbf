"""What any agent must beat: actions at random. DrQ-v2 and DrM are settings of `zoo/mentor.py`."""

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from ..base import ZooModel
from ..mentor import ControlOutput


class RandomPolicy(ZooModel):
    """Uniform actions whatever is seen; the same ones in every run.

    Args:
        schema: the data's sizes.
        seed: of the actions.
    """

    def __init__(self, schema: Mapping[str, Any], seed: int = 0) -> None:
        super().__init__()
        self.actions = int(schema["action"])
        self.generator = torch.Generator().manual_seed(seed)

    def fit(self, loader: Iterable[Any]) -> None:
        """Nothing to learn; no frame is played."""

    def forward(self, pixels: Tensor | None = None, state: Float[Tensor, "batch state"] | None = None) -> ControlOutput:
        seen = pixels if pixels is not None else state
        assert seen is not None
        action = torch.rand(len(seen), self.actions, generator=self.generator) * 2 - 1
        return ControlOutput(action.to(seen.device), {})
