"""MuJoCo behind the control domain: dm_control, Meta-World and Adroit, rendered headless (extra `control`).

Nothing here is imported before it is asked for. Set `MUJOCO_GL=egl` (or osmesa) before the start on a machine without
a display. Versions matter: dm_control 1.0.28, mujoco 3.3.0, metaworld 3.1.1 and gymnasium-robotics 1.4.2 go together;
dm_control with mujoco 4, and Meta-World with any mujoco but 3.3.0, do not.
"""

from importlib import import_module
from importlib.metadata import version
from typing import Any

import gymnasium as gym
import numpy as np
from gymnasium.spaces import Box, Dict
from gymnasium.utils import seeding

from ..errors import UserError
from .control_envs import OpenedEnv, RenderQuality, prepare

# Of the released code: camera, rewards divided by, and more than so many successful steps of 200 are a success.
ADROIT = {
    "door": ("AdroitHandDoor-v1", 20.0, 25),
    "hammer": ("AdroitHandHammer-v1", 100.0, 25),
    "pen": ("AdroitHandPen-v1", 50.0, 20),
    "relocate": ("AdroitHandRelocate-v1", 30.0, 25),
}
CORNER = (0.75, 0.075, 0.7)  # where the released code puts Meta-World's camera corner2
PROPRIOCEPTION = 24  # numbers of the hand itself, first in Adroit's observations


def load(module: str, package: str) -> Any:
    """An optional module.

    Raises:
        UserError: it is not installed.
    """
    try:
        return import_module(module)
    except ModuleNotFoundError:
        raise UserError(f"{package} is not installed: pip install 'moezoo[control]'") from None


def simplify(model: Any, quality: RenderQuality) -> None:
    """Render without multisampling and with a small shadow map if quick images will do."""
    if quality == "fast":
        model.vis.quality.offsamples = 0
        model.vis.quality.shadowsize = 64


class MujocoPixels(gym.Wrapper[Any, Any, Any, Any]):
    """Observes what an own `mujoco.Renderer` sees, which other environments' closing cannot blacken.

    Args:
        env: has `unwrapped.model` and `unwrapped.data`.
        size: side of the image.
        camera: name of a camera, or an object that has been set up.
        quality: `fast` leaves out shadows, reflections and multisampling.
        state: what of the environment's observation goes along, None for nothing.
    """

    def __init__(
        self,
        env: gym.Env[Any, Any],
        size: int,
        camera: str | int,
        quality: RenderQuality,
        state: int | None = None,
    ) -> None:
        super().__init__(env)
        self.size, self.camera, self.quality, self.state = size, camera, quality, state
        pixels = Box(0, 255, (3, size, size), np.uint8)
        self.observation_space = (
            pixels if state is None else Dict({"pixels": pixels, "state": Box(-np.inf, np.inf, (state,), np.float32)})
        )
        self._renderer: Any = None

    def reset(self, **kwargs: Any) -> tuple[Any, dict[str, Any]]:
        observation, info = self.env.reset(**kwargs)
        return self._seen(observation), info

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        observation, reward, terminated, truncated, info = self.env.step(action)
        return self._seen(observation), float(reward), terminated, truncated, info

    def _seen(self, observation: Any) -> Any:
        simulator: Any = self.env.unwrapped
        if self._renderer is None or self._renderer.model is not simulator.model:
            mujoco = load("mujoco", "mujoco")
            simplify(simulator.model, self.quality)
            self._renderer = mujoco.Renderer(simulator.model, self.size, self.size)
            if self.quality == "fast":
                for flag in (mujoco.mjtRndFlag.mjRND_SHADOW, mujoco.mjtRndFlag.mjRND_REFLECTION):
                    self._renderer.scene.flags[flag] = 0
        self._renderer.update_scene(simulator.data, camera=self.camera)
        pixels = np.ascontiguousarray(self._renderer.render().transpose(2, 0, 1))
        if self.state is None:
            return pixels
        return {"pixels": pixels, "state": np.asarray(observation[: self.state], np.float32)}


class ScaledReward(gym.RewardWrapper[Any, Any]):
    """Rewards divided by a number, so that returns of Adroit are those of the published curves' scale."""

    def __init__(self, env: gym.Env[Any, Any], divisor: float) -> None:
        super().__init__(env)
        self.divisor = divisor

    def reward(self, reward: Any) -> float:
        return float(reward) / self.divisor


