"""Environments of the control domain: one opened environment gives pixels, state or both, and takes actions in [-1, 1].

`open_env` knows them by name: `pixel_pendulum` needs gymnasium alone, `gym:<id>` any registered environment;
simulators with GL are in `control_simulators`.
"""

import hashlib
import importlib
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import gymnasium as gym
import numpy as np
from gymnasium.envs.classic_control.pendulum import PendulumEnv
from gymnasium.spaces import Box, Dict
from gymnasium.wrappers import RescaleAction, TimeLimit
from jaxtyping import UInt8

from ..errors import UserError

RenderQuality = Literal["fast", "paper"]
PENDULUM_STEPS = 200  # an episode of Pendulum-v1


class Frame(NamedTuple):
    """What is seen at one moment: an image, a vector of numbers, or both; unstacked."""

    pixels: np.ndarray | None  # uint8 [channels, height, width]
    state: np.ndarray | None  # float32 [state]


@dataclass(frozen=True)
class OpenedEnv:
    """An environment as the domain uses it.

    `name` is the dataset's on the leaderboard; `make` builds one instance, whose episodes end by time limit alone or
    by termination; an episode is a success after `success_after` successful simulator steps (None: the environment
    has no notion of success). `content` is what the fingerprint covers.
    """

    name: str
    make: Callable[[], gym.Env[Any, Any]]
    success_after: int | None
    content: dict[str, Any]


class PixelPendulum(gym.Env[np.ndarray, np.ndarray]):
    """Gymnasium's Pendulum-v1 seen as images: its dynamics and rewards, frames out of a table by angle.

    The action is the torque over its bound, in [-1, 1]. An image is the rod alone, grey on black; speed has to be
    read from several frames. No GL, no pygame.

    Args:
        size: side of the image in pixels.
        angles: images in the table; 720 are half a degree apart.
        table: `pendulum_frames(size, angles)`, to be shared by several environments.
    """

    metadata = {"render_modes": ["rgb_array"], "render_fps": 20}  # noqa: RUF012  Gymnasium's attribute
    render_mode = "rgb_array"

    def __init__(self, size: int = 40, angles: int = 720, table: np.ndarray | None = None) -> None:
        self.pendulum: Any = PendulumEnv()
        self.table = pendulum_frames(size, angles) if table is None else table
        self.action_space = Box(-1.0, 1.0, (1,), np.float32)
        self.observation_space = Box(0, 255, self.table.shape[1:], np.uint8)

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[np.ndarray, dict[str, Any]]:
        super().reset(seed=seed)
        self.pendulum.reset(seed=seed, options=options)
        return self._frame(), {}

    def step(self, action: np.ndarray) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        _, reward, terminated, truncated, info = self.pendulum.step(action * self.pendulum.max_torque)
        return self._frame(), float(reward), terminated, truncated, info

    def render(self) -> np.ndarray:
        """The image in colour, [height, width, 3]."""
        picture: np.ndarray = np.repeat(self._frame().transpose(1, 2, 0), 3, axis=2)
        return picture

    def _frame(self) -> np.ndarray:
        turn = float(self.pendulum.state[0]) / (2 * math.pi)
        frame: np.ndarray = self.table[round(turn * len(self.table)) % len(self.table)]
        return frame


def pendulum_frames(size: int, angles: int) -> UInt8[np.ndarray, "angles 1 size size"]:
    """A rod from the middle, upright at angle 0 and turning counter-clockwise, as in Gymnasium's picture."""
    if size < 8 or angles < 8:
        raise UserError(f"size={size}, angles={angles}: expected at least 8 of each")
    theta = np.arange(angles)[:, None, None] * (2 * np.pi / angles)
    place = (np.arange(size) + 0.5 - size / 2) / size  # of pixel centres, image widths from the middle
    right, up = place[None, None, :], -place[None, :, None]
    ahead_x, ahead_y = -np.sin(theta), np.cos(theta)
    length, radius = 0.42, 0.055
    along = np.clip(right * ahead_x + up * ahead_y, 0.0, length)
    distance = np.hypot(right - along * ahead_x, up - along * ahead_y)
    light = np.clip((radius - distance) * size + 0.5, 0.0, 1.0)  # one pixel of soft edge
    frames: np.ndarray = np.round(255 * light).astype(np.uint8)[:, None]
    return frames


class ActionRepeat(gym.Wrapper[Any, Any, Any, Any]):
    """Holds an action for `repeat` simulator steps, or until the episode ends, and sums their rewards.

    `info["success_steps"]` counts the simulator steps that called themselves a success.
    """

    def __init__(self, env: gym.Env[Any, Any], repeat: int) -> None:
        super().__init__(env)
        self.repeat = repeat

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        total, successes = 0.0, 0
        for _ in range(self.repeat):
            observation, reward, terminated, truncated, info = self.env.step(action)
            total += float(reward)
            successes += bool(info.get("success", info.get("is_success", False)))
            if terminated or truncated:
                break
        return observation, total, terminated, truncated, {**info, "success_steps": successes}


class RenderedPixels(gym.Wrapper[Any, Any, Any, Any]):
    """Observes what `render()` draws, made small by averaging; [3, size, size]."""

    def __init__(self, env: gym.Env[Any, Any], size: int) -> None:
        super().__init__(env)
        self.size = size
        self.observation_space = Box(0, 255, (3, size, size), np.uint8)

    def reset(self, **kwargs: Any) -> tuple[np.ndarray, dict[str, Any]]:
        _, info = self.env.reset(**kwargs)
        return self._picture(), info

    def step(self, action: Any) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        _, reward, terminated, truncated, info = self.env.step(action)
        return self._picture(), float(reward), terminated, truncated, info

    def _picture(self) -> np.ndarray:
        return shrink(np.asarray(self.env.render()), self.size)


