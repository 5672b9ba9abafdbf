"""The page: what stands on it follows from the result files, and published numbers stand apart."""

import re

import numpy as np
import polars as pl
import pytest
from moezoo import recipes
from moezoo.errors import UserError
from moezoo.leaderboard.board import build_tables
from moezoo.leaderboard.commands import main
from moezoo.leaderboard.published import load_published, read_published
from moezoo.leaderboard.report import write_report


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
