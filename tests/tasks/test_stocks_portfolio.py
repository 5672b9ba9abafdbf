"""TopkDropout against a loop over names in plain Python, accounts that add up, and Qlib's own numbers."""

import math

import numpy as np
import polars as pl
import pytest
import torch
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from moezoo import settings
from moezoo.tasks.stocks_metrics import daily_ic
from moezoo.tasks.stocks_portfolio import excess, topk_dropout


def make_market(days=40, names=30, seed=0):
    rng = torch.Generator().manual_seed(seed)
    score = torch.randn(days, names, generator=rng)
    score[torch.rand(days, names, generator=rng) < 0.1] = math.nan  # out of the universe
    earned = 0.02 * torch.randn(days, names, generator=rng)
    earned[torch.rand(days, names, generator=rng) < 0.1] = math.nan  # suspended
    return score, earned


def naive(score, earned, topk, n_drop, open_cost, close_cost, invested):
    """Qlib's rules, one name at a time."""
    cash, held, rows = 1.0, {}, []
    for s, r in zip(score.double().tolist(), earned.double().tolist(), strict=True):
        s = [-math.inf if math.isnan(x) else x for x in s]
        total = cash + sum(held.values())
        others = sorted((n for n in range(len(s)) if n not in held and s[n] > -math.inf), key=lambda n: -s[n])
        bids = others[: max(n_drop + topk - len(held), 0)]
        both = sorted([*held, *bids], key=lambda n: (s[n], n))
        sell = [n for n in held if n in both[:n_drop]]
        buy = bids[: max(len(sell) + topk - len(held), 0)]
        cost = traded = 0.0
        for n in sell:
            if not math.isnan(r[n]):
                amount = held.pop(n)
                cash += amount * (1 - close_cost)
                cost, traded = cost + amount * close_cost, traded + amount
        part = cash * invested / len(buy) if buy else 0.0
        for n in buy:
            if not math.isnan(r[n]):
                held[n] = part / (1 + open_cost)
                cash -= part
                cost, traded = cost + held[n] * open_cost, traded + held[n]
        profit = sum(v * (0 if math.isnan(r[n]) else r[n]) for n, v in held.items())
        held = {n: v * (1 + (0 if math.isnan(r[n]) else r[n])) for n, v in held.items()}
        rows.append((profit / total, cost / total, traded / total, len(held)))
    return np.array(rows).T


@hypothesis_settings(deadline=None, max_examples=25)
@given(st.integers(0, 1000), st.integers(1, 12), st.data())
def test_the_portfolio_equals_the_naive_loop(seed, topk, draw):
    n_drop = draw.draw(st.integers(1, topk))
    score, earned = make_market(seed=seed)
    got = topk_dropout(score, earned, None, topk, n_drop, 0.001, 0.002, 0.9)
    np.testing.assert_allclose(torch.stack(got), naive(score, earned, topk, n_drop, 0.001, 0.002, 0.9), atol=1e-12)


def test_without_costs_net_is_gross_and_costs_are_turnover_times_rate():
    score, earned = make_market()
    free = topk_dropout(score, earned, open_cost=0.0, close_cost=0.0, topk=10, n_drop=2)
    assert torch.equal(free.net, free.gross) and (free.cost == 0).all()
    same = topk_dropout(score, earned, open_cost=0.001, close_cost=0.001, topk=10, n_drop=2)
    torch.testing.assert_close(same.cost, same.turnover * 0.001)


def test_it_holds_k_names_and_sells_n_at_most():
    score, earned = make_market(days=60)
    score, earned = score.nan_to_num(), earned.nan_to_num()
    result = topk_dropout(score, earned, topk=10, n_drop=2)
    assert (result.held == 10).all()
    assert (result.turnover[1:] < 2 * 2 / 10 * 1.6).all() and result.turnover[0] == pytest.approx(0.95, abs=0.01)


def test_a_held_name_outside_the_universe_still_earns_and_leaves_first():
    score = torch.tensor([[3.0, 2.0, 1.0], [math.nan, 2.0, 3.0]])
    earned = torch.tensor([[0.0, 0.0, 0.0], [0.5, 0.0, 0.0]])
    result = topk_dropout(score, earned, torch.tensor([[True] * 3, [False, True, True]]), topk=1, n_drop=1)
    assert float(result.gross[1]) == pytest.approx(0.95 * 0.5, abs=1e-3), "it could not be sold that day"
    assert result.held[1] == 2  # the other one is bought from the cash that is left, as Qlib does


def test_perfect_foresight_earns_the_best_names():
    _, earned = make_market()
    earned = earned.nan_to_num()
    result = topk_dropout(earned, earned, topk=5, n_drop=5, open_cost=0.0, close_cost=0.0)
    best = earned.topk(5, 1).values.mean(1).double()
    assert torch.corrcoef(torch.stack([result.gross, best]))[0, 1] > 0.95 and result.gross.mean() > 0.9 * best.mean()


