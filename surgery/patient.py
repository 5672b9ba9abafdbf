"""A trained recipe on the table: its task, its data, what its experts are asked, and what may be done to them."""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple

import torch
from pytorch_lightning.callbacks import Callback, ProgressBar
from torch import Tensor, nn

from .. import runs
from ..errors import UserError
from ..tasks.base import MetricInfo
from ..zoo.core import Experts, MLPExperts, Routing
from ..zoo.core.surgery import (
    OnlinePruning,
    average_experts,
    dense_mlps,
    expert_pools,
    quantise_experts,
    replaced,
    restored,
    routers_of,
    silenced_experts,
    switched_experts,
    watched_inputs,
)

CALIBRATION_TOKENS = 4096


class Calibration(NamedTuple):
    """Some inputs of a pool on validation data, and the weights that its routers gave."""

    x: Tensor
    weights: Tensor

    @property
    def load(self) -> Tensor:
        """Each expert's share of the weight."""
        weight = self.weights.abs().sum(0)
        return weight / weight.sum().clamp_min(1e-12)


class Call(NamedTuple):
    """One forward of the model on validation data: the loader's batch, the output, what the pool was asked in it."""

    batch: Any
    output: Any
    asked: list[Tensor]

    @property
    def records(self) -> list[Routing]:
        return list(getattr(self.output, "routing", {}).values())


class Patient:
    """The recipe with its trained weights, and a Trainer that leaves nothing behind."""

    def __init__(self, request: runs.Request) -> None:
        self.cli, self.trainer = runs.evaluation(request)
        bars: list[Any] = self.trainer.callbacks  # type: ignore[attr-defined]
        bars[:] = [callback for callback in bars if not isinstance(callback, ProgressBar)]  # a test each would flicker
        self.task = self.cli.model.eval()

    @property
    def headline(self) -> MetricInfo:
        """How to read the recipe's own metric; known after a test."""
        info: MetricInfo = self.task.result.info[self.task.headline]
        return info

    def test(self) -> dict[str, float]:
        """The recipe's test metrics of the model as it is now."""
        self.trainer.test(self.task, datamodule=self.cli.datamodule, verbose=False)
        self.task.eval()
        return dict(self.task.result.metrics)

    def named(self, kind: str, option: str, found: dict[str, Any], wanted: str | None) -> str:
        """The one of some parts of the model that is meant."""
        if not found:
            raise UserError(f"{self.cli.name}: the model has no {kind} to operate on")
        if wanted is None and len(found) > 1:
            raise UserError(f"{self.cli.name} has several: choose one with {option} {'|'.join(found)}")
        if wanted is not None and wanted not in found:
            raise UserError(f"{option} {wanted}: {self.cli.name} has {', '.join(found)}")
        return next(iter(found)) if wanted is None else wanted


