"""On the Philippine exchange, where a signal is known to be, MIGA finds it (the fact sheet's A8)."""

import pytest
import pytorch_lightning as lightning
import torch
from moezoo.datasets.stocks import StocksData
from moezoo.settings import real_data_dir
from moezoo.tasks.stocks import StocksTask
from moezoo.zoo.core.statistics import expert_load, load_entropy
from moezoo.zoo.miga import MIGA


@pytest.mark.slow
@pytest.mark.real
def test_a_real_signal_is_found_and_told_from_chance():
    folder = real_data_dir()
    if folder is None:
        pytest.skip("MOEZOO_REAL_DATA is not set")
    torch.manual_seed(0)
    data = StocksData(
        source="long",
        files={"prices": str(folder / "miga" / "ph_pse_ohlc_value_2010_2021.parquet")},
        horizon=1,
        splits={
            "train": ["2010-01-01", "2016-06-30"],
            "valid": ["2016-07-01", "2017-12-31"],
            "test": ["2018-01-01", "2021-12-31"],
        },
        clip_return=0.5,
        bad_rows="drop",
    )
    data.setup("fit")
    task = StocksTask(MIGA(data.schema, "rec", hidden=32), loss="rank_ic", schema=data.schema)
    trainer = lightning.Trainer(
        accelerator="cpu", max_epochs=2, logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, num_sanity_val_steps=0, gradient_clip_val=1.0,
    )  # fmt: skip
    trainer.fit(task, datamodule=data)
    trainer.test(task, datamodule=data, verbose=False)
    metrics, record = task.result.metrics, task.routing["experts"]
    used = int((expert_load(record) > 0).sum())
    print(f"\n{metrics['rank_ic']:.4f} z {metrics['rank_ic_z']:.1f} entropy {load_entropy(record):.2f} {used} used")
    assert metrics["rank_ic"] >= 0.050 and metrics["rank_ic_z"] >= 3
    assert load_entropy(record) >= 0.75 and used >= 40
