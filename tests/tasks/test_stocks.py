"""The stocks task on the planted market: metrics, units, predictions, pictures, significance, no look at labels."""

import math

import numpy as np
import polars as pl
import pytest
import pytorch_lightning as lightning
import torch
from moezoo.datasets.stocks import StocksData
from moezoo.errors import UserError
from moezoo.leaderboard.results import check_units
from moezoo.tasks.stocks import STYLE_BINS, StocksTask, join, significance, style_usage
from moezoo.zoo.baselines.stocks import TRA, EncoderRanker, EnsembleRanker, FeatureRule, RidgeRanker, SwitchRanker
from moezoo.zoo.core.statistics import label_expert_nmi, routing_statistics
from moezoo.zoo.miga import MIGA, MIGAOutput

ORACLE = 0.275  # RankIC of the rule that knows the style


@pytest.fixture(scope="module")
def planted():
    data = StocksData(source="planted", lookback=1, horizon=1, days_per_batch=1)
    data.setup("fit")
    return data


def make_trainer(**changes):
    return lightning.Trainer(
        **{
            "logger": False,
            "enable_progress_bar": False,
            "enable_model_summary": False,
            "enable_checkpointing": False,
            "accelerator": "cpu",
            "num_sanity_val_steps": 0,
        }
        | changes
    )


def run_test(model, data, **changes):
    task = StocksTask(model, schema=data.schema, **{"null_models": 0} | changes)
    make_trainer().test(task, datamodule=data, verbose=False)
    return task


class Oracle(torch.nn.Module):
    """Knows the style of every name."""

    def forward(self, features, style, valid):
        return MIGAOutput((2 * style[..., 0] - 1) * features[:, :, -1, 0] * valid, {})


class Noise(torch.nn.Module):
    def forward(self, valid):
        return MIGAOutput(torch.randn(valid.shape) * valid, {})


def train(model, data, steps=150, lr=2e-2, **changes):
    """A quick start: a fifth of an epoch."""
    task = StocksTask(model, lambda p: torch.optim.AdamW(p, lr), schema=data.schema, null_models=0, **changes)
    trainer = make_trainer(max_epochs=1, limit_train_batches=steps, limit_val_batches=0)
    trainer.fit(task, datamodule=data)
    trainer.test(task, datamodule=data, verbose=False)
    return task


def test_the_oracle_is_significant_in_every_way(planted):
    task = run_test(Oracle(), planted, null_models=10)
    metrics = task.result.metrics
    assert metrics["rank_ic"] == pytest.approx(ORACLE, abs=0.01)
    assert metrics["rank_ic_z"] > 20 and metrics["rank_ic_t"] > 20
    assert metrics["annual_excess_net"] > 0.1 and metrics["long_precision"] > 0.6 < metrics["short_precision"]
    assert metrics["annual_excess_gross"] > metrics["annual_excess_net"]
    assert significance(metrics).endswith(": significant")


def test_noise_is_called_not_significant(planted):
    torch.manual_seed(0)
    metrics = run_test(Noise(), planted, null_models=10).result.metrics
    assert abs(metrics["rank_ic_z"]) < 3 and abs(metrics["rank_ic"]) < 0.015
    assert "not significant" in significance({"rank_ic": 0.004, "rank_ic_z": 0.5, "rank_ic_t": 1.0})
    assert "|t|" in significance({"rank_ic": 0.02, "rank_ic_z": 2.5, "rank_ic_t": 1.0})
    assert "not significant" in significance({"rank_ic": 0.02, "rank_ic_t": 5.0}), "an unknown z proves nothing"


def test_units_are_days_and_average_to_the_metrics(planted):
    result = run_test(RidgeRanker(planted.schema), planted).result
    check_units(result.units)
    assert len(result.units) == result.info["rank_ic"].n == 200
    for name in ("ic", "rank_ic", "long_precision"):
        assert result.units[name].mean() == pytest.approx(result.metrics[name])
    dates = [planted.calendar[day] for day in planted.days["test"]]
    assert result.units["unit"].to_list() == [int(f"{d:%Y%m%d}") for d in dates]