class Mixture(Patient):
    """A patient with a pool of experts that is meant."""

    def __init__(self, request: runs.Request, pool: str | None) -> None:
        super().__init__(request)
        pools = expert_pools(self.task.model)
        self.name = self.named("stacked experts", "--pool", pools, pool)
        self.experts: Experts = pools[self.name]
        self.number = self.experts.num_experts
        self.routers = routers_of(self.task.model, self.experts)

    def watch(self, use: Callable[[Call], None]) -> None:
        """Validate, and show every forward of the model on the way."""
        watcher = _Batches()
        callbacks: list[Any] = self.trainer.callbacks  # type: ignore[attr-defined]
        callbacks.append(watcher)
        with watched_inputs(self.experts) as seen:

            def note(model: nn.Module, args: Any, output: Any) -> None:
                use(Call(watcher.batch, output, list(seen)))
                seen.clear()

            hook = self.task.model.register_forward_hook(note)
            try:
                self.trainer.validate(self.task, datamodule=self.cli.datamodule, verbose=False)
            finally:
                hook.remove()
                callbacks.remove(watcher)
                self.task.eval()

    def calibrate(self) -> Calibration:
        """The first `CALIBRATION_TOKENS` inputs of the pool on validation data, and their weights."""
        xs: list[Tensor] = []
        weights: list[Tensor] = []

        def keep(call: Call) -> None:
            for x in call.asked:
                if sum(map(len, xs)) >= CALIBRATION_TOKENS:
                    return
                weight = self._weights(call.records, x)
                routed = (weight != 0).any(1)
                xs.append(x[routed].clone())
                weights.append(weight[routed])

        self.watch(keep)
        if not sum(map(len, xs)):
            raise UserError(f"{self.cli.name}: no validation token reaches the experts of {self.name}")
        return Calibration(torch.cat(xs)[:CALIBRATION_TOKENS], torch.cat(weights)[:CALIBRATION_TOKENS])

    def _weights(self, records: Iterable[Routing], x: Tensor) -> Tensor:
        """What the records give the pool for its inputs x; all alike where no record is of this pool.

        A record may be of larger units than x, such as sessions of candidates: each then holds for all of its rows.
        """
        found = []
        for record in records:
            times = len(x) // max(len(record.scores), 1)
            if record.num_experts == self.number and times * len(record.scores) == len(x):
                found.append(record.dense_weights().detach().abs().repeat_interleave(times, 0).to(x.device))
        return torch.stack(found).sum(0) if found else x.new_ones(len(x), self.number)

    @contextmanager
    def switched(self, off: Sequence[int], on: Sequence[int] = ()) -> Iterator[None]:
        """Experts off or on: by their routers' masks; where the gate is no router, those off answer zero."""
        for expert in [*off, *on]:
            if not 0 <= expert < self.number:
                raise UserError(f"expert {expert}: {self.name} has experts 0 to {self.number - 1}")
        if set(off) & set(on) or len(set(off)) == self.number:
            raise UserError("an expert cannot be both off and on, and some expert must stay")
        if on and not self.routers:
            raise UserError(
                f"--on needs a router of the core, and {self.cli.name} has a gate of its own: use --off alone"
            )
        with ExitStack() as stack:
            if self.routers:
                masks = {
                    name: torch.zeros(self.number + router.num_extra, dtype=torch.int8)
                    for name, router in self.routers.items()
                }
                for mask in masks.values():
                    mask[list(off)], mask[list(on)] = -1, 1
                stack.enter_context(switched_experts(self.task.model, masks))
            else:
                stack.enter_context(silenced_experts(self.experts, list(off)))
            yield

    @contextmanager
    def rounded(self, bits: Sequence[int]) -> Iterator[None]:
        """Experts at so many bits each, and as they were after the block."""
        with restored(self.experts):
            quantise_experts(self.experts, bits)
            yield

    @contextmanager
    def merged(self, groups: Sequence[Sequence[int]], load: Tensor) -> Iterator[None]:
        """Each expert the average of its group, within the block: what a merged layer computes, whatever the gate."""
        averages = dict(average_experts(self.mlp_experts, groups, load).named_parameters())
        with restored(self.experts):
            with torch.no_grad():
                for name, parameter in self.experts.named_parameters():
                    for g, group in enumerate(groups):
                        parameter[list(group)] = averages[name][g]
            yield

    @contextmanager
    def pruned_online(self, beta: float, skip: float, spare: float) -> Iterator[Counter[str]]:
        """`OnlinePruning` before the pool, within the block; counts routed `tokens` and the `slots` left to them."""
        if not self.routers:
            raise UserError(f"{self.cli.name} has a gate of its own: pruning by token needs a router of the core")
        counted: Counter[str] = Counter()

        def tokens(router: nn.Module, args: Any, record: Routing) -> None:
            counted["tokens"] += int((record.indices >= 0).any(1).sum())

        def slots(router: nn.Module, args: Any, record: Routing) -> None:
            counted["slots"] += int((record.indices >= 0).sum())

        with ExitStack() as stack:
            for name, router in self.routers.items():
                wrapped = OnlinePruning(router, beta, skip, spare).eval()
                wrapped.register_forward_hook(slots)
                stack.callback(router.register_forward_hook(tokens).remove)
                stack.enter_context(replaced(self.task.model, name, wrapped))
            yield counted

    @property
    def mlp_experts(self) -> MLPExperts:
        if not isinstance(self.experts, MLPExperts):
            raise UserError(f"{self.name} of {self.cli.name} is {type(self.experts).__name__}: this needs MLPExperts")
        return self.experts


class Dense(Patient):
    """A patient without experts, and the MLP in it that is meant."""

    def __init__(self, request: runs.Request, part: str | None) -> None:
        super().__init__(request)
        mlps = dense_mlps(self.task.model)
        self.name = self.named("MLP with one hidden layer", "--part", mlps, part)
        self.mlp = mlps[self.name]


class _Batches(Callback):
    """Knows the batch that is being validated."""

    batch: Any = None

    def on_validation_batch_start(
        self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        self.batch = batch
