"""Personalised classifiers: a generic expert for everybody, then local experts and gates for single users."""

from pathlib import Path
from typing import Any, Literal, NamedTuple

import polars as pl
import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from pytorch_lightning.cli import LRSchedulerCallable, OptimizerCallable
from torch import Tensor, nn

from ..datasets.personalised import PersonalBatch
from ..errors import UserError
from ..zoo.personalised import PersonalOutput
from .base import BaseTask, MetricInfo, TestResult

Learning = Literal["mixture", "own"]


class Answers(NamedTuple):
    """What was answered to each image of a split; kept on the CPU."""

    place: Int[Tensor, " images"]
    user: Int[Tensor, " images"]
    own: Int[Tensor, " images"]
    right: Int[Tensor, " images"]
    generic_right: Int[Tensor, " images"]
    local: Int[Tensor, " images"]


class PersonalisedTask(BaseTask):
    """Trains and tests any model whose forward takes image and user and gives a `PersonalOutput`.

    The optimiser sees a generic expert or users' parts, never both: what a batch does not reach has no gradient.

    Args:
        model: a personalised model of the zoo.
        optimizer: factory for the optimiser.
        lr_scheduler: factory for the scheduler.
        user_lr: learning rate of users' parts; default: the optimiser's.
        learning: of local experts beside a gate: `mixture` maximises the likelihood of the two experts weighed by
            the gate, on users' own images and the public's; `own` teaches local experts by their user's images
            alone, as the paper does, and the gate alone by the mixture.
        schema: the data's schema, linked by the command line.
    """

    mode = "max"
    headline = "user_accuracy"
    monitor = "val/score"

    def __init__(
        self,
        model: nn.Module,
        optimizer: OptimizerCallable = torch.optim.Adam,
        lr_scheduler: LRSchedulerCallable | None = None,
        user_lr: float | None = None,
        learning: Learning = "mixture",
        schema: dict[str, Any] | None = None,
    ) -> None:
        super().__init__(model, optimizer, lr_scheduler)
        if user_lr is not None and user_lr <= 0:
            raise UserError(f"model.user_lr={user_lr}: expected more than 0")
        self.user_lr, self.learning, self.schema = user_lr, learning, schema or {}
        self._answers: list[Answers] = []

    def forward(self, batch: PersonalBatch) -> PersonalOutput:
        """The model's output for images and users of the batch."""
        output: PersonalOutput = self.model(batch.image, batch.user)
        return output

    def configure_optimizers(self) -> Any:
        """Two groups: what serves everybody, and what is a user's own, with its own learning rate."""
        shared = {"generic", "network"}
        parts: dict[bool, list[nn.Parameter]] = {True: [], False: []}
        for name, parameter in self.model.named_parameters():
            parts[name.split(".")[0] in shared].append(parameter)
        groups: list[dict[str, Any]] = [{"params": parts[True]}]
        if parts[False]:
            groups.append({"params": parts[False]} | ({} if self.user_lr is None else {"lr": self.user_lr}))
        return self.optimise(groups)

    def training_step(self, batch: PersonalBatch, batch_idx: int) -> Tensor:
        output = self(batch)
        if batch.user is None or output.local is None:
            loss = F.cross_entropy(output.logits, batch.label)
        elif "gate" not in output.routing:
            loss = F.cross_entropy(output.local, batch.label)
        else:
            local = output.local if self.learning == "mixture" else output.local.detach()
            loss = mixture_loss(output.generic, local, output.routing["gate"].logits, batch.label)
            if self.learning == "own":
                each = F.cross_entropy(output.local, batch.label, reduction="none")
                loss = loss + (each * batch.own).sum() / batch.own.sum().clamp(min=1)
        loss = loss + self.record(output.routing)
        self.log("train/loss", loss, prog_bar=True, batch_size=len(batch.label))
        return loss

    def validation_step(self, batch: PersonalBatch, batch_idx: int) -> None:
        self._collect(batch)

    def on_validation_epoch_end(self) -> None:
        metrics = scores(self._take())
        self.log("val/score", (metrics["user_accuracy"] + metrics["generic_accuracy"]) / 2, sync_dist=True)
        for name, value in metrics.items():
            self.log(f"val/{name}", value, prog_bar=name.endswith("accuracy"), sync_dist=True)

    def test_step(self, batch: PersonalBatch, batch_idx: int) -> None:
        self._collect(batch)

    def on_test_epoch_end(self) -> None:
        self.tested = self._take()
        model: Any = self.model
        self.result = evaluate(self.tested, model.overhead())
        self.log_dict({f"test/{name}": value for name, value in self.result.metrics.items()}, sync_dist=True)

    def predict_step(self, batch: PersonalBatch, batch_idx: int) -> pl.DataFrame:
        """One row an image: place, user, whether it is the user's own, label, prediction with its probability, the
        generic expert's prediction, and whether the local expert answered."""
        output = self(batch)
        probability, prediction = output.logits.float().softmax(-1).max(-1)
        columns = {
            "place": batch.place,
            "user": torch.zeros_like(batch.place) if batch.user is None else batch.user,
            "own": batch.own,
            "label": batch.label,
            "prediction": prediction,
            "probability": probability,
            "generic": output.generic.argmax(-1),
            "local_answers": picked_local(output),
        }
        return pl.DataFrame({name: values.cpu().numpy() for name, values in columns.items()})

    def draw(self, folder: Path) -> list[Path]:
        """Accuracy of each user by the generic expert and by the personalised model, and who answered."""
        from .personalised_plots import draw

        return draw(self.result, self.schema.get("users"), folder) if self.result else []

    def _collect(self, batch: PersonalBatch) -> None:
        if batch.user is None:
            raise UserError("the data has no users in evaluation; expected PersonalisedData")
        output = self(batch)
        self.record(output.routing)
        found = (
            batch.place,
            batch.user,
            batch.own,
            output.logits.argmax(-1) == batch.label,
            output.generic.argmax(-1) == batch.label,
            picked_local(output),
        )
        self._answers.append(Answers(*(values.long().cpu() for values in found)))

    def _take(self) -> Answers:
        """The collected answers of all batches and processes, each place and user once."""
        batches, self._answers = self._answers, []
        if self.trainer.world_size > 1:
            gathered: list[Any] = [None] * self.trainer.world_size
            torch.distributed.all_gather_object(gathered, batches)
            batches = [batch for part in gathered for batch in part]
        whole = Answers(*(torch.cat(values) for values in zip(*batches, strict=True)))
        if self.trainer.world_size == 1:
            return whole
        _, first = torch.unique(whole.place, return_inverse=True)
        kept = torch.zeros(int(first.max()) + 1, dtype=torch.int64).scatter_(0, first, torch.arange(len(first)))
        return Answers(*(values[kept] for values in whole))