def test_the_test_keeps_every_labelled_name_whatever_its_label(planted):
    """Extreme labels stay: spec pitfall 1. `trim` is for training alone."""
    plain, trimmed = (run_test(FeatureRule(planted.schema), planted, trim=trim).result for trim in (0.0, 0.1))
    assert plain.metrics == trimmed.metrics
    panel, days = planted.panel, planted.days["test"]
    expected = []
    for day in days:
        x, y = -panel.features[:, day, 0].numpy(), panel.label[day].numpy()
        expected.append(np.corrcoef(x, y)[0, 1])
    assert plain.metrics["ic"] == pytest.approx(np.mean(expected), abs=1e-6)


def test_the_portfolio_and_its_benchmarks_use_the_days_in_order(planted):
    task = run_test(Oracle(), planted)
    assert (task.tested.day.diff() == 1).all()
    torch.testing.assert_close(task.tested.benchmark, planted.panel.benchmark[planted.days["test"]])
    assert task.portfolio.held.max() == 50 and len(task.portfolio.gross) == 200


@pytest.mark.parametrize("loss", ["ic", "rank_ic", "mse", "ic_mse"])
def test_every_loss_teaches(planted, loss):
    torch.manual_seed(0)
    planted_task = train(EncoderRanker(planted.schema, "linear", head=32), planted, loss=loss)
    assert planted_task.result.metrics["rank_ic"] > 0.2


@pytest.mark.parametrize(
    "build",
    [
        lambda s: SwitchRanker(s, "linear", hidden=16, expert_hidden=16),
        lambda s: EnsembleRanker(s, encoder="linear", hidden=16, head=16),
    ],
)
def test_rivals_learn_the_planted_styles(planted, build):
    torch.manual_seed(0)
    assert train(build(planted.schema), planted).result.metrics["rank_ic"] > 0.9 * ORACLE


def test_tra_learns_and_tests_alike_twice(planted):
    torch.manual_seed(0)
    task = train(TRA(planted.schema, "linear", hidden=16, history=4), planted, loss="mse")
    assert task.result.metrics["rank_ic"] > 0.5 * ORACLE
    again = make_trainer()
    before = dict(task.result.metrics)
    again.test(task, datamodule=planted, verbose=False)
    assert task.result.metrics == before, "memory of the first test must not reach into the second"


def check_planted(task, data):
    """The fact sheet's A10: 95 % of the oracle, and the top expert tells the style."""
    assert task.result.metrics["rank_ic"] >= 0.95 * run_test(Oracle(), data).result.metrics["rank_ic"]
    batch = next(iter(data.test_dataloader()))
    record = task.model.eval()(batch.features, batch.valid).routing["experts"]
    assert style_information(record, batch.style[..., 0].flatten().long()) >= 0.9
    return routing_statistics(record)


def style_information(record, style):
    """Mutual information of the heaviest expert and the style, in bits; at most 1."""
    top = record.indices.gather(1, record.weights.argmax(1, keepdim=True))[:, 0]
    joint = torch.zeros(record.num_experts, 2, dtype=torch.double).index_put(
        (top, style), torch.ones(len(top), dtype=torch.double), accumulate=True
    )
    joint /= joint.sum()
    independent = joint.sum(1, keepdim=True) * joint.sum(0, keepdim=True)
    return float(torch.special.xlogy(joint, joint / independent.clamp(min=1e-300)).sum() / math.log(2))


def test_miga_routes_where_a_linear_model_is_blind(planted):
    torch.manual_seed(0)
    small = MIGA(planted.schema, "linear", hidden=16, groups=2, experts_per_group=4, top_k=2, expert_dim=4)
    task = train(small, planted)
    check_planted(task, planted)
    assert abs(run_test(RidgeRanker(planted.schema), planted).result.metrics["rank_ic"]) <= 0.02
    batch = next(iter(planted.test_dataloader()))
    record = task.model(batch.features, batch.valid).routing["experts"]
    assert label_expert_nmi(record, batch.style[..., 0].flatten().long()) > 0.3


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_the_paper_sized_miga_reaches_the_oracle(planted, seed):
    torch.manual_seed(seed)
    statistics = check_planted(train(MIGA(planted.schema, "linear"), planted, 800, 5e-3), planted)
    assert statistics["load_entropy"] > 0.5
    torch.manual_seed(seed)
    linear = train(EncoderRanker(planted.schema, "linear"), planted, 800, 5e-3)
    assert abs(linear.result.metrics["rank_ic"]) <= 0.02


