"""What changes in a router while it trains but is no gradient: the balancing bias, the temperature, the search."""

from typing import Any, Literal

import pytorch_lightning as lightning
from pytorch_lightning.callbacks import Callback
from torch import nn

from ..errors import UserError
from ..zoo.core import PermutationLearner, Router, update_router_bias


class RouterBias(Callback):
    """Moves the biases of all routers with `balance="bias"` after each optimiser step (Wang et al. 2024).

    The load is that of all the micro-batches of the step, on all ranks.
    """

    def __init__(self) -> None:
        self._step = 0

    def on_fit_start(self, trainer: lightning.Trainer, task: lightning.LightningModule) -> None:
        if not any(getattr(router, "balance", None) == "bias" for router in _routers(task)):
            raise UserError('RouterBias: the model has no router with balance="bias"; set it, or drop the callback')

    def on_train_start(self, trainer: lightning.Trainer, task: lightning.LightningModule) -> None:
        self._step = trainer.global_step

    def on_train_batch_end(self, trainer: lightning.Trainer, task: lightning.LightningModule, *_: Any) -> None:
        if trainer.global_step != self._step:  # gradients may accumulate over batches, or several optimisers step
            self._step = trainer.global_step
            update_router_bias(task)


class TemperatureSchedule(Callback):
    """Anneals the temperature of every router that has one, from `start` to the value it was built with.

    In training batches alone: validation, checkpoints and the loaded model always have the router's own
    temperature. At optimiser step t of T the value is `start + (own - start) t / (T - 1)` ("linear") or
    `start (own / start)^(t / (T - 1))` ("exponential"); it follows from the step, so a resumed run goes on
    where it stopped. Logged as `moe/temperature` if all routers share it.

    Args:
        start: the temperature of the first step.
        steps: T, the optimiser steps to anneal over; by default those of the whole run.
    """

    def __init__(
        self, start: float, kind: Literal["linear", "exponential"] = "linear", steps: int | None = None
    ) -> None:
        if start <= 0:
            raise UserError(f"start={start} must be positive")
        if kind not in ("linear", "exponential"):
            raise UserError(f"kind={kind!r} must be 'linear' or 'exponential'")
        if steps is not None and steps < 1:
            raise UserError(f"steps={steps} must be at least 1")
        self.start, self.kind, self.steps = start, kind, steps
        self._total = 1
        self._own: dict[Any, float] = {}  # by router

    def value(self, progress: float, end: float) -> float:
        """The temperature after `progress` in [0, 1] of the way to `end`."""
        if self.kind == "linear":
            return self.start + (end - self.start) * progress
        return float(self.start * (end / self.start) ** progress)

    def on_fit_start(self, trainer: lightning.Trainer, task: lightning.LightningModule) -> None:
        self._own = {}
        for router in _routers(task):
            if isinstance(temperature := getattr(router, "temperature", None), float | int):  # not a learned one
                self._own[router] = temperature
        if not self._own:
            raise UserError("TemperatureSchedule: no router of the model has a temperature; drop the callback")
        total = trainer.estimated_stepping_batches if self.steps is None else self.steps
        if total == float("inf"):
            raise UserError("TemperatureSchedule: the run has no end to anneal towards; give steps or max_steps")
        self._total = int(total)

    def on_train_batch_start(self, trainer: lightning.Trainer, task: lightning.LightningModule, *_: Any) -> None:
        step = trainer.global_step // max(len(trainer.optimizers), 1)  # Lightning counts each optimiser's steps
        progress = min(step / max(self._total - 1, 1), 1.0)
        for router, end in self._own.items():
            router.temperature = self.value(progress, end)
        if len(set(self._own.values())) == 1:
            task.log("moe/temperature", next(iter(self._own)).temperature)

    def on_train_batch_end(self, *_: Any) -> None:
        self._restore()

    def on_exception(self, *_: Any) -> None:
        self._restore()

    def _restore(self) -> None:
        for router, own in self._own.items():
            router.temperature = own


class PermutationSearch(Callback):
    """Leads every `PermutationLearner` of the model through its search in the first steps, then freezes it (COMET+).

    Args:
        share: of the run's optimiser steps; the authors take 0.01 to 0.1.
    """

    def __init__(self, share: float = 0.1) -> None:
        if not 0 < share <= 1:
            raise UserError(f"share={share} must lie in (0, 1]")
        self.share = share
        self._steps = 1.0
        self._learners: list[PermutationLearner] = []

    def on_fit_start(self, trainer: lightning.Trainer, task: lightning.LightningModule) -> None:
        self._learners = [part for part in task.modules() if isinstance(part, PermutationLearner)]
        if not self._learners:
            raise UserError("PermutationSearch: no router of the model has a permutation; drop the callback")
        if trainer.estimated_stepping_batches == float("inf"):
            raise UserError("PermutationSearch: the run has no end to take a share of; give max_steps or max_epochs")
        self._steps = self.share * trainer.estimated_stepping_batches

    def on_train_batch_start(self, trainer: lightning.Trainer, task: lightning.LightningModule, *_: Any) -> None:
        step = trainer.global_step // max(len(trainer.optimizers), 1)
        for learner in self._learners:
            learner.search(step / self._steps)

    def on_train_end(self, trainer: lightning.Trainer, task: lightning.LightningModule) -> None:
        for learner in self._learners:
            learner.freeze()


def _routers(module: nn.Module) -> list[Router]:
    return [part for part in module.modules() if isinstance(part, Router)]
