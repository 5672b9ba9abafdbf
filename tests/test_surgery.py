"""`moezoo surgery` on shipped weights: what it takes away comes back, and mistakes are one line."""

import json

import pytest
import torch
from moezoo import cli, runs, surgery
from moezoo.surgery.report import draw_curve
from moezoo.zoo.core import MLPExperts
from moezoo.zoo.core.surgery import round_to_bits

PLANTED = ["--config", "stocks/miga_planted", "--trainer.limit_test_batches", "1"]


def operate(capsys, *words):
    code = cli.main(["surgery", *words])
    printed = capsys.readouterr()
    return code, printed.out, printed.err


def mixture(config, *overrides):
    runs.quiet()
    return surgery.Mixture(runs.Request(config=config, overrides=list(overrides)), None)


@pytest.mark.slow
def test_a_pool_is_measured_switched_rounded_and_merged_and_is_then_as_before():
    patient = mixture("stocks/miga_planted", "--trainer.limit_test_batches=1", "--trainer.limit_val_batches=2")
    before = {name: value.clone() for name, value in patient.task.model.state_dict().items()}
    metrics = patient.test()
    calibration = patient.calibrate()
    assert calibration.weights.shape == (len(calibration.x), 63) and calibration.x.shape[1] == patient.experts.dim
    assert ((calibration.weights > 0).sum(1) == 8).all()  # its router takes 8 of 63
    with patient.switched([0, 1]):
        again = patient.calibrate()
        assert (again.weights[:, :2] == 0).all() and ((again.weights > 0).sum(1) == 8).all()
        assert patient.test() != metrics
    with patient.rounded([2] * 63):
        weight = patient.experts.layers[0].weight
        torch.testing.assert_close(weight[5], round_to_bits(before["groups.experts.layers.0.weight"][5], 2))
    with patient.merged([[e] for e in range(61)] + [[61, 62]], calibration.load):
        assert torch.equal(weight[61], weight[62]) and torch.equal(
            weight[5], before["groups.experts.layers.0.weight"][5]
        )
    with patient.pruned_online(0.0, 0.0, 0.0) as counted:
        assert patient.test() == metrics and counted["slots"] == 8 * counted["tokens"]
    with patient.pruned_online(0.9, 0.0, 0.0) as counted:
        assert patient.test() != metrics and counted["tokens"] < counted["slots"] < 8 * counted["tokens"]
    assert all(torch.equal(value, before[name]) for name, value in patient.task.model.state_dict().items())
    assert patient.test() == metrics and isinstance(patient.experts, MLPExperts)


@pytest.mark.slow
def test_experts_of_a_policy_are_watched_while_it_plays_and_cached_without_any_change(capsys):
    assert mixture("control/mentor").calibrate().weights.shape == (10 * 100, 8)  # episodes, steps
    words = ["offload", "--cache", "2,8", "--config", "control/mentor", "--trainer.limit_test_batches", "1"]
    code, out, err = operate(capsys, *words)
    assert code == 0 and out.count("+0.0000") == 3, (out, err)


@pytest.mark.slow
@pytest.mark.parametrize(
    "words, rows",
    [
        (["rank", "--top", "2"], ["as", "its share"]),
        (["switch", "--off", "0,3", "--on", "7"], ["off 0, 3; on 7"]),
        (["prune", "--keep", "40,20"], ["40", "20", "0.63"]),
        (["quantise", "--bits", "4,2.5"], ["alike", "allocated", "4.00", "0.29"]),
        (["merge", "--keep", "40"], ["merged", "pruned", "40"]),
        (["online", "--beta", "0.5", "--skip", "0.1"], ["0.50", "0.10"]),
    ],
)
def test_each_verb_shows_a_row_for_each_variant(capsys, words, rows):
    code, out, err = operate(capsys, *words, *PLANTED)
    assert code == 0, err
    for row in rows:
        assert row in out.replace("\n", " "), (row, out)


