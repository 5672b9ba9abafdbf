"""Batches equal what a plain loop over symbols and days would gather; nothing of the future gets in."""

from datetime import date, timedelta

import numpy as np
import polars as pl
import pytest
import pytorch_lightning as lightning
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from moezoo.datasets import cache
from moezoo.datasets.stocks import StocksData
from moezoo.datasets.stocks_build import build_panel
from moezoo.datasets.stocks_splits import split_days
from moezoo.datasets.stocks_tables import StockTables
from moezoo.errors import UserError
from torchmetrics.functional import spearman_corrcoef


def market(symbols=8, days=120, seed=0, gaps=0.1, spans=True):
    rng = np.random.default_rng(seed)
    close = 50 * np.exp(np.cumsum(0.02 * rng.standard_normal((symbols, days)), 1))
    volume = np.round(np.exp(10 + rng.standard_normal(close.shape)))
    missing = rng.random(close.shape) < gaps
    missing[-1, : days // 2] = True
    close[missing] = np.nan
    volume[missing] = np.nan
    member = np.ones(close.shape, bool)
    if spans:
        member[0, days // 3 : days // 2] = False
        member[1, days // 2 :] = False
    calendar = tuple(date(2020, 1, 1) + timedelta(days=i) for i in range(days))
    names = tuple(f"S{i}" for i in range(symbols))
    return StockTables(calendar, names, {"close": close, "volume": volume}, member, np.full(days, np.nan))


def panel_of(tables, lookback=4, horizon=2, **kwargs):
    return build_panel(tables, "light", "robust", lookback, horizon, list(range(lookback, 60)), **kwargs)


def long_rows(tables):
    """The same market as a user's long table."""
    symbols, days = tables.fields["close"].shape
    return pl.DataFrame(
        {
            "date": list(tables.calendar) * symbols,
            "symbol": np.repeat(tables.symbols, days),
            "close": tables.fields["close"].ravel(),
            "volume": tables.fields["volume"].ravel(),
        }
    ).filter(pl.col("close").is_finite())


@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 99), gaps=st.sampled_from([0.0, 0.2, 0.7]), lookback=st.integers(1, 9))
def test_batches_equal_a_plain_loop(seed, gaps, lookback):
    tables, horizon = market(seed=seed, gaps=gaps), 3
    panel = panel_of(tables, lookback, horizon)
    close, volume = tables.fields["close"], tables.fields["volume"]
    days = [lookback, 45, 70, 110, 119]
    batch = panel.batch(days, lookback)
    count = len(tables.calendar)
    wide = 0
    for b, t in enumerate(days):
        expected = [
            i
            for i in range(len(tables.symbols))
            if tables.member[i, t]
            and np.isfinite(close[i, t])
            and t - np.flatnonzero(np.isfinite(close[i]))[0] >= lookback - 1
        ]
        wide = max(wide, len(expected))
        assert batch.symbol[b, : len(expected)].tolist() == expected
        assert batch.valid[b].sum() == len(expected) and (batch.symbol[b, len(expected) :] == -1).all()
        money = []
        for place, i in enumerate(expected):
            got = batch.features[b, place]
            assert torch.equal(got, panel.features[i, t - lookback + 1 : t + 1])
            gone = np.isnan(close[i, t - lookback + 1 : t + 1])
            assert (got[torch.from_numpy(gone)] == 0).all()
            ends = [close[i, t + k] if t + k < count else np.nan for k in (1, 2, 1 + horizon)]
            assert batch.label[b, place].item() == pytest.approx(ends[2] / ends[0] - 1, rel=1e-4, abs=1e-6, nan_ok=True)
            assert batch.next_return[b, place].item() == pytest.approx(
                ends[1] / ends[0] - 1, rel=1e-4, abs=1e-6, nan_ok=True
            )
            money.append(np.nanmean((close * volume)[i, max(t - 19, 0) : t + 1]))
        weights = np.array(money) / np.sum(money)
        np.testing.assert_allclose(batch.weight[b, : len(expected)].numpy(), weights, rtol=1e-4)
        rank = np.argsort(np.argsort(money)) / max(len(money) - 1, 1)
        if len(money) > 1:
            np.testing.assert_allclose(batch.style[b, : len(expected), 0].numpy(), rank, atol=1e-6)
        padding = slice(len(expected), None)
        assert (batch.features[b, padding] == 0).all() and batch.label[b, padding].isnan().all()
        assert (batch.weight[b, padding] == 0).all() and batch.next_return[b, padding].isnan().all()
    assert batch.symbol.shape[1] == wide


def test_valid_never_depends_on_what_comes_after():
    """A name that vanishes tomorrow is scored today."""
    tables = market(gaps=0, spans=False)
    before = panel_of(tables)
    for grid in tables.fields.values():
        grid[2, 61:] = np.nan
    after = panel_of(tables)
    assert torch.equal(before.valid[:61], after.valid[:61]) and after.valid[60, 2] and after.label[60, 2].isnan()


def test_later_prices_leave_batches_up_to_the_day_bit_equal():
    """A5: all that a model sees, not labels."""
    tables = market()
    rng, factor = np.random.default_rng(5), np.ones(tables.fields["close"].shape)
    factor[:, 81:] = np.exp(rng.standard_normal((8, 39)))
    fields = {name: grid * factor for name, grid in tables.fields.items()}
    other = StockTables(tables.calendar, tables.symbols, fields, tables.member, tables.market)
    a, b = (panel_of(x).batch([70, 80], 4) for x in (tables, other))
    for name in ("features", "valid", "weight", "style", "symbol", "day"):
        assert getattr(a, name).numpy().tobytes() == getattr(b, name).numpy().tobytes(), name
    assert torch.equal(a.label[0], b.label[0]) or torch.equal(a.label[0].isnan(), b.label[0].isnan())
    assert not torch.equal(a.label[1].nan_to_num(), b.label[1].nan_to_num())


def test_labels_use_closes_t1_to_t1_plus_horizon_alone():
    tables = market(gaps=0, spans=False)
    base, horizon = panel_of(tables, horizon=3).label, 3
    for offset in range(-2, 7):
        fields = {name: grid.copy() for name, grid in tables.fields.items()}
        fields["close"][:, 60 + offset] *= 1.5
        label = panel_of(
            StockTables(tables.calendar, tables.symbols, fields, tables.member, tables.market), horizon=3
        ).label
        assert torch.equal(base[60], label[60]) != (offset in (1, 1 + horizon)), offset


def test_a_name_that_nobody_traded_cannot_be_bought():
    tables = market(gaps=0, spans=False)
    tables.fields["volume"][3, 61] = 0
    panel = panel_of(tables)
    assert panel.next_return[60, 3].isnan() and panel.next_return[61, 3].isfinite() and panel.valid[61, 3]


def test_returns_are_clipped_not_dropped():
    tables = market(gaps=0, spans=False)
    tables.fields["close"][4, 62:] *= 100
    free, bound = panel_of(tables), panel_of(tables, clip_return=0.5)
    assert free.label[60, 4] > 50 and bound.label[60, 4] == 0.5 and bound.next_return[60, 4] == 0.5
    assert torch.equal(free.label.isnan(), bound.label.isnan())


def test_the_benchmark_is_the_index_and_else_the_weighted_universe():
    tables = market(gaps=0, spans=False)
    tables.market[62] = 0.0123
    panel = panel_of(tables)
    assert panel.benchmark[60] == pytest.approx(0.0123)
    expected = (panel.weight[61] * panel.next_return[61]).sum()
    assert panel.benchmark[61] == pytest.approx(expected.item(), rel=1e-4)
    assert panel.benchmark[-2:].isnan().all()


def test_purge_leaves_a_gap_of_horizon_plus_one():
    """A6: no label of train or valid touches a day of what follows."""
    calendar = [date(2020, 1, 1) + timedelta(days=i) for i in range(200)]
    splits = {
        "train": ["2020-01-01", "2020-04-09"],
        "valid": ["2020-04-10", "2020-05-29"],
        "test": ["2020-05-30", "2021-01-01"],
    }
    for horizon in (1, 5):
        days = split_days(calendar, splits, 8, horizon, "x")
        assert days["train"][0] == 7 and days["train"][-1] == 99 - horizon - 1
        for earlier, later in (("train", "valid"), ("valid", "test")):
            assert days[earlier][-1] + 1 + horizon < days[later][0]
        assert days["test"][-1] + 1 + horizon == 199 and days["predict"] == list(range(150, 200))


@pytest.mark.parametrize(
    ("splits", "message"),
    [
        ({"train": ["2020-01-01", "2020-02-01"]}, "data.splits: got train; expected train, valid and test"),
        ({"train": ["2020-02-01", "2020-01-01"]}, "data.splits.train: 2020-02-01 to 2020-01-01"),
        ({"train": ["2020-01-01", "soon"]}, r"data.splits.train=\['2020-01-01', 'soon'\]: expected \[first day"),
        ({"valid": ["2020-03-01", "2020-04-30"]}, "data.splits.valid: .* after the split before"),
        (
            {"test": ["2022-01-01", "2023-01-01"]},
            r"'test' \(2022-01-01 to 2023-01-01\) has no day.*2020-01-01 to 2020-07-18",
        ),
    ],
)
def test_bad_splits_are_one_line(splits, message):
    calendar = [date(2020, 1, 1) + timedelta(days=i) for i in range(200)]
    whole = {
        "train": ["2020-01-01", "2020-04-09"],
        "valid": ["2020-04-10", "2020-05-29"],
        "test": ["2020-05-30", "2021-01-01"],
    }
    given_splits = splits if len(splits) == 1 and "got" in message else whole | splits
    with pytest.raises(UserError, match=message) as error:
        split_days(calendar, given_splits, 8, 5, "x")
    assert "\n" not in str(error.value)


def test_too_short_a_history_is_told():
    with pytest.raises(UserError, match="12 trading days; expected at least 28 for windows of 8 days, labels of 5"):
        split_days([date(2020, 1, i + 1) for i in range(12)], None, 8, 5, "x")


def test_own_file_end_to_end_and_cached(tmp_path):
    tables = market(days=200)
    file = tmp_path / "prices.parquet"
    long_rows(tables).sample(fraction=1, shuffle=True, seed=0).write_parquet(file)

    def data(**kwargs):
        return StocksData(source="long", files={"prices": str(file)}, lookback=4, horizon=2, days_per_batch=7, **kwargs)

    first = data()
    assert first.schema["num_features"] == 29 and first.schema["dataset"] == "prices"
    assert "panel" not in first.__dict__  # the schema computes nothing
    first.setup("fit")
    train = list(first.train_dataloader())
    assert all(batch.features.shape[0] == 7 and batch.features.shape[2:] == (4, 29) for batch in train)
    assert sorted(d for batch in train for d in batch.day.tolist()) != [
        d for batch in train for d in batch.day.tolist()
    ]
    test_days = [d for batch in first.test_dataloader() for d in batch.day.tolist()]
    assert test_days == first.days["test"] == sorted(test_days)
    assert next(iter(first.predict_dataloader())).day[0] == test_days[0]
    assert first.days["predict"][-1] == len(first.calendar) - 1

    again, fresh = data(), data(cache=False)
    again.setup("fit")
    fresh.setup("fit")
    assert "opened" in again.__dict__ and again.fingerprint == first.fingerprint
    for name in ("features", "label", "valid", "next_return", "weight", "style", "benchmark"):
        assert torch.equal(getattr(again.panel, name).nan_to_num(9), getattr(fresh.panel, name).nan_to_num(9)), name
    assert again.panel.calendar == fresh.panel.calendar and again.panel.symbols == fresh.panel.symbols
    assert [path.name for path in tmp_path.iterdir()] == ["prices.parquet"]

    rows = long_rows(tables)
    rows[5, "close"] = 51.0
    rows.write_parquet(file)
    assert data().fingerprint != first.fingerprint


def test_the_cache_is_read_and_a_broken_one_is_built_anew(tmp_path, monkeypatch):
    monkeypatch.setenv("MOEZOO_CACHE", str(tmp_path / "cache"))
    long_rows(market(days=200)).write_parquet(tmp_path / "p.parquet")

    def data(horizon=2):
        return StocksData(source="long", files={"prices": str(tmp_path / "p.parquet")}, lookback=4, horizon=horizon)

    first = data().panel
    (stored,) = [path for path in (tmp_path / "cache").rglob("*") if path.is_file()]
    monkeypatch.setattr("moezoo.datasets.stocks.build_panel", None)  # a second build would fail
    assert torch.equal(data().panel.features, first.features)
    monkeypatch.undo()
    monkeypatch.setenv("MOEZOO_CACHE", str(tmp_path / "cache"))
    stored.write_bytes(b"not a panel")
    assert torch.equal(data().panel.features, first.features)
    assert torch.equal(data().panel.features, first.features) and stored.stat().st_size > 1000
    assert data(horizon=1).panel.label.isnan().sum() != first.label.isnan().sum()  # another recipe, another panel


def test_the_cache_keeps_the_panels_used_last(tmp_path, monkeypatch):
    monkeypatch.setenv("MOEZOO_CACHE", str(tmp_path / "cache"))
    long_rows(market(days=200)).write_parquet(tmp_path / "p.parquet")

    def use(horizon):
        _ = StocksData(source="long", files={"prices": str(tmp_path / "p.parquet")}, lookback=4, horizon=horizon).panel
        return set((tmp_path / "cache").rglob("*.safetensors"))

    first = use(1)
    size = next(iter(first)).stat().st_size
    monkeypatch.setattr(cache, "_MOST_BYTES", int(2.5 * size))
    both = use(2)
    assert len(both) == 2
    use(1)  # now the other one is the older
    assert first < use(3) and len(use(3)) == 2


def test_predictions_get_their_dates_and_names(tmp_path):
    long_rows(market(days=200)).write_parquet(tmp_path / "p.parquet")
    data = StocksData(source="long", files={"prices": str(tmp_path / "p.parquet")}, lookback=4, horizon=2)
    table = data.decode(pl.DataFrame({"day": [3, 199], "symbol": [7, 0], "score": [0.5, 1.5]}))
    assert table.rows() == [(date(2020, 1, 4), "S7", 0.5), (date(2020, 7, 18), "S0", 1.5)]


class Line(lightning.LightningModule):
    """The smallest thing that trains on these batches."""

    def __init__(self):
        super().__init__()
        self.layer, self.seen = torch.nn.Linear(4, 1), []

    def training_step(self, batch, index):
        self.seen += batch.day.tolist()
        return (self.layer(batch.features[:, :, -1]).squeeze(-1) - batch.label).square().mean()

    def test_step(self, batch, index):
        self.seen += batch.day.tolist()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.1)


