"""MENTOR's agent and its rules: spec checks a to d, parameter counts, saving."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from moezoo.errors import UserError
from moezoo.recipes import metadata, read
from moezoo.zoo.core import MLPExperts, MoE, StackedLinear, TopKRouter
from moezoo.zoo.core.statistics import parameter_counts
from moezoo.zoo.mentor import Mentor, MLPGate, official_aux_loss, orthogonal
from moezoo.zoo.mentor_rules import (
    TopAgents,
    dormant_ratio,
    exploitation,
    exploration_noise,
    flatten,
    fresh,
    linear_schedule,
    perturb,
    perturbation_strength,
    perturbed_parameters,
)

SCHEMA = {"dataset": "made_up", "pixels": [3, 24, 24], "state": 0, "action": 2}
SMALL = {"channels": 4, "strides": [2, 2, 1], "feature_dim": 10, "hidden": 32, "expert_hidden": 16, "gate_hidden": 12}


def small(**changes):
    torch.manual_seed(0)
    return Mentor(SCHEMA | changes.pop("schema", {}), **SMALL | {"experts": 4, "top_k": 2} | changes)


def images(batch=5, channels=3):
    return torch.randint(0, 256, (batch, channels, 24, 24), dtype=torch.uint8)


# Check a: the mixture.


def test_the_mixture_equals_a_loop_over_experts():
    model = small().eval()
    features = model.encoder(images(17))
    mean, routing = model.actor(features)
    z = model.actor.first(model.actor.trunk(features, None)).relu()
    up, down = model.actor.middle.experts.layers
    y = torch.zeros_like(z)
    for row, (weights, experts) in enumerate(zip(routing.weights, routing.indices, strict=True)):
        for weight, e in zip(weights, experts, strict=True):
            hidden = (up.weight[e] @ z[row] + up.bias[e]).relu()
            y[row] += weight * (down.weight[e] @ hidden + down.bias[e])
    expected = model.actor.last(y.relu()).tanh()
    torch.testing.assert_close(mean, expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(routing.weights.sum(-1), torch.ones(17))
    p = routing.scores
    best = p.topk(2, -1)
    torch.testing.assert_close(routing.weights, best.values / best.values.sum(-1, keepdim=True))


def test_the_balance_loss_teaches_the_gate_and_the_released_one_cannot():
    model = small(aux_coef=0.1)
    _, routing = model.actor(model.encoder(images(32)).detach())
    (gradient,) = torch.autograd.grad(routing.aux_loss, model.actor.middle.router.gate.last.weight, retain_graph=True)
    assert gradient.norm() > 0
    released = small(balance="official")
    _, routing = released.actor(released.encoder(images(32)).detach())
    entropy = -(routing.scores * routing.scores.log()).sum(-1).mean()
    load = torch.stack([(routing.indices == e).float().sum() / 32 for e in range(4)])
    torch.testing.assert_close(routing.aux_loss, entropy + load.var())
    gate = released.actor.middle.router.gate.last.weight
    (whole,) = torch.autograd.grad(routing.aux_loss, gate, retain_graph=True)
    (of_entropy,) = torch.autograd.grad(entropy, gate)
    torch.testing.assert_close(whole, of_entropy), "the variance of chosen indices has no gradient"
    assert float(official_aux_loss(routing).detach()) > 1.0, "starts near ln 4 whatever the coefficient"


def test_the_balance_loss_evens_out_the_load():
    """A gate that prefers one expert is brought to use all."""
    torch.manual_seed(0)
    router = TopKRouter(8, 4, 2, aux_coef=1.0, gate=MLPGate(8, 4, 16, 0.0))
    with torch.no_grad():
        router.gate.last.bias[:2] += 3.0
    optimizer, x = torch.optim.Adam(router.parameters(), 1e-2), torch.randn(256, 8)

    def busiest():
        return float(torch.bincount(router(x).indices.flatten(), minlength=4).max()) / 512

    before = busiest()
    for _ in range(150):
        optimizer.zero_grad()
        router(x).aux_loss.backward()
        optimizer.step()
    assert before > 0.45 and busiest() < 0.35


def test_one_expert_is_an_mlp():
    torch.manual_seed(0)
    moe = MoE(TopKRouter(6, 1, 1, gate=MLPGate(6, 1, 4, 0.1)), MLPExperts(1, 6, 9, act="relu"))
    up, down = moe.experts.layers
    x = torch.randn(11, 6)
    expected = torch.relu(x @ up.weight[0].T + up.bias[0]) @ down.weight[0].T + down.bias[0]
    torch.testing.assert_close(moe(x), expected, atol=1e-6, rtol=1e-5)
    assert not small(experts=1)(images()).routing and not small(experts=0)(images()).routing


# Check b: the dormant ratio.


def test_dormant_ratio_of_known_layers():
    dead, alike = torch.zeros(7, 10), torch.ones(7, 10)
    three = torch.ones(7, 10)
    three[:, :3] = 0
    assert float(dormant_ratio([dead])) == 1.0, "a dead layer is dormant, not active"
    assert float(dormant_ratio([alike])) == 0.0 and float(dormant_ratio([three])) == pytest.approx(0.3)
    assert float(dormant_ratio([dead, alike])) == 0.5
    assert float(dormant_ratio([torch.stack([dead, three])])) == pytest.approx(0.65), "experts are layers of their own"
    signs = torch.ones(8, 4)
    signs[::2] = -1
    assert float(dormant_ratio([signs])) == 0.0, "of absolute values"
    below = torch.ones(4, 40)
    below[:, 0] = 0.02
    assert float(dormant_ratio([below])) == pytest.approx(1 / 40)


@pytest.mark.parametrize("experts", [0, 1, 4])
@pytest.mark.parametrize("state", [0, 6])
def test_activations_are_those_of_the_forward_pass(experts, state):
    model = small(experts=experts, schema={"state": state}).eval()
    features, extra = model.encoder(images(9)), torch.randn(9, state) if state else None
    seen = []
    hooks = [
        part.register_forward_hook(lambda _m, _i, out: seen.append(out))
        for part in (model.actor.trunk.linear, model.actor.first, model.actor.last)
    ]
    mean, routing = model.actor(features, extra)
    for hook in hooks:
        hook.remove()
    read, z, *between, last = model.actor.activations(features, extra)
    torch.testing.assert_close(read, seen[0])
    torch.testing.assert_close(z, seen[1].relu())
    torch.testing.assert_close(last, seen[2], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(last.tanh(), mean, atol=1e-5, rtol=1e-5)
    shapes = {0: [(9, 32)], 1: [(9, 16), (9, 32)], 4: [(9, 12), (9, 4), (4, 9, 16), (4, 9, 32)]}
    assert [tuple(layer.shape) for layer in between] == shapes[experts]
    if routing is not None:
        torch.testing.assert_close(between[1], routing.logits)


def test_neurons_of_the_official_size():
    """The spec: 21.8 thousand neurons in MENTOR's actor for six actions, nearly all in the experts."""
    schema = {"dataset": "x", "pixels": [9, 84, 84], "state": 0, "action": 6}
    with torch.device("meta"):
        model = Mentor(schema)
    parts = [part for part in model.actor.modules() if isinstance(part, torch.nn.Linear | StackedLinear)]
    neurons = sum(part.bias.numel() for part in parts)
    assert 21_800 <= neurons < 21_900
    counts = {name: sum(p.numel() for p in part.parameters()) for name, part in model.named_children()}
    assert counts["encoder"] == 30_368 and model.encoder.features == 39_200
    assert counts["actor"] == 10_694_124 and counts["critic"] == 4_178_136 and counts["value"] == 3_062_999
    assert sum(p.numel() for p in model.actor.middle.parameters()) == 8_675_600


