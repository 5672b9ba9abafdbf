"""The full-size recipes on real simulators with small networks: a few hundred agent steps headless, by command."""

import json
import os

os.environ.setdefault("MUJOCO_GL", "egl")  # before mujoco is imported

import polars as pl
import pytest
from moezoo.cli import main

RECIPES = {
    "control/mentor_dmc": ("dm_control", 1000),  # frames of an episode
    "control/mentor_metaworld": ("metaworld", 500),
    "control/mentor_adroit": ("gymnasium_robotics", 200),
}
SMALL = {
    "model.model.hidden": 32,
    "model.model.expert_hidden": 16,
    "model.model.gate_hidden": 16,
    "model.model.channels": 4,
    "data.size": 36,
    "data.batch_size": 16,
    "data.capacity": 3000,
    "data.eval_episodes": 1,
    "data.test_episodes": 1,
    "trainer.accelerator": "cpu",
}


@pytest.mark.slow
@pytest.mark.parametrize("recipe", list(RECIPES))
def test_a_recipe_trains_headless(recipe, tmp_path):
    package, episode = RECIPES[recipe]
    pytest.importorskip(package, reason="the extra `control` is not installed")
    frames = episode + 400
    changes = SMALL | {"data.frames": frames, "data.eval_every": frames, "data.seed_frames": episode}
    words = [f"--{name}={value}" for name, value in changes.items()]
    assert main(["fit", "--config", recipe, "--run_dir", str(tmp_path / "run"), *words]) == 0
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    assert result["dataset"].endswith("_fast") and result["metrics"]["episode_length"] == episode // 2
    table = pl.read_csv(tmp_path / "run" / "metrics.csv", infer_schema_length=None)
    assert table["train/critic_loss"].drop_nulls().is_finite().all() and table["env/frame"].max() == frames
    assert (tmp_path / "run" / "pictures" / "episode.gif").stat().st_size > 10_000
