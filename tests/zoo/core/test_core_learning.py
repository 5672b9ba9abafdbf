"""The toy problem of the core's fact sheet: eight clusters, each with its own linear function."""

import functools

import pytest
import torch
from moezoo.zoo.core import (
    PEER,
    CometRouter,
    DenseRouter,
    DenseToSparseRouter,
    DSelectKRouter,
    ExpertChoiceRouter,
    GatingResidualRouter,
    MLPExperts,
    MoE,
    Monet,
    NoisyTopKRouter,
    NullExpertRouter,
    PermutationLearner,
    ProductKeyRouter,
    RecurrentRouter,
    Router,
    SoftMoE,
    SparsityGate,
    StraightThroughRouter,
    SwitchRouter,
    TopKRouter,
    ZeroExpert,
    update_router_bias,
)
from moezoo.zoo.core.statistics import expert_load, label_expert_nmi
from torch import nn

DIM, CLUSTERS, EXPERTS, WIDTH = 8, 8, 8, 16


class Toy:
    def __init__(self, seed):
        self.g = torch.Generator().manual_seed(seed)
        self.centres = 3 * torch.randn(CLUSTERS, DIM, generator=self.g)
        self.maps = torch.randn(CLUSTERS, DIM, generator=self.g)
        prior = torch.linspace(0.25, 2.0, CLUSTERS)  # max / mean about 1.8
        self.prior = prior / prior.sum()

    def batch(self, n):
        c = torch.multinomial(self.prior, n, replacement=True, generator=self.g)
        x = self.centres[c] + torch.randn(n, DIM, generator=self.g)
        return x, (x * self.maps[c]).sum(-1, keepdim=True), c


def train(model, loss_of, toy, steps=1500):
    optimiser = torch.optim.Adam(model.parameters(), lr=1e-2)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, steps)
    for step in range(steps):
        anneal(model, step / steps)
        x, y, _ = toy.batch(512)
        optimiser.zero_grad()
        loss_of(x, y).backward()
        optimiser.step()
        schedule.step()


def anneal(model, progress):
    """What a router's schedule would do: the temperature falls from 2, a permutation is searched for a tenth."""
    for part in model.modules():
        if isinstance(part, DenseToSparseRouter):
            part.temperature = 2.0 * (0.3 / 2.0) ** progress
        if isinstance(part, PermutationLearner):
            part.search(10 * progress)


class SecondLayer(Router):
    """The second of two routers that hand on their state; both read the token."""

    def __init__(self, first, second):
        super().__init__(second.num_experts, second.top_k)
        self.first, self.second = first, second

    def forward(self, x, **kw):
        return self.second(x, state=self.first(x).state, **kw)


def recurrent():
    cell = nn.GRUCell(16, 16)
    return SecondLayer(*(RecurrentRouter(DIM, TopKRouter(16, EXPERTS, 2), cell) for _ in range(2)))


def relative_error(got, y):
    return ((got - y).square().mean() / y.var()).item()


@functools.cache
def error_of_one_network(seed):
    """A single MLP as wide as all experts together, on the same batches."""
    torch.manual_seed(seed)
    toy = Toy(seed)
    mlp = nn.Sequential(nn.Linear(DIM, EXPERTS * WIDTH), nn.GELU(), nn.Linear(EXPERTS * WIDTH, 1))
    train(mlp, lambda x, y: (mlp(x) - y).square().mean(), toy)
    x, y, _ = toy.batch(8192)
    return relative_error(mlp(x), y)