def test_a_trainer_sees_every_train_day_once_in_a_new_order_each_epoch():
    data, model = StocksData(source="planted", lookback=2, horizon=1, days_per_batch=42), Line()
    options = {"accelerator": "cpu", "logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    options |= {"enable_model_summary": False, "use_distributed_sampler": False}
    lightning.Trainer(max_epochs=2, **options).fit(model, datamodule=data)
    train, first, second = data.days["train"], model.seen[:798], model.seen[798:]
    assert sorted(first) == sorted(second) == train and first != second != train
    model.seen = []
    lightning.Trainer(**options).test(model, datamodule=data, verbose=False)
    assert model.seen == data.days["test"]


def test_planted_market_hides_its_signal_from_a_line():
    """A10: an oracle reaches 0.27, past return alone nothing, and the cue tells the style."""
    data = StocksData(source="planted", lookback=1, horizon=1, eval_days_per_batch=200)
    data.setup("fit")
    (batch,) = data.test_dataloader()
    assert batch.features.shape == (200, 300, 1, 4) and batch.valid.all()
    sign, past, cue = batch.style[..., 0] * 2 - 1, batch.features[:, :, 0, 0], batch.features[:, :, 0, 1]
    oracle, line = spearman_corrcoef((sign * past).T, batch.label.T), spearman_corrcoef(past.T, batch.label.T)
    assert 0.265 <= oracle.mean() <= 0.285 and line.mean().abs() <= 0.01
    assert ((cue > 0) == (sign > 0)).float().mean() > 0.998
    assert torch.equal(batch.label, batch.next_return)
    assert data.schema["num_features"] == 4 and data.schema["styles"] == ["momentum"]
    longer = StocksData(source="planted", lookback=5, horizon=1)
    assert next(iter(longer.train_dataloader())).features.shape == (8, 300, 5, 4)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            {"source": "planted", "horizon": 5},
            "data.horizon=5: the planted market has one-day labels; set data.horizon=1",
        ),
        ({"source": "planted", "horizon": 1, "files": {"names": 5}}, "data.files.names=5: expected at least 20"),
        ({"source": "planted", "horizon": 1, "files": {"stocks": 3}}, "data.files.stocks: .* it takes names, seed"),
        ({"lookback": 0}, "data.lookback=0: expected at least 1"),
        ({"source": "long"}, "data.files.prices: source 'long' needs it, e.g. --data.files.prices PATH"),
        ({"files": {"prices": "x.csv"}}, "data.files.prices: source 'sp500' has no such argument; it takes none"),
    ],
)
def test_bad_arguments_are_one_line(arguments, message):
    with pytest.raises(UserError, match=message):
        data = StocksData(**arguments)
        _ = data.schema, data.panel
