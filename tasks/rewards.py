"""Reward models: Bradley-Terry on pairs, in one phase or three; how they judge, route and withstand best-of-n."""

import math
from collections.abc import Sequence
from inspect import signature
from pathlib import Path
from typing import Any, Literal, NamedTuple, cast

import polars as pl
import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from pytorch_lightning.cli import LRSchedulerCallable, OptimizerCallable
from torch import Tensor

from ..datasets.rewards_batches import PreferenceBatch
from ..errors import UserError
from ..zoo.dmoerm import RewardModel, RewardOutput
from .base import BaseTask, MetricInfo, TestResult
from .rewards_metrics import (
    best_of_n,
    length_bias,
    overoptimisation,
    pair_accuracy,
    pair_scores,
    pool_matrix,
    router_report,
)

Decay = Literal["cosine", "none"]


class RewardsTask(BaseTask):
    """Trains and tests any `RewardModel` whose forward takes fields of `PreferenceBatch` by name.

    A model of three phases is trained in one run: phase k takes `epochs[k - 1]` epochs on the pairs that the datamodule
    has for it, moves only its own parameters with an optimiser of its own, and begins with the best state of the phase
    before. A run that was killed, between phases or within one, goes on from its last epoch.

    Args:
        model: a reward model of the zoo.
        optimizer: factory for the optimiser, called for every phase.
        lr_scheduler: factory for a scheduler, for models of one phase.
        epochs: of each phase; the trainer's `max_epochs` is their sum. Empty: all of `max_epochs`, in one phase.
        rates: learning rate of each phase; default: the optimiser's.
        decay: of the learning rate within a phase, by step: to zero along a cosine, or none.
        margin: pairs must differ by this much times their margin (0 where the data has none).
        centring: weight of the mean square of a pair's summed rewards, which keeps rewards around zero.
        schema: the data's schema, linked by the command line.

    Raises:
        UserError: epochs or rates that do not fit the model's phases.
    """

    mode = "max"
    headline = "pair_accuracy"
    monitor = "val/progress"

    def __init__(
        self,
        model: RewardModel,
        optimizer: OptimizerCallable = torch.optim.Adam,
        lr_scheduler: LRSchedulerCallable | None = None,
        epochs: Sequence[int] = (),
        rates: Sequence[float] = (),
        decay: Decay = "cosine",
        margin: float = 0.0,
        centring: float = 0.0,
        schema: dict[str, Any] | None = None,
    ) -> None:
        super().__init__(model, optimizer, lr_scheduler)
        phases = model.phases
        for name, values in {"epochs": epochs, "rates": rates}.items():
            if values and (len(values) != phases or min(values) <= 0):
                raise UserError(f"model.{name}={list(values)}: expected a positive number for each of {phases} phases")
        if phases > 1 and not epochs:
            raise UserError(f"model.epochs is empty: {type(model).__name__} has {phases} phases, give epochs for each")
        if phases > 1 and lr_scheduler is not None:
            raise UserError("model.lr_scheduler goes with models of one phase; use model.decay")
        if min(margin, centring) < 0:
            raise UserError(f"model.margin={margin}, model.centring={centring}: expected 0 or more")
        self.epochs, self.rates, self.decay = list(epochs), list(rates), decay
        self.margin, self.centring = margin, centring
        self.phase = phases
        self.peaks: list[float] = []
        self.tasks = [str(task["name"]) for task in (schema or {}).get("tasks", [])]
        self.capabilities = [list(task["capabilities"]) for task in (schema or {}).get("tasks", [])]
        self.inputs = set(signature(model.forward).parameters)
        self._seen: list[Judged] = []

    def forward(self, batch: PreferenceBatch, **changes: Any) -> RewardOutput:
        """The model's output for both responses of each pair, one after the other, by what its forward names."""
        given = {
            "tokens": batch.tokens.flatten(0, 1),
            "mask": batch.mask.flatten(0, 1),
            "length": batch.length.flatten(),
            "prompt_tokens": batch.prompt_tokens,
            "prompt_mask": batch.prompt_mask,
            "task": batch.task,
            "capability": batch.capability,
            "phase": self.phase,
        } | changes
        output: RewardOutput = self.model(**{name: value for name, value in given.items() if name in self.inputs})
        return output

    @property
    def rewarder(self) -> RewardModel:
        """The model, with what a reward model has beyond a module."""
        return cast(RewardModel, self.model)

    # Phases.

    def phase_of(self, epoch: int) -> int:
        """The phase an epoch (from 0) belongs to; the last one's beyond the end."""
        ends = torch.tensor(self.epochs).cumsum(0).tolist()
        return next((k for k, end in enumerate(ends, 1) if epoch < end), self.rewarder.phases)

    def configure_optimizers(self) -> Any:
        """An optimiser over what the phase moves, at the phase's rate; all else is out of training."""
        chosen = self.rewarder.phase_parameters(self.phase)
        if self.rewarder.phases > 1:
            ids = {id(parameter) for parameter in chosen}
            for parameter in self.model.parameters():
                parameter.requires_grad_(id(parameter) in ids)
                parameter.grad = None
        made = self.optimise(chosen)
        groups = made["optimizer"].param_groups
        for group in groups:
            group["lr"] = self.rates[self.phase - 1] if self.rates else group["lr"]
        self.peaks = [float(group["lr"]) for group in groups]
        return made

    def setup(self, stage: str) -> None:
        """The phase to begin with; `on_load_checkpoint` knows better for a run that goes on."""
        self.phase = 1 if stage == "fit" else self.rewarder.phases

    def on_fit_start(self) -> None:
        trainer = self.trainer
        if self.epochs and trainer.max_epochs != sum(self.epochs):
            raise UserError(
                f"trainer.max_epochs={trainer.max_epochs}: expected {sum(self.epochs)}, the sum of "
                f"model.epochs={self.epochs}"
            )
        if self.rewarder.phases > 1 and getattr(trainer, "reload_dataloaders_every_n_epochs", 0) != 1:
            raise UserError("trainer.reload_dataloaders_every_n_epochs: expected 1, each phase has pairs of its own")
        if self.rewarder.phases > 1 and trainer.world_size > 1:
            raise UserError("a model of several phases trains in one process: set trainer.devices to 1")
        self._serve(self.phase)

    def on_train_start(self) -> None:
        self._serve(self.phase_of(self.current_epoch))

    def on_train_epoch_start(self) -> None:
        phase = self.phase_of(self.current_epoch)
        if phase != self.phase:
            self._restore_best()
            self.phase = phase
            self.rewarder.enter_phase(phase)
            self.trainer.strategy.setup_optimizers(self.trainer)
        self.log("phase", float(self.phase))

    def on_train_epoch_end(self) -> None:
        self._serve(self.phase_of(self.current_epoch + 1))

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["phase"] = self.phase

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self.phase = int(checkpoint["phase"])

    def _serve(self, phase: int) -> None:
        """Have the datamodule serve a phase's pairs from the next reload on."""
        data: Any = getattr(self.trainer, "datamodule", None)
        if self.rewarder.phases > 1 and data is not None:
            data.set_phase(phase)

    def _restore_best(self) -> None:
        """The best epoch so far is one of the phase that ends, as `val/progress` grows from phase to phase."""
        keeper = self.trainer.checkpoint_callback
        path = getattr(keeper, "best_model_path", "")
        if path and Path(path).exists():
            best = torch.load(path, map_location=self.device, weights_only=True)
            self.load_state_dict(best["state_dict"])

    # Training.

    def on_train_batch_start(self, batch: PreferenceBatch, batch_idx: int) -> None:
        if self.decay == "none" or self.scheduler_factory is not None:
            return
        lengths = self.epochs or [self.trainer.max_epochs or 1]
        begun = sum(lengths[: self.phase - 1])
        share = (self.current_epoch - begun + batch_idx / self.trainer.num_training_batches) / lengths[self.phase - 1]
        for group, peak in zip(self.optimizers().param_groups, self.peaks, strict=True):  # type: ignore[union-attr]
            group["lr"] = peak * 0.5 * (1 + math.cos(math.pi * min(share, 1.0)))

    def training_step(self, batch: PreferenceBatch, batch_idx: int) -> Tensor:
        output = self(batch)
        preference = preference_loss(output.scores, self.margin * batch.margin, self.centring)
        loss = preference + self.record(output.routing)
        size = len(batch.task)
        if output.task_logits.shape[1] and output.task_logits.requires_grad:
            routing = router_loss(output.task_logits, batch.task)
            loss = loss + routing
            self.log("train/router", routing, on_step=False, on_epoch=True, batch_size=size)
        self.log("train/loss", loss, prog_bar=True, batch_size=size)
        self.log("train/preference", preference, on_step=False, on_epoch=True, batch_size=size)
        return loss

    def validation_step(self, batch: PreferenceBatch, batch_idx: int) -> None:
        output = self(batch)
        self._seen.append(self._judged(batch, output, output))

    def on_validation_epoch_end(self) -> None:
        seen = self._take()
        accuracy = pair_accuracy(seen.reward[:, 0], seen.reward[:, 1], seen.task)
        self.log("val/pair_accuracy", accuracy.micro, prog_bar=True, sync_dist=True)
        self.log("val/pair_accuracy_macro", accuracy.macro, sync_dist=True)
        if seen.logits.shape[1]:
            self.log("val/router_accuracy", router_report(seen.logits, seen.task).accuracy, sync_dist=True)
        loss = float(seen.loss.mean())
        self.log("val/loss", loss, sync_dist=True)
        # How likely the labels are, between 0 and 1, above what any epoch of an earlier phase can reach.
        self.log("val/progress", self.phase - 1 + math.exp(-loss), sync_dist=True)

    # Evaluation.

    def test_step(self, batch: PreferenceBatch, batch_idx: int) -> None:
        output = self(batch)
        self.record(output.routing)
        routed = output.task_logits.shape[1] > 0 and "route" in self.inputs
        oracle = self(batch, route="oracle") if routed else output
        self._seen.append(self._judged(batch, output, oracle))

    def on_test_epoch_end(self) -> None:
        self.tested = self._take()
        self.result = evaluate(self.tested, self.tasks)
        self.log_dict({f"test/{name}": value for name, value in self.result.metrics.items()}, sync_dist=True)

    def predict_step(self, batch: PreferenceBatch, batch_idx: int) -> pl.DataFrame:
        """One row a pair: `index`, the task it was routed to and how sure the router was, both rewards, and those of
        each capability that the task has (null elsewhere)."""
        seen = self._judged(batch, *[self(batch)] * 2)
        columns: dict[str, Any] = {"index": seen.index.numpy()}
        if seen.logits.shape[1]:
            sure, chosen = seen.logits.softmax(-1).max(-1)
            columns["task"] = [self.tasks[t] if self.tasks else str(t) for t in chosen.tolist()]
            columns["task_probability"] = sure.numpy()
        else:
            chosen = seen.task
        columns |= {f"reward_{side}": seen.reward[:, i].numpy() for i, side in enumerate(("chosen", "rejected"))}
        if seen.capability.shape[2]:
            columns |= self._by_capability(seen, chosen)
        return pl.DataFrame(columns)

    def value_names(self, field: str) -> list[str] | None:
        """The tasks."""
        return self.tasks if field == "task" else None

    def draw(self, folder: Path) -> list[Path]:
        """Accuracy by task and capability, the router's confusion, the best-of-n curve and the length bias."""
        from .rewards_plots import draw

        return draw(self.tested, self.tasks, self.capabilities, folder)

    def _by_capability(self, seen: "Judged", task: Tensor) -> dict[str, pl.Series]:
        names = dict.fromkeys(name for own in self.capabilities for name in own)
        columns = {}
        for name in names:
            place = torch.tensor([own.index(name) if name in own else -1 for own in self.capabilities])[task]
            index = place.clamp(min=0)[:, None, None].expand(-1, 2, 1)
            values = seen.capability.gather(2, index)[..., 0].masked_fill((place < 0)[:, None], torch.nan)
            for i, side in enumerate(("chosen", "rejected")):
                columns[f"{name}_{side}"] = pl.Series(values[:, i].numpy()).fill_nan(None)
        return columns

    def _judged(self, batch: PreferenceBatch, output: RewardOutput, oracle: RewardOutput) -> "Judged":
        pairs = len(batch.task)
        judged = Judged(
            reward=output.reward.float().view(pairs, 2),
            oracle=oracle.reward.float().view(pairs, 2),
            loss=_losses(output.scores.float(), 0.0).mean(1),
            capability=output.capability_rewards.float().view(pairs, 2, -1),
            logits=output.task_logits.float()
            if len(output.task_logits) == pairs
            else output.task_logits.view(pairs, 0),
            task=batch.task,
            length=batch.length,
            index=batch.index,
            gold=batch.gold,
            pool=batch.pool,
        )
        return Judged(*(values.detach().cpu() for values in judged))

    def _take(self) -> "Judged":
        """What was seen in all batches and processes, every row once."""
        batches, self._seen = self._seen, []
        if self.trainer.world_size > 1:
            gathered: list[Any] = [None] * self.trainer.world_size
            torch.distributed.all_gather_object(gathered, batches)
            batches = [batch for part in gathered for batch in part]
        seen = Judged(*(torch.cat(values) for values in zip(*batches, strict=True)))
        if self.trainer.world_size > 1:
            order = seen.index.argsort(stable=True)
            first = torch.ones_like(order, dtype=torch.bool)
            first[1:] = seen.index[order][1:] != seen.index[order][:-1]
            seen = seen.rows(order[first])
        return seen


