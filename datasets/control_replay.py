"""Replay memory of single frames: stacks and n-step returns are put together when a batch is drawn."""

from collections import deque
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from ..errors import UserError
from .control_envs import Frame


class Observation(NamedTuple):
    """What an agent acts on: the last frames one after the other in the channels, oldest first, and the state."""

    pixels: Tensor | None  # uint8 [batch, stack * channels, height, width]
    state: Tensor | None  # float32 [batch, state]


class ControlBatch(NamedTuple):
    """Transitions over n steps: `reward` is sum_i (prod_{j<i} gamma d_j) r_i, `discount` prod_i gamma d_i, d = 0 at
    termination and 1 elsewhere, truncation included. Actions lie in [-1, 1]."""

    observation: Observation
    action: Tensor  # float32 [batch, action]
    reward: Tensor  # float32 [batch]
    discount: Tensor  # float32 [batch]
    next_observation: Observation


class Replay:
    """A ring of frames, each stored once: a stack of k frames costs no more than one.

    A slot holds the frame at step t and the action, reward and termination that follow it. Batches come from finished
    episodes alone: an episode is drawn first, then a start in it (as in DrQ-v2). Windows of n steps stay inside an
    episode; a shorter episode is one window. Stacks reach back to the episode's first frame and repeat it.

    Args:
        capacity: frames; at least as many as two episodes have.
        pixels: (channels, height, width) of a frame, None for none.
        state: numbers of a state, 0 for none.
        action: numbers of an action.
        frame_stack: frames of an observation.
        n_step: steps of a return.
        gamma: discount of one step.
        device: where frames are kept and batches made.
        seed: of the draws.
    """

    def __init__(
        self,
        capacity: int,
        pixels: tuple[int, ...] | None,
        state: int,
        action: int,
        frame_stack: int = 3,
        n_step: int = 3,
        gamma: float = 0.99,
        device: torch.device | str = "cpu",
        seed: int = 0,
    ) -> None:
        self.capacity, self.frame_stack, self.n_step, self.gamma = capacity, frame_stack, n_step, gamma
        self.device, self.actions = torch.device(device), action
        self.frames = torch.empty((capacity, *pixels), dtype=torch.uint8, device=device) if pixels else None
        self.states = torch.zeros(capacity, state, device=device) if state else None
        self.records = torch.zeros(capacity, action + 2, device=device)  # action, reward, 0 where it terminated
        self.generator = torch.Generator(device).manual_seed(seed)
        self.written = 0  # frames ever; the slot of frame i is i modulo capacity
        self.start = 0  # of the episode now being written
        self.episodes: deque[tuple[int, int]] = deque()  # (first frame, steps) of finished episodes
        self.steps = 0  # of the finished episodes held
        self._table: Tensor | None = None

    @property
    def nbytes(self) -> int:
        """Bytes of the frames."""
        return 0 if self.frames is None else self.frames.numel()

    def begin(self, frame: Frame) -> None:
        """The first frame of an episode; an unfinished one before it is forgotten."""
        self.start = self.written
        self._write(frame)

    def add(
        self, action: Float[Tensor, " action"], reward: float, terminated: bool, truncated: bool, frame: Frame
    ) -> None:
        """One step: the action taken, its reward, how the episode goes on, and the frame it led to."""
        row = torch.cat([action.float().cpu(), torch.tensor([reward, float(not terminated)])])
        self.records[(self.written - 1) % self.capacity] = row.to(self.device)
        self._write(frame)
        if terminated or truncated:
            self.episodes.append((self.start, self.written - 1 - self.start))
            self.steps += self.episodes[-1][1]
            self._table = None

    def latest(self) -> Observation:
        """The newest observation, as a batch of one."""
        return self._observe(
            torch.tensor([self.written - 1], device=self.device), torch.tensor([self.start], device=self.device)
        )

    def sample(self, batch_size: int) -> ControlBatch:
        """A random batch.

        Raises:
            UserError: no episode is finished yet.
        """
        if not self.episodes:
            raise UserError("the replay holds no finished episode yet: collect more frames before learning")
        if self._table is None:
            self._table = torch.tensor(list(self.episodes), device=self.device)
        chosen = torch.randint(len(self._table), (batch_size,), generator=self.generator, device=self.device)
        start, steps = self._table[chosen].unbind(1)
        window = steps.clamp(max=self.n_step)
        where = torch.rand(batch_size, generator=self.generator, device=self.device, dtype=torch.float64)
        return self.at(start, start + (where * (steps - window + 1)).long(), window)

    def at(
        self, start: Int[Tensor, " batch"], first: Int[Tensor, " batch"], window: Int[Tensor, " batch"]
    ) -> ControlBatch:
        """Transitions from frame `first` over `window` steps, of episodes that begin at frame `start`."""
        ahead = torch.arange(self.n_step, device=self.device)
        rows = self.records[(first[:, None] + ahead) % self.capacity]
        inside = ahead < window[:, None]
        keep = torch.where(inside, self.gamma * rows[..., -1], 1.0)
        total = keep.cumprod(1)
        before = torch.cat([torch.ones_like(total[:, :1]), total[:, :-1]], 1)
        reward = (before * rows[..., -2] * inside).sum(1)
        both = self._observe(torch.cat([first, first + window]), torch.cat([start, start]))
        now, later = (Observation(*(None if x is None else x.chunk(2)[i] for x in both)) for i in (0, 1))
        return ControlBatch(now, rows[:, 0, : self.actions], reward, total[:, -1], later)

    def _observe(self, frame: Int[Tensor, " batch"], start: Int[Tensor, " batch"]) -> Observation:
        pixels = None
        if self.frames is not None:
            back = torch.arange(1 - self.frame_stack, 1, device=self.device)
            slots = (frame[:, None] + back).maximum(start[:, None]) % self.capacity
            pixels = self.frames.index_select(0, slots.flatten())
            pixels = pixels.view(len(frame), -1, *self.frames.shape[2:])
        return Observation(pixels, None if self.states is None else self.states[frame % self.capacity])

    def _write(self, frame: Frame) -> None:
        slot = self.written % self.capacity
        if self.written - self.start >= self.capacity:
            raise UserError(f"data.capacity={self.capacity}: an episode is longer; expected room for two at least")
        while self.episodes and self.episodes[0][0] + self.capacity <= self.written:
            self.steps -= self.episodes.popleft()[1]
            self._table = None
        if self.frames is not None:
            assert frame.pixels is not None
            self.frames[slot] = torch.as_tensor(frame.pixels).to(self.device)
        if self.states is not None:
            assert frame.state is not None
            self.states[slot] = torch.as_tensor(frame.state).to(self.device)
        self.written += 1

    def state_dict(self) -> dict[str, Any]:
        """All that is held, and the state of the draws."""
        held = min(self.written, self.capacity)
        tensors = {"frames": self.frames, "states": self.states, "records": self.records}
        return {
            "written": self.written,
            "start": self.start,
            "episodes": [list(episode) for episode in self.episodes],
            "generator": self.generator.get_state(),
            **{name: value[:held].cpu().clone() for name, value in tensors.items() if value is not None},
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a `state_dict` of a replay of the same sizes."""
        for name in ("frames", "states", "records"):
            mine = getattr(self, name)
            if mine is not None:
                mine[: len(state[name])] = state[name].to(self.device)
        self.written, self.start, self._table = state["written"], state["start"], None
        self.episodes = deque((first, steps) for first, steps in state["episodes"])
        self.steps = sum(steps for _, steps in self.episodes)
        self.generator.set_state(state["generator"].cpu())
