"""The bench of routed CNNs: its contenders compute the same, and its command says what is wrong."""

import json

import pytest
import torch
from moezoo.cli import main
from moezoo.leaderboard.bench import robustness
from torch.utils.flop_counter import FlopCounterMode


def flops(network, image):
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        network(image)
    return counter.get_total_flops()


def test_sorting_does_half_of_the_work_of_masking_for_the_same_numbers():
    torch.manual_seed(0)
    networks = {name: network.eval() for name, network in robustness.contenders().items()}
    image = torch.rand(4, 3, 32, 32)
    torch.testing.assert_close(networks["sorted"](image), networks["mask-all"](image), rtol=0, atol=1e-5)
    torch.testing.assert_close(networks["sorted+router"](image), networks["sorted"](image), rtol=0, atol=1e-5)
    counts = {name: flops(network, image) for name, network in networks.items()}
    assert counts["mask-all"] / counts["sorted"] == pytest.approx(0.298 / 0.1517, rel=0.01)  # spec 2.3
    assert counts["sorted"] / counts["dense"] == pytest.approx(0.1517 / 0.5554, rel=0.01)


def test_the_command_measures_keeps_and_refuses(tmp_path, capsys):
    assert main(["bench", "robustness", "--rounds", "1", "--batch", "2", "--output", str(tmp_path / "r.json")]) == 0
    document = json.loads((tmp_path / "r.json").read_text())
    assert set(document["seconds"]) == {f"resnet18-{m}-{f}-2" for m in ("eval", "train") for f in ("nchw", "nhwc")}
    for samples in document["seconds"].values():
        assert {name: len(rounds) for name, rounds in samples.items()} == dict.fromkeys(robustness.contenders(), 1)
    assert "0.40" in capsys.readouterr().out
    assert main(["bench", "robustness", "--rounds", "0"]) == 2
    assert "--rounds 0" in capsys.readouterr().err