class Judged(NamedTuple):
    """What a model said of pairs, beside what is known of them; fields as in `PreferenceBatch` and `RewardOutput`."""

    reward: Float[Tensor, "pairs 2"]
    oracle: Float[Tensor, "pairs 2"]
    loss: Float[Tensor, " pairs"]
    capability: Float[Tensor, "pairs 2 capabilities"]
    logits: Float[Tensor, "pairs tasks"]
    task: Int[Tensor, " pairs"]
    length: Int[Tensor, "pairs 2"]
    index: Int[Tensor, " pairs"]  # type: ignore[assignment]
    gold: Float[Tensor, "pairs 2"]
    pool: Int[Tensor, " pairs"]

    def rows(self, chosen: Tensor) -> "Judged":
        """Some of the pairs, by number or mask."""
        return Judged(*(values[chosen] for values in self))


def preference_loss(
    scores: Float[Tensor, "rows scores"], margin: Float[Tensor, " pairs"] | float = 0.0, centring: float = 0.0
) -> Float[Tensor, ""]:
    """Mean of -log sigmoid(r_chosen - r_rejected - margin) over pairs (Bradley & Terry 1952), for each of the scores.

    Rows 2i and 2i + 1 are pair i's chosen and rejected response. `centring` adds that much of the mean square of
    r_chosen + r_rejected.
    """
    scores = scores.float()
    loss = _losses(scores, margin).mean()
    if centring:
        loss = loss + centring * (scores[0::2] + scores[1::2]).square().mean()
    return loss


