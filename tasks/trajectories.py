"""Vehicle trajectories: three losses weighed by learned uncertainty, displacement errors, intentions with lead time."""

from collections.abc import Sequence
from inspect import signature
from pathlib import Path
from typing import Any, Literal

import polars as pl
import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from pytorch_lightning.cli import LRSchedulerCallable, OptimizerCallable
from torch import Tensor, nn

from ..datasets.trajectories_windows import TrajectoryBatch
from ..errors import UserError
from ..zoo.core import Routing
from ..zoo.tmmoe import INTENTIONS, TASKS
from .base import BaseTask
from .trajectories_metrics import Windows, ade, distance, evaluate, fde, intention_metrics

Weighting = Literal["uncertainty", "equal"]
Regression = Literal["mse", "huber"]
SCALE = (2.0, 1.0)  # m; errors along and across the road are about equally large in these units
LOG_VARIANCE = 6.0  # bound of |log sigma^2|


class TrajectoriesTask(BaseTask):
    """Trains and tests any model whose forward takes fields of `TrajectoryBatch` by name and gives a
    `TrajectoryOutput`.

    Args:
        model: a trajectories model of the zoo.
        optimizer: factory for the optimiser.
        lr_scheduler: factory for the scheduler.
        weighting: of longitudinal, lateral and intention loss: `uncertainty` (Kendall et al. 2018, learned
            homoscedastic variances) or `equal` (the same formula with all log-variances 0).
        freeze_epochs: epochs before the log-variances are learned.
        log_variance: their start.
        regression: of the scaled errors: `mse`, or `huber`, which heeds far-off windows less.
        class_weights: of keep, left and right in the cross-entropy; real roads have some 96 % keep.
        focal: exponent gamma of the focal loss (Lin et al. 2017); 0 is cross-entropy.
        schema: the data's schema, linked by the command line.

    Raises:
        UserError: a weight that is not positive, or not three of them.
    """

    mode = "min"
    headline = "ade"
    monitor = "val/ade"

    def __init__(
        self,
        model: nn.Module,
        optimizer: OptimizerCallable = torch.optim.Adam,
        lr_scheduler: LRSchedulerCallable | None = None,
        weighting: Weighting = "uncertainty",
        freeze_epochs: int = 2,
        log_variance: float = 0.0,
        regression: Regression = "mse",
        class_weights: Sequence[float] = (1.0, 1.0, 1.0),
        focal: float = 0.0,
        schema: dict[str, Any] | None = None,
    ) -> None:
        super().__init__(model, optimizer, lr_scheduler)
        if len(class_weights) != len(INTENTIONS) or min(class_weights) <= 0:
            raise UserError(f"model.class_weights={list(class_weights)}: expected three positive numbers")
        if focal < 0:
            raise UserError(f"model.focal={focal}: expected 0 (cross-entropy) or more")
        self.weighting, self.freeze_epochs, self.regression, self.focal = weighting, freeze_epochs, regression, focal
        self.log_variance = nn.Parameter(torch.full((len(TASKS),), float(log_variance)))
        self.register_buffer("class_weights", torch.tensor(list(class_weights)), persistent=False)
        self.schema = schema or {"frame_rate": 10.0}
        self.inputs = [name for name in signature(model.forward).parameters if name in TrajectoryBatch._fields]
        self._windows: list[Windows] = []

    def forward(self, batch: TrajectoryBatch) -> Any:
        """The model's output for the fields of the batch that its forward names."""
        return self.model(**{name: getattr(batch, name) for name in self.inputs})

    def configure_optimizers(self) -> Any:
        """The injected optimiser; log-variances are never decayed towards 0."""
        groups: list[dict[str, Any]] = [{"params": list(self.model.parameters())}]
        if self.weighting == "uncertainty":
            groups.append({"params": [self.log_variance], "weight_decay": 0.0})
        return self.optimise(groups)

    def training_step(self, batch: TrajectoryBatch, batch_idx: int) -> Tensor:
        output = self(batch)
        longitudinal, lateral = regression_losses(output.position, batch.future, self.regression)
        intention = intention_loss(output.intention, batch.intention, self.get_buffer("class_weights"), self.focal)
        losses = torch.stack([longitudinal, lateral, intention])
        with torch.no_grad():
            self.log_variance.clamp_(-LOG_VARIANCE, LOG_VARIANCE)
        frozen = self.weighting == "equal" or self.current_epoch < self.freeze_epochs
        # Zero times the parameter: every process of a distributed run has a gradient for it.
        log_variance = self.log_variance.detach() + 0.0 * self.log_variance if frozen else self.log_variance
        loss = uncertainty_loss(losses, log_variance) + self.record(output.routing)
        size = len(batch.track)
        self.log("train/loss", loss, prog_bar=True, batch_size=size)
        for name, value, s in zip(TASKS, losses, self.log_variance.detach(), strict=True):
            self.log(f"train/{name}", value, on_step=False, on_epoch=True, batch_size=size)
            self.log(f"weight/{name}", (-s).exp(), on_step=False, on_epoch=True, batch_size=size)
        return loss

    def validation_step(self, batch: TrajectoryBatch, batch_idx: int) -> None:
        self._collect(batch)

    def on_validation_epoch_end(self) -> None:
        windows = self._take()
        error = distance(windows.position, windows.future)
        average = float(ade(error).nanmean())
        if average != average and not self.trainer.sanity_checking:
            raise UserError(f"{self.monitor} is undefined: no validation window has a known future")
        known = windows.intention >= 0
        scores = intention_metrics(windows.probability[known], windows.intention[known])
        self.log("val/ade", average, prog_bar=True, sync_dist=True)
        self.log("val/fde", float(fde(error).nanmean()), sync_dist=True)
        for name in ("macro_f1", "auprc"):
            if name in scores:
                self.log(f"val/{name}", scores[name], prog_bar=name == "macro_f1", sync_dist=True)

    def test_step(self, batch: TrajectoryBatch, batch_idx: int) -> None:
        self._collect(batch)

    def on_test_epoch_end(self) -> None:
        self.tested = self._take()
        self.result = evaluate(self.tested, float(self.schema["frame_rate"]))
        self.log_dict({f"test/{name}": value for name, value in self.result.metrics.items()}, sync_dist=True)

    def predict_step(self, batch: TrajectoryBatch, batch_idx: int) -> pl.DataFrame:
        """One row a window: vehicle, frame, seconds, intention probabilities, x and y (m) of each step ahead, gates.

        `x_k`, `y_k` are the displacements from the current position k steps ahead, along the road and to the left.
        """
        windows = self._window(batch, self(batch))
        rate = float(self.schema["frame_rate"])
        columns: dict[str, Tensor] = {
            "track": windows.track,
            "frame": windows.frame,
            "time": windows.frame.double() / rate,
        }
        columns |= dict(zip(INTENTIONS, windows.probability.unbind(1), strict=True))
        for axis, name in enumerate(("x", "y")):
            steps = windows.position[..., axis].unbind(1)
            columns |= {f"{name}_{k}": values for k, values in enumerate(steps, 1)}
        for task, gate in zip(TASKS, windows.gates.unbind(1), strict=True):
            columns |= {f"gate_{task}_{e}": values for e, values in enumerate(gate.unbind(1))}
        return pl.DataFrame({name: values.numpy() for name, values in columns.items()})

    def draw(self, folder: Path) -> list[Path]:
        """Predicted and real tracks on the lanes, RMSE over the horizon, and the gates of each manoeuvre."""
        from . import trajectories_plots

        return trajectories_plots.draw(self.tested, self.schema, folder)

    def _window(self, batch: TrajectoryBatch, output: Any) -> Windows:
        windows = Windows(
            position=output.position.float(),
            future=batch.future,
            probability=output.intention.float().softmax(-1),
            intention=batch.intention,
            crossing=batch.crossing,
            lateral=batch.lateral,
            velocity=batch.velocity,
            gates=gate_weights(output.routing, len(batch.track)).to(output.position.device),
            track=batch.track,
            frame=batch.frame,
        )
        return Windows(*(values.detach().cpu() for values in windows))

    def _collect(self, batch: TrajectoryBatch) -> None:
        output = self(batch)
        self.record(output.routing)
        self._windows.append(self._window(batch, output))

    def _take(self) -> Windows:
        """The collected windows of all batches and processes."""
        batches, self._windows = self._windows, []
        if self.trainer.world_size > 1:
            gathered: list[Any] = [None] * self.trainer.world_size
            torch.distributed.all_gather_object(gathered, batches)
            batches = [batch for part in gathered for batch in part]
        return Windows(*(torch.cat(values) for values in zip(*batches, strict=True)))


