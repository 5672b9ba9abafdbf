"""Relations in video: focal losses for classes and predicates, association over windows, the field's metrics."""

from collections.abc import Mapping, Sequence
from inspect import signature
from pathlib import Path
from typing import Any, NamedTuple

import polars as pl
import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from pytorch_lightning.cli import LRSchedulerCallable, OptimizerCallable
from torch import Tensor, nn

from ..datasets.relations_table import Clip, Relation, RelationSet, Triplet, as_set
from ..datasets.relations_windows import RelationBatch, Windows
from ..errors import UserError
from ..zoo.core import Routing
from ..zoo.moevrd import Labels, RelationOutput
from .base import BaseTask, MetricInfo, TestResult
from .relations_association import Candidates, ScoreOf, associate, by_clip, candidates, suppress
from .relations_eval import RETURNS, TAGS, Dialect, RelationScores, evaluate, evaluate_zero_shot

_SCHEMA = {"objects": ["object"], "predicates": ["predicate"]}


class Tested(NamedTuple):
    """The last test: the clips, what was predicted of each, scores, and who decided.

    `usage` is the share of each domain's pairs that each expert decides with others; empty for one expert.
    """

    clips: Sequence[Clip]
    predictions: RelationSet
    scores: RelationScores
    usage: Float[Tensor, "domains experts"]
    domains: list[int]


class _Pairs(NamedTuple):
    """Of each pair: row, domain, whether subject and object are right (NaN if unknown), the experts' weights."""

    pair: Int[Tensor, " pairs"]
    domain: Int[Tensor, " pairs"]
    right: Float[Tensor, "pairs 2"]
    gates: Float[Tensor, "pairs experts"]


