"""The page: what stands on it follows from the result files, and published numbers stand apart."""

import re
import subprocess
import sys

import numpy as np
import polars as pl
import pytest
from moezoo import recipes
from moezoo.errors import UserError
from moezoo.leaderboard.board import build_tables
from moezoo.leaderboard.commands import main
from moezoo.leaderboard.published import load_published, read_published
from moezoo.leaderboard.report import write_report
from moezoo.leaderboard.results import MetricInfo

INFO = {"session_auc": MetricInfo("max", "", 300)}


@pytest.fixture
def store(make_result, write_recipe, tmp_path):
    """Three seeds of an MoE, its twin and a rival; the MoE is better by 0.02 on every unit."""
    write_recipe("ranking/awmoe", title="AW-MoE <b>&</b>")
    write_recipe("ranking/twin", kind="dense", twin_of="ranking/awmoe")
    write_recipe("ranking/din", kind="rival")
    rng = np.random.default_rng(0)
    scores = rng.random(300)
    for recipe, gain in (("ranking/awmoe", 0.02), ("ranking/twin", 0.0), ("ranking/din", -0.01)):
        for seed in range(3):
            own = scores + gain + rng.normal(0, 0.01, 300)
            result = make_result(
                recipe=recipe,
                seed=seed,
                metrics={"session_auc": own.mean()},
                metric_info={"session_auc": make_result().metric_info["session_auc"]},
                recipe_hash=recipes.recipe_hash(recipe),
            )
            result.save_in_store(tmp_path / "store", pl.DataFrame({"unit": range(300), "session_auc": own}))
    return tmp_path / "store"


def test_rows_are_sorted_compared_and_marked(store):
    (table,) = build_tables(store)
    assert [row.recipe.name for row in table.rows] == ["ranking/awmoe", "ranking/twin", "ranking/din"]
    moe, twin, _ = table.rows
    assert "its dense twin" in write(store)
    markdown = (store.parent / "site" / "LEADERBOARD.md").read_text()
    rows = [line for line in markdown.splitlines() if "`ranking/" in line]
    assert [row.split("`")[1] for row in rows] == [row.recipe.name for row in table.rows]
    gain = np.mean([r.metrics["session_auc"] for r in moe.cells]) - np.mean(
        [r.metrics["session_auc"] for r in twin.cells]
    )
    assert f"+{gain:.4f}" in rows[0] and "p=0.002" in rows[0]


def write(store):
    page, markdown = write_report(store, store.parent / "site")
    assert page.name == "index.html" and markdown.name == "LEADERBOARD.md"
    return page.read_text()


def test_the_page_is_whole_in_one_file_and_escapes_what_it_is_given(store):
    html = write(store)
    assert "AW-MoE <b>" not in html and "AW-MoE &lt;b&gt;" in html
    assert "<svg" in html and not re.findall(r'(?:src|href)="https?://[^"]*\.(?:js|css)"', html)
    markdown = (store.parent / "site" / "LEADERBOARD.md").read_text()
    assert "AW-MoE <b>" not in markdown


def test_the_mean_and_interval_on_the_page_are_those_of_the_files(store):
    from moezoo.leaderboard.results import load_results
    from moezoo.leaderboard.statistics import mean_interval

    values = [r.metrics["session_auc"] for r in load_results(store) if r.recipe == "ranking/awmoe"]
    expected = mean_interval(np.array(values))
    markdown = (write(store), (store.parent / "site" / "LEADERBOARD.md").read_text())[1]
    row = next(line for line in markdown.splitlines() if "ranking/awmoe" in line)
    assert f"{expected.mean:.4f} ± {expected.high - expected.mean:.4f}" in row


def test_stale_results_are_flagged(store, write_recipe):
    write_recipe("ranking/din", model="changed", kind="rival")
    assert "stale" in write(store)


def test_published_numbers_stand_apart_and_carry_their_protocol(store):
    html = write(store)
    measured, published = html.split("Published elsewhere", 1)
    assert "0.883526" in published and "0.883526" not in measured
    assert "early" in published and "not transcribed" in published


def test_published_files_are_read_strictly(tmp_path):
    assert load_published()["ranking"]
    path = tmp_path / "ranking.yaml"
    path.write_text("tables: []\nsurprise: 1\n")
    with pytest.raises(UserError, match=r"ranking\.yaml.*surprise"):
        read_published(path)


def test_a_broken_result_file_is_one_line_and_exit_code_2(store, capsys):
    next(store.rglob("*.json")).write_text("{}")
    assert main(["report", "--results", str(store), "--output", str(store.parent / "new")]) == 2
    told = capsys.readouterr().err.strip()
    assert "\n" not in told and ".json" in told
    assert not (store.parent / "new").exists()


def test_the_command_line_names_its_mistakes(capsys):
    assert main(["run", "ranking/awmo"]) == 2
    assert "ranking/awmoe" in capsys.readouterr().err
    assert main(["run", "ranking/awmoe", "--seeds", "4-1"]) == 2
    assert "--seeds" in capsys.readouterr().err


