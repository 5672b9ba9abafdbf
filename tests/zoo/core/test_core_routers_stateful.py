"""Routers with a memory, product keys and the sparsity gate: the property that defines each."""

import copy

import pytest
import torch
from moezoo.zoo.core import (
    DenseRouter,
    GatingResidualRouter,
    MLPExperts,
    MoE,
    NullExpertRouter,
    ProductKeyRouter,
    RecurrentRouter,
    SparsityGate,
    TopKRouter,
    update_router_bias,
)
from moezoo.zoo.core.routing.product_key import product_top_k, squarest_grid
from torch import nn
from torch.autograd import gradcheck


def run_layers(layers, x, **kw):
    """The records of layers that read the same x and hand on their state."""
    state, records = None, []
    for layer in layers:
        records.append(layer(x, state=state, **kw))
        state = records[-1].state
    return records


# --- recurrent over depth


def recurrent(layers=3, seed=0, state=5, experts=6):
    torch.manual_seed(seed)
    cell = nn.GRUCell(state, state)
    return [RecurrentRouter(4, TopKRouter(state, experts, 2), cell) for _ in range(layers)]


def test_a_recurrent_router_is_a_gru_over_layers():
    layers = recurrent()
    x, state = torch.randn(7, 4), torch.zeros(7, 5)
    for layer, record in zip(layers, run_layers(layers, x), strict=True):
        state = layer.cell(x @ layer.weight.T, state)
        torch.testing.assert_close(record.state, state)
        torch.testing.assert_close(record.logits, state @ layer.router.weight.T)


def test_the_first_layer_shapes_what_the_last_one_chooses():
    layers = recurrent()
    x = torch.randn(7, 4)
    last = run_layers(layers, x)[-1]
    (grad,) = torch.autograd.grad(last.weights.square().sum(), layers[0].weight)
    assert grad.abs().max() > 0
    assert len({id(p) for layer in layers for p in layer.cell.parameters()}) == 4  # one cell


def test_a_recurrent_router_goes_with_experts_and_low_precision():
    layer = recurrent(1)[0]
    moe = MoE(layer, MLPExperts(6, 4, 8)).bfloat16()
    y, routing = moe(torch.randn(3, 5, 4, dtype=torch.bfloat16), return_routing=True)
    assert y.shape == (3, 5, 4) and routing.state.shape == (15, 5) and routing.state.dtype == torch.float32
    assert moe.last_routing.state.grad_fn is None
    with pytest.raises(ValueError, match="input_size=3 must be its hidden_size=5"):
        RecurrentRouter(4, TopKRouter(5, 6, 2), nn.GRUCell(3, 5))


# --- gating residuals


def residual(layers=3, seed=0, make=lambda: TopKRouter(4, 6, 2)):
    torch.manual_seed(seed)
    routers = [GatingResidualRouter(make()) for _ in range(layers)]
    for router in routers:
        nn.init.normal_(router.weight)
        nn.init.normal_(router.gate.weight)
    return routers


def test_a_gating_residual_adds_the_last_layers_logits():
    layers = residual()
    x, before = torch.randn(7, 4), None
    for layer, record in zip(layers, run_layers(layers, x), strict=True):
        want = x @ layer.gate.weight.T + (0 if before is None else before @ layer.weight.T)
        torch.testing.assert_close(record.logits, want)
        torch.testing.assert_close(record.state, want)
        before = want


