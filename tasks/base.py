"""What every task shares: model and optimiser by injection, routing losses, test results, pictures."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import polars as pl
import pytorch_lightning as lightning
import torch
from pytorch_lightning.callbacks import Callback
from pytorch_lightning.cli import LRSchedulerCallable, OptimizerCallable
from torch import Tensor, nn

from ..zoo.core import Routing
from .balancing import RouterBias


@dataclass(frozen=True)
class MetricInfo:
    """How to read a metric: whether high or low is good, its unit, and how many units it averages."""

    goal: Literal["max", "min"]
    unit: str = ""
    n: int = 0


@dataclass(frozen=True)
class TestResult:
    """A test's metrics, and the scores of each unit (session, day, clip) for paired comparisons."""

    __test__ = False  # not a pytest class

    metrics: Mapping[str, float]
    info: Mapping[str, MetricInfo]
    units: pl.DataFrame = field(default_factory=pl.DataFrame)


class BaseTask(lightning.LightningModule):
    """A model in training: subclasses give the loss, the metrics and the pictures.

    Args:
        model: what computes; its forward returns named tensors and `routing`, a dict of records.
        optimizer: factory, parameters -> optimiser.
        lr_scheduler: factory, optimiser -> scheduler, stepped each epoch.

    `monitor` and `mode` choose the checkpoint on validation. `result` holds the last test's outcome, `routing` the
    records of the last step, detached, for telemetry.
    """

    monitor = "val/loss"
    mode: Literal["min", "max"] = "min"
    headline = "loss"

    def __init__(
        self,
        model: nn.Module,
        optimizer: OptimizerCallable = torch.optim.Adam,
        lr_scheduler: LRSchedulerCallable | None = None,
    ) -> None:
        super().__init__()
        self.model = model
        self.optimizer_factory, self.scheduler_factory = optimizer, lr_scheduler
        self.result: TestResult | None = None
        self.routing: dict[str, Routing] = {}
        self.configure_losses()
        self.configure_metrics()

    def configure_losses(self) -> None:
        """Build the losses; called once by the constructor."""

    def configure_metrics(self) -> None:
        """Build the metrics; called once by the constructor."""

    def configure_optimizers(self) -> Any:
        """The injected optimiser over all parameters, with its scheduler if there is one."""
        return self.optimise(self.parameters())

    def configure_callbacks(self) -> list[Callback]:
        """Routers that balance by a bias have it moved, so that no recipe can forget to."""
        biased = any(getattr(part, "balance", None) == "bias" for part in self.model.modules())
        return [RouterBias()] if biased else []

    def optimise(self, parameters: Iterable[nn.Parameter] | Iterable[dict[str, Any]]) -> dict[str, Any]:
        """Lightning's dictionary of the injected optimiser and scheduler over `parameters`, or groups of them."""
        optimizer = self.optimizer_factory(parameters)
        if self.scheduler_factory is None:
            return {"optimizer": optimizer}
        return {"optimizer": optimizer, "lr_scheduler": self.scheduler_factory(optimizer)}

    def record(self, routing: Mapping[str, Routing]) -> Tensor | float:
        """Keep the routing for telemetry and return its balance losses, which count with weight 1."""
        self.routing = {name: record.detach() for name, record in routing.items()}
        return sum((record.aux_loss for record in routing.values()), 0.0)

    def value_names(self, field: str) -> Sequence[str] | None:
        """What the whole numbers of a field of the batches stand for, or of its column `field:3`; None if nothing."""
        return None

    def draw(self, folder: Path) -> list[Path]:
        """Draw the last test's pictures into `folder`; returns what was drawn."""
        return []

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.model(*args, **kwargs)
