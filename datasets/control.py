"""Continuous control: environments that are stepped while learning, the replay they fill, fixed seeds to test on.

The datamodule knows no model: a task puts its policy into `policy`. An item of the train loader is `update_every`
agent steps taken with it, the episodes that ended, and a batch from the replay. An epoch is the frames between two
evaluations.
"""

import hashlib
import json
from collections.abc import Iterator, Sequence
from functools import cached_property
from typing import Any, Literal, NamedTuple

import gymnasium as gym
import polars as pl
import pytorch_lightning as lightning
import torch
from jaxtyping import Int
from torch import Tensor

from ..errors import UserError
from .control_envs import OpenedEnv, RenderQuality, open_env, sizes, split
from .control_replay import ControlBatch, Observation, Replay
from .control_rollout import Collector, Episode, Policy, play, stacked

VALIDATION_SEED, TEST_SEED, TRAIN_SEED = 1_000_000, 2_000_000, 3_000_000  # of the first episodes

__all__ = ["ControlBatch", "ControlData", "ControlStep", "Episode", "Episodes", "Observation"]


class ControlStep(NamedTuple):
    """What happened between two updates: the clock (frames), the episodes that ended, and what to learn from; no
    batch while the replay holds too little."""

    frame: int
    episodes: list[Episode]
    batch: ControlBatch | None


class Episodes(NamedTuple):
    """Episodes to be played: the seeds they are reset with."""

    seed: Int[Tensor, " episodes"]


