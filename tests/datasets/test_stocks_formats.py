"""One market read from every format gives the same tables; each mistake of the user is one clear line."""

import sys
from datetime import date, timedelta

import numpy as np
import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from moezoo.datasets import stocks_sp500
from moezoo.datasets.stocks import StocksData, open_source
from moezoo.datasets.stocks_tables import Judge
from moezoo.errors import UserError
from moezoo.settings import real_data_dir

DAYS, SYMBOLS = 60, ("AAA", "BBB", "CCC")
FIELDS = ("open", "high", "low", "close", "volume")


def rows(gaps=True):
    """A small market as long rows, by symbol and date."""
    rng = np.random.default_rng(1)
    close = 20 * np.exp(np.cumsum(0.02 * rng.standard_normal((len(SYMBOLS), DAYS)), 1))
    frame = pl.DataFrame(
        {
            "date": [date(2021, 1, 4) + timedelta(days=i) for i in range(DAYS)] * len(SYMBOLS),
            "symbol": np.repeat(SYMBOLS, DAYS),
            "open": close.ravel() * 1.01,
            "high": close.ravel() * 1.03,
            "low": close.ravel() * 0.98,
            "close": close.ravel(),
            "volume": np.round(1e5 * rng.random(close.size)),
        }
    )
    return frame.filter(~((pl.col("symbol") == "BBB") & pl.col("date").dt.day().is_in([9, 10]))) if gaps else frame


def read(file, bad_rows="raise", **files):
    return open_source("long", {"prices": str(file), **files}).read(Judge(bad_rows))


def written(tmp_path, frame, name="prices.csv"):
    file = tmp_path / name
    frame.write_parquet(file) if name.endswith("parquet") else frame.write_csv(file)
    return file


def same(a, b, rtol=0.0):
    assert a.calendar == b.calendar and a.symbols == b.symbols and set(a.fields) == set(b.fields)
    for name in a.fields:
        np.testing.assert_allclose(a.fields[name], b.fields[name], rtol=rtol, err_msg=name)
    np.testing.assert_array_equal(a.member, b.member)


def write_wide(tmp_path, frame):
    files = {}
    for field in FIELDS:
        wide = frame.pivot("symbol", index="date", values=field).sort("date", descending=True)
        files[field] = str(written(tmp_path, wide, f"{field}.csv"))
    return files


def write_qlib(root, frame):
    """The binary layout from its description."""
    days = frame["date"].unique().sort().to_list()
    (root / "calendars").mkdir(parents=True)
    (root / "instruments").mkdir()
    (root / "calendars" / "day.txt").write_text("".join(f"{day}\n" for day in days))
    spans = []
    for (symbol,), part in frame.sort("date").group_by("symbol", maintain_order=True):
        folder = root / "features" / symbol.lower()
        folder.mkdir(parents=True)
        first, last = part["date"][0], part["date"][-1]
        spans.append(f"{symbol}\t{first}\t{last}")
        span = (
            pl.DataFrame({"date": [d for d in days if first <= d <= last]})
            .join(part, on="date", how="left")
            .sort("date")
        )
        for field in FIELDS:
            values = span[field].fill_null(np.nan).to_numpy()
            np.concatenate([[days.index(first)], values]).astype("<f4").tofile(folder / f"{field}.day.bin")
    (root / "instruments" / "all.txt").write_text("\n".join(spans) + "\n")
    (root / "instruments" / "two.txt").write_text("AAA\t2021-01-04\t2021-01-20\nCCC\t2021-01-10\t2099-12-31\n")
    return root


def test_every_format_reads_the_same_market(tmp_path):
    frame = rows().filter(~((pl.col("symbol") == "CCC") & (pl.col("date") < date(2021, 1, 12))))
    expected = read(written(tmp_path, frame, "prices.parquet"))
    assert expected.symbols == SYMBOLS and len(expected.calendar) == DAYS
    assert np.isnan(expected.fields["close"]).sum() == 2 * 2 + 8
    same(read(written(tmp_path, frame)), expected, rtol=1e-14)
    folder = tmp_path / "each"
    folder.mkdir()
    for (symbol,), part in frame.group_by("symbol"):
        written(folder, part.drop("symbol"), f"{symbol}.csv")
    same(read(folder), expected, rtol=1e-14)
    same(open_source("wide", write_wide(tmp_path, frame)).read(Judge()), expected, rtol=1e-14)
    qlib = open_source("qlib", {"folder": str(write_qlib(tmp_path / "q", frame))}).read(Judge())
    spans = np.array([[True] * DAYS, [True] * DAYS, [False] * 8 + [True] * (DAYS - 8)])
    np.testing.assert_array_equal(qlib.member, spans)
    assert qlib.calendar == expected.calendar
    for name in expected.fields:
        np.testing.assert_allclose(qlib.fields[name], expected.fields[name], rtol=1e-6)


