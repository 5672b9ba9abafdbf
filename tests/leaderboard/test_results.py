"""Result files: strict in, atomic out."""

import json

import polars as pl
import pytest
from moezoo.errors import UserError
from moezoo.leaderboard.results import MetricInfo, Result, load_results, provenance, units_path


def test_a_result_comes_back_as_it_was(make_result, units, tmp_path):
    result = make_result(seed=3)
    path = result.save_in_store(tmp_path, units)
    assert path == tmp_path / "ranking" / "awmoe" / "cj_500-test-s3.json" == result.store_path(tmp_path)
    assert Result.read(path) == result
    assert pl.read_parquet(units_path(path)).equals(units)
    assert load_results(tmp_path) == [result]
    assert sorted(p.suffix for p in path.parent.iterdir()) == [".json", ".parquet"]  # no leftovers


@pytest.mark.parametrize(
    ("change", "key"),
    [
        (lambda d: d.update(extra=1), "extra"),
        (lambda d: d.pop("seed"), "seed"),
        (lambda d: d.update(seed="0"), "seed"),
        (lambda d: d["metrics"].update(session_auc=float("nan")), "session_auc"),
        (lambda d: d["metrics"].update(logloss="low"), "logloss"),
        (lambda d: d["metric_info"].pop("logloss"), "logloss"),
        (lambda d: d["metric_info"]["logloss"].update(goal="least"), "goal"),
        (lambda d: d["parameters"].update(active=-1), "active"),
        (lambda d: d.update(recipe="awmoe"), "recipe"),
        (lambda d: d.update(recipe="../../etc/awmoe"), "recipe"),
    ],
)
def test_a_wrong_file_is_named_with_its_key(make_result, units, tmp_path, change, key):
    path = make_result().save_in_store(tmp_path, units)
    document = json.loads(path.read_text())
    change(document)
    path.write_text(json.dumps(document))
    with pytest.raises(UserError) as caught:
        Result.read(path)
    assert str(path) in str(caught.value) and key in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("content", ["", "{", "[]", '{"seed": 1, "seed": 2}'])
def test_what_is_no_result_is_refused(tmp_path, content):
    path = tmp_path / "x.json"
    path.write_text(content)
    with pytest.raises(UserError, match=r"x\.json"):
        Result.read(path)


def test_a_metric_that_is_no_number_is_never_written(make_result, tmp_path):
    with pytest.raises(UserError, match="session_auc"):
        make_result(metrics={"session_auc": float("inf")}, metric_info={"session_auc": MetricInfo("max", "", 1)})


@pytest.mark.parametrize(
    "table",
    [
        pl.DataFrame({"session_auc": [0.5]}),
        pl.DataFrame({"unit": ["a"], "session_auc": [0.5]}),
        pl.DataFrame({"unit": [1], "session_auc": ["high"]}),
    ],
)
def test_units_of_another_shape_are_refused_and_nothing_is_written(make_result, tmp_path, table):
    with pytest.raises(UserError, match="unit"):
        make_result().save(tmp_path / "run", table)
    assert not list(tmp_path.rglob("*.json"))


def test_the_json_is_written_last(make_result, units, tmp_path):
    """A folder in place of the units' file makes the write fail half-way: then there must be no result."""
    (tmp_path / "units.parquet").mkdir()
    with pytest.raises(OSError):
        make_result().save(tmp_path, units)
    assert not (tmp_path / "result.json").exists()


def test_provenance_says_where_and_with_what():
    where = provenance()
    assert where["hardware"].cores >= 1 and where["hardware"].cpu
    assert {"python", "torch", "polars", "transformers", "moezoo"} <= set(where["versions"])