class ControlData(lightning.LightningDataModule):
    """An environment to learn in and fixed episodes to validate and test on.

    Args:
        env: `pixel_pendulum`; `gym:<id>` (state; with options `{pixels: true}` what it draws); with the extra
            `control`: `dmc:<domain>-<task>`, `metaworld:<task>-v3`, `adroit:door`, `hammer`, `pen` or `relocate`.
        options: further arguments of the environment, e.g. `{angles: 720}`, `{sparse: true}`.
        size: side of an image in pixels.
        frame_stack: images of an observation, the oldest first.
        action_repeat: simulator steps (frames) of an agent step; their rewards are summed.
        reward_scale: factor on rewards for learning; returns are unscaled.
        n_step: agent steps of a return.
        gamma: discount of an agent step.
        capacity: frames of the replay.
        batch_size: transitions an update.
        frames: budget of a run in environment frames.
        seed_frames: frames of uniformly random actions before learning begins.
        eval_every: frames between two validations, an epoch.
        update_every: agent steps an update.
        eval_episodes: episodes of a validation.
        test_episodes: episodes of the test, with other seeds.
        parallel: environments side by side when validating and testing.
        replay_on: keep frames in main memory (`cpu`) or beside the model (`trainer`).
        save_replay: put the replay into checkpoints, for a bit-exact resume. Without it a resumed run collects
            `seed_frames` with its policy before it learns on.
        render_quality: simulators with GL: `fast` leaves out shadows, reflections and multisampling; `paper` does not.

    After `setup`: `collector`. `policy` has to be set before training.

    Raises:
        UserError: an environment that is not there, or frames that do not divide.
    """

    policy: Policy | None = None
    collector: Collector | None = None

    def __init__(
        self,
        env: str = "pixel_pendulum",
        options: dict[str, Any] | None = None,
        size: int = 40,
        frame_stack: int = 3,
        action_repeat: int = 2,
        reward_scale: float = 1.0,
        n_step: int = 3,
        gamma: float = 0.99,
        capacity: int = 100_000,
        batch_size: int = 256,
        frames: int = 10_000,
        seed_frames: int = 1_000,
        eval_every: int = 1_000,
        update_every: int = 2,
        eval_episodes: int = 10,
        test_episodes: int = 20,
        parallel: int = 10,
        replay_on: Literal["cpu", "trainer"] = "cpu",
        save_replay: bool = False,
        render_quality: RenderQuality = "fast",
    ) -> None:
        super().__init__()
        self.env, self.options, self.size = env, options or {}, size
        self.frame_stack, self.action_repeat, self.reward_scale = frame_stack, action_repeat, reward_scale
        self.n_step, self.gamma, self.capacity, self.batch_size = n_step, gamma, capacity, batch_size
        self.frames, self.seed_frames, self.eval_every, self.update_every = (
            frames,
            seed_frames,
            eval_every,
            update_every,
        )
        self.eval_episodes, self.test_episodes, self.parallel = eval_episodes, test_episodes, parallel
        self.replay_on, self.save_replay, self.render_quality = replay_on, save_replay, render_quality
        self._resumed: dict[str, Any] | None = None
        self._check()

    def _check(self) -> None:
        positive = ("size", "frame_stack", "action_repeat", "n_step", "capacity", "batch_size", "frames", "seed_frames")
        for name in (*positive, "eval_every", "update_every", "eval_episodes", "test_episodes", "parallel"):
            if getattr(self, name) < 1:
                raise UserError(f"data.{name}={getattr(self, name)}: expected 1 or more")
        if not 0 < self.gamma <= 1:
            raise UserError(f"data.gamma={self.gamma}: expected more than 0 and at most 1")
        item = self.action_repeat * self.update_every
        if self.eval_every % item or self.frames % self.eval_every:
            raise UserError(
                f"data.frames={self.frames}, data.eval_every={self.eval_every}: expected frames to be a multiple of "
                f"eval_every, and eval_every of action_repeat * update_every = {item}"
            )

    @cached_property
    def opened(self) -> OpenedEnv:
        return open_env(self.env, self.size, self.action_repeat, self.render_quality, self.options)

    @cached_property
    def watched(self) -> list[gym.Env[Any, Any]]:
        """Environments for validation and test; open until the process ends, as closing one can blacken others."""
        return [self.opened.make() for _ in range(min(self.parallel, max(self.eval_episodes, self.test_episodes)))]

    @cached_property
    def schema(self) -> dict[str, Any]:
        """What a model or task is built with (JSON-able): dataset, fingerprint, pixels ([channels, height, width] of a
        stacked observation or None), state and action (numbers), action_repeat, gamma, frames (the budget), eval_every,
        success (whether there is such a notion), render_quality."""
        env = self.watched[0]
        pixels, state = sizes(env.observation_space)
        shape = env.action_space.shape
        assert shape is not None
        content = {**self.opened.content, "repeat": self.action_repeat, "stack": self.frame_stack, "env": self.env}
        content |= {"test": [TEST_SEED, self.test_episodes]}
        quality = self.render_quality if self.opened.content.get("gl") else None
        return {
            "dataset": self.opened.name + (f"_{quality}" if quality else ""),
            "fingerprint": hashlib.sha256(json.dumps(content, sort_keys=True, default=str).encode()).hexdigest()[:32],
            "pixels": [pixels[0] * self.frame_stack, *pixels[1:]] if pixels else None,
            "state": state,
            "action": int(shape[0]),
            "action_repeat": self.action_repeat,
            "gamma": self.gamma,
            "frames": self.frames,
            "eval_every": self.eval_every,
            "success": self.opened.success_after is not None,
            "render_quality": quality,
        }

    def setup(self, stage: str) -> None:
        """Build the environment to learn in and its empty replay; seeds are drawn from torch's global generator."""
        if stage != "fit" or self.collector is not None:
            return
        env = self.opened.make()
        pixels, state = sizes(env.observation_space)
        seed, draws = torch.randint(2**30, (2,)).tolist()
        replay = Replay(
            self.capacity,
            pixels,
            state,
            self.schema["action"],
            self.frame_stack,
            self.n_step,
            self.gamma,
            self._device(),
            draws,
        )
        self.collector = Collector(
            env,
            replay,
            self.action_repeat,
            self.seed_frames,
            self.reward_scale,
            self.opened.success_after,
            TRAIN_SEED + seed,
        )
        if self._resumed is not None:
            self.collector.load_state_dict(self._resumed)
            self._resumed = None

    def _device(self) -> torch.device:
        if self.replay_on == "cpu" or self.trainer is None:
            return torch.device("cpu")
        return self.trainer.strategy.root_device

    @property
    def frame(self) -> int:
        """The clock: environment frames played for learning so far."""
        return 0 if self.collector is None else self.collector.frame

    def interact(self) -> ControlStep:
        """Take `update_every` agent steps, then draw a batch if enough episodes are finished."""
        if self.collector is None or self.policy is None:
            raise UserError("ControlData: call setup('fit') and set `policy` (a ControlTask does) before training")
        ended = [self.collector.step(self.policy) for _ in range(self.update_every)]
        replay = self.collector.replay
        held = min(replay.written, self.capacity) * self.action_repeat
        enough = held >= min(self.seed_frames, self.capacity * self.action_repeat)
        ready = enough and self.frame >= self.seed_frames and bool(replay.episodes)
        batch = replay.sample(self.batch_size) if ready else None
        return ControlStep(self.frame, [episode for episode in ended if episode is not None], batch)

    def play(self, seeds: Sequence[int], policy: Policy, device: Any = "cpu", record: bool = False) -> list[Episode]:
        """Episodes of `policy` from these seeds, which nothing is learned from."""
        chosen = self.watched[: self.parallel]
        after = self.opened.success_after
        return list(play(chosen, seeds, policy, self.frame_stack, after, device, record))

    def first(self, seeds: Sequence[int], device: Any = "cpu") -> Observation:
        """What is seen first in the episodes of these seeds."""
        frames = [split(self.watched[0].reset(seed=int(seed))[0]) for seed in seeds]
        return stacked([[frame] * self.frame_stack for frame in frames], device)

    def train_dataloader(self) -> "Interaction":
        """`ControlStep`s of one epoch."""
        return Interaction(self)

    def val_dataloader(self) -> "EpisodeLoader":
        return EpisodeLoader(VALIDATION_SEED, self.eval_episodes, self.parallel)

    def test_dataloader(self) -> "EpisodeLoader":
        return EpisodeLoader(TEST_SEED, self.test_episodes, self.parallel)

    def predict_dataloader(self) -> "EpisodeLoader":
        return self.test_dataloader()

    def decode(self, predictions: pl.DataFrame) -> pl.DataFrame:
        """Predictions bear no ids of ours: as they are."""
        return predictions

    def state_dict(self) -> dict[str, Any]:
        return {} if self.collector is None else {"collector": self.collector.state_dict(self.save_replay)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        if "collector" in state_dict:
            if self.collector is None:
                self._resumed = state_dict["collector"]
            else:
                self.collector.load_state_dict(state_dict["collector"])


class Interaction:
    """The train loader: of known length, so that Lightning never steps the environment ahead of an update."""

    batch_size = None

    def __init__(self, data: ControlData) -> None:
        self.data = data

    def __len__(self) -> int:
        return self.data.eval_every // (self.data.action_repeat * self.data.update_every)

    def __iter__(self) -> Iterator[ControlStep]:
        for _ in range(len(self)):
            yield self.data.interact()


class EpisodeLoader:
    """Seeds in a row, as many a batch as environments are played side by side."""

    batch_size = None

    def __init__(self, first: int, episodes: int, parallel: int) -> None:
        self.seeds = torch.arange(first, first + episodes).split(parallel)

    def __len__(self) -> int:
        return len(self.seeds)

    def __iter__(self) -> Iterator[Episodes]:
        return map(Episodes, self.seeds)