# Check c: the perturbation.


def test_top_agents_keep_the_best():
    top = TopAgents(4, 3)
    assert top.held == 0
    with pytest.raises(ValueError, match="expected at least 2"):
        top.draw()
    returns = [5.0, -1.0, 3.0, 9.0, 4.0, -7.0, 8.0, 2.0]
    for value in returns:
        top.push(value, torch.full((3,), value))
    assert top.held == 4 and sorted(top.returns.tolist()) == sorted(returns)[-4:]
    assert sorted(top.weights[:, 0].tolist()) == sorted(returns)[-4:], "weights and returns stay together"


def test_candidates_have_the_sets_mean_and_deviation():
    generator = torch.Generator().manual_seed(0)
    top = TopAgents(6, 40)
    members = torch.randn(6, 40, generator=generator) * torch.linspace(0.5, 2, 40) + 3
    for i, member in enumerate(members):
        top.push(float(i), member)
    draws = torch.stack([top.draw(generator) for _ in range(2000)])
    torch.testing.assert_close(draws.mean(0), members.mean(0), rtol=0.05, atol=0.05)
    torch.testing.assert_close(draws.std(0), members.std(0), rtol=0.05, atol=0.0)
    alike = TopAgents(3, 2)
    for _ in range(3):
        alike.push(1.0, torch.tensor([2.0, -4.0]))
    torch.testing.assert_close(alike.draw(generator), torch.tensor([2.0, -4.0]))


