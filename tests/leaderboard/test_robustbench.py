"""Robustness results in RobustBench's form."""

import json

import polars as pl
from moezoo import recipes
from moezoo.leaderboard.report import write_report
from moezoo.leaderboard.results import MetricInfo

# What every file of RobustBench's model_info/cifar10/Linf has (revision 78fcc9e).
KEYS = {
    "link", "name", "authors", "additional_data", "number_forward_passes", "dataset", "venue", "architecture", "eps",
    "clean_acc", "reported", "autoattack_acc",
}  # fmt: skip


def test_results_are_written_as_robustbench_has_them(make_result, tmp_path):
    changes = {"recipe": "robustness/advmoe", "dataset": "cut", "recipe_hash": recipes.recipe_hash("robustness/advmoe")}
    info = {"sa": 2000, "ra_pgd50": 1000, "ra_route": 1000, "ra_aa": 200, "aa_flags": 200, "aa_flag_square": 200}
    units = pl.DataFrame({"unit": [0, 1], "ra_route": [0.0, 1.0]})
    for seed, ra in ((0, 0.5), (1, 0.52)):
        metrics = {"sa": 0.8, "ra_pgd50": 0.6, "ra_route": 0.55, "ra_aa": ra, "aa_flags": 0.0}
        metrics |= {"aa_flag_square": 1.0} if seed else {}
        goals = {name: MetricInfo("min" if name.startswith("aa_") else "max", "", info[name]) for name in metrics}
        make_result(seed=seed, metrics=metrics, metric_info=goals, **changes).save_in_store(tmp_path / "store", units)
    plain = {"recipe": "robustness/at_dense", "metrics": {"sa": 0.7}, "metric_info": {"sa": MetricInfo("max", "", 10)}}
    make_result(**changes | plain).save_in_store(tmp_path / "store", units)
    *pages, path = write_report(tmp_path / "store", tmp_path / "site")
    assert [page.name for page in pages] == ["index.html", "LEADERBOARD.md"], "no file without AutoAttack"
    assert path == tmp_path / "site/model_info/cut/Linf/advmoe.json"
    entry = json.loads(path.read_text())
    assert set(entry) >= KEYS and set(entry) <= KEYS | {"footnote", "unreliable", "external"}
    assert (entry["clean_acc"], entry["reported"], entry["autoattack_acc"]) == ("80.00", "60.00", "51.00")
    assert entry["link"] == "https://arxiv.org/abs/2308.10110" and entry["eps"] == "0.1"
    assert entry["unreliable"] is True and "square" in entry["footnote"]
    assert "first 200 test images" in entry["footnote"] and "55.00%" in entry["footnote"]