@pytest.mark.parametrize(
    "make",
    [
        lambda: TopKRouter(4, 6, 2, balance="bias", score_func="sigmoid"),
        lambda: DenseRouter(4, 6, activation=torch.tanh),
        lambda: NullExpertRouter(4, 6, num_null=1, top_k=3, num_other=3),
    ],
)
def test_without_a_past_it_is_the_router_alone(make):
    torch.manual_seed(0)
    plain = make()
    ours, x = GatingResidualRouter(copy.deepcopy(plain)), torch.randn(9, 4)
    kw = {"token_mask": torch.arange(9) != 4, "expert_mask": torch.arange(plain.num_experts + plain.num_extra) != 2}
    got, want = ours(x, **kw), plain(x, **kw)
    for field in ("weights", "indices", "scores", "aux_loss"):
        assert torch.equal(getattr(got, field), getattr(want, field))
    again = ours(x, state=got.state, **kw)  # W starts at zero
    assert torch.equal(again.weights, want.weights)
    assert (got.num_extra, ours.active_experts) == (plain.num_extra, plain.active_experts)
    update_router_bias(ours)


def test_an_expert_switched_off_in_one_layer_haunts_no_later_one():
    layers = residual(2)
    x = torch.randn(7, 4)
    first = layers[0](x, expert_mask=torch.arange(6) != 0)
    torch.testing.assert_close(layers[1](x, state=first.state).logits, run_layers(layers, x)[1].logits)