def test_predictions_rank_each_day_and_name_the_experts(planted):
    torch.manual_seed(0)
    model = MIGA(planted.schema, "linear", hidden=8, groups=2, experts_per_group=2, top_k=2, expert_dim=4)
    task = StocksTask(model, schema=planted.schema)
    parts = make_trainer().predict(task, datamodule=planted)
    table = planted.decode(pl.concat(parts))
    assert table.columns == ["date", "symbol", "score", "rank", "experts", "gate_entropy"]
    day = table.filter(pl.col("date") == table["date"][0]).sort("score", descending=True)
    assert day["rank"].to_list() == list(range(1, 301)) and day["symbol"].n_unique() == 300
    assert table["gate_entropy"].is_between(0, math.log(2) + 1e-6).all()
    assert table["experts"].str.contains(r"^[0-3] [0-3]$").all()


def test_days_without_a_label_are_scored(planted):
    batch = next(iter(planted.predict_dataloader()))
    task = StocksTask(RidgeRanker(planted.schema), schema=planted.schema)
    unlabelled = batch._replace(label=torch.full_like(batch.label, math.nan))
    assert task.predict_step(unlabelled, 0).equals(task.predict_step(batch, 0))


def test_pictures(planted, tmp_path):
    torch.manual_seed(0)
    task = run_test(MIGA(planted.schema, "linear", hidden=8), planted)
    paths = task.draw(tmp_path / "pictures")
    assert [p.name for p in paths] == ["equity_curve.png", "ic_by_month.png", "experts_by_style.png"]
    assert all(p.stat().st_size > 5000 for p in paths)
    assert len(run_test(RidgeRanker(planted.schema), planted).draw(tmp_path / "more")) == 2


def test_style_usage_adds_up_to_all_gate_weight(planted):
    batch = next(iter(planted.test_dataloader()))
    model = MIGA(planted.schema, "linear", hidden=8).eval()
    record = model(batch.features, batch.valid).routing
    usage = style_usage(batch, record)
    assert usage.shape == (len(batch.day), STYLE_BINS, 63)
    torch.testing.assert_close(usage.sum(1), record["experts"].dense_weights().view(-1, 300, 63).sum(1))
    low = batch.style[..., 0] == 0
    expected = (record["experts"].dense_weights().view(-1, 300, 63) * low[..., None]).sum(1)
    torch.testing.assert_close(usage[:, 0], expected)


def test_repeated_days_count_once_and_days_come_in_order(planted):
    task = run_test(RidgeRanker(planted.schema), planted)
    parts = [type(task.tested)(*(v[i] for v in task.tested)) for i in ([3, 1], [1, 0, 2])]
    assert join(parts).day.tolist() == task.tested.day[:4].tolist()


def test_an_undefined_monitor_is_one_line(planted):
    class Unlabelled(StocksData):
        def on_after_batch_transfer(self, batch, dataloader_idx):
            return batch._replace(label=batch.label * math.nan)

    data = Unlabelled(source="planted", lookback=1, horizon=1)
    data.setup("fit")
    task = StocksTask(RidgeRanker(data.schema), schema=data.schema)
    with pytest.raises(UserError, match="20 names"):
        make_trainer().validate(task, datamodule=data, verbose=False)


def test_mistakes_are_one_line(planted):
    with pytest.raises(UserError, match="trim"):
        StocksTask(RidgeRanker(planted.schema), trim=0.5)
    with pytest.raises(UserError, match="n_drop=60"):
        StocksTask(RidgeRanker(planted.schema), n_drop=60)