ROUTERS = {
    "dense": lambda: DenseRouter(DIM, EXPERTS),
    "dense, activation gate": lambda: DenseRouter(DIM, EXPERTS, activation=torch.tanh, temperature=0.1),
    "top-2": lambda: TopKRouter(DIM, EXPERTS, 2),
    "top-2, coef .1": lambda: TopKRouter(DIM, EXPERTS, 2, aux_coef=0.1),
    "top-2, groups": lambda: TopKRouter(DIM, EXPERTS, 2, num_groups=2, topk_groups=1),
    "noisy top-2": lambda: NoisyTopKRouter(DIM, EXPERTS, 2),
    "sigmoid, no balance": lambda: TopKRouter(DIM, EXPERTS, 2, score_func="sigmoid", balance="none"),
    "sigmoid, bias 1e-3": lambda: TopKRouter(DIM, EXPERTS, 2, score_func="sigmoid", balance="bias"),
    "expert choice": lambda: ExpertChoiceRouter(DIM, EXPERTS),
    "null": lambda: NullExpertRouter(DIM, EXPERTS, num_null=4, top_k=4),
    "top-1": lambda: TopKRouter(DIM, EXPERTS, 1, norm_topk_prob=False),
    "switch": lambda: SwitchRouter(DIM, EXPERTS, capacity_factor=4.0),
    "switch, BPR": lambda: SwitchRouter(DIM, EXPERTS, capacity_factor=2.0, priority="prob"),
    "straight-through": lambda: StraightThroughRouter(DIM, EXPERTS),
    "DSelect-2": lambda: DSelectKRouter(DIM, EXPERTS, 2),
    "COMET-2": lambda: CometRouter(DIM, EXPERTS, 2),
    "COMET-2, permuted": lambda: CometRouter(DIM, EXPERTS, 2, permutation=PermutationLearner(EXPERTS)),
    "dense to sparse": lambda: DenseToSparseRouter(DIM, EXPERTS),
    "recurrent top-2": recurrent,
    "gating residual, top-2": lambda: SecondLayer(*(GatingResidualRouter(TopKRouter(DIM, EXPERTS, 2)) for _ in "12")),
    "product keys, top-2": lambda: ProductKeyRouter(DIM, EXPERTS, 2),
    "sparsity, top-2": lambda: TopKRouter(
        DIM, EXPERTS, 2, gate=SparsityGate(MLPExperts(EXPERTS, DIM, WIDTH, 1, "relu"))
    ),
}
# A token of groups reaches half of the experts (relMSE .0093 for the MLP's .0014, seed 1). Sparsity scores lie in
# (-1, 1), so that one weight of two is never more than e² times the other, and an expert must keep its neurons silent
# on the tokens it wants: it ends behind one wide network (.0154 and .0017 for .0130 and .0014, seeds 0 and 1).
LIMITED = ("top-2, groups", "sparsity, top-2")


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize("name", ROUTERS)
def test_experts_learn_the_clusters(name, seed):
    torch.manual_seed(seed)
    router = ROUTERS[name]()
    extra = [ZeroExpert() for _ in range(router.num_extra)]
    # A token whose slots are all null or dropped needs a way around the experts.
    shared = nn.Linear(DIM, 1) if router.num_extra or name.startswith("switch") else None
    experts = router.gate.experts if name.startswith("sparsity") else MLPExperts(EXPERTS, DIM, WIDTH, 1)
    moe, toy = MoE(router, experts, shared, extra_experts=extra), Toy(seed)

    loads = []

    def loss_of(x, y):
        update_router_bias(moe)
        got, routing = moe(x, return_routing=True)
        loads.append(expert_load(routing))
        return (got - y).square().mean() + routing.aux_loss

    train(moe, loss_of, toy)
    x, y, cluster = toy.batch(8192)
    with torch.no_grad():
        got, routing = moe.eval()(x, return_routing=True)
    error, nmi = relative_error(got, y), label_expert_nmi(routing, cluster).item()
    rival = error_of_one_network(seed)
    # Over many batches: with a bias, experts that tie take turns, so a single batch says little.
    load = torch.stack(loads[-300:]).mean(0)
    violation = (load.max() / load.mean() - 1).item()
    print(f"\n{name} seed {seed}: relMSE {error:.4f} (MLP {rival:.4f}) MaxVio {violation:.2f} NMI {nmi:.3f}")
    assert error < 0.05  # a network of one expert's width leaves .08
    if router.top_k == 2 and name not in LIMITED:
        assert error <= 0.01 and error < rival
    if name in ("top-2", "noisy top-2"):
        assert error <= 0.008 and nmi >= 0.85
    if name == "sigmoid, bias 1e-3":
        assert violation <= 0.25
    if name == "expert choice":
        assert violation <= 1e-6
    if name == "dense to sparse":
        assert routing.top_k == 1 and error <= 0.01


LAYERS = {
    "PEER": (lambda: PEER(DIM, 144, heads=4, top_k=8, key_dim=8, out=1), 0.01),
    "Monet, horizontal": (lambda: Monet(DIM, 16, heads=2, top_k=4, act="gelu", out=1), 0.02),
    "Monet, vertical": (lambda: Monet(DIM, 16, heads=2, top_k=4, form="vertical", act="gelu", out=2), 0.02),
    # Mixing tokens that have nothing to do with each other costs it: a network of one expert's width leaves .08.
    "soft": (lambda: SoftMoE(DIM, MLPExperts(EXPERTS, DIM, WIDTH, 1), slots=8), 0.08),
}


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize("name", LAYERS)
def test_other_layers_learn_the_clusters(name, seed):
    torch.manual_seed(seed)
    make, limit = LAYERS[name]
    layer, toy = make(), Toy(seed)

    def run(x):
        got, routing = layer(x.view(-1, 64, DIM), return_routing=True)  # for soft MoE: sets of 64
        return got.flatten(0, 1)[:, :1], routing.aux_loss

    def loss_of(x, y):
        got, aux_loss = run(x)
        return (got - y).square().mean() + aux_loss

    train(layer, loss_of, toy)
    x, y, _ = toy.batch(8192)
    with torch.no_grad():
        layer.eval()
        error = relative_error(run(x)[0], y)
    print(f"\n{name} seed {seed}: relMSE {error:.4f} (MLP {error_of_one_network(seed):.4f})")
    assert error < limit