@settings(max_examples=25, deadline=None)
@given(alpha=st.floats(0, 1), seed=st.integers(0, 100))
def test_perturbing_mixes_exactly(alpha, seed):
    torch.manual_seed(seed)
    layers = torch.nn.ModuleList([torch.nn.Linear(3, 4), torch.nn.LayerNorm(4), StackedLinear(2, 4, 3)])
    parameters = perturbed_parameters([layers])
    before, norm, candidate = flatten(parameters), layers[1].weight.clone(), torch.randn(16 + 30)
    perturb(parameters, candidate, alpha)
    torch.testing.assert_close(flatten(parameters), alpha * before + (1 - alpha) * candidate)
    assert torch.equal(layers[1].weight, norm), "normalisation is left alone"
    if alpha == 1:
        assert torch.equal(flatten(parameters), before)


def test_every_linear_layer_is_perturbed_and_no_convolution():
    model = small()
    touched = {id(p) for p in perturbed_parameters([model])}
    for name, parameter in model.named_parameters():
        assert (id(parameter) in touched) == (not name.startswith("encoder.") and ".norm." not in name), name
    candidate = fresh([model.actor], orthogonal)
    assert len(candidate) == len(flatten(perturbed_parameters([model.actor])))
    assert not torch.allclose(candidate, flatten(perturbed_parameters([model.actor])))


# Check d: what follows from beta.


def test_rules_of_beta():
    def b(value):
        return torch.tensor(value)

    assert float(exploration_noise(b(0.2))) == pytest.approx(0.4) and float(exploitation(b(0.2))) == pytest.approx(0.3)
    assert float(exploration_noise(b(0.5), 1.0)) == pytest.approx(1 / (1 + math.exp(-3)))
    assert float(exploitation(b(0.25))) == pytest.approx(0.6 / (1 + math.exp(2.5)))
    strengths = [float(perturbation_strength(b(x), 0.9)) for x in (0.0, 0.2, 0.4, 0.7)]
    assert strengths == pytest.approx([0.9, 0.6, 0.2, 0.2])
    assert [linear_schedule(1.0, 0.1, 100, t) for t in (0, 50, 100, 500)] == pytest.approx([1.0, 0.55, 0.1, 0.1])


# The agent as a model of the zoo.


def test_the_agent_survives_saving(tmp_path):
    model = small(schema={"state": 4}, critic_norm=True).eval()
    model.save_pretrained(tmp_path / "weights")
    loaded = Mentor.from_pretrained(tmp_path / "weights")
    pixels, state = images(), torch.randn(5, 4)
    assert torch.equal(model(pixels, state).action, loaded(pixels, state).action)


def test_greedy_actions_do_not_depend_on_the_batch():
    model, pixels = small().eval(), images(6)
    with torch.no_grad():
        together = model(pixels).action
        alone = torch.cat([model(pixels[i : i + 1]).action for i in range(6)])
    assert together.abs().max() < 1
    torch.testing.assert_close(together, alone, atol=1e-5, rtol=1e-4)


def test_weights_start_orthogonal():
    model = small()
    weight = model.critic.q1[2].weight
    torch.testing.assert_close(weight @ weight.T, torch.eye(32), atol=1e-5, rtol=0)
    expert = model.actor.middle.experts.layers[0].weight[3]
    torch.testing.assert_close(expert @ expert.T, torch.eye(16), atol=1e-5, rtol=0)
    first = model.encoder.layers[0].weight.flatten(1)
    torch.testing.assert_close(first @ first.T, 2 * torch.eye(4), atol=1e-5, rtol=0)
    assert all((p == 0).all() for n, p in model.named_parameters() if n.endswith("bias"))


@pytest.mark.parametrize(("recipe", "twin"), [("control/mentor", "control/mentor_dense")])
def test_the_twin_has_as_many_active_parameters(recipe, twin):
    schema = {"dataset": "pixel_pendulum", "pixels": [3, 40, 40], "state": 0, "action": 1}
    models = [Mentor(schema, **read(name)["model"]["init_args"]["model"]["init_args"]) for name in (recipe, twin)]
    active = [parameter_counts(model.actor)["active"] for model in models]
    assert active[1] == pytest.approx(active[0], rel=0.02) and metadata(twin).twin_of == recipe
    acting = [parameter_counts(model.actor.middle)["active"] for model in models]
    assert acting[1] == pytest.approx(acting[0], rel=0.02), "the mixture itself against what stands in its place"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"schema": {"pixels": None}}, "gives no pixels"),
        ({"strides": [2] * 5}, "too many for images"),
        ({"top_k": 9}, "expected 1 to experts=4"),
    ],
)
def test_mistakes_are_told(changes, message):
    with pytest.raises(UserError, match=message):
        small(**changes)