def test_a_mean_mixes_no_two_versions_of_a_recipe(store, make_result, units):
    old = make_result(recipe="ranking/din", seed=7, recipe_hash="old", metrics={"session_auc": 0.9}, metric_info=INFO)
    old.save_in_store(store, units)
    row = next(row for row in build_tables(store)[0].rows if row.recipe.name == "ranking/din")
    assert row.seeds == [0, 1, 2] and row.left_out == 1 and not row.stale
    assert "1 stale cell left out" in write(store)


def test_the_twin_differs_from_its_moe_by_what_the_moe_differs_from_it(store):
    moe, twin, din = build_tables(store)[0].rows
    (forth,), (back,) = (row.against_twins for row in (moe, twin))
    assert forth.other.name == "ranking/twin" and back.other.name == "ranking/awmoe" and not din.against_twins
    assert forth.test.difference == -back.test.difference and forth.test.n == 300
    assert (forth.test.low, forth.test.high) == pytest.approx((-back.test.high, -back.test.low))
    assert twin.against_best is None and moe.against_best.other.name == "ranking/twin"


def test_a_score_that_a_seed_lacks_leaves_the_other_seeds_score(store, make_result):
    """Units are joined by their number, whatever the order of the rows, and null is no zero."""
    for name, scores in (
        ("awmoe", [[0.4, None, 0.9], [0.6, None, 0.7]]),
        ("twin", [[0.1, 0.5, None], [0.3, 0.5, 0.2]]),
    ):
        for seed, column in enumerate(scores):
            result = make_result(recipe=f"ranking/{name}", seed=seed, dataset="tiny", metrics={"session_auc": 0.5},
                                 metric_info=INFO, recipe_hash=recipes.recipe_hash(f"ranking/{name}"))  # fmt: skip
            table = pl.DataFrame({"unit": [10, 20, 30], "session_auc": column})
            result.save_in_store(store, table.sample(fraction=1, shuffle=True, seed=seed))
    tiny = next(table for table in build_tables(store) if table.dataset == "tiny")
    moe = next(row for row in tiny.rows if row.recipe.name == "ranking/awmoe")
    (comparison,) = moe.against_twins
    assert comparison.test.n == 2  # unit 20 has no score in either seed of the MoE
    assert comparison.test.difference == pytest.approx(((0.5 - 0.2) + (0.8 - 0.2)) / 2)


def test_other_data_is_another_table(store, make_result, units):
    make_result(dataset_fingerprint="changed").save_in_store(store, units)
    assert len(build_tables(store)) == 2


def test_where_less_is_better_the_least_comes_first(make_result, write_recipe, units, tmp_path):
    for name, ade in (("a", 1.5), ("b", 0.7), ("c", 0.9)):
        write_recipe(f"trajectories/{name}")
        result = make_result(
            recipe=f"trajectories/{name}", metrics={"ade": ade}, metric_info={"ade": MetricInfo("min", "m", 9)}
        )
        result.save_in_store(tmp_path / "store", units)
    (table,) = build_tables(tmp_path / "store")
    assert [row.recipe.name[-1] for row in table.rows] == ["b", "c", "a"]
    assert "lower is better" in write(tmp_path / "store")


def test_metrics_of_two_meanings_are_refused(store, make_result, units):
    wrong = make_result(
        seed=9,
        metrics={"session_auc": 0.5},
        metric_info={"session_auc": MetricInfo("min", "", 3)},
        recipe_hash=recipes.recipe_hash("ranking/awmoe"),
    )
    wrong.save_in_store(store, units)
    with pytest.raises(UserError, match="session_auc"):
        build_tables(store)


def test_the_same_results_give_the_same_bytes_and_ids_are_unique(store):
    html = write(store)
    assert write(store) == html
    ids = re.findall(r'\bid="([^"]+)"', html)
    assert len(ids) == len(set(ids))
    assert set(re.findall(r'href="#([^"]+)"', html)) <= set(ids)


def test_a_rule_far_off_is_an_arrow_and_does_not_stretch_the_axis(store, make_result, write_recipe, units):
    assert "←" not in write(store)
    write_recipe("ranking/random", kind="rule")
    result = make_result(recipe="ranking/random", metrics={"session_auc": 0.0123}, metric_info=INFO)
    result.save_in_store(store, units)
    assert "← 0.0123" in write(store)


def test_published_numbers_keep_their_closing_zeros(store):
    html = write(store)
    assert ">0.879690<" in html and ">0.881160<" in html


def test_the_report_needs_no_torch(store, tmp_path):
    code = (
        "import sys; from moezoo.leaderboard.commands import main; "
        f"assert main(['report', '--results', {str(store)!r}, '--output', {str(tmp_path / 'page')!r}]) == 0; "
        "assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
