"""Soft MoE, momentum over depth, PEER, Monet and loaded experts: the property that defines each."""

import itertools

import pytest
import torch
from moezoo.zoo.core import (
    PEER,
    AdamResidual,
    LoadedExperts,
    MLPExperts,
    ModuleExperts,
    MoE,
    MomentumResidual,
    Monet,
    SoftMoE,
    TopKRouter,
    group_by_expert,
)
from torch import nn
from torch.autograd import gradcheck


def gradcheck_of(module, x, pick=lambda out: out):
    names, values = zip(*module.named_parameters(), strict=True)

    def run(x, *parameters):
        return pick(torch.func.functional_call(module, dict(zip(names, parameters, strict=True)), (x,)))

    return gradcheck(run, (x.double().requires_grad_(), *values))


# --- soft MoE


def soft(slots=2, out=None):
    torch.manual_seed(0)
    return SoftMoE(4, MLPExperts(3, 4, 6, out), slots)


def test_soft_moe_is_the_papers_three_lines():
    layer, x = soft(out=5).double(), torch.randn(2, 7, 4, dtype=torch.float64)
    layer.scale.data.fill_(3.0)
    y, routing = layer(x, return_routing=True)
    assert y.shape == (2, 7, 5)
    for sequence, got in zip(x, y, strict=True):
        phi = layer.phi / layer.phi.norm(dim=1, keepdim=True) * 3
        logits = sequence / sequence.norm(dim=1, keepdim=True) @ phi.T
        inputs = logits.softmax(0).T @ sequence
        outputs = torch.cat([layer.experts.dense(inputs[2 * e : 2 * e + 2])[:, e] for e in range(3)])
        torch.testing.assert_close(got, logits.softmax(1) @ outputs)
    torch.testing.assert_close(routing.weights.sum(-1), torch.ones(14, dtype=torch.float64))


def test_soft_moe_knows_no_order_and_no_padding():
    layer, x = soft(), torch.randn(2, 7, 4)
    order = torch.randperm(7)
    torch.testing.assert_close(layer(x[:, order]), layer(x)[:, order])
    mask = torch.arange(7) < torch.tensor([[4], [7]])
    y, routing = layer(x, return_routing=True, token_mask=mask)
    torch.testing.assert_close(y[0, :4], layer(x[0, :4]))
    assert (y[0, 4:] == 0).all() and (routing.indices[4:7] == -1).all()
    assert torch.isfinite(layer(x, token_mask=torch.zeros(2, 7, dtype=torch.bool))).all()
    assert layer(x[:, :0]).shape == (2, 0, 4)


def test_equal_shares_are_computed_alike_by_any_kind_of_experts():
    torch.manual_seed(0)
    kinds = [MLPExperts(3, 4, [6, 5], act="swiglu"), ModuleExperts(lambda: nn.Linear(4, 4), 3)]
    for experts in kinds:
        x = torch.randn(3, 5, 4)
        want = torch.stack([experts.dense(rows)[:, e] for e, rows in enumerate(x)])
        torch.testing.assert_close(experts.batched(x), want)
        assert experts.batched(x[:, :0]).shape == (3, 0, 4)


def test_gradcheck_of_soft_moe():
    assert gradcheck_of(soft().double(), torch.randn(2, 3, 4))


# --- momentum


def test_momentum_is_the_sum_of_what_came_before():
    step, x = MomentumResidual(mu=0.6, gamma=0.5), torch.randn(4, 3)
    updates, state, now = torch.randn(5, 4, 3), None, x
    for y in updates:
        now, state = step(now, y, state)
    want = x + sum(0.5 * 0.6 ** (i - j) * updates[j] for i in range(5) for j in range(i + 1))
    torch.testing.assert_close(now, want)
    torch.testing.assert_close(MomentumResidual(mu=0.0)(x, updates[0])[0], x + updates[0])


def test_adam_takes_the_steps_of_adam():
    torch.manual_seed(0)
    x, updates, state = torch.randn(4, 3), torch.randn(6, 4, 3), None
    step, now = AdamResidual(gamma=0.3, betas=(0.8, 0.9), eps=1e-12), torch.zeros(4, 3)
    parameter = torch.zeros(4, 3, requires_grad=True)
    optimiser = torch.optim.Adam([parameter], lr=0.3, betas=(0.8, 0.9), eps=0.0)
    for t, y in enumerate(updates, 1):
        before = now.clone()
        now, state = step(now, y, state)
        parameter.grad = -y
        was = parameter.detach().clone()
        optimiser.step()
        correction = (1 - 0.8**t) / (1 - 0.9**t) ** 0.5  # the paper leaves it out
        torch.testing.assert_close((now - before) / correction, parameter.detach() - was)
    bounded, _ = AdamResidual(kappa=1.0)(1e6 * x, updates[0])
    assert bounded.abs().max() < 1e2


def test_gradcheck_over_layers_of_momentum():
    updates = torch.randn(3, 4, 3, dtype=torch.float64, requires_grad=True)
    for step in (MomentumResidual(), AdamResidual(eps=1e-2, kappa=0.1)):

        def run(x, updates, step=step):
            state = None
            for y in updates:
                x, state = step(x, y, state)
            return x

        assert gradcheck(run, (torch.randn(4, 3, dtype=torch.float64, requires_grad=True), updates))


