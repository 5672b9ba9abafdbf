"""The toy problem of the core's fact sheet: eight clusters, each with its own linear target."""

import pytest
import torch
from moezoo.zoo.core import DenseRouter, MLPExperts, MoE, NoisyTopKRouter, TopKRouter
from moezoo.zoo.core.statistics import label_expert_nmi, max_violation

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
        return x, ((x - self.centres[c]) * self.maps[c]).sum(-1, keepdim=True) + self.maps[c][:, :1], c


def learn(router, seed, steps=1500):
    torch.manual_seed(seed)
    toy = Toy(seed)
    moe = MoE(router(), MLPExperts(EXPERTS, DIM, WIDTH, 1))
    optimiser = torch.optim.Adam(moe.parameters(), lr=1e-2)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, steps)
    for _ in range(steps):
        x, y, _ = toy.batch(512)
        got, routing = moe(x, return_routing=True)
        optimiser.zero_grad()
        ((got - y).square().mean() + routing.aux_loss).backward()
        optimiser.step()
        schedule.step()
    x, y, c = toy.batch(8192)
    with torch.no_grad():
        got, routing = moe.eval()(x, return_routing=True)
    error = (got - y).square().mean() / y.var()
    return error.item(), max_violation(routing).item(), label_expert_nmi(routing, c).item()


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize(
    ("name", "router", "least_nmi"),
    [
        ("dense", lambda: DenseRouter(DIM, EXPERTS), 0.80),
        ("top2", lambda: TopKRouter(DIM, EXPERTS, 2), 0.85),
        ("noisy2", lambda: NoisyTopKRouter(DIM, EXPERTS, 2), 0.85),
    ],
)
def test_experts_learn_the_clusters(name, router, least_nmi, seed):
    error, violation, nmi = learn(router, seed)
    print(f"\n{name} seed {seed}: relMSE {error:.4f} MaxVio {violation:.2f} NMI {nmi:.3f}")
    assert error <= 0.008
    assert nmi >= least_nmi
