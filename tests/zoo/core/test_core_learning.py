"""The toy problem of the core's fact sheet: eight clusters, each with its own linear function."""

import functools

import pytest
import torch
from moezoo.zoo.core import DenseRouter, MLPExperts, MoE, NoisyTopKRouter, TopKRouter
from moezoo.zoo.core.statistics import label_expert_nmi, max_violation
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
    for _ in range(steps):
        x, y, _ = toy.batch(512)
        optimiser.zero_grad()
        loss_of(x, y).backward()
        optimiser.step()
        schedule.step()


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


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize("name", ["dense", "top2", "noisy2"])
def test_experts_learn_the_clusters(name, seed):
    torch.manual_seed(seed)
    router = {
        "dense": lambda: DenseRouter(DIM, EXPERTS),
        "top2": lambda: TopKRouter(DIM, EXPERTS, 2),
        "noisy2": lambda: NoisyTopKRouter(DIM, EXPERTS, 2),
    }[name]()
    moe, toy = MoE(router, MLPExperts(EXPERTS, DIM, WIDTH, 1)), Toy(seed)

    def loss_of(x, y):
        got, routing = moe(x, return_routing=True)
        return (got - y).square().mean() + routing.aux_loss

    train(moe, loss_of, toy)
    x, y, cluster = toy.batch(8192)
    with torch.no_grad():
        got, routing = moe.eval()(x, return_routing=True)
    error, nmi = relative_error(got, y), label_expert_nmi(routing, cluster).item()
    rival = error_of_one_network(seed)
    violation = max_violation(routing).item()
    print(f"\n{name} seed {seed}: relMSE {error:.4f} (MLP {rival:.4f}) MaxVio {violation:.2f} NMI {nmi:.3f}")
    assert error <= 0.008
    assert error < rival
    if name != "dense":  # a dense gate mixes experts, so its largest one need not tell the cluster
        assert nmi >= 0.85