def test_qlib_universe_is_dated_and_the_benchmark_leaves_it(tmp_path):
    root = write_qlib(tmp_path / "q", rows(gaps=False))
    two = open_source("qlib", {"folder": str(root), "universe": "two"})
    assert two.name == "two" and two.fields == ("open", "high", "low", "close", "volume")
    tables = two.read(Judge())
    assert tables.symbols == ("AAA", "CCC")
    assert tables.member.sum(1).tolist() == [17, DAYS - 6]
    assert not tables.member[0, 17] and tables.member[0, 16] and not tables.member[1, 5] and tables.member[1, 6]
    indexed = open_source("qlib", {"folder": str(root), "benchmark": "BBB"}).read(Judge())
    assert indexed.member.sum(1).tolist() == [DAYS, 0, DAYS]
    close = indexed.fields["close"][1]
    np.testing.assert_allclose(indexed.market[1:], close[1:] / close[:-1] - 1)


@settings(max_examples=15, deadline=None)
@given(first=st.integers(0, 5), values=st.lists(st.floats(0.5, 1e5, width=32) | st.none(), min_size=2, max_size=20))
def test_qlib_round_trip_of_gaps(tmp_path_factory, first, values):
    days = [date(2021, 1, 1) + timedelta(days=i) for i in range(30)]
    frame = pl.DataFrame({"date": days, "symbol": "AAA", **{f: np.linspace(1, 2, 30) for f in FIELDS}})
    root = write_qlib(tmp_path_factory.mktemp("q"), frame)
    (root / "features" / "bbb").mkdir()
    raw = np.array([first, *(np.nan if v is None else v for v in values)], "<f4")
    raw.tofile(root / "features" / "bbb" / "close.day.bin")
    with (root / "instruments" / "all.txt").open("a") as file:
        file.write("BBB\t2021-01-01\t2021-01-30\n")
    close = open_source("qlib", {"folder": str(root)}).read(Judge()).fields["close"][1]
    np.testing.assert_array_equal(close[first : first + len(values)], raw[1:].astype(float))
    assert np.isnan(close[:first]).all() and np.isnan(close[first + len(values) :]).all()


def test_yahoo_names_and_adjustment(tmp_path):
    frame = rows()
    yahoo = frame.select(
        pl.col("date").dt.strftime("%Y-%m-%d 00:00:00-05:00").alias("Date"),
        pl.col("symbol").alias("Ticker"),
        *((2 * pl.col(name)).alias(name.title()) for name in ("open", "high", "low", "close")),
        pl.col("close").alias("Adj Close"),
        pl.col("volume").alias("Volume"),
    )
    same(read(written(tmp_path, yahoo)), read(written(tmp_path, frame, "p.parquet")), rtol=1e-12)


@pytest.mark.parametrize("form", ["%Y%m%d", "%Y/%m/%d", "%Y-%m-%dT%H:%M:%S"])
def test_dates_in_the_usual_forms(tmp_path, form):
    frame = rows()
    same(
        read(written(tmp_path, frame.with_columns(pl.col("date").cast(pl.Datetime).dt.strftime(form)))),
        read(written(tmp_path, frame, "p.parquet")),
        rtol=1e-14,
    )


def test_unsorted_rows_are_sorted_with_one_line(tmp_path):
    frame = rows()
    in_order = read(written(tmp_path, frame))
    assert not in_order.notes
    shuffled = read(written(tmp_path, frame.sample(fraction=1, shuffle=True, seed=3), "s.csv"))
    same(shuffled, in_order)
    assert shuffled.notes == (f"{tmp_path}/s.csv: rows are not in order of date; they have been sorted",)