def shrink(image: UInt8[np.ndarray, "height width 3"], size: int) -> UInt8[np.ndarray, "3 size size"]:
    """An image averaged down to a square, channel first."""
    if image.shape[:2] != (size, size):
        from PIL import Image

        image = np.asarray(Image.fromarray(image).resize((size, size), Image.Resampling.BOX))
    return np.ascontiguousarray(image.transpose(2, 0, 1))


class NoBlackFrames(gym.Wrapper[Any, Any, Any, Any]):
    """Refuses images of one colour: with EGL, closing one environment can silently turn all others black."""

    def reset(self, **kwargs: Any) -> tuple[Any, dict[str, Any]]:
        observation, info = self.env.reset(**kwargs)
        self._check(observation)
        return observation, info

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        observation, reward, terminated, truncated, info = self.env.step(action)
        self._check(observation)
        return observation, float(reward), terminated, truncated, info

    def _check(self, observation: Any) -> None:
        pixels = split(observation).pixels
        if pixels is not None and pixels.min() == pixels.max():
            raise UserError(
                f"{self.env.unwrapped}: rendered a frame of one colour ({pixels.flat[0]}); set MUJOCO_GL=egl or osmesa "
                "before the start, and keep every environment open while another of the process is used"
            )


def split(observation: Any) -> Frame:
    """An environment's observation as pixels and state: uint8 images, float vectors or `{pixels, state}`."""
    if isinstance(observation, dict):
        return Frame(observation["pixels"], np.asarray(observation["state"], np.float32).reshape(-1))
    array = np.asarray(observation)
    if array.dtype == np.uint8 and array.ndim == 3:
        return Frame(array, None)
    return Frame(None, array.astype(np.float32).reshape(-1))


def sizes(space: gym.Space[Any]) -> tuple[tuple[int, ...] | None, int]:
    """(channels, height, width) of the pixels or None, and how many numbers the state has."""
    if isinstance(space, Dict) and set(space.spaces) == {"pixels", "state"}:
        pixels, state = space["pixels"].shape, space["state"].shape
        assert pixels is not None and state is not None
        return tuple(pixels), math.prod(state)
    if isinstance(space, Box) and space.dtype == np.uint8 and len(space.shape) == 3:
        return tuple(space.shape), 0
    if isinstance(space, Box) and np.issubdtype(space.dtype, np.floating):
        return None, math.prod(space.shape)
    raise UserError(f"observation space {space}: expected images, a box of numbers, or a Dict of `pixels` and `state`")


def prepare(env: gym.Env[Any, Any], action_repeat: int, guard: bool = True) -> gym.Env[Any, Any]:
    """Actions in [-1, 1], repeated; pixels that are not black."""
    space = env.action_space
    if not isinstance(space, Box) or not np.isfinite([space.low, space.high]).all():
        raise UserError(f"action space {space}: expected bounded continuous actions")
    if (space.low != -1).any() or (space.high != 1).any():
        env = RescaleAction(env, np.float32(-1.0), np.float32(1.0))
    env = ActionRepeat(env, action_repeat)
    return NoBlackFrames(env) if guard and sizes(env.observation_space)[0] else env


def open_env(name: str, size: int, action_repeat: int, quality: RenderQuality, options: dict[str, Any]) -> OpenedEnv:
    """The environment of that name; see `ControlData` for names and options.

    Raises:
        UserError: an unknown name, options it does not take, or an extra that is not installed.
    """
    kind, _, task = name.partition(":")
    openers = {"pixel_pendulum": _open_pendulum, "gym": _open_gym}
    if kind in ("dmc", "metaworld", "adroit"):
        opener = getattr(importlib.import_module(".control_simulators", __package__), f"open_{kind}")
    elif kind in openers:
        opener = openers[kind]
    else:
        raise UserError(f"data.env={name}: expected pixel_pendulum, gym:<id>, dmc:<domain>-<task>, metaworld:, adroit:")
    try:
        opened: OpenedEnv = opener(task, size, action_repeat, quality, **options)
    except TypeError as error:
        raise UserError(f"data.env={name}, data.options={options}: {error}") from None
    return opened


def _open_pendulum(task: str, size: int, action_repeat: int, quality: RenderQuality, angles: int = 720) -> OpenedEnv:
    table = pendulum_frames(size, angles)

    def make() -> gym.Env[Any, Any]:
        return prepare(TimeLimit(PixelPendulum(size, angles, table), PENDULUM_STEPS), action_repeat, guard=False)

    digest = hashlib.sha256(table.tobytes()).hexdigest()[:16]
    content = {"gymnasium": gym.__version__, "size": size, "angles": angles, "frames": digest}
    return OpenedEnv("pixel_pendulum", make, None, content)


def _open_gym(
    task: str, size: int, action_repeat: int, quality: RenderQuality, pixels: bool = False, **options: Any
) -> OpenedEnv:
    """Any registered environment with continuous actions: its state, or what it draws."""
    if task not in gym.registry:
        raise UserError(f"data.env=gym:{task}: Gymnasium has no such environment; import its package first")

    def make() -> gym.Env[Any, Any]:
        env = gym.make(task, render_mode="rgb_array" if pixels else None, **options)
        return prepare(RenderedPixels(env, size) if pixels else env, action_repeat)

    content = {"gymnasium": gym.__version__, "id": task, "pixels": size if pixels else 0, "options": options}
    return OpenedEnv(task.lower().replace("/", "_") + ("_pixels" if pixels else ""), make, None, content)
