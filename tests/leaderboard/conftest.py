"""Made-up results and recipes, written to temporary folders."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
import yaml
from moezoo import recipes
from moezoo.leaderboard.results import Hardware, MetricInfo, Parameters, Result

MakeResult = Callable[..., Result]


@pytest.fixture
def make_result() -> MakeResult:
    """`make_result(seed=3, ...)`: a valid result, with the given fields changed."""

    def make(**changes: Any) -> Result:
        fields: dict[str, Any] = {
            "recipe": "ranking/awmoe",
            "dataset": "cj_500",
            "split": "test",
            "seed": 0,
            "metrics": {"session_auc": 0.77, "logloss": 0.42, "session_auc_tail1": 0.66},
            "metric_info": {
                "session_auc": MetricInfo("max", "", 10000),
                "logloss": MetricInfo("min", "nats", 98000),
                "session_auc_tail1": MetricInfo("max", "", 1005),
            },
            "dataset_fingerprint": "890f0b92",
            "parameters": Parameters(120000, 80000),
            "flops_per_sample": 3.1e5,
            "train_seconds": 85.5,
            "hardware": Hardware("AMD EPYC", 2, None),
            "versions": {"python": "3.11.7", "torch": "2.14.1"},
            "git_commit": "0123456789abcdef",
            "recipe_hash": "aaaa",
            "created": "2026-11-24T12:00:00+00:00",
        }
        return Result(**(fields | changes))

    return make


@pytest.fixture
def units() -> pl.DataFrame:
    """Per-unit scores of 200 units."""
    scores = np.random.default_rng(0).random(200)
    return pl.DataFrame({"unit": range(200), "session_auc": scores, "tail1": scores > 0.9})


@pytest.fixture
def write_recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Path]:
    """`write_recipe("ranking/a", kind="rule")`: a recipe among the packaged ones, which are these alone."""
    folder = tmp_path / "configs"
    folder.mkdir()
    monkeypatch.setattr(recipes, "CONFIGS", folder)

    def write(name: str, model: str = "a", **metadata: Any) -> Path:
        path = folder / f"{name}.yaml"
        path.parent.mkdir(exist_ok=True)
        metadata = {"title": name.split("/")[-1], "kind": "moe"} | metadata
        path.write_text(yaml.safe_dump({"model": {"class_path": model}, "recipe": metadata}))
        return path

    return write
