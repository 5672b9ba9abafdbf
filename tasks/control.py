"""Continuous control: one clock of environment frames, evaluation on fixed episodes, curves in DrQ-v2's layout.

What an agent learns from a batch is in a subclass: `control_mentor` (MENTOR, DrM, DrQ-v2) and `control_pmoe` (SAC with
a mixture policy).
"""

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import polars as pl
import torch
from jaxtyping import Float
from pytorch_lightning.cli import LRSchedulerCallable, OptimizerCallable
from pytorch_lightning.trainer.states import TrainerFn
from torch import Tensor, nn

from ..datasets.control import ControlBatch, ControlData, ControlStep, Episode, Episodes, Observation
from ..errors import UserError
from .base import BaseTask, MetricInfo, TestResult

LOG_EVERY = 20  # updates; a log costs as much as a small layer
CURVE = ("agent", "task", "seed", "frame", "episode_reward", "success_rate", "hour")  # DrQ-v2's columns and ours


class ControlTask(BaseTask):
    """Plays, learns, is watched. Frames are environment frames everywhere: `action_repeat` for each agent step.

    The train loader's items are `ControlStep`s: before each, `ControlData` has taken agent steps with `explore`. A
    validation plays its episodes with `act` and adds a row to `eval.csv` of the run folder. The run stops when the
    frames of the data are spent.

    Args:
        model: an agent of the zoo: `model(pixels=, state=)` gives `action` and `routing`.
        optimizer: factory, called once for each part that has an optimiser of its own.
        lr_scheduler: not used: rates are constant.
        agent: name in the `agent` column of `eval.csv`.
        schema: the data's schema, linked by the command line.
    """

    monitor = "val/episode_return"
    mode = "max"
    headline = "episode_return"

    def __init__(
        self,
        model: nn.Module,
        optimizer: OptimizerCallable = torch.optim.Adam,
        lr_scheduler: LRSchedulerCallable | None = None,
        agent: str = "agent",
        schema: dict[str, Any] | None = None,
    ) -> None:
        super().__init__(model, optimizer, lr_scheduler)
        if lr_scheduler is not None:
            raise UserError("model.lr_scheduler: control trains at a constant rate; drop the scheduler")
        self.automatic_optimization = False
        self.agent, self.schema = agent, schema or {}
        self.updates = 0
        self.curve: list[dict[str, Any]] = []
        self.generator: torch.Generator | None = None  # of noise, augmentation and candidates
        self.played: list[Episode] = []
        self.shown: list[Episode] = []
        self._hours, self._since = 0.0, time.monotonic()
        self._resumed: dict[str, Any] = {}

    # What a subclass gives.

    def explore(self, observation: Observation) -> Float[Tensor, "batch action"]:
        """Actions with noise, to learn from."""
        raise NotImplementedError

    def update(self, batch: ControlBatch) -> dict[str, Tensor | float]:
        """Learn from a batch; returns what to log."""
        raise NotImplementedError

    def parts(self) -> dict[str, nn.Module]:
        """What has an optimiser of its own, in the order of `self.optimizers()`."""
        raise NotImplementedError

    def episode_ended(self, episode: Episode) -> None:
        """An episode has been played for learning."""

    def telemetry(self) -> dict[str, float]:
        """Further numbers that are logged with each validation."""
        return {}

    # Acting.

    @torch.no_grad()
    def act(self, observation: Observation) -> Float[Tensor, "batch action"]:
        """Greedy actions."""
        if self.model.training:
            self.model.eval()
        action: Tensor = self.model(**self._inputs(observation)).action
        return action

    def forward(self, batch: Episodes | Observation) -> Any:
        """The model's output for observations, or for the first ones of episodes."""
        if isinstance(batch, Episodes):
            batch = self.data.first(batch.seed.tolist(), self.device)
        return self.model(**self._inputs(batch))

    def _inputs(self, observation: Observation) -> dict[str, Tensor]:
        return {name: x.to(self.device) for name, x in observation._asdict().items() if x is not None}

    @property
    def data(self) -> ControlData:
        """The trainer's datamodule, which keeps the environments and the clock."""
        data = getattr(self.trainer, "datamodule", None)
        if not isinstance(data, ControlData):
            raise UserError("a control task learns with ControlData: pass it to the Trainer as datamodule=")
        return data

    def random(self, *shape: int) -> Float[Tensor, "..."]:
        """Normal numbers from the task's own generator."""
        return torch.randn(shape, generator=self.generator, device=self.device)

    # Learning.

    def configure_optimizers(self) -> Any:
        """The injected optimiser over each part."""
        return [self.optimizer_factory(part.parameters()) for part in self.parts().values()]

    def _optimizers(self) -> list[Any]:
        """One for each part."""
        found = self.optimizers()
        return list(found) if isinstance(found, list) else [found]

    def on_fit_start(self) -> None:
        self.generator = torch.Generator(self.device).manual_seed(int(torch.randint(2**62, ())))
        self.data.policy = self.explore

    def on_train_start(self) -> None:
        self._since = time.monotonic()
        if self._resumed:
            assert self.generator is not None
            self.generator.set_state(self._resumed["noise"].cpu())
            torch.set_rng_state(self._resumed["torch"].cpu())
            if "cuda" in self._resumed and torch.cuda.is_available():
                torch.cuda.set_rng_state(self._resumed["cuda"].cpu(), self.device)
            self._resumed = {}

    def training_step(self, batch: ControlStep, batch_idx: int) -> None:
        for episode in batch.episodes:
            self.episode_ended(episode)
            self.log("train/episode_return", episode.episode_return, prog_bar=True, batch_size=1)
        if batch.batch is None:
            return
        self.model.train()
        values = self.update(batch.batch)
        self.updates += 1
        if self.updates % LOG_EVERY == 1:
            self.log_dict({f"train/{name}": value for name, value in values.items()}, batch_size=1)

    def on_train_epoch_end(self) -> None:
        if self.data.frame >= self.data.frames:
            self.trainer.should_stop = True

    # Being watched.

    def validation_step(self, batch: Episodes, batch_idx: int) -> None:
        self.played += self.data.play(batch.seed.tolist(), self.act, self.device)

    def on_validation_epoch_end(self) -> None:
        episodes, self.played = self.played, []
        returns = mean_return(episodes)
        self.log("val/episode_return", returns, prog_bar=True)
        success = success_rate(episodes)
        if success is not None:
            self.log("val/success_rate", success, prog_bar=True)
        frame = float(self.data.frame)
        self.log_dict({"env/frame": frame, **{f"agent/{name}": value for name, value in self.telemetry().items()}})
        if self.trainer.sanity_checking or not self._fitting:
            return
        row = {"agent": self.agent, "task": self.schema.get("dataset", ""), "seed": self._seed(), "frame": int(frame)}
        row |= {"episode_reward": returns, "success_rate": success, "hour": self._spent()}
        self.curve.append(row)
        if (folder := self._run_folder()) is not None and self.trainer.is_global_zero:
            folder.mkdir(parents=True, exist_ok=True)
            write_curve(self.curve, folder / "eval.csv")

    def test_step(self, batch: Episodes, batch_idx: int) -> None:
        self.played += self.data.play(batch.seed.tolist(), self.act, self.device, record=batch_idx == 0)

    def on_test_epoch_end(self) -> None:
        episodes, self.played = self.played, []
        self.shown = [episode for episode in episodes if episode.actions]
        self.result = summarise(episodes, self.curve, self.schema.get("frames"))
        self.log_dict({f"test/{name}": value for name, value in self.result.metrics.items()})

    def predict_step(self, batch: Episodes, batch_idx: int) -> pl.DataFrame:
        """A row for each agent step of the test episodes: `seed` of the episode, `step`, `action_<i>`, `reward`,
        `episode_return` so far and `gate_<e>`, the weight of each expert."""
        weights: list[Tensor] = []

        def watch(observation: Observation) -> Tensor:
            output = self.model(**self._inputs(observation))
            weights.append(gates(output.routing, len(output.action)))
            action: Tensor = output.action
            return action

        seeds = batch.seed.tolist()
        self.model.eval()
        tables = []
        for i, episode in enumerate(self.data.play(seeds, watch, self.device, record=True)):
            actions = torch.tensor([list(map(float, action)) for action in episode.actions])
            used = torch.stack([step[i] for step in weights[: episode.length]])
            total = torch.tensor(episode.rewards, dtype=torch.float64).cumsum(0)
            columns: dict[str, Any] = {"seed": [episode.seed] * episode.length, "step": range(episode.length)}
            columns |= {f"action_{j}": values.numpy() for j, values in enumerate(actions.unbind(1))}
            columns |= {"reward": episode.rewards, "episode_return": total.numpy()}
            columns |= {f"gate_{e}": values.numpy() for e, values in enumerate(used.unbind(1))}
            tables.append(pl.DataFrame(columns))
        return pl.concat(tables)

    def draw(self, folder: Path) -> list[Path]:
        """A video and a strip of the first test episode, and the learning curve."""
        from . import control_plots

        return control_plots.draw(self.shown, self.curve, self.schema, folder)

    # Going on after an interruption.

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        assert self.generator is not None
        state = {"updates": self.updates, "hours": self._spent(), "curve": self.curve}
        state |= {"noise": self.generator.get_state(), "torch": torch.get_rng_state()}
        if self.device.type == "cuda":
            state["cuda"] = torch.cuda.get_rng_state(self.device)
        checkpoint["control"] = state

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        if self._trainer is not None and not self._fitting:  # weights to be tested: what was learned when stays
            return
        state = checkpoint["control"]
        self.updates, self._hours, self.curve = state["updates"], state["hours"], list(state["curve"])
        self._resumed = state

    def _spent(self) -> float:
        return self._hours + ((time.monotonic() - self._since) / 3600 if self._fitting else 0.0)

    @property
    def _fitting(self) -> bool:
        return self.trainer.state.fn == TrainerFn.FITTING

    def _seed(self) -> int:
        return int(self.schema.get("seed", torch.initial_seed() % 2**32))

    def _run_folder(self) -> Path | None:
        folder = getattr(self.trainer.logger, "log_dir", None)
        return None if folder is None else Path(folder)