def test_other_names_cap_sector_membership_and_index(tmp_path):
    frame = rows(gaps=False).with_columns(cap=pl.col("close") * 1000, sector=pl.lit("Energy")).rename({"close": "px"})
    members = pl.DataFrame(
        {"ticker": ["AAA", "AAA", "BBB", "CCC"], "from": ["2021-01-04", "2021-02-01", "2021-01-05", None],
         "to": ["2021-01-10", None, "2021-01-06", None]}
    )  # fmt: skip
    index = rows(gaps=False).filter(pl.col("symbol") == "BBB").select("date", "close")
    tables = read(
        written(tmp_path, frame),
        columns={"close": "px"},
        membership=str(written(tmp_path, members, "m.csv")),
        benchmark=str(written(tmp_path, index, "i.csv")),
    )
    assert tables.member.sum(1).tolist() == [7 + DAYS - 28, 2, DAYS]
    assert tables.sectors == dict.fromkeys(SYMBOLS, "Energy") and "cap" in tables.fields
    level = index["close"].to_numpy()
    np.testing.assert_allclose(tables.market[1:], level[1:] / level[:-1] - 1)
    assert np.isnan(tables.market[0])
    as_symbol = read(tmp_path / "prices.csv", columns={"close": "px"}, benchmark="BBB")
    np.testing.assert_allclose(as_symbol.market, tables.market)
    assert as_symbol.member.sum(1).tolist() == [DAYS, 0, DAYS]


def edit(column, row, value):
    def change(frame):
        frame = frame.cast({column: pl.String})
        frame[row, column] = value
        return frame

    return change


MISTAKES = {
    "no close": (lambda f: f.drop("close"), r"prices.csv: column 'close' is missing; .*'\{close: YOURS"),
    "near name": (
        lambda f: f.rename({"close": "closing"}),
        "rename 'closing', or give --data.files.columns '{close: closing}'",
    ),
    "no symbol": (lambda f: f.drop("symbol"), "prices.csv: column 'symbol' is missing"),
    "text volume": (edit("volume", 4, "1.2M"), "column 'volume', row 5: '1.2M'; expected a number such as 1234.5"),
    "text price": (edit("close", 2, "n/a"), "column 'close', row 3: 'n/a'; expected a number"),
    "no date": (edit("date", 6, "yesterday"), "column 'date', row 7: 'yesterday'; expected YYYY-MM-DD as in"),
    "mixed dates": (edit("date", 6, "01/10/2021"), "row 7: '01/10/2021'; expected YYYY-MM-DD .* must not be mixed"),
    "other dates": (
        lambda f: f.with_columns(pl.col("date").dt.strftime("%d.%m.%y")),
        "column 'date', row 1: '04.01.21'; expected a date such as 2024-05-31",
    ),
    "empty symbol": (edit("symbol", 1, None), "column 'symbol', row 2: empty; expected a symbol in every row"),
    "repeated": (
        lambda f: pl.concat([f, f[3:5]]),
        r"2 rows repeating a date and symbol \(row 177: AAA on 2021-01-07; row 178: .*once.*bad_rows=drop",
    ),
    "zero": (edit("close", 7, "0"), r"1 row with close <= 0 \(row 8: AAA on 2021-01-11, 0\); expected close > 0"),
    "negative": (edit("open", 7, "-3"), r"1 row with open <= 0 \(row 8: AAA on 2021-01-11, -3\)"),
    "negative volume": (edit("volume", 0, "-5"), r"1 row with volume < 0 \(row 1: AAA on 2021-01-04, -5\)"),
    "infinite": (edit("close", 0, "inf"), r"1 row with infinite close \(row 1"),
    "high below low": (edit("high", 9, "0.5"), r"1 row with high < low \(row 10: AAA on 2021-01-13, 0.5\)"),
    "future": (edit("date", 59, "2999-01-01"), r"1 row with a date in the future \(row 60: AAA on 2999-01-01"),
    "one symbol": (lambda f: f[:60], r"one symbol alone \(AAA\); expected several"),
    "same series": (
        lambda f: f.drop("high", "low").with_columns(pl.col("close").first().over("date")),
        r"2 symbols share their prices with another one \(AAA, CCC have the same close on every day\)",
    ),
    "no rows": (lambda f: f[:0], "prices.csv: no rows"),
}  # fmt: skip