def test_a_stack_of_mixtures_learns_with_either():
    for make in (MomentumResidual, lambda: AdamResidual(gamma=0.3)):
        torch.manual_seed(0)
        layers = nn.ModuleList(MoE(TopKRouter(4, 4, 2), MLPExperts(4, 4, 16)) for _ in range(3))
        step, optimiser = make(), torch.optim.Adam(layers.parameters(), 1e-2)
        errors = []
        for _ in range(60):
            start = torch.randn(128, 4)
            x, state = start, None
            for layer in layers:
                x, state = step(x, layer(x), state)
            errors.append((x - start.abs()).square().mean())
            optimiser.zero_grad()
            errors[-1].backward()
            optimiser.step()
        assert errors[-1] < 0.3 * errors[0]


# --- PEER


def test_peer_is_a_sum_over_the_best_neurons():
    torch.manual_seed(0)
    layer, x = PEER(4, 25, heads=2, top_k=3, key_dim=5, out=6), torch.randn(2, 7, 4)
    y, routing = layer(x, return_routing=True)
    rows, columns = layer.keys(x.flatten(0, 1))
    want = torch.zeros(14, 6)
    for head in range(2):
        every = (rows[:, head, :, None] + columns[:, head, None]).flatten(1)
        best = every.topk(3)
        for n, (weights, experts) in enumerate(zip(best.values.softmax(-1), best.indices, strict=True)):
            for weight, e in zip(weights, experts, strict=True):
                want[n] += weight * nn.functional.gelu(layer.down[e] @ x.flatten(0, 1)[n]) * layer.up[e]
    torch.testing.assert_close(y.flatten(0, 1), want)
    assert routing.num_experts == 10 and ((routing.indices >= 0) & (routing.indices < 10)).all()
    torch.testing.assert_close(routing.weights.sum(-1), torch.ones(14))
    assert layer(x[:0]).shape == (0, 7, 6)


def test_gradcheck_of_peer():
    torch.manual_seed(0)
    layer = PEER(3, 9, heads=2, top_k=2, key_dim=2, act="tanh", balance_coef=0.1).double()
    assert gradcheck_of(layer, torch.randn(4, 3), lambda y: y)
    layer.forward = lambda x, forward=layer.forward: forward(x, return_routing=True)
    assert gradcheck_of(layer, torch.randn(4, 3), lambda out: (out[1].weights, out[1].aux_loss))


# --- Monet


def expert_of(layer, i, j, x):
    """Expert (i, j) written out as a network of its own."""
    if layer.form == "horizontal":
        hidden = (x @ layer.first[0, i].T + layer.first_bias[0, i]).relu()
        return hidden @ layer.second[0, j].T + layer.second_bias[0, j]
    first = torch.cat([layer.first[0, i], layer.first[1, j]])
    bias = torch.cat([layer.first_bias[0, i], layer.first_bias[1, j]])
    second = torch.cat([layer.second[0, i], layer.second[1, j]])
    return (x @ first.T + bias).relu() @ second.T + torch.cat([layer.second_bias[0, i], layer.second_bias[1, j]])


@pytest.mark.parametrize("form", ["horizontal", "vertical"])
def test_monet_is_the_sum_over_all_pairs_of_halves(form):
    torch.manual_seed(0)
    layer = Monet(4, 5, hidden=6, heads=3, top_k=2, form=form).double()
    x = torch.randn(11, 4, dtype=torch.float64)
    gates = layer._gates(layer._logits(x))
    y, routing = layer.train()(x, return_routing=True)
    want = torch.zeros(11, 4, dtype=torch.float64)
    for i, j in itertools.product(range(5), range(5)):
        weight = (gates[:, 0, :, i] * gates[:, 1, :, j]).sum(1, keepdim=True)
        want += weight * expert_of(layer, i, j, x)
    torch.testing.assert_close(y, want)
    assert (gates == 0).any() and (gates.amax(-1) > 0).all()
    torch.testing.assert_close(routing.weights.sum(-1), torch.ones(11, dtype=torch.float64))


def test_monets_threshold_keeps_top_k_of_gaussian_logits_and_always_the_best():
    torch.manual_seed(0)
    layer = Monet(4, 256, heads=1, top_k=16)
    kept = (layer._gates(torch.randn(300, 2, 1, 256)) > 0).sum(-1).float()
    assert kept.mean() == pytest.approx(16, rel=0.05)
    assert ((layer._gates(torch.randn(9, 2, 1, 256) - 100) > 0).sum(-1) == 1).all()