class ControlSuite(gym.Env[np.ndarray, np.ndarray]):
    """A task of dm_control's suite as a Gymnasium environment of pixels.

    An episode of a suite task ends by its time limit, which truncates; where the task itself ends it (discount 0) it
    terminates. `reset(seed)` seeds the task's own random state.
    """

    def __init__(self, domain: str, task: str, size: int, camera: int, quality: RenderQuality) -> None:
        suite = load("dm_control.suite", "dm_control")
        if (domain, task) not in suite.ALL_TASKS:
            near = ", ".join(f"{d}-{t}" for d, t in suite.ALL_TASKS if d == domain)
            raise UserError(f"data.env=dmc:{domain}-{task}: no such task; of {domain} there are: {near or 'none'}")
        self.simulator = suite.load(domain, task)
        self.size, self.camera, self.quality = size, camera, quality
        simplify(self.simulator.physics.model, quality)
        bounds = self.simulator.action_spec()
        self.action_space = Box(bounds.minimum.astype(np.float32), bounds.maximum.astype(np.float32), dtype=np.float32)
        self.observation_space = Box(0, 255, (3, size, size), np.uint8)

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[np.ndarray, dict[str, Any]]:
        super().reset(seed=seed)
        if seed is not None:
            self.simulator.task.random.seed(seed % 2**32)
        self.simulator.reset()
        return self._frame(), {}

    def step(self, action: np.ndarray) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        moment = self.simulator.step(action)
        terminated = bool(moment.last() and moment.discount == 0)
        return self._frame(), float(moment.reward or 0.0), terminated, bool(moment.last()) and not terminated, {}

    def _frame(self) -> np.ndarray:
        flags = {"shadow": False, "reflection": False} if self.quality == "fast" else {}
        image = self.simulator.physics.render(self.size, self.size, self.camera, render_flag_overrides=flags)
        frame: np.ndarray = np.ascontiguousarray(image.transpose(2, 0, 1))
        return frame


def open_dmc(task: str, size: int, action_repeat: int, quality: RenderQuality, camera: int | None = None) -> OpenedEnv:
    """`cartpole-swingup` and the like; camera 0, for quadrupeds 2."""
    domain, _, name = task.partition("-")
    name = name.replace("-", "_")
    chosen = (2 if domain == "quadruped" else 0) if camera is None else camera
    load("dm_control.suite", "dm_control")

    def make() -> gym.Env[Any, Any]:
        return prepare(ControlSuite(domain, name, size, chosen, quality), action_repeat)

    content = {"gl": True, "dm_control": version("dm_control"), "mujoco": version("mujoco"), "camera": chosen}
    return OpenedEnv(f"dmc_{domain}_{name}", make, None, content | {"size": size, "quality": quality})


def open_metaworld(task: str, size: int, action_repeat: int, quality: RenderQuality, sparse: bool = False) -> OpenedEnv:
    """`hammer-v3` and the like through camera corner2; `sparse` rewards success alone (1 or 0, our reading of the
    paper's sparse tasks, whose code is not released)."""
    load("metaworld", "metaworld")

    def make() -> gym.Env[Any, Any]:
        try:
            env: gym.Env[Any, Any] = gym.make("Meta-World/MT1", env_name=task, seed=0)
        except (KeyError, ValueError, AssertionError) as error:
            raise UserError(f"data.env=metaworld:{task}: no such task ({error}); they end in -v3") from None
        model = env.unwrapped.model  # type: ignore[attr-defined]
        model.cam_pos[model.camera("corner2").id] = CORNER
        env = SeededTask(env)
        seen = MujocoPixels(SuccessReward(env) if sparse else env, size, "corner2", quality)
        return prepare(seen, action_repeat)

    content = {"gl": True, "metaworld": version("metaworld"), "mujoco": version("mujoco"), "camera": list(CORNER)}
    name = f"metaworld_{task}" + ("_sparse" if sparse else "")
    return OpenedEnv(name, make, 1, content | {"size": size, "quality": quality, "sparse": sparse})


def open_adroit(
    task: str, size: int, action_repeat: int, quality: RenderQuality, camera: str = "vil_camera"
) -> OpenedEnv:
    """`door`, `hammer`, `pen`, `relocate`; pixels and the hand's own joints. Episodes are not those of the paper: it
    used version 0 and a camera that version 1 does not have."""
    if task not in ADROIT:
        raise UserError(f"data.env=adroit:{task}: expected one of {', '.join(ADROIT)}")
    robotics = load("gymnasium_robotics", "gymnasium-robotics")
    name, divisor, needed = ADROIT[task]

    def make() -> gym.Env[Any, Any]:
        gym.register_envs(robotics)
        env = ScaledReward(gym.make(name), divisor)
        return prepare(MujocoPixels(env, size, camera, quality, PROPRIOCEPTION), action_repeat)

    content = {"gl": True, "gymnasium_robotics": version("gymnasium-robotics"), "mujoco": version("mujoco")}
    return OpenedEnv(f"adroit_{task}", make, needed + 1, content | {"camera": camera, "size": size, "quality": quality})


class SuccessReward(gym.Wrapper[Any, Any, Any, Any]):
    """Reward 1 where the simulator calls a step a success, 0 elsewhere."""

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        observation, _, terminated, truncated, info = self.env.step(action)
        return observation, float(bool(info.get("success", 0.0))), terminated, truncated, info


class SeededTask(gym.Wrapper[Any, Any, Any, Any]):
    """Meta-World draws the task's goal before it seeds itself; here the seed comes first."""

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        if seed is not None:
            self.env.unwrapped.np_random = seeding.np_random(seed)[0]
        return self.env.reset(seed=seed, options=options)