def test_excess_figures_by_hand():
    returns = torch.tensor([0.02, -0.03, 0.01, 0.05], dtype=torch.double)
    benchmark = torch.tensor([0.01, 0.0, math.nan, 0.01], dtype=torch.double)
    series = np.array([0.01, -0.03, 0.04])
    figures = excess(returns, benchmark, 100)
    assert figures.annual == pytest.approx(series.mean() * 100)
    assert figures.ratio == pytest.approx(series.mean() / series.std(ddof=1) * 10)
    assert figures.drawdown == pytest.approx(-0.03)
    assert excess(torch.tensor([-0.1, 0.0]), torch.zeros(2), 100).drawdown == pytest.approx(-0.1), "from the start"


@pytest.fixture(scope="module")
def csi300():
    """Prices of the Chinese panel on its calendar, with everything Qlib's protocol derives from them."""
    folder = settings.real_data_dir()
    if folder is None:
        pytest.skip("MOEZOO_REAL_DATA is not set")
    prices = pl.read_parquet(folder / "miga" / "cn_csi300_ohlcv_2010_2026.parquet", columns=["date", "symbol", "close"])
    prices = prices.filter(pl.col("date").is_between(pl.date(2016, 12, 1), pl.date(2020, 9, 30)))
    wide = prices.pivot(on="symbol", index="date", values="close").sort("date")
    close = wide.drop("date").to_numpy().astype(float)
    ahead = np.full((3, *close.shape), np.nan)
    for i in (1, 2):
        ahead[i, :-i] = close[i:]
    move = np.full_like(close, np.nan)
    move[:-1] = close[1:] / close[:-1] - 1  # of day t+1, on which trades take place
    return {
        "folder": folder / "miga",
        "date": wide["date"].to_list(),
        "symbol": wide.columns[1:],
        "next_return": ahead[2] / ahead[1] - 1,
        "move": move,
    }


def oracle_panel(csi300, name):
    scores = pl.read_parquet(csi300["folder"] / f"oracle_qlib_{name}_scores_csi300_2017_2020.parquet")
    days = {d: i for i, d in enumerate(csi300["date"])}
    names = {s: i for i, s in enumerate(csi300["symbol"])}
    panel = np.full((len(days), len(names)), np.nan)
    known = scores.filter(pl.col("symbol").is_in(csi300["symbol"]) & pl.col("date").is_in(csi300["date"]))
    rows, columns = known["date"].replace_strict(days), known["symbol"].replace_strict(names)
    panel[rows.to_numpy(), columns.to_numpy()] = known["score"].to_numpy()
    used = np.flatnonzero(~np.isnan(panel).all(1))
    return torch.from_numpy(panel[used]), used


@pytest.mark.real
@pytest.mark.parametrize(
    ("name", "ic", "icir", "rank_ic", "rank_icir"),
    [("linear", 0.0338, 0.2490, 0.0441, 0.3218), ("lgb", 0.0353, 0.2553, 0.0475, 0.3477)],
)
def test_ics_of_qlibs_scores_are_qlibs(csi300, name, ic, icir, rank_ic, rank_icir):
    score, used = oracle_panel(csi300, name)
    label = torch.from_numpy(csi300["next_return"][used])
    daily = daily_ic(score, label.nan_to_num(), ~score.isnan() & ~label.isnan())
    for series, mean, ratio in zip(daily, (ic, rank_ic), (icir, rank_icir), strict=True):
        series = series[~series.isnan()]
        assert float(series.mean()) == pytest.approx(mean, abs=1e-3)
        assert float(series.mean() / series.std()) == pytest.approx(ratio, abs=0.01)


@pytest.mark.real
@pytest.mark.parametrize(
    ("name", "gross", "ratio", "net"), [("linear", 0.080, 1.04, 0.033), ("lgb", 0.1572, 1.918, 0.1094)]
)
def test_the_portfolio_of_qlibs_scores_is_qlibs(csi300, name, gross, ratio, net):
    score, used = oracle_panel(csi300, name)
    earned = torch.from_numpy(csi300["next_return"][used])
    benchmark = earned[:, csi300["symbol"].index("SH000300")]
    tradable = torch.from_numpy(np.abs(csi300["move"][used]) < 0.095) & ~earned.isnan()
    result = topk_dropout(score, earned, tradable, topk=50, n_drop=5, open_cost=0.0005, close_cost=0.0015)
    before, after = (excess(series, benchmark, 238) for series in (result.gross, result.net))
    print(name, before, after, float(result.turnover.mean()))
    assert before.annual == pytest.approx(gross, abs=0.02) and before.ratio == pytest.approx(ratio, abs=0.2)
    assert after.annual == pytest.approx(net, abs=0.02)
    assert float(result.turnover.mean()) == pytest.approx(0.20, abs=0.02)