def mean_return(episodes: Sequence[Episode]) -> float:
    """Mean undiscounted return."""
    return sum(episode.episode_return for episode in episodes) / max(len(episodes), 1)


def success_rate(episodes: Sequence[Episode]) -> float | None:
    """Share of successful episodes; None where the environment has no notion of success."""
    known = [episode.success for episode in episodes if episode.success is not None]
    return sum(known) / len(known) if known else None


def summarise(
    episodes: Sequence[Episode], curve: Sequence[dict[str, Any]] = (), frames: int | None = None
) -> TestResult:
    """Mean and least return, success rate, how the run went, and every episode's return.

    `return_at_25`, `50`, `75` are mean returns of the last validation within that percentage of the budget, `frames`:
    how many frames a recipe needs.
    """
    returns = torch.tensor([episode.episode_return for episode in episodes], dtype=torch.float64)
    n = len(episodes)
    metrics = {"episode_return": float(returns.mean()), "return_worst": float(returns.min())}
    metrics["episode_length"] = sum(episode.length for episode in episodes) / n
    units = {"unit": [episode.seed for episode in episodes], "episode_return": returns.tolist()}
    if (rate := success_rate(episodes)) is not None:
        metrics["success_rate"] = rate
        units["success_rate"] = [float(bool(episode.success)) for episode in episodes]
    for percent in (25, 50, 75) if frames else ():
        within = [row["episode_reward"] for row in curve if row["frame"] * 100 <= percent * (frames or 0)]
        if within:
            metrics[f"return_at_{percent}"] = within[-1]
    unit = {"episode_length": "steps", "success_rate": ""}
    info = {name: MetricInfo("max", unit.get(name, "return"), n) for name in metrics}
    return TestResult(metrics, info, pl.DataFrame(units))


def gates(routing: dict[str, Any], batch: int) -> Float[Tensor, "batch experts"]:
    """Weight of every expert for each observation; no columns without experts."""
    for record in routing.values():
        weights: Tensor = record.dense_weights().float().cpu()
        return weights
    return torch.zeros(batch, 0)


def write_curve(rows: Sequence[dict[str, Any]], file: Path) -> None:
    """Evaluations as CSV in DrQ-v2's layout; `success_rate` only where there is one."""
    table = pl.DataFrame(rows, infer_schema_length=None).select(CURVE)
    if table["success_rate"].null_count() == len(table):
        table = table.drop("success_rate")
    partial = file.with_name(f".{file.name}.tmp")
    table.write_csv(partial)
    partial.replace(file)
