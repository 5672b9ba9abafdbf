"""Personalised ranking: losses over the candidates of a session, ranking metrics, long-tail slices."""

from collections.abc import Iterable
from inspect import signature
from pathlib import Path
from typing import Any, Literal, NamedTuple

import polars as pl
import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from pytorch_lightning.cli import LRSchedulerCallable, OptimizerCallable
from torch import Tensor, nn

from ..datasets.ranking import RankingBatch
from ..errors import UserError
from .base import BaseTask, MetricInfo, TestResult
from .ranking_metrics import SessionMetrics, grouped_auc, log_loss, mid_ranks, session_metrics

RankingLoss = Literal["pointwise", "listwise", "pairwise"]


class Scored(NamedTuple):
    """Scored sessions of a whole split, on the CPU."""

    scores: Float[Tensor, "batch cands"]
    labels: Float[Tensor, "batch cands"]
    mask: Bool[Tensor, "batch cands"]
    user: Int[Tensor, " batch"]
    session: Int[Tensor, " batch"]
    slices: Bool[Tensor, "batch slices"]
    length: Int[Tensor, " batch"]  # behaviour rows before the session
    group: Int[Tensor, " batch"]  # code of the first candidate in `picture_field`
    gate: Float[Tensor, "batch experts"]


class RankingTask(BaseTask):
    """Trains and tests any model whose forward takes fields of `RankingBatch` by name and returns logits.

    Args:
        model: a ranking model of the zoo.
        optimizer: factory for the optimiser; with sparse embeddings it gets the dense parameters.
        sparse_optimizer: factory for embedding tables with `sparse=True`.
        lr_scheduler: factory for the scheduler.
        loss: over a session's candidates: `listwise` (softmax cross-entropy), `pointwise` (binary
            cross-entropy) or `pairwise` (logistic on positive minus negative). After the first, a
            candidate's probability is its softmax share of the session, else the sigmoid of its score.
        monitor: validation metric that chooses the checkpoint; `gauc` for data with one candidate a row.
        schema: the data's schema, linked by the command line.
    """

    mode = "max"

    def __init__(
        self,
        model: nn.Module,
        optimizer: OptimizerCallable = torch.optim.Adam,
        sparse_optimizer: OptimizerCallable = torch.optim.SparseAdam,
        lr_scheduler: LRSchedulerCallable | None = None,
        loss: RankingLoss = "listwise",
        monitor: Literal["session_auc", "gauc"] = "session_auc",
        schema: dict[str, Any] | None = None,
    ) -> None:
        super().__init__(model, optimizer, lr_scheduler)
        self.loss_name, self.headline, self.monitor = loss, monitor, f"val/{monitor}"
        self.schema = schema or {"slices": [], "fields": [], "vocabulary": {}}
        self.sparse_optimizer_factory = sparse_optimizer
        self.inputs = [name for name in signature(model.forward).parameters if name in RankingBatch._fields]
        self.sparse = [m.weight for m in model.modules() if isinstance(m, nn.Embedding) and m.sparse]
        # Lightning steps one optimiser by itself; sparse tables need a second one.
        self.automatic_optimization = not self.sparse
        self.probabilistic = getattr(model, "probabilistic", True)
        self.picture_field = _picture_field(self.schema)
        self.group_names: list[str] = []
        self._scored: list[Scored] = []

    def forward(self, batch: RankingBatch) -> Any:
        """The model's output for the fields of the batch that its forward names."""
        return self.model(**{name: getattr(batch, name) for name in self.inputs})

    def configure_optimizers(self) -> Any:
        if not self.sparse:
            return self.optimise(self.parameters())
        if self.trainer.gradient_clip_val:
            raise UserError("trainer.gradient_clip_val: sparse gradients cannot be clipped; drop it or sparse: true")
        tables = {id(weight) for weight in self.sparse}
        rest = [p for p in self.parameters() if id(p) not in tables]
        return self.optimise(rest), {"optimizer": self.sparse_optimizer_factory(self.sparse)}

    def training_step(self, batch: RankingBatch, batch_idx: int) -> Tensor:
        output = self(batch)
        rank_loss = ranking_loss(output.scores, batch.labels, batch.candidate_mask, self.loss_name)
        loss = rank_loss + self.record(output.routing)
        self.log("train/loss", loss, prog_bar=True, batch_size=len(batch.user))
        self.log("train/rank_loss", rank_loss, batch_size=len(batch.user))
        if not self.automatic_optimization:
            self._step_all(loss)
        return loss

    def _step_all(self, loss: Tensor) -> None:
        optimizers: Any = self.optimizers()
        for optimizer in optimizers:
            optimizer.zero_grad()
        self.manual_backward(loss)
        for optimizer in optimizers:
            optimizer.step()

    def validation_step(self, batch: RankingBatch, batch_idx: int) -> None:
        self._collect(batch)

    def on_validation_epoch_end(self) -> None:
        scored = self._take()
        metrics = _overall(scored)
        metrics["session_auc"] = float(session_metrics(*scored[:3]).session_auc.nanmean())
        if metrics[self.headline] != metrics[self.headline] and not self.trainer.sanity_checking:
            raise UserError(
                f"{self.monitor} is undefined: no validation "
                + (
                    "session has both a positive and a negative candidate; for data with one candidate a row set "
                    "--model.monitor gauc --model.loss pointwise"
                    if self.headline == "session_auc"
                    else "user has both a positive and a negative candidate"
                )
            )
        for name in ("session_auc", "gauc", "logloss"):
            self.log(f"val/{name}", metrics[name], prog_bar=name == self.headline, sync_dist=True)

    def on_test_start(self) -> None:
        data: Any = getattr(self.trainer, "datamodule", None)
        if self.picture_field is not None and hasattr(data, "names"):
            self.group_names = data.names(self.schema["fields"][self.picture_field])

    def test_step(self, batch: RankingBatch, batch_idx: int) -> None:
        self._collect(batch)

    def on_test_epoch_end(self) -> None:
        self.tested = self._take()
        self.result = evaluate(self.tested, self.schema["slices"], logloss=self.probabilistic)
        self.log_dict({f"test/{name}": value for name, value in self.result.metrics.items()}, sync_dist=True)

    def logits(self, output: Any, mask: Bool[Tensor, "batch cands"]) -> Float[Tensor, "batch cands"]:
        """Scores as log-odds in float64, so that they compare across sessions; their order within one stays."""
        scores: Tensor = output.scores.double()
        if self.loss_name != "listwise" or not self.probabilistic:
            return scores
        log_p = scores.masked_fill(~mask, -torch.inf).log_softmax(-1).clamp(min=-700)
        rest = (-log_p.exp()).clamp(min=-1 + 1e-15)
        return (log_p - torch.log1p(rest)).masked_fill(~mask, 0.0)

    def predict_step(self, batch: RankingBatch, batch_idx: int) -> pl.DataFrame:
        """One row a candidate: session, place, rank (1 is best), score (log-odds) and probability."""
        mask = batch.candidate_mask
        scores = self.logits(self(batch), mask)
        place = torch.arange(scores.shape[1], device=scores.device).expand_as(scores)
        columns = {
            "session": batch.session.unsqueeze(1).expand_as(scores),
            "place": place,
            "rank": mid_ranks(scores, mask),
            "score": scores,
            "probability": scores.sigmoid(),
        }
        return pl.DataFrame({name: values[mask].cpu().numpy() for name, values in columns.items()})

    def value_names(self, field: str) -> list[str] | None:
        """Those of the data's vocabulary; known after a test, as the datamodule is."""
        name, _, column = field.partition(":")
        known = {"candidates": "fields", "query": "query"}.get(name)
        data: Any = getattr(self.trainer, "datamodule", None)
        if known is None or data is None:
            return None
        names: list[str] = data.names(self.schema[known][int(column or 0)])
        return names

    def draw(self, folder: Path) -> list[Path]:
        """AUC by history length, and who the gate listens to in each category."""
        from . import ranking_plots

        return ranking_plots.draw(self.tested, self.group_names, folder)

    def _collect(self, batch: RankingBatch) -> None:
        output = self(batch)
        self.record(output.routing)
        gates = [record.weights for record in output.routing.values()]
        field = self.picture_field
        self._scored.append(
            Scored(
                scores=self.logits(output, batch.candidate_mask).cpu(),
                labels=batch.labels.cpu(),
                mask=batch.candidate_mask.cpu(),
                user=batch.user.cpu(),
                session=batch.session.cpu(),
                slices=batch.slices.cpu(),
                length=batch.length.cpu(),
                group=(batch.user * 0 if field is None else batch.candidates[:, 0, field]).cpu(),
                gate=(gates[0].float() if gates else output.scores.new_zeros(len(batch.user), 0)).cpu(),
            )
        )

    def _take(self) -> Scored:
        """The collected sessions of all batches and processes, each once."""
        batches, self._scored = self._scored, []
        if self.trainer.world_size > 1:
            gathered: list[Any] = [None] * self.trainer.world_size
            torch.distributed.all_gather_object(gathered, batches)
            batches = [batch for part in gathered for batch in part]
        width = max(batch.scores.shape[1] for batch in batches)
        padded = [[_widen(v, width) if i < 3 else v for i, v in enumerate(batch)] for batch in batches]
        scored = Scored(*(torch.cat(values) for values in zip(*padded, strict=True)))
        # A distributed sampler repeats samples to fill the last batch: keep each session once.
        _, inverse = scored.session.unique(return_inverse=True)
        first = torch.full((int(inverse.max()) + 1,), len(inverse)).scatter_reduce(
            0, inverse, torch.arange(len(inverse)), "amin"
        )
        return Scored(*(values[first] for values in scored))


