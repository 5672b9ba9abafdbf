"""`moezoo surgery` on shipped weights: what it takes away comes back, and mistakes are one line."""

import pytest
import torch
from moezoo import cli, runs, surgery
from moezoo.zoo.core import MLPExperts
from moezoo.zoo.core.surgery import round_to_bits

PLANTED = ["--config", "stocks/miga_planted", "--trainer.limit_test_batches", "1"]


def operate(capsys, *words):
    code = cli.main(["surgery", *words])
    printed = capsys.readouterr()
    return code, printed.out, printed.err


@pytest.mark.slow
def test_a_pool_is_measured_switched_and_rounded_and_is_then_as_before():
    request = runs.Request(config="stocks/miga_planted", overrides=["--trainer.limit_test_batches=1"])
    runs.quiet()
    patient = surgery.Patient(request, None)
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
    assert all(torch.equal(value, before[name]) for name, value in patient.task.model.state_dict().items())
    assert patient.test() == metrics and isinstance(patient.experts, MLPExperts)


@pytest.mark.slow
@pytest.mark.parametrize(
    "words, rows",
    [
        (["rank", "--top", "2"], ["as", "its share"]),
        (["switch", "--off", "0,3", "--on", "7"], ["off 0, 3; on 7"]),
        (["prune", "--keep", "40,20"], ["40", "20", "63%"]),
        (["quantise", "--bits", "4,2.5"], ["alike", "allocated", "4.00", "29%"]),
    ],
)
def test_each_verb_shows_a_row_for_each_variant(capsys, words, rows):
    code, out, err = operate(capsys, *words, *PLANTED)
    assert code == 0, err
    for row in rows:
        assert row in out.replace("\n", " "), (row, out)


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