def _losses(scores: Tensor, margin: Tensor | float) -> Float[Tensor, "pairs scores"]:
    gap = scores[0::2] - scores[1::2]
    return -F.logsigmoid(gap - (margin[:, None] if isinstance(margin, Tensor) else margin))


def router_loss(logits: Float[Tensor, "prompts tasks"], task: Int[Tensor, " prompts"]) -> Float[Tensor, ""]:
    """Mean cross-entropy of the logits over the prompts whose task is known (not -1); 0 where none is."""
    known = task >= 0
    each = F.cross_entropy(logits.float(), task.clamp(min=0), reduction="none")
    return (each * known).sum() / known.sum().clamp(min=1)


def evaluate(seen: Judged, names: Sequence[str] = ()) -> TestResult:
    """The leaderboard's metrics: pair accuracy, routing, best of n in pools, and what length alone would get."""
    pairs, pools = seen.rows(seen.pool < 0), seen.rows(seen.pool >= 0)
    accuracy = pair_accuracy(pairs.reward[:, 0], pairs.reward[:, 1], pairs.task, names or None)
    share, n = MetricInfo("max", n=accuracy.n), accuracy.n
    metrics = {
        "pair_accuracy": accuracy.micro,
        "pair_accuracy_macro": accuracy.macro,
        "pair_accuracy_se": accuracy.micro_se,
    }
    info = {"pair_accuracy": share, "pair_accuracy_macro": share, "pair_accuracy_se": MetricInfo("min", n=n)}
    taken = {*metrics, "pair_accuracy_oracle"}
    for name, part in accuracy.by_task.items():
        key = f"pair_accuracy_{_snake(name)}"
        while key in taken:
            key += "_"
        taken.add(key)
        metrics[key], info[key] = part.value, MetricInfo("max", n=part.n)
    if pairs.logits.shape[1]:
        routing = router_report(pairs.logits, pairs.task)
        oracle = pair_accuracy(pairs.oracle[:, 0], pairs.oracle[:, 1])
        metrics |= {"pair_accuracy_oracle": oracle.micro}
        metrics |= {"router_accuracy": routing.accuracy, "router_macro_f1": routing.macro_f1}
        info |= {"pair_accuracy_oracle": share}
        info |= dict.fromkeys(("router_accuracy", "router_macro_f1"), MetricInfo("max", n=routing.n))
    if len(pools.pool):
        more, meant = _best_of_n(pools)
        metrics, info = metrics | more, info | meant
    bias = length_bias(pairs.reward[:, 0], pairs.reward[:, 1], pairs.length)
    metrics |= {"length_accuracy": bias.length_accuracy, "prefers_longer": bias.prefers_longer}
    metrics |= {"length_correlation": bias.correlation}
    info |= {
        "length_accuracy": share,
        "prefers_longer": MetricInfo("min", n=n),
        "length_correlation": MetricInfo("min", n=n),
    }
    kept = {name: value for name, value in metrics.items() if math.isfinite(value)}
    return TestResult(kept, {name: info[name] for name in kept}, _units(pairs))