def ranking_loss(
    scores: Float[Tensor, "batch cands"],
    labels: Float[Tensor, "batch cands"],
    mask: Bool[Tensor, "batch cands"],
    kind: RankingLoss,
) -> Float[Tensor, ""]:
    """Mean loss over sessions (`pointwise`: over candidates); padded candidates take no part."""
    positive = (labels > 0) & mask
    if kind == "pointwise":
        return F.binary_cross_entropy_with_logits(scores[mask], positive[mask].to(scores.dtype))
    if kind == "listwise":
        log_p = scores.masked_fill(~mask, -torch.inf).log_softmax(-1)
        each = -log_p.masked_fill(~positive, 0.0).sum(-1) / positive.sum(-1).clamp(min=1)
    else:
        pairs = positive.unsqueeze(2) & (mask & ~positive).unsqueeze(1)
        cost = F.softplus(scores.unsqueeze(1) - scores.unsqueeze(2))
        each = (cost * pairs).sum((1, 2)) / pairs.sum((1, 2)).clamp(min=1)
    has = positive.any(-1)
    return (each * has).sum() / has.sum().clamp(min=1)


def evaluate(scored: Scored, slices: Iterable[str] = (), logloss: bool = True) -> TestResult:
    """Every leaderboard metric of scored sessions, overall and on each slice, and the per-session table.

    `logloss=False` leaves it out, for scores that are counts and no log-odds.
    """
    per_session = session_metrics(*scored[:3])
    table: dict[str, Any] = {"unit": scored.session.numpy()}
    table |= {name: _nan_to_null(values) for name, values in per_session._asdict().items()}
    metrics: dict[str, float] = {}
    info: dict[str, MetricInfo] = {}

    def add(values: SessionMetrics, suffix: str, rows: Bool[Tensor, " batch"]) -> None:
        for name, each in values._asdict().items():
            defined = each[rows][~each[rows].isnan()]
            if len(defined):
                metrics[name + suffix] = float(defined.mean())
                info[name + suffix] = MetricInfo("max", n=len(defined))

    add(per_session, "", torch.ones_like(scored.session, dtype=torch.bool))
    overall = _overall(scored)
    samples, users = int(scored.mask.sum()), int(overall.pop("users"))
    metrics |= overall
    info |= {"gauc": MetricInfo("max", n=users), "auc": MetricInfo("max", n=samples)}
    info |= {"logloss": MetricInfo("min", "nats", samples)}
    for i, name in enumerate(slices):
        table[name] = scored.slices[:, i].numpy()
        add(per_session, f"_{name}", scored.slices[:, i])
    undefined = {name for name, value in metrics.items() if value != value} | (set() if logloss else {"logloss"})
    metrics = {name: value for name, value in metrics.items() if name not in undefined}
    return TestResult(metrics, {name: info[name] for name in metrics}, pl.DataFrame(table))


def _overall(scored: Scored) -> dict[str, float]:
    """Metrics over all candidates: gAUC by user, AUC, logloss, and how many users have both classes."""
    scores, labels = scored.scores[scored.mask], scored.labels[scored.mask]
    users = grouped_auc(scores, labels, scored.user.unsqueeze(1).expand_as(scored.mask)[scored.mask])
    overall = grouped_auc(scores, labels, torch.zeros_like(labels, dtype=torch.long))
    return {
        "gauc": users.weighted(),
        "auc": overall.mean(),
        "logloss": log_loss(scores, labels),
        "users": float((~users.auc.isnan()).sum()),
    }


def _picture_field(schema: dict[str, Any]) -> int | None:
    """The item field with the most values that still fit a picture (at most 40)."""
    sizes = [schema["vocabulary"][name] for name in schema["fields"]]
    fits = [(size, i) for i, size in enumerate(sizes) if 4 < size <= 42]
    return max(fits)[1] if fits else None


def _widen(values: Tensor, width: int) -> Tensor:
    return F.pad(values, (0, width - values.shape[1]))


def _nan_to_null(values: Tensor) -> pl.Series:
    return pl.Series(values.numpy()).fill_nan(None)