def mixture_loss(
    generic: Float[Tensor, "batch classes"],
    local: Float[Tensor, "batch classes"],
    gate: Float[Tensor, "batch 2"],
    label: Int[Tensor, " batch"],
) -> Float[Tensor, ""]:
    """Mean of -log Σ_e π_e p_e(label), π the softmax of the gate's logits, in fp32."""
    each = torch.stack([generic.float().log_softmax(-1), local.float().log_softmax(-1)], 1)
    mixed = (gate.float().log_softmax(-1)[:, :, None] + each).logsumexp(1)
    return F.nll_loss(mixed, label)


def picked_local(output: PersonalOutput) -> Int[Tensor, " batch"]:
    """1 where the local expert answered."""
    if "gate" in output.routing:
        return output.routing["gate"].indices[:, 0]
    return torch.full_like(output.logits[:, 0], float(output.local is not None)).long()


def scores(answers: Answers) -> dict[str, float]:
    """Accuracies, each user counting alike, and the share of images that local experts answered.

    `user_gain` is what users gain over the generic expert, `generic_loss` what the public's images lose when they
    meet a user's model.
    """
    own = answers.own.bool()
    each = [own & (answers.user == k) for k in answers.user[own].unique()]
    user = _mean([answers.right[rows] for rows in each])
    public = answers.right[~own].double().mean().item()
    return {
        "user_accuracy": user,
        "generic_accuracy": public,
        "user_gain": user - _mean([answers.generic_right[rows] for rows in each]),
        "generic_loss": answers.generic_right[~own].double().mean().item() - public,
        "local_share_user": _mean([answers.local[rows] for rows in each]),
        "local_share_generic": answers.local[~own].double().mean().item(),
    }


def evaluate(answers: Answers, overhead: float) -> TestResult:
    """The leaderboard's metrics, and for each user accuracy, gain and share of the local expert on own images."""
    own = answers.own.bool()
    metrics = scores(answers) | {"overhead": overhead}
    count, public = int(own.sum()), int((~own).sum())
    units = {"local_share_user": count, "user_accuracy": count, "user_gain": count, "overhead": 1}
    goals: dict[str, Literal["max", "min"]] = {"generic_loss": "min", "overhead": "min", "local_share_generic": "min"}
    info = {name: MetricInfo(goals.get(name, "max"), "", units.get(name, public)) for name in metrics}
    rows = []
    for k in answers.user[own].unique().tolist():
        mine = own & (answers.user == k)
        right, generic = (values[mine].double().mean().item() for values in (answers.right, answers.generic_right))
        share = answers.local[mine].double().mean().item()
        rows.append((k, right, right - generic, share))
    table = pl.DataFrame(rows, schema=["unit", "user_accuracy", "user_gain", "local_share_user"], orient="row")
    return TestResult(metrics, info, table)


def _mean(parts: list[Tensor]) -> float:
    return float(torch.stack([part.double().mean() for part in parts]).mean())
