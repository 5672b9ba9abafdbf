"""The ranking datamodule: causal features against plain counting, negatives, histories, slices."""

import numpy as np
import polars as pl
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from moezoo.datasets.ranking import RankingData
from moezoo.datasets.ranking_features import CrossFeatures, OccurrenceIndex, encode
from moezoo.errors import UserError

DAY = 86_400


@st.composite
def logs(draw):
    """Random behaviour of a few owners with few codes, and windows into it."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    rows, owners, codes = draw(st.integers(1, 60)), draw(st.integers(1, 4)), draw(st.integers(1, 5))
    owner = np.sort(rng.integers(0, owners, rows))
    code = rng.integers(0, codes, rows)
    sessions = draw(st.integers(1, 8))
    who = rng.integers(0, owners, sessions)
    first, after = np.searchsorted(owner, who), np.searchsorted(owner, who, side="right")
    start = first + (rng.random(sessions) * (after - first + 1)).astype(int)
    end = start + (rng.random(sessions) * (after - start + 1)).astype(int)
    return owner, code, codes, who, start, end, rng.integers(0, codes, sessions)


@settings(deadline=None, max_examples=80)
@given(logs())
def test_the_index_counts_as_a_loop_does(log):
    owner, code, codes, who, start, end, wanted = log
    index = OccurrenceIndex(owner, code, codes)
    count = index.count(who, start, end, wanted)
    latest = index.latest(who, start, end, wanted, 3)
    for i in range(len(who)):
        rows = [r for r in range(start[i], end[i]) if code[r] == wanted[i]]
        assert count[i] == len(rows)
        assert [r for r in latest[i] if r >= 0] == rows[-3:]


def purchases(seed=0, users=12, items=40, baskets=30):
    """A long table of purchases: items of eight kinds, users with favourites, one basket a few days apart."""
    rng = np.random.default_rng(seed)
    rows = []
    for user in range(users):
        favourites = rng.choice(items, 8, replace=False)
        for basket in range(baskets):
            time = (basket * 3 + int(rng.integers(0, 3))) * DAY + user
            bought = np.unique(np.append(rng.choice(favourites, 3), rng.integers(0, items)))
            rows += [(user, int(item), time, float(1 + item % 7)) for item in bought]
    return pl.DataFrame(rows, schema=["user_id", "item_id", "timestamp", "price"], orient="row")


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("long")
    purchases().write_parquet(folder / "events.parquet")
    items = pl.DataFrame({"item_id": range(40)}).with_columns(
        kind=(pl.col("item_id") % 2).cast(pl.String), brand=(pl.col("item_id") % 3).cast(pl.String)
    )
    items.write_csv(folder / "items.csv")
    return {"events": str(folder / "events.parquet"), "items": str(folder / "items.csv"), "query": ["kind"]}


@pytest.fixture
def data(files):
    module = RankingData(source="long", files=files, history_length=10, batch_size=16)
    module.setup("fit")
    return module


def test_the_shipped_sessions_have_the_slices_of_the_fact_sheet():
    data = RankingData(cross_features=False)
    slices = torch.cat([batch.slices for batch in data.test_dataloader()])
    assert slices.sum(0).tolist() == [1005, 1582] and len(slices) == 10_000


def test_features_equal_plain_counting(data):
    features, events = data.features, data.tables.events
    owner, item, time = (events[c].to_numpy().astype(int) for c in ("owner", "item", "time"))
    sessions = data.train_sessions.draw(np.arange(40), np.random.default_rng(0))
    values = features(features.windows(*sessions.window), sessions.candidates)
    column = {name: i for i, name in enumerate(features.names)}
    train = events["is_train"].to_numpy()
    for s in range(40):
        who, start, end, now = (int(v[s]) for v in sessions.window)
        past = np.arange(start, end)
        assert (owner[past] == who).all() and (time[past] < now).all()
        for c, candidate in enumerate(sessions.candidates[s]):
            if candidate < 0:
                continue
            own = past[item[past] == candidate]
            got = values[s, c]
            assert got[column["repeat_log"]] == pytest.approx(np.log1p(len(own)))
            assert got[column["repeat_any"]] == (len(own) > 0)
            recent = own[time[own] >= now - 60 * DAY]
            assert got[column["repeat_recent_log"]] == pytest.approx(np.log1p(len(recent)))
            age = (now - time[own[-1]]) / DAY if len(own) else np.inf
            assert got[column["recency_30d"]] == pytest.approx(np.exp(-age / 30), abs=1e-6)
            others = ((item == candidate) & train & (owner != who)).sum()
            assert got[column["popularity_log"]] == pytest.approx(np.log1p(others))


def test_features_of_a_session_do_not_see_its_basket_or_the_future(data):
    """Other purchases of the same user from the basket on: no feature of the session moves."""
    events = data.tables.events
    sessions = data.train_sessions.draw(np.arange(60), np.random.default_rng(0))
    codes, query = data.catalogue.codes, data.catalogue.query_code
    base = data.features(data.features.windows(*sessions.window), sessions.candidates)
    held_out = ~events["is_train"].to_numpy()
    rng = np.random.default_rng(1)
    changed = events["item"].to_numpy().copy()
    changed[held_out] = rng.integers(0, len(query), held_out.sum())
    tampered = CrossFeatures(events.with_columns(item=pl.Series(changed)), len(query), query, {"brand": codes["brand"]})
    again = tampered(tampered.windows(*sessions.window), sessions.candidates)
    np.testing.assert_allclose(base, again, atol=1e-6)
    # And the user's own later train purchases, of which only the statistics of the market may know.
    own = [i for i, name in enumerate(data.features.names) if name.startswith(("repeat_", "recency", "last", "brand"))]
    own = [i for i in own if data.features.names[i] != "repeat_rate"]
    for s in range(0, 60, 7):
        who, end = int(sessions.window[0][s]), int(sessions.window[2][s])
        later = np.flatnonzero((events["owner"].to_numpy() == who) & (np.arange(len(events)) >= end))
        changed = events["item"].to_numpy().copy()
        changed[later] = rng.integers(0, len(query), len(later))
        tampered = CrossFeatures(
            events.with_columns(item=pl.Series(changed)), len(query), query, {"brand": codes["brand"]}
        )
        one = tampered(tampered.windows(*(w[s : s + 1] for w in sessions.window)), sessions.candidates[s : s + 1])
        np.testing.assert_allclose(base[s, :, own], one[0, :, own], atol=1e-6)


def test_negatives_are_distinct_of_the_same_query_and_not_in_the_basket(data):
    train = data.train_sessions
    sessions = train.draw(np.arange(len(train)), np.random.default_rng(0))
    events = data.tables.events
    for s, row in enumerate(sessions.candidates):
        real = row[row >= 0]
        assert len(set(real)) == len(real)
        assert len(set(data.catalogue.query_code[real])) == 1
        who, _, end, _ = (int(v[s]) for v in sessions.window)
        basket = events.filter((pl.col("owner") == who) & (pl.col("basket") == events["basket"][end]))["item"]
        assert row[0] in basket.to_list()
        assert not set(real[1:]) & set(basket)
        assert (data.popularity[real[1:]] > 0).all()


def test_negatives_follow_popularity_like_numpys_weighted_choice(data):
    """Inclusion frequencies over many draws against `numpy.random.choice` without replacement."""
    train, rng = data.train_sessions, np.random.default_rng(0)
    index = np.zeros(4000, int)
    drawn = train.draw(index, rng).candidates[:, 1:]
    query = data.catalogue.query_code
    basket = set(train._bought[: train._count[0]])
    pool = np.array([i for i in np.flatnonzero(data.popularity) if query[i] == train._query[0] and i not in basket])
    p = data.popularity[pool] / data.popularity[pool].sum()
    oracle = np.concatenate([rng.choice(pool, drawn.shape[1], replace=False, p=p) for _ in range(4000)])
    ours, theirs = np.bincount(drawn.ravel(), minlength=40), np.bincount(oracle, minlength=40)
    assert np.abs(ours - theirs).max() < 5 * np.sqrt(4000 / 2)


def test_a_very_wide_pool_is_thinned_and_still_gives_distinct_negatives(tmp_path):
    events = purchases(items=900, users=40)
    events.write_parquet(tmp_path / "events.parquet")
    data = RankingData(source="long", files={"events": str(tmp_path / "events.parquet")}, cross_features=False)
    assert len(np.flatnonzero(data.popularity)) > 256
    sessions = data.train_sessions.draw(np.arange(200), np.random.default_rng(0))
    for row in sessions.candidates:
        real = row[row >= 0]
        assert len(set(real)) == len(real) >= 8
        assert (data.popularity[real] > 0).all()


@pytest.mark.parametrize("query_history", [0, 4])
def test_histories_show_the_latest_rows_once(files, query_history):
    data = RankingData(source="long", files=files, history_length=10, query_history=query_history)
    sessions = data.train_sessions
    batch = sessions[list(range(50))]
    drawn = sessions.draw(np.arange(50), np.random.default_rng(0))
    item, query = data.tables.events["item"].to_numpy(), data.catalogue.query_code
    code = data.catalogue.codes["item"]
    for s in range(50):
        _, start, end, _ = (int(v[s]) for v in drawn.window)
        same = [r for r in range(start, end) if query[item[r]] == query[drawn.candidates[s, 0]]]
        rows = set(same[max(len(same) - query_history, 0) :]) if query_history else set()
        rows |= set(range(max(start, end - (10 - query_history)), end))
        shown = batch.history[s][batch.history_mask[s]][:, 0].tolist()
        assert sorted(shown) == sorted(code[item[r]] for r in rows)
        assert (batch.history[s][~batch.history_mask[s]] == 0).all()


def test_batches_repeat_under_the_same_seed_and_differ_between_epochs(data):
    def epoch():
        return torch.cat([batch.candidates.flatten() for batch in data.train_dataloader()])

    torch.manual_seed(1)
    first, second = epoch(), epoch()
    torch.manual_seed(1)
    assert torch.equal(first, epoch())
    assert not torch.equal(first, second)


def test_dense_features_are_standardised_on_train(data):
    dense = torch.cat([b.dense[b.candidate_mask] for _ in range(4) for b in data.train_dataloader()])
    assert dense.mean(0).abs().max() < 0.3 and dense.std(0).max() < 2


def test_vocabularies_come_from_train_rows_alone(data):
    trained = data.tables.events.filter("is_train")["item"].unique()
    assert data.schema["vocabulary"]["item"] == len(trained) + 2
    codes, size = encode(pl.Series(["a", "b", None, "z"]), pl.Series(["b", "a", "a"]))
    assert codes.tolist() == [2, 3, 1, 1] and size == 4


def test_the_shipped_data_is_told_apart_by_brand_and_manufacturer():
    assert RankingData().catalogue.telling_attributes() == ["brand", "manufacturer_id"]


def test_the_schema_is_json(data):
    import json

    assert json.loads(json.dumps(data.schema)) == data.schema


def test_predictions_are_named_by_the_users_ids(data):
    split = data.split("test")
    table = pl.DataFrame({"session": [0, 0], "place": [1, 0], "rank": [1.0, 2.0], "score": [0.5, 0.1]})
    named = data.decode(table)
    first = split["candidates"][0]
    assert named["item_id"].to_list() == [
        data.tables.items["item_id"][first[1]],
        data.tables.items["item_id"][first[0]],
    ]
    assert named["user_id"].to_list() == [split["user_id"][0]] * 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"source": "long", "files": {}}, "data.files.events"),
        ({"source": "long", "files": {"event": "x"}}, "no such argument; it takes events"),
        ({"source": "completejourney", "files": {"events": "x"}}, "it ships with moezoo"),
        ({"source": "long", "files": {"events": "missing.parquet"}}, "missing.parquet"),
        ({"query_history": 99}, "expected 0 to history_length"),
        ({"cross_attributes": ["colour"]}, "no attribute 'colour'"),
    ],
)
def test_mistakes_are_told_in_one_line(arguments, message):
    with pytest.raises(UserError, match=message) as caught:
        RankingData(**arguments).setup("fit")
    assert "\n" not in str(caught.value)