@pytest.mark.slow
@pytest.mark.parametrize(
    "words, rows",
    [
        (["split", "--experts", "28", "--keep", "28,1"], ["28", "1.00", "0.04"]),
        (["upcycle", "--experts", "4", "--top", "2"], ["upcycled"]),
    ],
)
def test_a_dense_mlp_is_as_it_was_while_all_its_experts_answer(capsys, tmp_path, words, rows):
    output = tmp_path / "deep" / "raw.json"
    dense = ["--config", "stocks/miga_dense", "--trainer.limit_test_batches", "1", "--output", str(output)]
    code, out, err = operate(capsys, *words, *dense)
    assert code == 0 and all(row in out for row in rows), (out, err)
    raw = json.loads(output.read_text())
    assert raw["recipe"] == "stocks/miga_dense" and raw["headline"] == "rank_ic" and raw["n"] > 0
    assert raw["rows"][0]["metrics"]["rank_ic"] == pytest.approx(raw["as trained"]["rank_ic"], abs=1e-5)
    if words[0] == "split":
        assert raw["rows"][1]["metrics"]["rank_ic"] != pytest.approx(raw["as trained"]["rank_ic"], abs=1e-5)


@pytest.mark.slow
def test_a_policy_and_its_copy_in_experts_train_on_alike(capsys, tmp_path):
    file = tmp_path / "raw.json"
    code, _, err = operate(capsys, "upcycle", "--train", "--config", "control/mentor_dense", "--output", str(file))
    assert code == 0, err
    raw = json.loads(file.read_text())
    returns = {row["variant"]: row["metrics"]["episode_return"] for row in raw["rows"]}
    start = raw["as trained"]["episode_return"]
    assert returns["upcycled"] == pytest.approx(start, abs=1.0)
    assert min(returns["dense, trained on"], returns["upcycled, trained on"]) > start + 20


@pytest.mark.slow
def test_the_map_shows_and_draws_what_experts_answer_to(capsys, tmp_path):
    picture = tmp_path / "map.png"
    code, out, err = operate(capsys, "map", "--by", "label", "--output", str(picture), *PLANTED)
    assert code == 0 and "normalised mutual information" in out and picture.stat().st_size > 5000, err
    code, _, err = operate(capsys, "map", "--by", "colour", *PLANTED)
    assert code == 2 and "the batches have" in err


@pytest.mark.slow
@pytest.mark.parametrize(
    "words, message",
    [
        (["switch", "--off", "63", *PLANTED], "groups.experts has experts 0 to 62"),
        (["switch", *PLANTED], "give --off or --on"),
        (["switch", "--off", "1", "--on", "1", *PLANTED], "both off and on"),
        (["prune", "--keep", "63", *PLANTED], "between 1 and 62"),
        (["quantise", "--bits", "0.5", *PLANTED], "the smallest of --choices is 1"),
        (["rank", *PLANTED, "--pool", "experts"], "has groups.experts"),
        (["rank", "--config", "ranking/din"], "no stacked experts"),
        (["merge", "--keep", "2", "--config", "relations/moevrd"], "this needs MLPExperts"),
        (["online", "--config", "ranking/awmoe"], "needs a router of the core"),
        (["split", "--keep", "1", "--experts", "9", "--config", "stocks/miga_dense"], "divide the hidden width 616"),
        (["upcycle", "--config", "ranking/awmoe_dense", "--part", "tower"], "no MLP with one hidden layer"),
    ],
)
def test_mistakes_on_a_patient_are_one_line(capsys, words, message):
    code, _, err = operate(capsys, *words)
    assert code == 2 and message in err and err.count("\n") == 1


@pytest.mark.parametrize(
    "words, message",
    [
        ([], "VERB"),
        (["amputate"], "amputate"),
        (["switch", "--config", "stocks/miga", "--off", "a"], "'a': expected whole numbers"),
        (["rank", "--config", "stocks/mgia"], "stocks/mgia"),
    ],
)
def test_mistakes_in_words_are_one_line(capsys, words, message):
    code, _, err = operate(capsys, *words)
    assert code == 2 and message in err and err.count("\n") == 1


def test_a_curve_is_drawn_for_each_way(tmp_path):
    def row(size, how, value):
        return {"size": size, "how": how, "metrics": {"auc": value}}

    rows = [row(0.5, "alike", 0.7), row(0.3, "alike", 0.6), row(0.4, "allocated", 0.69)]
    raw = {"recipe": "a/b", "verb": "quantise", "headline": "auc", "as trained": {"auc": 0.7}, "rows": rows}
    draw_curve(raw, "size", "size", tmp_path / "deep" / "curve.png")
    assert (tmp_path / "deep" / "curve.png").stat().st_size > 5000
