"""The fact sheet's learning checks: minutes each, so `-m slow`; the one on Amazon Beauty needs the real data too."""

import numpy as np
import polars as pl
import pytest
import pytorch_lightning as lightning
from moezoo import cli, settings
from moezoo.datasets.ranking import RankingData
from moezoo.leaderboard.results import Result
from moezoo.tasks.ranking import RankingTask
from moezoo.zoo.awmoe import AWMoE
from moezoo.zoo.baselines.ranking import TowerRanker

POPULARITY, REPEAT_POPULARITY = 0.6160, 0.7703


@pytest.mark.slow
@pytest.mark.parametrize(
    ("recipe", "floor"), [("ranking/awmoe_ids", POPULARITY + 0.05), ("ranking/awmoe", REPEAT_POPULARITY)]
)
def test_a_default_run_is_above_the_floor(tmp_path, recipe, floor):
    assert cli.main(["fit", "--config", recipe, "--run_dir", str(tmp_path / "run")]) == 0
    assert Result.read(tmp_path / "run" / "result.json").metrics["session_auc"] >= floor


@pytest.mark.slow
@pytest.mark.real
def test_awmoe_is_a_point_above_din_on_amazon_beauty(tmp_path):
    """Mean over five seeds, two epochs, ids alone; the last purchase of each user, against sampled items."""
    folder = settings.real_data_dir()
    if folder is None:
        pytest.skip("MOEZOO_REAL_DATA is not set")
    events = tmp_path / "beauty.parquet"
    pl.read_parquet(folder / "awmoe" / "amazon_beauty_inter.parquet").rename({"pos": "timestamp"}).write_parquet(events)
    data = RankingData(
        source="long",
        files={
            "events": str(events),
            "items": str(folder / "awmoe" / "amazon_beauty_item.parquet"),
            "split": "leave_one_out",
        },
        history_length=30,
        negatives=4,
        cross_features=False,
    )
    scores: dict[str, list[float]] = {"awmoe": [], "din": []}
    for seed in range(5):
        for name, build in (("awmoe", AWMoE), ("din", TowerRanker)):
            lightning.seed_everything(seed)
            task = RankingTask(build(data.schema), schema=data.schema)
            trainer = lightning.Trainer(
                max_epochs=2, logger=False, enable_progress_bar=False, enable_model_summary=False,
                enable_checkpointing=False, accelerator="cpu",
            )  # fmt: skip
            trainer.fit(task, datamodule=data)
            trainer.test(task, datamodule=data, verbose=False)
            scores[name].append(task.result.metrics["session_auc"])
    print(scores)
    assert np.mean(scores["awmoe"]) - np.mean(scores["din"]) >= 0.01