@pytest.mark.parametrize("name", MISTAKES)
def test_a_bad_panel_is_one_line(name, tmp_path):
    change, message = MISTAKES[name]
    written(tmp_path, change(rows()))
    with pytest.raises(UserError, match=message) as error:
        read(tmp_path / "prices.csv")
    assert "\n" not in str(error.value) and str(error.value).startswith(str(tmp_path / "prices.csv"))


@pytest.mark.parametrize(
    "name", ["repeated", "zero", "negative", "negative volume", "infinite", "high below low", "future"]
)
def test_bad_rows_are_dropped_when_asked_and_told(name, tmp_path):
    change, _ = MISTAKES[name]
    tables = read(written(tmp_path, change(rows())), bad_rows="drop")
    clean = read(written(tmp_path, rows(), "clean.csv"))
    lost = np.isfinite(clean.fields["close"]).sum() - np.isfinite(tables.fields["close"]).sum()
    assert lost == (0 if name == "repeated" else 1)
    (line,) = tables.notes
    assert line.startswith(f"{tmp_path}/prices.csv: dropped ") and "(row " in line and "\n" not in line
    for name, grid in tables.fields.items():
        assert np.array_equal(np.isnan(grid), np.isnan(tables.fields["close"])), name


def test_days_outside_the_calendar(tmp_path):
    file = written(tmp_path, rows(gaps=False))
    calendar = tmp_path / "days.txt"
    calendar.write_text("".join(f"{date(2021, 1, 4) + timedelta(days=i)}\n" for i in range(DAYS) if i != 5))
    with pytest.raises(
        UserError, match=r"3 rows dated outside the calendar .*days.txt \(row 6: AAA on 2021-01-09; row 66"
    ):
        read(file, calendar=str(calendar))
    assert len(read(file, bad_rows="drop", calendar=str(calendar)).calendar) == DAYS - 1


@pytest.mark.parametrize(
    ("members", "message"),
    [
        ({"symbol": ["AAA", "XXX"], "start": ["2021-01-04"] * 2, "end": ["2021-03-01"] * 2},
         r"m.csv: 1 row naming 1 symbols without prices \(row 2: XXX\); expected symbols of the price file"),
        ({"symbol": ["aaa", "bbb"], "start": ["2021-01-04"] * 2, "end": ["2021-03-01"] * 2},
         r"none of its 2 symbols \(aaa, ...\) has prices; the prices have e.g. AAA"),
        ({"symbol": ["AAA"], "start": ["2021-03-01"], "end": ["2021-01-04"]}, "row 1: AAA from 2021-03-01 to 2021"),
        ({"symbol": ["AAA"], "start": ["2001-03-01"], "end": ["2001-04-04"]}, "nobody is a member on any day from"),
        ({"symbol": ["AAA"], "start": ["2021-01-04"]}, "m.csv: column 'end' is missing"),
    ],
)  # fmt: skip
def test_a_bad_membership_is_one_line(members, message, tmp_path):
    file, spans = written(tmp_path, rows()), written(tmp_path, pl.DataFrame(members), "m.csv")
    with pytest.raises(UserError, match=message) as error:
        read(file, membership=str(spans))
    assert "\n" not in str(error.value)


def test_a_symbol_of_digits_is_found_without_its_zeros(tmp_path):
    codes = rows().with_columns(pl.col("symbol").replace_strict(SYMBOLS, ["000300", "000016", "600519"]))
    file = written(tmp_path, codes)
    wanted, got = read(file, benchmark="000300"), read(file, benchmark="300")  # as the command line hands it on
    assert np.array_equal(wanted.market, got.market, equal_nan=True) and np.isfinite(got.market).any()
    assert not got.member[got.symbols.index("000300")].any()
    with pytest.raises(UserError, match="benchmark=519: neither a file nor a symbol"):
        read(file, benchmark="519")


def test_unknown_members_can_be_left_out(tmp_path):
    spans = pl.DataFrame({"symbol": ["AAA", "XXX"], "start": ["2021-01-04"] * 2, "end": ["2021-03-01"] * 2})
    tables = read(written(tmp_path, rows()), "drop", membership=str(written(tmp_path, spans, "m.csv")))
    assert tables.member.any(1).tolist() == [True, False, False] and len(tables.notes) == 1


