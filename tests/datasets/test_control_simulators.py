"""dm_control, Meta-World and Adroit, where the extra `control` is installed; else each test skips with a reason."""

import os

os.environ.setdefault("MUJOCO_GL", "egl")  # before mujoco is imported

import numpy as np
import pytest
import torch
from moezoo.datasets import control_simulators
from moezoo.datasets.control import ControlData
from moezoo.errors import UserError

SIMULATORS = {
    "dmc:cartpole-swingup": ("dm_control", 1, 500),
    "metaworld:hammer-v3": ("metaworld", 4, 250),
    "adroit:door": ("gymnasium_robotics", 28, 100),
}


def data(env, **changes):
    sizes = {"size": 32, "frames": 80, "eval_every": 80, "seed_frames": 20, "capacity": 2000, "parallel": 1}
    return ControlData(env, **sizes | {"eval_episodes": 1, "test_episodes": 1} | changes)


@pytest.fixture(params=list(SIMULATORS))
def simulator(request):
    pytest.importorskip(SIMULATORS[request.param][0], reason="the extra `control` is not installed")
    return request.param


@pytest.mark.slow
def test_frames_rewards_and_seeds(simulator):
    _, actions, _ = SIMULATORS[simulator]
    made = data(simulator)
    assert made.schema["action"] == actions and made.schema["render_quality"] == "fast"
    assert made.schema["dataset"].endswith("_fast") and made.schema["pixels"][1:] == [32, 32]
    first, again = (made.opened.make() for _ in range(2))
    seen, same = (env.reset(seed=3)[0] for env in (first, again))
    rng = np.random.default_rng(0)
    for _ in range(5):
        action = rng.uniform(-1, 1, actions).astype(np.float32)
        seen, reward, *_ = first.step(action)
        same, expected, *_ = again.step(action)
        assert reward == pytest.approx(expected, abs=1e-9), "the same seed and actions, the same episode"
    pixels = seen["pixels"] if isinstance(seen, dict) else seen
    others = same["pixels"] if isinstance(same, dict) else same
    assert pixels.std() > 1 and pixels.dtype == np.uint8
    np.testing.assert_array_equal(pixels, others)
    again.close()
    assert first.step(action)[0] is not None, "not blackened by the other's end"


@pytest.mark.slow
def test_paper_quality_differs_and_says_so(simulator):
    fast, paper = data(simulator), data(simulator, render_quality="paper")
    assert paper.schema["dataset"].endswith("_paper") and fast.schema["fingerprint"] != paper.schema["fingerprint"]
    images = [made.first([0]).pixels.float() for made in (fast, paper)]
    assert 0 < float((images[0] - images[1]).abs().mean()) < 40


def test_what_is_not_installed_is_named(monkeypatch):
    def gone(name):
        raise ModuleNotFoundError(name)

    monkeypatch.setattr(control_simulators, "import_module", gone)
    for env in ("dmc:cartpole-swingup", "metaworld:hammer-v3", "adroit:door"):
        with pytest.raises(UserError, match=r"is not installed: pip install 'moezoo\[control\]'"):
            _ = data(env).schema
    with pytest.raises(UserError, match="expected one of door, hammer, pen, relocate"):
        _ = data("adroit:kettle").schema


@pytest.mark.slow
def test_a_task_that_does_not_exist_is_told(simulator):
    kind = simulator.partition(":")[0]
    with pytest.raises(UserError, match=r"no such task|expected one of"):
        _ = data(f"{kind}:juggling-club").schema
    assert torch.is_tensor(data(simulator).first([1]).pixels)
