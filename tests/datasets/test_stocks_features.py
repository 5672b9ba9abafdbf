"""Every Alpha158 column equals the plain formula, gaps never borrow from neighbours, and nothing looks ahead."""

from datetime import date, timedelta

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from moezoo.datasets.stocks_build import build_panel, raw_features
from moezoo.datasets.stocks_features import feature_expressions
from moezoo.datasets.stocks_tables import StockTables
from moezoo.errors import UserError

TINY = 1e-12
WINDOWS = (5, 10, 20, 30, 60)


def market(symbols=3, days=90, seed=0, gaps=0.1, fields=("open", "high", "low", "close", "volume", "vwap")):
    """Random walks with missing days and a late listing."""
    rng = np.random.default_rng(seed)
    close = 50 * np.exp(np.cumsum(0.02 * rng.standard_normal((symbols, days)), 1))
    opened = close * np.exp(0.01 * rng.standard_normal(close.shape))
    high = np.maximum(close, opened) * np.exp(0.01 * rng.random(close.shape))
    low = np.minimum(close, opened) * np.exp(-0.01 * rng.random(close.shape))
    volume = np.round(np.exp(10 + rng.standard_normal(close.shape)))
    grids = {"open": opened, "high": high, "low": low, "close": close, "volume": volume, "vwap": (high + low) / 2}
    grids["amount"] = grids["volume"] * grids["vwap"]
    missing = rng.random(close.shape) < gaps
    missing[-1, : days // 3] = True
    for grid in grids.values():
        grid[missing] = np.nan
    calendar = tuple(date(2020, 1, 1) + timedelta(days=i) for i in range(days))
    names = tuple(f"S{i}" for i in range(symbols))
    member = np.ones(close.shape, bool)
    return StockTables(calendar, names, {f: grids[f] for f in fields}, member, np.full(days, np.nan))


def changed_after(tables, day, seed=9):
    """The same market up to `day`, another one after it."""
    rng = np.random.default_rng(seed)
    fields = {}
    for name, grid in tables.fields.items():
        factor = np.ones(grid.shape)
        factor[:, day + 1 :] = np.exp(rng.standard_normal((grid.shape[0], grid.shape[1] - day - 1)))
        fields[name] = grid * factor
    return StockTables(tables.calendar, tables.symbols, fields, tables.member, tables.market)


def window(values, t, d):
    """The last d rows up to t; absent ones before the beginning are not there."""
    return values[max(t - d + 1, 0) : t + 1]


def known(values):
    return values[~np.isnan(values)]


def pairs(x, y):
    both = ~np.isnan(x) & ~np.isnan(y)
    return x[both], y[both]


def corr(x, y):
    x, y = pairs(x, y)
    if len(x) < 2 or x.min() == x.max() or y.min() == y.max():
        return np.nan
    return np.corrcoef(x, y)[0, 1]


def back(values, n):
    return np.concatenate([np.full(n, np.nan), values[:-n]])


def std(x):
    x = known(x)
    return x.std(ddof=1) if len(x) > 1 else np.nan


def place_of(x, pick):
    """Position of the first extreme in a window that ends today, oldest 1."""
    return np.nan if np.isnan(x).all() else pick(x) + 1


def naive_alpha158(o, h, low, c, v, vwap, t):
    """One symbol, one day, straight from the published formulas."""
    hi_oc, lo_oc = np.maximum(o, c)[t], np.minimum(o, c)[t]
    length = h[t] - low[t]
    out = {
        "KMID": (c[t] - o[t]) / o[t],
        "KLEN": length / o[t],
        "KMID2": (c[t] - o[t]) / (length + TINY),
        "KUP": (h[t] - hi_oc) / o[t],
        "KUP2": (h[t] - hi_oc) / (length + TINY),
        "KLOW": (lo_oc - low[t]) / o[t],
        "KLOW2": (lo_oc - low[t]) / (length + TINY),
        "KSFT": (2 * c[t] - h[t] - low[t]) / o[t],
        "KSFT2": (2 * c[t] - h[t] - low[t]) / (length + TINY),
        "OPEN0": o[t] / c[t],
        "HIGH0": h[t] / c[t],
        "LOW0": low[t] / c[t],
        "VWAP0": vwap[t] / c[t],
    }
    prev, vprev = back(c, 1), back(v, 1)
    move, flow, change = c - prev, v - vprev, c / prev
    traded = np.abs(change - 1) * v
    index = np.arange(len(c), dtype=float)
    for d in WINDOWS:
        cw, hw, lw, vw = (window(x, t, d) for x in (c, h, low, v))
        mw, fw, tw = (window(x, t, d) for x in (move, flow, traded))
        x, y = pairs(window(index, t, d), cw)
        slope, intercept = np.polyfit(x, y, 1) if len(x) > 1 else (np.nan, np.nan)
        # argmax of an array that begins where the window does, were it full
        lead = d - len(cw)
        high_at = place_of(np.concatenate([np.full(lead, np.nan), hw]), np.nanargmax)
        low_at = place_of(np.concatenate([np.full(lead, np.nan), lw]), np.nanargmin)
        ups, downs = np.nansum(np.maximum(mw, 0)), np.nansum(np.maximum(-mw, 0))
        vups, vdowns = np.nansum(np.maximum(fw, 0)), np.nansum(np.maximum(-fw, 0))
        cnt, vol = known(mw), known(vw)
        nothing = np.nan
        out |= {
            f"ROC{d}": back(c, d)[t] / c[t] if d < len(c) else nothing,
            f"MA{d}": np.nanmean(cw) / c[t],
            f"STD{d}": std(cw) / c[t],
            f"BETA{d}": slope / c[t],
            f"RSQR{d}": corr(window(index, t, d), cw) ** 2,
            f"RESI{d}": (c[t] - slope * t - intercept) / c[t],
            f"MAX{d}": np.nanmax(hw) / c[t],
            f"MIN{d}": np.nanmin(lw) / c[t],
            f"QTLU{d}": np.nanquantile(cw, 0.8) / c[t],
            f"QTLD{d}": np.nanquantile(cw, 0.2) / c[t],
            f"RANK{d}": ((known(cw) < c[t]).sum() + ((known(cw) == c[t]).sum() + 1) / 2) / len(known(cw)),
            f"RSV{d}": (c[t] - np.nanmin(lw)) / (np.nanmax(hw) - np.nanmin(lw) + TINY),
            f"IMAX{d}": high_at / d,
            f"IMIN{d}": low_at / d,
            f"IMXD{d}": (high_at - low_at) / d,
            f"CORR{d}": corr(cw, np.log(vw + 1)),
            f"CORD{d}": corr(window(change, t, d), np.log(window(v / vprev, t, d) + 1)),
            f"CNTP{d}": (cnt > 0).mean() if len(cnt) else nothing,
            f"CNTN{d}": (cnt < 0).mean() if len(cnt) else nothing,
            f"CNTD{d}": (cnt > 0).mean() - (cnt < 0).mean() if len(cnt) else nothing,
            f"SUMP{d}": ups / (ups + downs + TINY) if len(cnt) else nothing,
            f"SUMN{d}": downs / (ups + downs + TINY) if len(cnt) else nothing,
            f"SUMD{d}": (ups - downs) / (ups + downs + TINY) if len(cnt) else nothing,
            f"VMA{d}": vol.mean() / (v[t] + TINY),
            f"VSTD{d}": std(vw) / (v[t] + TINY),
            f"WVMA{d}": std(tw) / (np.nanmean(tw) + TINY) if len(known(tw)) > 1 else nothing,
            f"VSUMP{d}": vups / (vups + vdowns + TINY) if len(known(fw)) else nothing,
            f"VSUMN{d}": vdowns / (vups + vdowns + TINY) if len(known(fw)) else nothing,
            f"VSUMD{d}": (vups - vdowns) / (vups + vdowns + TINY) if len(known(fw)) else nothing,
        }
    return out


def test_alpha158_columns_are_the_plain_formulas():
    tables = market()
    found = raw_features(tables, "alpha158")
    assert len(found) == 158
    days = [1, 3, 8, 29, 31, 59, 60, 61, 75, 89]
    compared = 0
    for i in range(len(tables.symbols)):
        rows = [tables.fields[f][i] for f in ("open", "high", "low", "close", "volume", "vwap")]
        for t in days:
            if np.isnan(rows[3][t]):
                continue
            for name, value in naive_alpha158(*rows, t).items():
                got = found[name][i, t]
                assert got == pytest.approx(value, rel=2e-4, abs=2e-5, nan_ok=True), (name, i, t)
                compared += 1
    assert compared > 2000


def test_a_flat_price_has_no_correlation_and_no_rounding_noise():
    tables = market(gaps=0)
    tables.fields["close"][0, 40:] = 12.34
    found = raw_features(tables, "alpha158")
    assert np.isnan(found["CORR20"][0, 60:]).all() and np.isnan(found["RSQR20"][0, 60:]).all()
    assert np.isfinite(found["CORR20"][1, 60:]).all()


def test_columns_follow_the_fields_there_are():
    count = {f: len(feature_expressions("light", f)) for f in (("close",), ("close", "volume"))}
    assert count == {("close",): 20, ("close", "volume"): 29}
    bar = ("open", "high", "low", "close", "volume")
    assert len(feature_expressions("light", bar)) == 36
    assert "VWAP0" not in feature_expressions("alpha158", bar)
    with pytest.raises(UserError, match=r"needs open, high, low, and the source has close, volume; use .*light"):
        feature_expressions("alpha158", ("close", "volume"))


@pytest.mark.parametrize("kind", ["light", "alpha158"])
@settings(max_examples=5, deadline=None)
@given(seed=st.integers(0, 1000), day=st.integers(2, 80), gaps=st.sampled_from([0.0, 0.2, 0.6]))
def test_later_prices_leave_earlier_features_bit_equal(kind, seed, day, gaps):
    """A5."""
    tables = market(seed=seed, gaps=gaps)
    before, after = raw_features(tables, kind), raw_features(changed_after(tables, day), kind)
    differs = False
    for name in before:
        assert before[name][:, : day + 1].tobytes() == after[name][:, : day + 1].tobytes(), name
        differs |= not np.array_equal(before[name][:, day + 1 :], after[name][:, day + 1 :], equal_nan=True)
    assert differs


@pytest.mark.parametrize("kind", ["light", "alpha158"])
@settings(max_examples=5, deadline=None)
@given(seed=st.integers(0, 1000), gaps=st.sampled_from([0.0, 0.3, 0.8]))
def test_a_symbol_never_borrows_from_another(kind, seed, gaps):
    """Each symbol alone has the features it has among others, bit for bit."""
    tables = market(seed=seed, gaps=gaps)
    together = raw_features(tables, kind)
    for i in range(len(tables.symbols)):
        fields = {name: grid[i : i + 1] for name, grid in tables.fields.items()}
        one = StockTables(tables.calendar, tables.symbols[i : i + 1], fields, tables.member[i : i + 1], tables.market)
        for name, values in raw_features(one, kind).items():
            assert values[0].tobytes() == together[name][i].tobytes(), name


def test_windows_are_days_of_the_calendar_not_rows_of_the_symbol():
    """Pitfall 2: with a day missing, 'five days ago' is still five days ago, and that day itself is unknown."""
    tables = market(gaps=0)
    close = tables.fields["close"]
    for grid in tables.fields.values():
        grid[0, 50] = np.nan
    roc = raw_features(tables, "alpha158")["ROC5"][0]
    assert np.isnan(roc[[50, 55]]).all()
    assert roc[54] == pytest.approx(close[0, 49] / close[0, 54]) and roc[56] == pytest.approx(
        close[0, 51] / close[0, 56]
    )


def test_prices_in_another_unit_change_no_ratio():
    tables = market()
    scaled = {f: grid * (1 if f == "volume" else 7.0) for f, grid in tables.fields.items()}
    other = StockTables(tables.calendar, tables.symbols, scaled, tables.member, tables.market)
    for kind in ("light", "alpha158"):
        a, b = raw_features(tables, kind), raw_features(other, kind)
        for name in a:
            np.testing.assert_allclose(a[name], b[name], rtol=1e-3, atol=1e-5, err_msg=name)


def test_amount_stands_in_for_volume():
    with_amount = market(fields=("open", "high", "low", "close", "amount"))
    found = raw_features(with_amount, "light")
    assert len(found) == 38 and np.isfinite(found["volume_20"][0, 70:]).any()


def test_robust_scaling_knows_the_train_days_alone():
    """Later data neither moves the scale nor the scaled features of earlier days."""
    tables, train = market(symbols=5, days=200, gaps=0.05), list(range(10, 120))
    panel = build_panel(tables, "light", "robust", 4, 2, train)
    later = build_panel(changed_after(tables, 125), "light", "robust", 4, 2, train)
    assert panel.features[:, :126].numpy().tobytes() == later.features[:, :126].numpy().tobytes()
    raw = raw_features(tables, "light")
    priced = np.isfinite(tables.fields["close"])
    for i, (name, x) in enumerate(raw.items()):
        fit = x[:, train][priced[:, train]]
        fit = fit[np.isfinite(fit)]
        if not len(fit):
            continue
        median = np.median(fit)
        z = np.clip((x - median) / (1.4826 * np.median(np.abs(fit - median))), -3, 3)
        expected = np.where(priced, np.nan_to_num(z), 0)
        np.testing.assert_allclose(panel.features[..., i].numpy(), expected, rtol=1e-3, atol=1e-4, err_msg=name)


@pytest.mark.parametrize("normalise", ["rank", "zscore"])
def test_cross_sectional_scaling_is_of_the_day(normalise):
    tables = market(symbols=12, days=120, gaps=0.1)
    panel = build_panel(tables, "light", normalise, 4, 1, [])
    x = raw_features(tables, "light")["ret_5"][:, 100]
    z = panel.features[:, 100, 3].numpy()
    there = np.isfinite(x) & np.isfinite(tables.fields["close"][:, 100])
    assert (z[~there] == 0).all()
    if normalise == "rank":
        expected = (x[there].argsort().argsort() + 1) / there.sum() * 3.46 - 1.73
    else:
        expected = np.clip((x[there] - x[there].mean()) / x[there].std(ddof=1), -3, 3)
    np.testing.assert_allclose(z[there], expected, rtol=1e-3, atol=1e-4)
