"""PMOE: an actor whose policy is a mixture of Gaussians, for states (Ren et al., arXiv:2104.09122)."""

from collections.abc import Mapping
from itertools import pairwise
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from ..errors import UserError
from .base import ZooModel
from .core import DenseRouter, LinearExperts, LinearGate, Routing
from .mentor import ControlOutput

LOG_STD = (-20.0, 2.0)


class PMOE(ZooModel):
    """`pi(a|s) = sum_k w_k(s) N(a; mu_k(s), sigma_k(s))`, squashed by tanh, and twin critics.

    A primitive k is a linear head on a shared body; the router reads the state alone. With one expert it is the actor
    of SAC (Haarnoja et al., arXiv:1812.05905).

    Args:
        schema: the data's sizes: `state` and `action`.
        hidden: width of the policy's body.
        layers: hidden layers of the body.
        experts: K, the primitives.
        critic_hidden: width of the critics; as many layers as the body.

    Raises:
        UserError: data without states.
    """

    def __init__(
        self,
        schema: Mapping[str, Any],
        hidden: int = 256,
        layers: int = 2,
        experts: int = 5,
        critic_hidden: int = 256,
    ) -> None:
        super().__init__()
        state, action = int(schema["state"]), int(schema["action"])
        if not state:
            raise UserError(f"{schema['dataset']} gives no state, which this agent reads; see zoo/mentor.py for pixels")
        if experts < 1 or layers < 1:
            raise UserError(f"experts={experts}, layers={layers}: expected at least 1 of each")
        self.actor = MixturePolicy(state, action, hidden, layers, experts)
        widths = [state + action, *[critic_hidden] * layers, 1]
        self.critic = TwinCritic(widths)

    def forward(self, state: Float[Tensor, "batch state"], pixels: Tensor | None = None) -> ControlOutput:
        """The likeliest primitive's mean action."""
        mean, _, routing = self.actor(state)
        best = routing.scores.argmax(-1)
        return ControlOutput(mean[torch.arange(len(best), device=best.device), best].tanh(), {"actor": routing})


class MixturePolicy(nn.Module):
    """Means and log deviations of K primitives before the squash, and their weights as a routing record."""

    def __init__(self, state: int, action: int, hidden: int, layers: int, experts: int) -> None:
        super().__init__()
        self.body = mlp([state, *[hidden] * layers])
        self.experts = LinearExperts(experts, hidden, 2 * action)
        self.router = DenseRouter(state, experts, gate=LinearGate(state, experts, bias=True, std=0.0))

    def forward(
        self, state: Float[Tensor, "batch state"]
    ) -> tuple[Float[Tensor, "batch experts action"], Float[Tensor, "batch experts action"], Routing]:
        h = self.body(state).relu()
        mean, log_std = self.experts.dense(h).chunk(2, -1)
        return mean, log_std.clamp(*LOG_STD), self.router(state)


class TwinCritic(nn.Module):
    """Two Q-values of a state and an action."""

    def __init__(self, widths: list[int]) -> None:
        super().__init__()
        self.q1, self.q2 = mlp(widths), mlp(widths)

    def forward(
        self, state: Float[Tensor, "*batch state"], action: Float[Tensor, "*batch action"]
    ) -> tuple[Float[Tensor, "*batch"], Float[Tensor, "*batch"]]:
        pair = torch.cat([state, action], -1)
        return self.q1(pair).squeeze(-1), self.q2(pair).squeeze(-1)


def squashed(
    mean: Float[Tensor, "*batch action"], log_std: Float[Tensor, "*batch action"], noise: Float[Tensor, "*batch action"]
) -> tuple[Float[Tensor, "*batch action"], Float[Tensor, "*batch"]]:
    """`tanh(mean + std noise)` and its log density; noise is standard normal.

    log(1 - tanh(u)^2) is written as 2 (log 2 - u - softplus(-2u)), which does not underflow.
    """
    u = mean + log_std.exp() * noise
    log_density = -0.5 * (noise.square() + 2 * log_std + torch.log(u.new_tensor(2 * torch.pi)))
    jacobian = 2 * (torch.log(u.new_tensor(2.0)) - u - F.softplus(-2 * u))
    return u.tanh(), (log_density - jacobian).sum(-1)


def mlp(widths: list[int]) -> nn.Sequential:
    """Linear layers with ReLU between."""
    layers: list[nn.Module] = []
    for inputs, outputs in pairwise(widths):
        layers += [nn.Linear(inputs, outputs), nn.ReLU()]
    return nn.Sequential(*layers[:-1])