class RelationsTask(BaseTask):
    """Trains and tests any model whose forward takes `subject`, `object`, `position` and gives a `RelationOutput`.

    The datamodule (`RelationsData`) is asked for windows and annotations of the split that is evaluated.

    Args:
        model: a relations model of the zoo.
        optimizer: factory for the optimiser.
        lr_scheduler: factory for the scheduler.
        focal: exponent gamma of the focal losses; 0 is cross-entropy.
        preference_decay: weight decay of preference matrices, whatever that of the rest.
        class_threshold: what classes of a triplet must exceed.
        predicate_threshold: what its predicate must exceed.
        link: overlap from which a window's relation goes on with that of the window before.
        score: of a relation over windows: `sum` or `mean`.
        dialect: of the evaluator: `exact`, `helper` or `legacy_normalized`.
        schema: the data's schema, linked by the command line.

    Raises:
        UserError: a threshold outside [0, 1), a negative exponent or decay.
    """

    mode = "max"
    headline = "map"
    monitor = "val/map"

    def __init__(
        self,
        model: nn.Module,
        optimizer: OptimizerCallable = torch.optim.Adam,
        lr_scheduler: LRSchedulerCallable | None = None,
        focal: float = 2.0,
        preference_decay: float = 0.01,
        class_threshold: float = 0.2,
        predicate_threshold: float = 0.2,
        link: float = 0.5,
        score: ScoreOf = "sum",
        dialect: Dialect = "exact",
        schema: dict[str, Any] | None = None,
    ) -> None:
        super().__init__(model, optimizer, lr_scheduler)
        for name, value in (("class_threshold", class_threshold), ("predicate_threshold", predicate_threshold)):
            if not 0 <= value < 1:
                raise UserError(f"model.{name}={value}: expected 0 <= {name} < 1")
        if not 0 <= link < 1:
            raise UserError(f"model.link={link}: expected 0 <= link < 1")
        if focal < 0 or preference_decay < 0:
            raise UserError(f"model.focal={focal}, model.preference_decay={preference_decay}: expected 0 or more")
        self.focal, self.preference_decay = focal, preference_decay
        self.class_threshold, self.predicate_threshold = class_threshold, predicate_threshold
        self.link, self.score, self.dialect = link, score, dialect
        self.schema: Mapping[str, Any] = schema or _SCHEMA
        self.inputs = [name for name in signature(model.forward).parameters if name in RelationBatch._fields]
        self._found: list[Candidates] = []
        self._pairs: list[_Pairs] = []

    def forward(self, batch: RelationBatch) -> RelationOutput:
        """The model's output for what is seen; it is shown no label."""
        output: RelationOutput = self.model(**{name: getattr(batch, name) for name in self.inputs})
        return output

    def configure_optimizers(self) -> Any:
        """The injected optimiser; preference matrices have a weight decay of their own."""
        preferences = getattr(self.model, "preferences", None)
        own = list(preferences.parameters()) if isinstance(preferences, nn.Module) else []
        ids = {id(parameter) for parameter in own}
        groups: list[dict[str, Any]] = [{"params": [p for p in self.model.parameters() if id(p) not in ids]}]
        if own:
            groups.append({"params": own, "weight_decay": self.preference_decay})
        return self.optimise(groups)

    def on_fit_start(self) -> None:
        """Models with frequencies for preferences count the training pairs first."""
        count = getattr(self.model, "count_triplets", None)
        if callable(count):
            count(self._data.train_dataloader())

    def training_step(self, batch: RelationBatch, batch_idx: int) -> Tensor:
        labels = Labels(batch.subject_class, batch.object_class, batch.predicate)
        output = self.model(**{name: getattr(batch, name) for name in self.inputs}, labels=labels)
        losses = {
            "subject": class_loss(output.subject, labels.subject, self.focal),
            "object": class_loss(output.object, labels.object, self.focal),
            "predicate": predicate_loss(output.predicate, labels.predicate, self.focal),
        }
        loss: Tensor = torch.stack(list(losses.values())).sum() + self.record(output.routing)
        size = len(batch.pair)
        self.log("train/loss", loss, prog_bar=True, batch_size=size)
        for name, value in losses.items():
            self.log(f"train/{name}", value, on_step=False, on_epoch=True, batch_size=size)
        return loss

    def validation_step(self, batch: RelationBatch, batch_idx: int) -> None:
        self._collect(batch)

    def on_validation_epoch_end(self) -> None:
        _, scores, pairs = self._evaluate("valid")
        for name in ("map", "recall_at_50", "precision_at_1"):
            self.log(f"val/{name}", scores.metrics[name], prog_bar=name == "map", sync_dist=True)
        self.log("val/object_accuracy", float(pairs.right.nanmean()), prog_bar=True, sync_dist=True)

    def test_step(self, batch: RelationBatch, batch_idx: int) -> None:
        self._collect(batch)

    def on_test_epoch_end(self) -> None:
        predictions, scores, pairs = self._evaluate("test")
        clips = self._data.clips("test")
        domains, usage = expert_usage(pairs.gates, pairs.domain)
        self.tested = Tested(clips, predictions, scores, usage, domains)
        self.result = self._result(self.tested, pairs, self._data.train_triplets)
        self.log_dict({f"test/{name}": value for name, value in self.result.metrics.items()}, sync_dist=True)

    def predict_step(self, batch: RelationBatch, batch_idx: int) -> pl.DataFrame:
        """One row a triplet of a window, best first: clip, frames [begin, end) of the window, subject, predicate,
        object (names), score, the tracklets' first frames and boxes (pixels, four numbers a frame), gates."""
        output = self(batch)
        windows = self._data.windows("test")
        found = suppress(self._candidates(batch, output), windows)
        named = by_clip(found, windows, self.schema["objects"], self.schema["predicates"])
        relations = [r for _, some in sorted(named.items()) for window in some for r in window]
        window = windows.pair_window.cpu()[found.pair]
        begin = windows.window_begin.cpu()[window]
        row = torch.full((int(batch.pair.max()) + 1,), -1).index_put((batch.pair.cpu(),), torch.arange(len(batch.pair)))
        gates = gate_weights(output.routing, len(batch.pair)).cpu()[row[found.pair]]
        columns: dict[str, Any] = {
            "clip": windows.clip.cpu()[window].numpy(),
            "begin": begin.numpy(),
            "end": (begin + self.schema["window"]).numpy(),
            **dict(
                zip(("subject", "predicate", "object"), zip(*(r.triplet for r in relations), strict=True), strict=True)
            ),
            "score": found.score.double().numpy(),
            "subject_begin": [r.subject.begin for r in relations],
            "object_begin": [r.object.begin for r in relations],
            "subject_boxes": [r.subject.boxes.ravel().tolist() for r in relations],
            "object_boxes": [r.object.boxes.ravel().tolist() for r in relations],
        }
        columns |= {f"gate_{e}": values.double().numpy() for e, values in enumerate(gates.unbind(1))}
        return pl.DataFrame(columns, schema_overrides=_PREDICTED)

    def value_names(self, field: str) -> list[str] | None:
        """The classes of objects, background last."""
        return [*self.schema["objects"], "background"] if field in ("subject_class", "object_class") else None

    def draw(self, folder: Path) -> list[Path]:
        """Relations over time, average precision of each predicate, and which expert each domain uses."""
        from . import relations_plots

        return relations_plots.draw(self.tested, folder)

    @property
    def _data(self) -> Any:
        """The datamodule, which has windows and annotations."""
        return self.trainer.datamodule  # type: ignore[attr-defined]

    def _candidates(self, batch: RelationBatch, output: RelationOutput) -> Candidates:
        found = candidates(
            output.subject.float().exp(),
            output.predicate.float().sigmoid(),
            output.object.float().exp(),
            batch.window,
            self.class_threshold,
            self.predicate_threshold,
        )
        return found._replace(pair=batch.pair[found.pair])

    def _collect(self, batch: RelationBatch) -> None:
        output = self(batch)
        self.record(output.routing)
        self._found.append(Candidates(*(values.cpu() for values in self._candidates(batch, output))))
        classes = torch.stack([batch.subject_class, batch.object_class], 1)
        guess = torch.stack([output.subject.argmax(1), output.object.argmax(1)], 1)
        right = (guess == classes).float().masked_fill(classes < 0, torch.nan)
        gates = gate_weights(output.routing, len(batch.pair))
        self._pairs.append(_Pairs(*(values.detach().cpu() for values in (batch.pair, batch.domain, right, gates))))

    def _evaluate(self, split: str) -> tuple[RelationSet, RelationScores, _Pairs]:
        """Predictions, scores and pairs of all batches and processes, each pair once."""
        parts = [self._found], [self._pairs]
        self._found, self._pairs = [], []
        if self.trainer.world_size > 1:
            parts = tuple(_gathered(part[0], self.trainer.world_size) for part in parts)  # type: ignore[assignment]
        found = Candidates(*(torch.cat(values) for values in zip(*(c for some in parts[0] for c in some), strict=True)))
        pairs = _Pairs(*(torch.cat(values) for values in zip(*(p for some in parts[1] for p in some), strict=True)))
        pairs = _Pairs(*(values[_first_of_each(pairs.pair)] for values in pairs))
        windows: Windows = self._data.windows(split)
        key = torch.stack([found.pair, found.subject, found.predicate, found.object], 1)
        found = Candidates(*(values[_first_of_each(key)] for values in found))
        order = found.score.argsort(descending=True, stable=True)
        order = order[windows.pair_window.cpu()[found.pair[order]].argsort(stable=True)]
        found = suppress(Candidates(*(values[order] for values in found)), windows)
        clips: Sequence[Clip] = self._data.clips(split)
        named = by_clip(found, windows, self.schema["objects"], self.schema["predicates"])
        relations: dict[str, list[Relation]] = {clip.name: [] for clip in clips}
        for number, some in named.items():
            relations[clips[number].name] = associate(some, self.link, self.score)
        predictions = RelationSet(relations)
        return predictions, evaluate(as_set(clips), predictions, self.dialect), pairs

    def _result(self, tested: Tested, pairs: _Pairs, train: set[Triplet]) -> TestResult:
        scores, truth = tested.scores, as_set(tested.clips)
        videos, instances = scores.videos.height, int(scores.videos["instances"].sum())
        metrics, info = dict(scores.metrics), {}
        for name in metrics:
            info[name] = MetricInfo("max", n=instances if name.startswith("recall") else videos)
        metrics["predicate_map"] = scores.mean_predicate_ap
        info["predicate_map"] = MetricInfo("max", n=int((scores.predicates["instances"] > 0).sum()))
        for name, generalised in (("zero_shot_map", False), ("generalised_zero_shot_map", True)):
            new = evaluate_zero_shot(truth, tested.predictions, train, self.dialect, generalised=generalised)
            if new is not None:
                metrics[name], info[name] = new.metrics["map"], MetricInfo("max", n=new.videos.height)
        metrics["object_accuracy"] = float(pairs.right.nanmean())
        info["object_accuracy"] = MetricInfo("max", n=int((~pairs.right.isnan()).sum()))
        if tested.usage.numel():
            metrics["usage_std_over_domains"] = float(tested.usage.std(0, correction=0).mean())
            info["usage_std_over_domains"] = MetricInfo("max", n=len(tested.domains))
        names = {clip.name: number for number, clip in enumerate(tested.clips)}
        rows = scores.videos
        units = rows.select(
            unit=pl.col("video").replace_strict(names, return_dtype=pl.Int64),
            map=pl.col("ap"),
            **{f"recall_at_{k}": pl.col(f"hits_at_{k}") / pl.col("instances") for k in RETURNS},
            **{f"precision_at_{k}": pl.col(f"precision_at_{k}") for k in TAGS},
        )
        return TestResult(metrics, info, units)