@pytest.mark.parametrize(
    ("column", "dtype", "message"),
    [
        ("close", pl.Boolean, "column 'close' is Boolean; expected numbers"),
        ("volume", pl.Date, "column 'volume' is Date; expected numbers"),
        ("date", pl.Float64, "column 'date' is Float64; expected dates such as 2024-05-31"),
    ],
)
def test_a_wrong_type_is_one_line(column, dtype, message, tmp_path):
    frame = rows().with_columns(pl.lit(1).cast(pl.Int32).cast(dtype).alias(column))
    with pytest.raises(UserError, match=message):
        read(written(tmp_path, frame, "p.parquet"))


def test_other_mistakes_are_one_line(tmp_path):
    file = written(tmp_path, rows())
    with pytest.raises(UserError, match=r"data\.files\.benchmark=SPX: neither a file nor a symbol"):
        read(file, benchmark="SPX")
    with pytest.raises(UserError, match=r"column 'px', given for close, is missing; it has date"):
        read(file, columns={"close": "px"})
    with pytest.raises(UserError, match=r"data.files.columns.price: unknown; expected one of date, symbol, open"):
        read(file, columns={"price": "close"})
    with pytest.raises(UserError, match=r"nothing.parquet: no such file"):
        read(tmp_path / "nothing.parquet")
    wide = write_wide(tmp_path, rows())
    pl.read_csv(wide["volume"]).rename({"BBB": "ZZZ"}).write_csv(wide["volume"])
    with pytest.raises(UserError, match=r"volume.csv: column 'ZZZ' is no symbol of .*close.csv"):
        open_source("wide", wide).read(Judge())
    root = write_qlib(tmp_path / "q", rows())
    with pytest.raises(UserError, match=r"data.files.universe=csi300: .* the folder has all, two"):
        open_source("qlib", {"folder": str(root), "universe": "csi300"})
    np.zeros(100, "<f4").tofile(root / "features" / "aaa" / "close.day.bin")
    with pytest.raises(UserError, match="99 values from position 0 leave the calendar of 60 days"):
        open_source("qlib", {"folder": str(root)}).read(Judge())
    (root / "features" / "aaa" / "close.day.bin").write_bytes(b"abc")
    with pytest.raises(UserError, match="3 bytes; expected float32"):
        open_source("qlib", {"folder": str(root)}).read(Judge())
    with pytest.raises(UserError, match=r"no folder 'calendars'; expected a Qlib folder"):
        open_source("qlib", {"folder": str(tmp_path)})


def test_dropped_rows_are_told_each_time_also_from_the_cache(tmp_path, caplog):
    file = written(tmp_path, edit("close", 7, "0")(rows()))
    for _ in range(2):
        caplog.clear()
        data = StocksData(source="long", files={"prices": str(file)}, lookback=2, horizon=1, bad_rows="drop")
        data.setup("fit")
        data.setup("test")
        assert [record.getMessage() for record in caplog.records] == list(data.panel.notes)
        assert len(data.panel.notes) == 1 and "dropped 1 row with close <= 0" in data.panel.notes[0]


def test_a_mistake_leaves_nothing_behind(tmp_path, monkeypatch):
    monkeypatch.setenv("MOEZOO_CACHE", str(tmp_path / "cache"))
    file = written(tmp_path, edit("close", 7, "0")(rows()))
    data = StocksData(source="long", files={"prices": str(file)}, lookback=2, horizon=1)
    with pytest.raises(UserError):
        data.setup("fit")
    assert [path.name for path in tmp_path.iterdir()] == ["prices.csv"]


def test_sp500_without_its_package_names_the_extra(monkeypatch):
    def absent(name):
        raise stocks_sp500.PackageNotFoundError(name)

    monkeypatch.setattr(stocks_sp500, "package_files", absent)
    with pytest.raises(
        UserError, match=r"portfolio-backtester==0.1.0, which is not installed: pip install 'moezoo\[stocks\]'"
    ):
        _ = StocksData().schema


@pytest.fixture(scope="module")
def sp500():
    try:
        return open_source("sp500", {}).read(Judge())
    except UserError as error:
        pytest.skip(str(error))


