"""Upcycling, splitting, pruning and merging: what each must leave as it was."""

import copy

import pytest
import torch
from moezoo.zoo.core import (
    DenseRouter,
    HashRouter,
    LinearExperts,
    MLPExperts,
    MoE,
    NoisyTopKRouter,
    NullExpertRouter,
    StraightThroughRouter,
    TaskGate,
    TopKRouter,
    ZeroExpert,
)
from moezoo.zoo.core.statistics import expert_similarity
from moezoo.zoo.core.surgery import (
    MixtureOfAttention,
    balanced_clusters,
    diversify_experts,
    group_alike,
    merge_experts,
    prune_experts,
    read_mlp,
    split_mlp,
    take_experts,
    upcycle,
    upcycle_mlp,
)
from torch import nn
from torch.autograd import gradcheck

ROUTERS = {
    "top-2": lambda: TopKRouter(6, 4, 2),
    "sigmoid, bias": lambda: TopKRouter(6, 4, 2, score_func="sigmoid", balance="bias"),
    "tasks": lambda: TopKRouter(6, 4, 2, gate=TaskGate(6, 4, 2)),
    "noisy": lambda: NoisyTopKRouter(6, 4, 2).eval(),
    "dense": lambda: DenseRouter(6, 4, bias=True),
    "straight": lambda: StraightThroughRouter(6, 4),
    "null": lambda: NullExpertRouter(6, 4, num_null=2, top_k=3),
}


def mixture(name="top-2", hidden=5, act="gelu", seed=0):
    torch.manual_seed(seed)
    router = ROUTERS[name]()
    for parameter in router.parameters():
        nn.init.normal_(parameter)
    return MoE(router, MLPExperts(4, 6, hidden, 3, act=act), extra_experts=[ZeroExpert()] * router.num_extra).eval()


def dense(act=nn.GELU, hidden=12, bias=True):
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(6, hidden, bias), act(), nn.Dropout(0.1), nn.Linear(hidden, 3, bias)).eval()


# --- upcycle


@pytest.mark.parametrize("act", [nn.ReLU, nn.GELU, nn.SiLU, nn.Tanh])
@pytest.mark.parametrize("router", ["top-2", "dense"])
def test_an_upcycled_layer_starts_as_the_dense_one(act, router):
    mlp, x = dense(act).double(), torch.randn(20, 6, dtype=torch.float64)
    moe = MoE(ROUTERS[router](), upcycle_mlp(mlp, 4)).eval()
    torch.testing.assert_close(moe(x), mlp(x))
    assert moe.experts.dropout == 0.1
    torch.testing.assert_close(upcycle(mlp, 4, 2).eval()(x), mlp(x))


def test_one_upcycled_expert_per_token_starts_near_the_dense_one_and_its_router_learns():
    mlp, x = dense(), torch.randn(50, 6)
    moe = upcycle(mlp, 4, 1)
    assert (moe.eval()(x) - mlp(x)).norm() < 0.1 * mlp(x).norm()
    moe.train()(x).square().sum().backward()
    assert moe.router.weight.grad.abs().max() > 0


def test_noise_and_masks_set_the_copies_apart():
    mlp, g = dense(hidden=200), torch.Generator().manual_seed(3)
    noisy = upcycle_mlp(mlp, 3, noise=0.1, generator=g)
    change = noisy.layers[0].weight - mlp[0].weight
    assert change.std().item() == pytest.approx(0.1 * mlp[0].weight.std().item(), rel=0.05)
    assert not torch.equal(change[0], change[1])
    masked = upcycle_mlp(mlp, 3, mask=0.3, generator=g)
    gone = masked.layers[0].weight == 0
    assert gone.float().mean().item() == pytest.approx(0.3, abs=0.02)
    assert torch.equal(masked.layers[0].weight[~gone], mlp[0].weight.expand(3, -1, -1)[~gone])
    assert not torch.equal(gone[0], gone[1])
    one, two = (upcycle_mlp(mlp, 3, mask=0.3, generator=torch.Generator().manual_seed(4)) for _ in range(2))
    assert torch.equal(one.layers[1].weight, two.layers[1].weight)


def test_specialists_become_experts_in_turn():
    specialists = [dense(), copy.deepcopy(dense())]
    nn.init.normal_(specialists[1][0].weight)
    experts, x = upcycle_mlp(specialists, 4).eval(), torch.randn(7, 6)
    y = experts.dense(x)
    for e in range(4):
        torch.testing.assert_close(y[:, e], specialists[e % 2](x))


