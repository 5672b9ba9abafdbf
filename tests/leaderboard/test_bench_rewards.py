"""The bench of DMoERM's inner layer: PEFT's adapters give its numbers, and its command says what is wrong."""

import json

import pytest
import torch
from moezoo.cli import main
from moezoo.leaderboard.bench import rewards

SMALL = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 50,
}


@pytest.fixture(scope="module")
def contenders():
    with rewards._config(SMALL) as name:
        return rewards.Contenders(name, "cpu")


def test_every_contender_applies_the_same_six_experts(contenders):
    text = rewards._text(4, 9, SMALL["vocab_size"], "cpu")
    with torch.no_grad():
        hidden = contenders.one_pass(text)
        for other in (contenders.switched(text), contenders.mixed(text)):
            torch.testing.assert_close(other, hidden, rtol=0, atol=1e-5)
    between = (hidden[:, :1] - hidden[:, 1:]).abs().amax((0, 2))
    assert between.min() > 1e-3  # experts differ, so that agreeing on them says something


def test_contenders_that_differ_are_not_timed(contenders):
    layer = next(iter(contenders.ours.capability_adapters._layers))
    with torch.no_grad():
        layer.experts.up.weight[3] += 1
        try:
            with pytest.raises(RuntimeError, match="differ"):
                contenders._agree(rewards._text(2, 5, SMALL["vocab_size"], "cpu"))
        finally:
            layer.experts.up.weight[3] -= 1


def test_it_measures_and_keeps_every_sample(tmp_path, capsys):
    path = tmp_path / "r.json"
    results = rewards.run(2, (1, 2), 8, output=path, shape=SMALL)
    kept = json.loads(path.read_text())["seconds"]
    assert set(kept) == {"score-1", "score-2", "train-1", "train-2"} == set(results["seconds"])
    assert all(len(rounds) == 2 for samples in kept.values() for rounds in samples.values())
    shown = capsys.readouterr().out
    assert all(f"{case}x8 tokens" in shown for case in kept) and "at least 2" in shown


def test_the_command_refuses(capsys):
    assert main(["bench", "rewards", "--rows", "2", "0"]) == 2
    assert "--rows [2, 0]" in capsys.readouterr().err