def test_monets_losses_are_zero_at_their_best_and_its_norm_rests_in_evaluation():
    layer = Monet(4, 5, hidden=6, heads=2, top_k=2, uniformity_coef=1.0, ambiguity_coef=1.0)
    sure = torch.eye(5).repeat(2, 1)[:, None, None].expand(10, 2, 2, 5)
    assert layer._record(sure, sure).aux_loss.abs() < 1e-6
    unsure = torch.full((10, 2, 2, 5), 0.2)
    torch.testing.assert_close(layer._record(unsure, unsure).aux_loss, torch.tensor(0.8))
    one_sided = sure[:1].expand(10, 2, 2, 5)
    assert layer._record(one_sided, one_sided).aux_loss > 5
    layer.eval()
    x = torch.randn(8, 4)
    torch.testing.assert_close(layer(x)[:3], layer(x[:3]))
    assert layer(x, return_routing=True)[1].aux_loss == 0
    assert torch.isfinite(layer.train()(x[:1])).all() and layer(x[:0]).shape == (0, 4)


@pytest.mark.parametrize("form", ["horizontal", "vertical"])
def test_gradcheck_of_monet(form):
    torch.manual_seed(0)
    layer = Monet(3, 4, hidden=4, heads=2, top_k=2, form=form, act="tanh", out=2).double().eval()
    assert gradcheck_of(layer, torch.randn(4, 3))


# --- loaded experts


def test_each_expert_comes_once_with_all_its_instances():
    indices = torch.tensor([[2, 0], [0, 2], [4, -1], [2, 4], [7, 0]])
    groups = {g.expert: list(zip(g.instances.tolist(), g.slots.tolist(), strict=True)) for g in _groups(indices, 6)}
    assert groups == {0: [(0, 1), (1, 0), (4, 1)], 2: [(0, 0), (1, 1), (3, 0)], 4: [(2, 0), (3, 1)]}
    assert [g.expert for g in group_by_expert(indices, 6, first=2)] == [2, 0, 4]
    assert [g.expert for g in group_by_expert(indices, 6, first=1)] == [0, 2, 4]


def _groups(indices, num_experts):
    groups = list(group_by_expert(indices, num_experts))
    assert [g.expert for g in groups] == sorted({g.expert for g in groups})
    return groups


def test_loaded_experts_give_the_numbers_of_kept_ones_and_load_each_once():
    torch.manual_seed(0)
    kept = MLPExperts(6, 4, 8)
    shelf = [nn.Sequential(nn.Linear(4, 8), nn.GELU(), nn.Linear(8, 4)) for _ in range(6)]
    with torch.no_grad():
        for e, module in enumerate(shelf):
            for i in (0, 1):
                module[2 * i].weight.copy_(kept.layers[i].weight[e])
                module[2 * i].bias.copy_(kept.layers[i].bias[e])
    asked = []
    loaded = LoadedExperts(6, lambda e: asked.append(e) or shelf[e])
    router, x = TopKRouter(4, 6, 2), torch.randn(40, 4)
    nn.init.normal_(router.weight)
    mask = torch.arange(6) != 3
    with torch.no_grad():
        got = MoE(router, loaded)(x, expert_mask=mask)
        torch.testing.assert_close(got, MoE(router, kept)(x, expert_mask=mask))
        assert sorted(asked) == [0, 1, 2, 4, 5] and loaded.loads == 5
        MoE(router, loaded)(x, expert_mask=mask)
        assert asked[5:] == [0, 1, 2, 4] and loaded.loads == 9  # it began with the one it still held
        torch.testing.assert_close(loaded.dense(x), kept.dense(x))
        assert MoE(router, loaded)(x[:0]).shape == (0, 4)
    assert not list(loaded.parameters())


# --- all


@pytest.mark.parametrize("name", ["soft", "peer", "horizontal", "vertical"])
def test_layers_run_in_low_precision_and_gate_in_full(name):
    torch.manual_seed(0)
    make = {"soft": lambda: SoftMoE(8, MLPExperts(4, 8, 16)), "peer": lambda: PEER(8, 16, 2, 3, 4)}
    layer = make.get(name, lambda: Monet(8, 6, hidden=4, heads=2, top_k=2, form=name))()
    x = torch.randn(2, 30, 8)
    exact = layer.eval()(x)
    with torch.autocast("cpu", torch.bfloat16):
        y, routing = layer(x, return_routing=True)
    assert routing.scores.dtype == torch.float32
    assert (y.float() - exact).norm() < 0.03 * exact.norm()
    y, routing = layer.train().bfloat16()(x.bfloat16(), return_routing=True)
    assert y.dtype == torch.bfloat16 and routing.scores.dtype == torch.float32 and torch.isfinite(y).all()


@pytest.mark.parametrize(
    "make, words",
    [
        (lambda: SoftMoE(4, MLPExperts(3, 4, 6), 0), "slots=0"),
        (lambda: MomentumResidual(mu=1.0), "mu=1.0"),
        (lambda: AdamResidual(betas=(0.9, 1.0)), "betas"),
        (lambda: PEER(4, 10), "such as 9"),
        (lambda: PEER(4, 9, act="swiglu"), "act='swiglu'"),
        (lambda: Monet(4, 5, top_k=5), "top_k=5"),
        (lambda: Monet(4, 5, hidden=5, top_k=2, form="vertical"), "must be even"),
    ],
)
def test_mistakes_are_named(make, words):
    with pytest.raises(ValueError, match=words):
        make()