def regression_losses(
    position: Float[Tensor, "batch horizon 2"], future: Float[Tensor, "batch horizon 2"], kind: Regression = "mse"
) -> Float[Tensor, " 2"]:
    """Mean loss along and across the road over the known steps, of errors in units of 2 m and 1 m."""
    known = ~future.isnan()
    position = position.to(torch.promote_types(position.dtype, torch.float32))
    error = (position - future.nan_to_num(nan=0.0)) / position.new_tensor(SCALE)
    error = error.masked_fill(~known, 0.0)
    each = error.square() if kind == "mse" else 2 * F.huber_loss(error, torch.zeros_like(error), reduction="none")
    return each.sum((0, 1)) / known.sum((0, 1)).clamp(min=1)


def intention_loss(
    logits: Float[Tensor, "batch 3"],
    label: Int[Tensor, " batch"],
    weights: Float[Tensor, " 3"],
    focal: float = 0.0,
) -> Float[Tensor, ""]:
    """Weighted mean of `(1 - p)^focal * -log p` of the true class; windows of unknown intention (-1) are left out."""
    known = label >= 0
    truth = label.clamp(min=0)
    log_p = logits.float().log_softmax(-1).gather(1, truth[:, None]).squeeze(1)
    weight = weights[truth] * known
    each = -log_p if not focal else -log_p * (1 - log_p.exp()).clamp(min=0) ** focal
    return (weight * each).sum() / weight.sum().clamp(min=1e-12)


def uncertainty_loss(losses: Float[Tensor, " 3"], log_variance: Float[Tensor, " 3"]) -> Float[Tensor, ""]:
    """`Σ_reg [e^-s L / 2 + s / 2] + e^-s CE + s / 2` with s = log sigma² (Kendall et al. 2018, eqs. 7, 10).

    The last of the losses is the cross-entropy. The sum may be negative: it is no measure of how good a model is.
    """
    factor = losses.new_tensor([0.5, 0.5, 1.0])
    return (factor * (-log_variance).exp() * losses + 0.5 * log_variance).sum()


def gate_weights(routing: dict[str, Routing], batch: int) -> Float[Tensor, "batch tasks experts"]:
    """Each task's gate; no experts where the model has no gate per task."""
    if not all(task in routing for task in TASKS):
        return torch.zeros(batch, len(TASKS), 0)
    return torch.stack([routing[task].dense_weights() for task in TASKS], 1).float()
