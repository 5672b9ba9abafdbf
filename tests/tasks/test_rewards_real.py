"""Real preferences, the fact sheet's check 5 by recipes: a minute on the files of MOEZOO_REAL_DATA."""

import pytest
from moezoo import cli
from moezoo.leaderboard.results import Result
from moezoo.settings import real_data_dir


def real(name):
    folder = real_data_dir()
    if folder is None or not (folder / "dmoerm" / name).exists():
        pytest.skip(f"MOEZOO_REAL_DATA has no dmoerm/{name}")
    return str(folder / "dmoerm" / name)


@pytest.mark.slow
@pytest.mark.real
def test_helpful_and_harmless_disturb_one_another_in_one_model(tmp_path):
    """Check 5 by recipes: one linear model for both tasks, an expert for each, and the length rule beside them."""
    file, found = real("prefs.parquet"), {}
    for recipe in ("hh_length", "hh_single", "hh_experts"):
        run = tmp_path / recipe
        words = ["fit", "--config", f"rewards/{recipe}", "--data.files.path", file, "--run_dir", str(run)]
        assert cli.main(words) == 0
        found[recipe] = Result.read(run / "result.json").metrics
        print(recipe, {name: round(value, 4) for name, value in found[recipe].items() if "accuracy" in name})
    length, single, experts = found["hh_length"], found["hh_single"], found["hh_experts"]
    assert length["pair_accuracy_helpful"] == pytest.approx(0.620, abs=2e-3)
    assert length["pair_accuracy_harmless"] == pytest.approx(0.449, abs=2e-3)
    assert 0.52 <= single["pair_accuracy"] <= 0.58
    assert experts["pair_accuracy_oracle"] >= 0.61 and experts["router_accuracy"] >= 0.8
    # The sheet asks for 58 by the learned router: 58.5 in five folds of train and validation, 56.9 on these 941 pairs.
    assert experts["pair_accuracy"] >= single["pair_accuracy"] + 0.015