def _best_of_n(pools: Judged) -> tuple[dict[str, float], dict[str, MetricInfo]]:
    """Gold reward of the best of n by the model, for a few n, and the fall from the peak to the largest n."""
    proxy, gold = pool_matrix(pools.reward, pools.gold, pools.pool)
    curve = best_of_n(proxy, gold)
    fall = overoptimisation(curve.n, curve.gold)
    count = len(proxy)
    chosen = {int(n): float(g) for n, g in zip(curve.n, curve.gold, strict=True)}
    wanted = sorted({n for n in (4, 16, int(curve.n.max())) if n in chosen})
    metrics = {f"bon_gold_{n}": chosen[n] for n in wanted} | {
        "overoptimisation": fall.score,
        "bon_peak": float(fall.peak),
    }
    info = {name: MetricInfo("min" if name == "overoptimisation" else "max", n=count) for name in metrics}
    return metrics, info


def _units(pairs: Judged) -> pl.DataFrame:
    """One row a pair, for paired comparisons between models."""
    scores = pair_scores(pairs.reward[:, 0], pairs.reward[:, 1])
    columns: dict[str, Any] = {"unit": pairs.index.long().numpy(), "pair_accuracy": scores.double().numpy()}
    longer = pairs.length[:, 0] > pairs.length[:, 1]
    table = pl.DataFrame(columns | {"chosen_longer": longer.numpy()})
    return table.with_columns(pl.col("pair_accuracy").fill_nan(None))


def _snake(name: str) -> str:
    return "".join(c if c.isalnum() else "_" for c in name.lower())
