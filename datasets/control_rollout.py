"""Playing episodes: one environment that fills the replay, and several side by side that are only watched."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import gymnasium as gym
import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from .control_envs import Frame, split
from .control_replay import Observation, Replay

Policy = Callable[[Observation], Tensor]  # actions in [-1, 1], [batch, action]


@dataclass
class Episode:
    """One episode: undiscounted return and length (agent steps), whether it was a success (None: no such notion),
    whether any of its actions was uniformly random.

    When recorded, `frames` holds the newest image before each step and after the last, `actions` and `rewards` the
    steps.
    """

    seed: int
    episode_return: float = 0.0
    length: int = 0
    success: bool | None = None
    random: bool = False
    frames: list[np.ndarray] = field(default_factory=list)
    actions: list[np.ndarray] = field(default_factory=list)
    rewards: list[float] = field(default_factory=list)


class Collector:
    """Plays one episode after the other into the replay and counts frames.

    `frame` is the one clock of a run: environment frames since its start, `action_repeat` for each agent step. Until
    `seed_frames` actions are uniformly random. Every episode is reset with a seed of its own; a resumed run resets the
    environment with the same seed and takes the same actions again, which brings back the state of any deterministic
    simulator.

    Args:
        env: a prepared environment.
        replay: where frames go.
        action_repeat: frames of an agent step.
        seed_frames: frames of random actions.
        reward_scale: what rewards are multiplied with on their way to the replay; returns stay as they are.
        success_after: see `OpenedEnv`.
        seed: of episodes and random actions.
    """

    def __init__(
        self,
        env: gym.Env[Any, Any],
        replay: Replay,
        action_repeat: int,
        seed_frames: int,
        reward_scale: float,
        success_after: int | None,
        seed: int,
    ) -> None:
        self.env, self.replay = env, replay
        self.action_repeat, self.seed_frames, self.reward_scale = action_repeat, seed_frames, reward_scale
        self.success_after, self.seed = success_after, seed
        self.generator = torch.Generator().manual_seed(seed)
        self.frame = 0
        self.finished = 0  # episodes
        self.taken: list[Tensor] = []  # actions of the present episode
        self._return, self._successes, self._begun = 0.0, 0, False

    def step(self, policy: Policy) -> Episode | None:
        """One agent step; the episode if it has ended with it."""
        if not self._begun:
            self._begin(write=True)
        action = self._random() if self.frame < self.seed_frames else policy(self.replay.latest())[0].float().cpu()
        self.taken.append(action)
        ended = self._act(action, write=True)
        self.frame += self.action_repeat
        if not ended:
            return None
        success = None if self.success_after is None else self._successes >= self.success_after
        random = self.frame - len(self.taken) * self.action_repeat < self.seed_frames
        episode = Episode(self.seed + self.finished, self._return, len(self.taken), success, random)
        self.finished += 1
        self._begun = False
        return episode

    def state_dict(self, with_replay: bool) -> dict[str, Any]:
        """Clock, draws and the present episode; `with_replay` all frames too."""
        taken = torch.stack(self.taken) if self._begun and self.taken else torch.zeros(0)
        own = {"frame": self.frame, "finished": self.finished, "seed": self.seed, "begun": self._begun, "taken": taken}
        own["generator"] = self.generator.get_state()
        return own | ({"replay": self.replay.state_dict()} if with_replay else {})

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where the other stopped; without its replay from the start of that episode."""
        self.frame, self.finished, self.seed = state["frame"], state["finished"], state["seed"]
        self.generator.set_state(state["generator"].cpu())
        self._begun = False
        if "replay" in state:
            self.replay.load_state_dict(state["replay"])
            if state["begun"]:
                self._begin(write=False)
                for action in state["taken"]:
                    self.taken.append(action)
                    self._act(action, write=False)

    def _begin(self, write: bool) -> None:
        observation, _ = self.env.reset(seed=self.seed + self.finished)
        self.taken, self._return, self._successes, self._begun = [], 0.0, 0, True
        if write:
            self.replay.begin(split(observation))

    def _act(self, action: Tensor, write: bool) -> bool:
        observation, reward, terminated, truncated, info = self.env.step(action.numpy())
        self._return += float(reward)
        self._successes += info["success_steps"]
        if write:
            frame = split(observation)
            self.replay.add(action, float(reward) * self.reward_scale, terminated, truncated, frame)
        return terminated or truncated

    def _random(self) -> Float[Tensor, " action"]:
        return torch.rand(self.replay.actions, generator=self.generator) * 2 - 1


def play(
    envs: Sequence[gym.Env[Any, Any]],
    seeds: Sequence[int],
    policy: Policy,
    frame_stack: int,
    success_after: int | None,
    device: torch.device | str = "cpu",
    record: bool = False,
) -> Iterator[Episode]:
    """An episode for each seed, as many side by side as there are environments; in the order of the seeds.

    Observations go to `device`; a policy that ignores its batch gives the same episodes for any number of
    environments.
    """
    for begin in range(0, len(seeds), len(envs)):
        some = seeds[begin : begin + len(envs)]
        yield from _side_by_side(envs[: len(some)], some, policy, frame_stack, success_after, device, record)


def _side_by_side(
    envs: Sequence[gym.Env[Any, Any]],
    seeds: Sequence[int],
    policy: Policy,
    frame_stack: int,
    success_after: int | None,
    device: torch.device | str,
    record: bool,
) -> list[Episode]:
    episodes, successes = [Episode(int(seed)) for seed in seeds], [0] * len(seeds)
    frames = [split(env.reset(seed=int(seed))[0]) for env, seed in zip(envs, seeds, strict=True)]
    history = [[frame] * frame_stack for frame in frames]
    going = set(range(len(envs)))
    while going:
        actions = policy(stacked(history, device)).float().cpu().numpy()
        for i in sorted(going):
            episode, before = episodes[i], history[i][-1]
            seen, reward, terminated, truncated, info = envs[i].step(actions[i])
            history[i] = [*history[i][1:], split(seen)]
            episode.episode_return += float(reward)
            episode.length += 1
            successes[i] += info["success_steps"]
            if record:
                episode.actions.append(actions[i].copy())
                episode.rewards.append(float(reward))
                if before.pixels is not None:
                    episode.frames.append(before.pixels)
            if terminated or truncated:
                going.discard(i)
                if success_after is not None:
                    episode.success = successes[i] >= success_after
                if record and (last := history[i][-1].pixels) is not None:
                    episode.frames.append(last)
    return episodes


def stacked(history: Sequence[Sequence[Frame]], device: torch.device | str = "cpu") -> Observation:
    """The last frames of several environments as observations."""
    pixels = [
        np.concatenate(images) for past in history if (images := [f.pixels for f in past if f.pixels is not None])
    ]
    states = [past[-1].state for past in history if past[-1].state is not None]
    return Observation(
        torch.from_numpy(np.stack(pixels)).to(device) if pixels else None,
        torch.from_numpy(np.stack(states)).to(device) if states else None,
    )