def test_evomoe_goes_from_one_expert_to_different_ones():
    experts = MLPExperts(4, 6, 50)
    before = experts.layers[0].weight[2].clone()
    diversify_experts(experts, source=2, mask=0.5, generator=torch.Generator().manual_seed(0))
    for e in range(4):
        weight = experts.layers[0].weight[e]
        assert torch.equal(weight[weight != 0], before[weight != 0]) and (weight == 0).float().mean() > 0.4
    assert torch.equal(experts.layers[1].bias[0], experts.layers[1].bias[3])


def test_attention_experts_mix_softly():
    torch.manual_seed(0)

    class Attention(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = nn.MultiheadAttention(4, 2, batch_first=True)

        def forward(self, x):
            return self.inner(x, x, x, need_weights=False)[0]

    one = Attention()
    layer, x = MixtureOfAttention(4, [copy.deepcopy(one) for _ in range(3)]), torch.randn(2, 5, 4)
    torch.testing.assert_close(layer(x), one(x))
    other = MixtureOfAttention(4, [Attention() for _ in range(2)]).double()
    weights, x = other.gate(x.double()).softmax(-1), x.double()
    want = weights[..., :1] * other.attention[0](x) + weights[..., 1:] * other.attention[1](x)
    torch.testing.assert_close(other(x), want)
    assert gradcheck(other, (x[:1, :2].clone().requires_grad_(),))


# --- split


@pytest.mark.parametrize("bias", [True, False])
def test_all_emergent_experts_together_are_the_dense_mlp(bias):
    mlp, x = dense(bias=bias).double(), torch.randn(20, 6, dtype=torch.float64)
    for experts in (1, 3, 4, 12):
        torch.testing.assert_close(split_mlp(mlp, experts, experts).eval()(x), mlp(x))


def test_emergent_experts_find_the_neurons_that_belong_together():
    torch.manual_seed(0)
    mlp = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 3))
    group = torch.arange(16) % 4
    directions = torch.eye(8)[:4]
    with torch.no_grad():
        mlp[0].weight.copy_(directions[group] + 0.1 * torch.randn(16, 8))
        mlp[0].bias.fill_(-0.5)
    for seed in range(5):
        moe = split_mlp(mlp, 4, 1, torch.Generator().manual_seed(seed))
        x = directions[torch.arange(40) % 4] * (2 + torch.rand(40, 1))
        wanted = mlp(x) - mlp[2].bias
        error = (moe(x) - mlp[2].bias - wanted).norm() / wanted.norm()
        if error < 0.05:  # k-means is a local search: the fifth seed is not the first to find it
            break
    assert error < 0.05 and (moe.last_routing.weights == 1).all()


def test_clusters_are_equal_in_size_and_gather_what_is_alike():
    g = torch.Generator().manual_seed(0)
    centres = 5 * torch.eye(4)[:3]
    points = torch.cat([centre + 0.1 * torch.randn(6, 4, generator=g) for centre in centres])
    found = balanced_clusters(points, 3, g)
    assert sorted(found.flatten().tolist()) == list(range(18))
    assert {frozenset(c) for c in found.tolist()} == {frozenset(range(6 * i, 6 * i + 6)) for i in range(3)}


# --- prune


@pytest.mark.parametrize("name", ROUTERS)
@pytest.mark.parametrize("keep", [[0, 2, 3], [3, 1, 0]])
def test_a_pruned_layer_is_the_layer_with_experts_switched_off(name, keep):
    moe, x = mixture(name, act="swiglu"), torch.randn(30, 6)
    kw = {"task_id": torch.arange(30) % 2} if name == "tasks" else {}
    before = copy.deepcopy(moe.state_dict())
    pruned = prune_experts(moe, keep)
    mask = torch.ones(4 + moe.router.num_extra, dtype=torch.bool)
    mask[[e for e in range(4) if e not in keep]] = False
    torch.testing.assert_close(pruned(x, **kw), moe(x, expert_mask=mask, **kw))
    assert pruned.experts.num_experts == 3 and pruned.router.num_experts == 3
    assert all(torch.equal(v, before[k]) for k, v in moe.state_dict().items())
    pruned.train()(x, **kw).sum().backward()
    assert sum(p.numel() for p in pruned.parameters()) < sum(p.numel() for p in moe.parameters())


