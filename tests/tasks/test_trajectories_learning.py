"""The fact sheet's learning checks (7.3, 4): minutes each, so `-m slow`."""

import importlib.util

import pytest
from moezoo import cli, settings
from moezoo.leaderboard.results import Result


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("libsumo") is None, reason="no libsumo")
def test_the_default_run_beats_the_rules(tmp_path, monkeypatch):
    monkeypatch.setenv("MOEZOO_CACHE", str(tmp_path / "cache"))
    found = {}
    for recipe in ("tmmoe", "constant_velocity", "lateral_rule"):
        run = tmp_path / recipe
        assert cli.main(["fit", "--config", f"trajectories/{recipe}", "--run_dir", str(run)]) == 0
        found[recipe] = Result.read(run / "result.json").metrics
    ours = found["tmmoe"]
    assert ours["ade"] <= 0.83 and ours["macro_f1"] >= 0.70 and min(ours["f1_left"], ours["f1_right"]) >= 0.55
    assert ours["ade"] < 0.85 * found["constant_velocity"]["ade"]
    assert ours["macro_f1"] > found["lateral_rule"]["macro_f1"] > found["constant_velocity"]["macro_f1"]


@pytest.mark.slow
@pytest.mark.real
def test_us101_is_predicted_better_than_by_constant_velocity(tmp_path):
    folder = settings.real_data_dir()
    if folder is None:
        pytest.skip("MOEZOO_REAL_DATA is not set")
    file = folder / "tmmoe" / "ngsim_us101_commonroad.parquet"
    found = {}
    for recipe in ("tmmoe_us101", "constant_velocity_us101"):
        run = tmp_path / recipe
        words = ["fit", "--config", f"trajectories/{recipe}", "--data.files.path", str(file), "--run_dir", str(run)]
        assert cli.main(words) == 0
        found[recipe] = Result.read(run / "result.json").metrics["ade"]
    assert found["tmmoe_us101"] <= 0.9 * found["constant_velocity_us101"]