def test_sp500_is_the_known_panel(sp500):
    """A11. Of the file's 3,809 rows, two are holidays without any price: 2016-01-18 and 2018-12-05."""
    assert (len(sp500.symbols), len(sp500.calendar)) == (503, 3_807)
    assert not {date(2016, 1, 18), date(2018, 12, 5)} & set(sp500.calendar)
    close = sp500.fields["close"]
    assert np.isfinite(close).sum() == 503 * 3_809 - 123_795
    assert (sp500.calendar[0], sp500.calendar[-1]) == (date(2006, 8, 31), date(2021, 10, 14))
    assert len({series.tobytes() for series in close}) == 503
    assert all(day.weekday() < 5 for day in sp500.calendar) and list(sp500.calendar) == sorted(set(sp500.calendar))
    moves = np.abs(close[:, 1:] / close[:, :-1] - 1)
    assert (moves > 0.5).sum() == 26
    # The factors' market is that of the same days: a shift by one would show at once.
    ours = np.nanmean(close[:, 1:] / close[:, :-1] - 1, 0)
    both = np.isfinite(sp500.market[1:])
    assert np.corrcoef(ours[both], sp500.market[1:][both])[0, 1] > 0.97
    assert sp500.calendar[1 + np.flatnonzero(both)[-1]] == date(2021, 6, 30)


def test_sp500_changed_files_are_refused(sp500, monkeypatch):
    monkeypatch.setattr(stocks_sp500, "_FILES", dict.fromkeys(stocks_sp500._FILES, "0" * 64))
    with pytest.raises(UserError, match="has changed: sha256 cfecf9b2a808, expected 000000000000; pip install --force"):
        open_source("sp500", {})


def test_sp500_package_is_never_imported(sp500):
    assert "portfolio_backtester" not in sys.modules


def real(name):
    folder = real_data_dir()
    if folder is None:
        pytest.skip("MOEZOO_REAL_DATA is not set")
    return str(folder / "miga" / name)


@pytest.mark.real
def test_real_sp500_ohlcv():
    file = real("us_sp500_ohlcv_2013_2018.parquet")
    with pytest.raises(UserError, match="1 row with high < low"):
        read(file)
    tables = read(file, "drop")
    assert (len(tables.symbols), len(tables.calendar)) == (505, 1_259)
    assert np.isfinite(tables.fields["close"]).sum() == 619_040 - 1


@pytest.mark.real
def test_real_philippines():
    file = real("ph_pse_ohlc_value_2010_2021.parquet")
    with pytest.raises(UserError, match="37 rows with open <= 0"):
        read(file)
    tables = read(file, "drop")
    assert (len(tables.symbols), len(tables.calendar)) == (257, 2_798)
    assert np.isfinite(tables.fields["close"]).sum() == 538_408 - 37 - 2


@pytest.mark.real
def test_real_csi300_with_dated_membership():
    prices, members = real("cn_csi300_ohlcv_2010_2026.parquet"), real("cn_csi300_membership.parquet")
    with pytest.raises(UserError, match="42 rows naming 38 symbols without prices"):
        read(prices, membership=members)
    tables = read(prices, "drop", membership=members, benchmark="SH000300")
    assert (len(tables.symbols), len(tables.calendar)) == (758, 3_966)
    assert np.isfinite(tables.fields["close"]).sum() == 2_607_504
    scored = (tables.member & np.isfinite(tables.fields["close"])).sum(0)
    spans = pl.scan_parquet(members)
    joined = pl.scan_parquet(prices).join(spans, on="symbol").filter(pl.col("date").is_between("start", "end"))
    count = joined.unique(["date", "symbol"]).group_by("date").len().sort("date").collect()
    assert count["date"].to_list() == list(tables.calendar) and count["len"].to_list() == scored.tolist()
    assert (scored.min(), scored.max(), scored.sum()) == (243, 300, 1_071_343)
    gone = tables.symbols.index("SH600004")
    days = np.array(tables.calendar, "datetime64[D]")
    out = (days > np.datetime64("2011-12-12")) & (days < np.datetime64("2018-12-17"))
    assert not tables.member[gone, out].any() and tables.member[gone, days == np.datetime64("2019-01-02")].all()
    level = tables.fields["close"][tables.symbols.index("SH000300")]
    np.testing.assert_allclose(tables.market[1:], level[1:] / level[:-1] - 1)
