"""PMOE's policy: densities, the likeliest primitive, the twin's size."""

import math

import pytest
import torch
from moezoo.errors import UserError
from moezoo.recipes import metadata, read
from moezoo.zoo.baselines.control import RandomPolicy
from moezoo.zoo.core.statistics import parameter_counts
from moezoo.zoo.pmoe import PMOE, squashed

SCHEMA = {"dataset": "made_up", "pixels": None, "state": 3, "action": 2}


def test_the_density_is_that_of_a_squashed_normal():
    torch.manual_seed(0)
    mean, log_std, noise = torch.randn(3, 50, 2, dtype=torch.float64)
    action, log_density = squashed(mean, log_std, noise)
    normal = torch.distributions.Normal(mean, log_std.exp())
    tanh = torch.distributions.TransformedDistribution(normal, torch.distributions.TanhTransform(cache_size=1))
    u = mean + log_std.exp() * noise
    expected = normal.log_prob(u).sum(-1) - torch.log1p(-u.tanh().square()).sum(-1)
    torch.testing.assert_close(action, u.tanh())
    near = u.abs().amax(-1) < 6  # beyond it the naive formula loses its digits
    torch.testing.assert_close(log_density[near], expected[near])
    torch.testing.assert_close(log_density[near], tanh.log_prob(u.tanh())[near].sum(-1), atol=1e-4, rtol=1e-4)
    assert squashed(mean + 40, log_std, noise)[1].isfinite().all()


def test_the_density_integrates_to_one():
    grid = torch.linspace(-9, 9, 20001, dtype=torch.float64)[:, None]
    mean, log_std = torch.full_like(grid, 0.3), torch.full_like(grid, -0.2)
    action, log_density = squashed(mean, log_std, (grid - mean) / log_std.exp())
    assert float(torch.trapezoid(log_density.exp(), action[:, 0])) == pytest.approx(1.0, abs=1e-4)


def test_the_likeliest_primitive_acts():
    torch.manual_seed(0)
    model = PMOE(SCHEMA, hidden=16, experts=4)
    with torch.no_grad():
        model.actor.router.gate.bias.copy_(torch.tensor([0.0, 0.0, 2.0, 0.0]))
    state = torch.randn(9, 3)
    mean, log_std, routing = model.actor(state)
    assert mean.shape == log_std.shape == (9, 4, 2)
    torch.testing.assert_close(routing.scores.sum(-1), torch.ones(9))
    torch.testing.assert_close(model(state).action, mean[:, 2].tanh())
    body, heads = model.actor.body(state).relu(), model.actor.experts.layers[0]
    for k in range(4):
        torch.testing.assert_close(mean[:, k], (body @ heads.weight[k].T + heads.bias[k])[:, :2], atol=1e-5, rtol=1e-5)


def test_it_survives_saving(tmp_path):
    model = PMOE(SCHEMA, hidden=8, experts=3).eval()
    model.save_pretrained(tmp_path / "w")
    state = torch.randn(4, 3)
    assert torch.equal(PMOE.from_pretrained(tmp_path / "w")(state).action, model(state).action)


def test_the_twin_is_sac_of_the_same_size():
    schema = {"dataset": "pendulum-v1", "pixels": None, "state": 3, "action": 1}
    recipes = ("control/pmoe", "control/pmoe_dense")
    models = [PMOE(schema, **read(name)["model"]["init_args"]["model"]["init_args"]) for name in recipes]
    active = [parameter_counts(model.actor)["active"] for model in models]
    assert active[1] == pytest.approx(active[0], rel=0.02) and metadata(recipes[1]).twin_of == recipes[0]
    assert models[1].actor.experts.num_experts == 1


def test_random_actions_are_uniform_and_the_same_each_run():
    one, other = RandomPolicy(SCHEMA), RandomPolicy(SCHEMA)
    actions = one(state=torch.zeros(4000, 3)).action
    assert torch.equal(actions, other(pixels=torch.zeros(4000, 1, 2, 2, dtype=torch.uint8)).action)
    assert abs(float(actions.mean())) < 0.03 and float(actions.std()) == pytest.approx(1 / math.sqrt(3), abs=0.02)


def test_mistakes_are_told():
    with pytest.raises(UserError, match="gives no state"):
        PMOE(SCHEMA | {"state": 0})
    with pytest.raises(UserError, match="at least 1 of each"):
        PMOE(SCHEMA, experts=0)