@pytest.mark.parametrize(
    "make, keep, words",
    [
        (mixture, [0, 0, 1], "must be different"),
        (mixture, [0, 4], "out of 0 to 3"),
        (mixture, [1], "less than the router's top_k=2"),
        (lambda: MoE(HashRouter(4), MLPExperts(4, 6, 5)), [0, 1], "with a gate, not HashRouter"),
        (lambda: MoE(TopKRouter(6, 4, 2, num_groups=2, topk_groups=1), MLPExperts(4, 6, 5)), [0, 1], "within groups"),
    ],
)
def test_pruning_names_mistakes(make, keep, words):
    with pytest.raises(ValueError, match=words):
        prune_experts(make(), keep)


# --- merge


@pytest.mark.parametrize("name", [n for n in ROUTERS if n != "tasks"])
def test_merging_copies_changes_nothing_be_their_neurons_in_any_order(name):
    moe, x = mixture(name, hidden=7), torch.randn(40, 6)
    with torch.no_grad():
        for copied, source in ((1, 0), (3, 2)):
            order = torch.randperm(7)
            inner, outer = moe.experts.layers
            inner.weight[copied], inner.bias[copied] = inner.weight[source][order], inner.bias[source][order]
            outer.weight[copied], outer.bias[copied] = outer.weight[source][:, order], outer.bias[source]
    merged = merge_experts(moe, [[0, 1], [2, 3]])
    torch.testing.assert_close(merged(x), moe(x))
    assert merged.experts.num_experts == 2
    routing = merged.last_routing
    torch.testing.assert_close(routing.scores.sum(-1), moe.last_routing.scores.sum(-1))
    off = merged(x, expert_mask=torch.tensor([False, True] + [True] * moe.router.num_extra))
    torch.testing.assert_close(
        off, moe(x, expert_mask=torch.tensor([False, False, True, True] + [True] * moe.router.num_extra))
    )


def test_a_merged_expert_is_the_average_by_use():
    moe, usage = mixture(act="swiglu"), torch.tensor([3.0, 1.0, 2.0, 2.0])
    merged = merge_experts(moe, [[0, 1], [2], [3]], usage)
    for layer, old in zip(merged.experts.layers, moe.experts.layers, strict=True):
        torch.testing.assert_close(layer.weight[0], 0.75 * old.weight[0] + 0.25 * old.weight[1])
        assert torch.equal(layer.weight[1], old.weight[2])
    with pytest.raises(ValueError, match="each of 4 experts once"):
        merge_experts(moe, [[0, 1], [2]])


def test_groups_join_what_is_alike():
    moe, x = mixture(), torch.randn(60, 6)
    twins = take_experts(moe.experts, torch.tensor([2, 0, 2, 1, 0]))
    similarity = expert_similarity(twins.dense(x))
    assert {tuple(g) for g in group_alike(similarity, 3)} == {(0, 2), (1, 4), (3,)}
    assert group_alike(similarity, 5) == [[0], [1], [2], [3], [4]]


# --- mistakes


@pytest.mark.parametrize(
    "mlp, words",
    [
        (nn.Sequential(nn.Linear(6, 4), nn.LeakyReLU(), nn.Linear(4, 3)), "got Linear, LeakyReLU, Linear"),
        (nn.Sequential(nn.Linear(6, 4), nn.Linear(4, 3)), "got Linear, Linear"),
        (nn.Sequential(nn.ReLU(), nn.Linear(6, 4)), "got ReLU, Linear"),
        (nn.Sequential(nn.Linear(6, 4), nn.GELU("tanh"), nn.Linear(4, 3)), "approximate"),
        (nn.Sequential(nn.Linear(6, 4), nn.ReLU(), nn.Linear(4, 3, bias=False)), "a bias, or none"),
        (nn.Conv1d(3, 3, 1), "got Conv1d"),
    ],
)
def test_what_is_no_mlp_is_named(mlp, words):
    with pytest.raises(ValueError, match=words):
        read_mlp(mlp)


def test_other_mistakes_are_named():
    with pytest.raises(ValueError, match="must divide the hidden width 12"):
        split_mlp(dense(), 5, 2)
    with pytest.raises(ValueError, match="one form"):
        upcycle_mlp([dense(), dense(hidden=5)], 4)
    with pytest.raises(ValueError, match=r"mask=1\.0"):
        upcycle_mlp(dense(), 4, mask=1.0)
    assert isinstance(upcycle_mlp(nn.Linear(6, 3), 4), MLPExperts) and not isinstance(mixture().experts, LinearExperts)