_PREDICTED: Any = {
    "subject": pl.String,
    "predicate": pl.String,
    "object": pl.String,
    "subject_begin": pl.Int64,
    "object_begin": pl.Int64,
    "subject_boxes": pl.List(pl.Float64),
    "object_boxes": pl.List(pl.Float64),
}


def class_loss(
    log_probability: Float[Tensor, "pairs classes"], label: Int[Tensor, " pairs"], focal: float
) -> Float[Tensor, ""]:
    """Mean of `(1 - p)^focal · -log p` of the true class; the factor has no gradient (VidVRD-II's code)."""
    log_p = log_probability.float().gather(1, label[:, None])[:, 0]
    return -((1 - log_p.detach().exp()).clamp_min(0) ** focal * log_p).mean()


def predicate_loss(
    log_odds: Float[Tensor, "pairs predicates"], target: Float[Tensor, "pairs predicates"], focal: float
) -> Float[Tensor, ""]:
    """The same for each predicate on its own, mean over pairs and predicates."""
    each = F.binary_cross_entropy_with_logits(log_odds.float(), target.float(), reduction="none")
    return ((1 - (-each.detach()).exp()) ** focal * each).mean()


def gate_weights(routing: Mapping[str, Routing], pairs: int) -> Float[Tensor, "pairs experts"]:
    """The experts' weights of each pair; no columns for a model without a mixture."""
    for record in routing.values():
        return record.dense_weights().float()
    return torch.zeros(pairs, 0)


def expert_usage(
    gates: Float[Tensor, "pairs experts"], domain: Int[Tensor, " pairs"]
) -> tuple[list[int], Float[Tensor, "domains experts"]]:
    """The domains that occur, and the share of each one's pairs in which each expert has a say."""
    names = domain.unique()
    usage = torch.stack([(gates[domain == d] > 0).float().mean(0) for d in names])
    return names.tolist(), usage


def _first_of_each(keys: Int[Tensor, "rows *columns"]) -> Int[Tensor, " kept"]:
    """Rows of the first of equal keys, in order."""
    unique, inverse = torch.unique(keys, dim=0, return_inverse=True)
    first = torch.full((len(unique),), len(keys)).scatter_reduce(0, inverse, torch.arange(len(keys)), "amin")
    return first.sort().values


def _gathered(part: Any, world: int) -> list[Any]:
    every: list[Any] = [None] * world
    torch.distributed.all_gather_object(every, part)
    return every