@pytest.mark.parametrize("make", [lambda n: recurrent(n, state=3, experts=4), residual])
def test_gradcheck_through_layers(make):
    layers = nn.ModuleList(make(2)).double()
    names, values = zip(*layers.named_parameters(), strict=True)

    class Chain(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = layers

        def forward(self, x):
            record = run_layers(self.layers, x)[-1]
            return record.weights, record.state, record.aux_loss

    chain = Chain()

    def run(x, *parameters):
        named = {f"layers.{n}": p for n, p in zip(names, parameters, strict=True)}
        return torch.func.functional_call(chain, named, (x,))

    assert gradcheck(run, (torch.randn(3, 4, dtype=torch.float64, requires_grad=True), *values))


# --- product keys


@pytest.mark.parametrize("rows, columns, k", [(3, 4, 2), (5, 5, 25), (8, 2, 9), (1, 7, 3)])
def test_product_keys_find_the_best_of_all_pairs(rows, columns, k):
    torch.manual_seed(0)
    a, b = torch.randn(6, 2, rows), torch.randn(6, 2, columns)
    got, number = product_top_k(a, b, k)
    every = (a[..., :, None] + b[..., None, :]).flatten(2)
    want = every.topk(k)
    torch.testing.assert_close(got, want.values)
    assert torch.equal(number, want.indices)


def product(heads=2, **kw):
    torch.manual_seed(0)
    return ProductKeyRouter(4, 12, 3, heads=heads, key_dim=4, **kw)


def test_a_product_key_router_mixes_what_its_heads_choose():
    router, x = product(), torch.randn(9, 4)
    r = router(x)
    assert router.keys.grid == (3, 4) == squarest_grid(12) and squarest_grid(7) == (1, 7)
    assert r.dropless and r.indices.shape == (9, 6)
    rows, columns = router.keys(x)
    want = torch.zeros(9, 12)
    for head in range(2):
        sums = (rows[:, head, :, None] + columns[:, head, None]).flatten(1)
        best = sums.topk(3)
        want += torch.zeros(9, 12).scatter(1, best.indices, best.values.softmax(-1)) / 2
    torch.testing.assert_close(r.dense_weights(), want)
    torch.testing.assert_close(r.scores.sum(-1), torch.ones(9))
    assert r.aux_loss > 0 and router.eval()(x).aux_loss == 0


def test_product_keys_cost_the_square_root():
    small, large = ProductKeyRouter(4, 16, 2), ProductKeyRouter(4, 1024, 2)
    keys = [r.keys.row_keys.numel() + r.keys.column_keys.numel() for r in (small, large)]
    assert keys[1] == 8 * keys[0]
    with pytest.raises(ValueError, match="12 places for num_experts=16"):
        ProductKeyRouter(4, 16, 2, grid=(3, 4))
    with pytest.raises(ValueError, match="top_k >= 2"):
        ProductKeyRouter(4, 16, 1)


def test_a_product_key_router_minds_masks():
    router, x = product(), torch.randn(9, 4)
    mask = torch.arange(12) != 5
    r = router(x, expert_mask=mask, token_mask=torch.arange(9) > 2)
    assert (r.indices != 5).all() and (r.indices[:3] == -1).all() and (r.weights[r.indices < 0] == 0).all()
    torch.testing.assert_close(r.weights[3:].sum(-1), torch.ones(6))
    torch.testing.assert_close(router(x, expert_mask=mask | True).dense_weights(), router(x).dense_weights())
    lonely = router(x, expert_mask=torch.arange(12) == 7)
    assert ((lonely.indices == 7) | (lonely.indices == -1)).all()
    forced = torch.zeros(12, dtype=torch.int8)
    forced[4] = 1
    assert (router(x, expert_mask=forced).indices == 4).sum(-1).min() == 2  # in each head


def test_gradcheck_of_product_keys():
    router = product().double()
    names, values = zip(*router.named_parameters(), strict=True)

    def run(x, *parameters):
        r = torch.func.functional_call(router, dict(zip(names, parameters, strict=True)), (x,))
        return r.weights, r.scores, r.aux_loss

    assert gradcheck(run, (torch.randn(5, 4, dtype=torch.float64, requires_grad=True), *values))


# --- sparsity


@pytest.mark.parametrize("act", ["relu", "reglu"])
def test_the_sparsity_gate_predicts_how_many_neurons_stay_silent(act):
    torch.manual_seed(0)
    experts = MLPExperts(4, 30, 400, act=act)
    with torch.no_grad():
        experts.layers[0].weight += torch.linspace(-0.05, 0.05, 4).view(4, 1, 1)
    gate, x = SparsityGate(experts), torch.rand(50, 30) + torch.randn(50, 1)
    hidden = experts.layers[0].wide(x)[..., :400]
    silent = (hidden <= 0).float().mean(-1)
    predicted = (gate(x) + 1) / 2  # the chance of silence
    assert (predicted - silent).abs().mean() < 0.02 and silent.std() > 0.1
    assert torch.corrcoef(torch.stack([predicted.flatten(), silent.flatten()]))[0, 1] > 0.98


def test_the_sparsity_gate_has_no_parameters_and_teaches_the_experts():
    torch.manual_seed(0)
    experts = MLPExperts(6, 4, 8, act="relu")
    moe = MoE(TopKRouter(4, 6, 2, gate=SparsityGate(experts)), experts)
    assert not list(moe.router.parameters())
    assert not any(name.startswith("router") for name in moe.state_dict())
    twin = copy.deepcopy(moe)
    assert twin.router.gate.experts is twin.experts and twin.experts is not experts
    routing = moe(torch.randn(5, 4), return_routing=True)[1]
    routing.weights.square().sum().backward()
    assert experts.layers[0].weight.grad.abs().max() > 0 and experts.layers[1].weight.grad is None
    for make, words in [
        (lambda: SparsityGate(MLPExperts(6, 4, 8)), "act 'relu' or 'reglu', not 'gelu'"),
        (lambda: SparsityGate(MLPExperts(6, 4, [], act="relu")), "a hidden layer"),
    ]:
        with pytest.raises(ValueError, match=words):
            make()


def test_gradcheck_of_the_sparsity_gate():
    torch.manual_seed(0)
    experts = MLPExperts(3, 4, 5, act="reglu").double()
    gate = SparsityGate(experts)
    x = torch.randn(5, 4, dtype=torch.float64, requires_grad=True)

    def run(x, weight, bias):
        class Around(nn.Module):
            def __init__(self):
                super().__init__()
                self.experts = experts

            def forward(self, x):
                return gate(x)

        return torch.func.functional_call(
            Around(), {"experts.layers.0.weight": weight, "experts.layers.0.bias": bias}, (x,)
        )

    assert gradcheck(run, (x, experts.layers[0].weight, experts.layers[0].bias))
