"""The convergence experiment measures what it says: errors of nothing are nothing, a fit improves, a rate is a rate."""

import json

import pytest
import torch
from moezoo.leaderboard.bench import gate_convergence as experiment


def truth(copies=1):
    """The true parameters, with the second expert as often as asked, its gate shared out."""
    values = {name: value[None] for name, value in experiment.true_parameters().items()}
    if copies > 1:
        for name in ("slope", "offset", "gate_slope", "gate_offset"):
            values[name] = values[name][:, [0] + [1] * copies]
        values["gate_offset"] = values["gate_offset"] - torch.tensor([0.0] + [copies] * copies).clamp_min(1).log()
    return values


@pytest.mark.parametrize("gate", experiment.GATES)
def test_the_truth_has_no_error_and_more_likelihood_than_its_neighbours(gate):
    act = experiment.GATES[gate]
    x, y = experiment.sample(act, 1, 20000, torch.Generator().manual_seed(0))
    for copies in (1, 2):
        for name, error in experiment.voronoi_errors(act, truth(copies), x).items():
            assert error.abs().max() < 1e-9, name
    best = experiment.negative_log_likelihood(act, truth(), x, y)
    torch.testing.assert_close(experiment.negative_log_likelihood(act, truth(2), x, y), best)
    for name in ("slope", "offset", "gate_slope"):
        moved = truth()
        moved[name] = moved[name] + torch.tensor([0.3, -0.3], dtype=torch.float64)
        assert experiment.negative_log_likelihood(act, moved, x, y) > best, name


def test_a_temperature_can_be_traded_for_slopes_with_a_linear_gate_alone():
    x = torch.linspace(-3, 3, 50, dtype=torch.float64)[None]
    doubled = truth()
    doubled["gate_slope"] = 2 * doubled["gate_slope"]
    doubled["log_temperature"] = doubled["log_temperature"] + torch.tensor(2.0, dtype=torch.float64).log()
    gap = {
        gate: (experiment.log_gates(act, doubled, x) - experiment.log_gates(act, truth(), x)).abs().max().item()
        for gate, act in experiment.GATES.items()
    }
    assert gap["linear"] < 1e-12 and gap["tanh"] > 0.1


def test_a_rate_is_the_slope_of_the_logarithms():
    sizes = [100, 400, 1600]
    assert experiment.rate(sizes, [[3 * n**-0.5] * 3 for n in sizes]) == pytest.approx(-0.5)


def test_a_small_run_writes_and_draws(tmp_path):
    experiment.main(
        ["--sizes", "100", "200", "--replicates", "2", "--steps", "20", "--output", str(tmp_path / "a" / "gates")]
    )
    results = json.loads((tmp_path / "a" / "gates.json").read_text())
    assert results["sizes"] == [100, 200] and set(results["errors"]) == {"linear", "tanh"}
    assert (tmp_path / "a" / "gates.png").stat().st_size > 5000
