"""MENTOR's agent: DrQ-v2's encoder and critics, an actor with a mixture of experts, a value net.

Huang et al., "MENTOR: Mixture-of-Experts Network with Task-Oriented Perturbation for Visual RL" (arXiv:2410.14972).
Without experts it is DrQ-v2's agent (Yarats et al., arXiv:2107.09645), and DrM's with the value net (Xu et al.,
arXiv:2310.19668). How the agent learns is in `tasks/control_mentor.py`, its rules in `mentor_rules.py`.
"""

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any, Literal, NamedTuple, cast

import torch
from jaxtyping import Float, Int, UInt8
from torch import Tensor, nn

from ..errors import UserError
from .base import ZooModel
from .core import Gate, MLPExperts, MoE, Routing, StackedLinear, TopKRouter
from .core.losses import slot_counts

Balance = Literal["switch", "bias", "official", "none"]


class ControlOutput(NamedTuple):
    """What an agent would do without noise: `action` in [-1, 1], [batch, action], and the routing records."""

    action: Tensor
    routing: dict[str, Routing]


class Mentor(ZooModel):
    """Acts on stacked images; holds actor, twin critic and value net over one convolutional encoder.

    Args:
        schema: the data's sizes: `pixels`, `state`, `action`.
        channels: of every convolution.
        strides: of the 3x3 convolutions, one each; DrQ-v2's are 2, 1, 1, 1.
        feature_dim: width F that each head's trunk reads the encoder into; the paper's 50, 100 for dog and humanoid.
        hidden: width H of the heads.
        experts: E; 0 puts DrQ-v2's linear layer in their place, 1 an MLP as wide as `expert_hidden` and no router.
        top_k: experts an observation uses.
        expert_hidden: hidden width of an expert, H -> `expert_hidden` -> H.
        gate_hidden: hidden width of the gate.
        gate_dropout: in the gate, in training.
        balance: `switch`, the differentiable loss E sum_e f_e P_e; `bias`, without any loss; `none`; `official`, the
            loss of the released code for comparison: variance of the load, which has no gradient, plus the router's
            entropy, with weight 1 whatever `aux_coef` is.
        aux_coef: weight of the Switch loss.
        critic_norm: dropout 0.01 and layer normalisation in the critics, as for Meta-World.
        value: hold the value net that DrM and MENTOR exploit with.

    Raises:
        UserError: data without pixels, images too small for the convolutions, or impossible numbers of experts.
    """

    def __init__(
        self,
        schema: Mapping[str, Any],
        channels: int = 32,
        strides: Sequence[int] = (2, 1, 1, 1),
        feature_dim: int = 50,
        hidden: int = 1024,
        experts: int = 16,
        top_k: int = 4,
        expert_hidden: int = 256,
        gate_hidden: int = 256,
        gate_dropout: float = 0.1,
        balance: Balance = "switch",
        aux_coef: float = 0.005,
        critic_norm: bool = False,
        value: bool = True,
    ) -> None:
        super().__init__()
        if schema["pixels"] is None:
            raise UserError(f"{schema['dataset']} gives no pixels, which this agent reads; see zoo/pmoe.py for states")
        if experts > 1 and not 1 <= top_k <= experts:
            raise UserError(f"top_k={top_k}: expected 1 to experts={experts}")
        state, action = int(schema["state"]), int(schema["action"])
        self.encoder = Encoder(schema["pixels"], channels, strides)
        sizes = (self.encoder.features, feature_dim, state, hidden)
        middle = _middle(hidden, experts, top_k, expert_hidden, gate_hidden, gate_dropout, balance, aux_coef)
        self.actor = Actor(Trunk(*sizes), middle, feature_dim, hidden, action, balance == "official")
        self.critic = Critic(Trunk(*sizes), feature_dim, hidden, action, critic_norm)
        self.value = Value(Trunk(*sizes), feature_dim, hidden, critic_norm) if value else None
        self.apply(orthogonal)

    def forward(
        self,
        pixels: UInt8[Tensor, "batch channels height width"],
        state: Float[Tensor, "batch state"] | None = None,
    ) -> ControlOutput:
        """The greedy action."""
        action, routing = self.actor(self.encoder(pixels), state)
        return ControlOutput(action, {} if routing is None else {"actor": routing})


class Encoder(nn.Module):
    """3x3 convolutions with ReLU over `pixels / 255 - 0.5`; what comes out is flattened."""

    def __init__(self, pixels: Sequence[int], channels: int, strides: Sequence[int]) -> None:
        super().__init__()
        inputs, *sides = pixels
        layers: list[nn.Module] = []
        for stride in strides:
            layers += [nn.Conv2d(inputs, channels, 3, stride), nn.ReLU()]
            inputs, sides = channels, [(side - 3) // stride + 1 for side in sides]
        if min(sides) < 1:
            raise UserError(f"strides={list(strides)}: too many for images of {list(pixels[1:])}")
        self.layers = nn.Sequential(*layers)
        self.features = inputs * sides[0] * sides[1]

    @property
    def dtype(self) -> torch.dtype:
        return next(self.parameters()).dtype

    def forward(self, pixels: UInt8[Tensor, "batch channels height width"]) -> Float[Tensor, "batch features"]:
        quick = pixels.device.type == "cpu" and not torch.is_grad_enabled()  # twice as fast there, and no faster else
        layout = torch.channels_last if quick else torch.contiguous_format
        seen = pixels.to(self.dtype, memory_format=layout).mul_(1 / 255).sub_(0.5)
        features: Tensor = self.layers(seen).flatten(1)
        return features


class Trunk(nn.Module):
    """The encoder's features read into F numbers in (-1, 1), with the state added where there is one (Adroit)."""

    def __init__(self, features: int, dim: int, state: int, hidden: int) -> None:
        super().__init__()
        self.linear = nn.Linear(features, dim)
        self.norm = nn.LayerNorm(dim)
        self.state = _mlp([state, hidden, dim]) if state else None
        self.fuse = _mlp([dim, hidden, dim]) if state else None

    def forward(
        self, features: Float[Tensor, "batch features"], state: Float[Tensor, "batch state"] | None
    ) -> Float[Tensor, "batch dim"]:
        return self.finish(self.linear(features), state)

    def finish(self, read: Float[Tensor, "batch dim"], state: Tensor | None) -> Float[Tensor, "batch dim"]:
        """What follows the linear layer."""
        z: Tensor = self.norm(read).tanh()
        if self.state is not None and self.fuse is not None:
            z = self.fuse(z + self.state(state))
        return z


class Actor(nn.Module):
    """Trunk, a layer, the experts, a layer: the mean action."""

    def __init__(
        self, trunk: Trunk, middle: MoE | nn.Sequential, dim: int, hidden: int, action: int, official: bool
    ) -> None:
        super().__init__()
        self.trunk, self.middle, self.official = trunk, middle, official
        self.first, self.last = nn.Linear(dim, hidden), nn.Linear(hidden, action)

    def forward(
        self, features: Float[Tensor, "batch features"], state: Float[Tensor, "batch state"] | None = None
    ) -> tuple[Float[Tensor, "batch action"], Routing | None]:
        z = self.first(self.trunk(features, state)).relu()
        routing: Routing | None = None
        if isinstance(self.middle, MoE):
            y, routing = self.middle(z, return_routing=True)
            if self.official and self.training:
                routing.aux_loss = official_aux_loss(routing)
        else:
            y = self.middle(z)
        return self.last(y.relu()).tanh(), routing

    def activations(self, features: Float[Tensor, "batch features"], state: Tensor | None = None) -> list[Tensor]:
        """What every linear layer gives, [..., batch, units], for the dormant ratio: after ReLU where one follows the
        layer itself, before any activation elsewhere (trunk, experts' and gate's outputs, action); all experts see
        all observations."""
        read = self.trunk.linear(features)
        z = self.first(self.trunk.finish(read, state)).relu()
        if isinstance(self.middle, MoE):
            gate: Any = self.middle.router.gate
            routing = self.middle.router(z)
            up, down = cast("list[StackedLinear]", list(self.middle.experts.layers))  # type: ignore[arg-type]
            hidden = up.wide(z).transpose(0, 1).relu()
            each = down.batched(hidden)
            between = [gate.first(z).relu(), routing.logits, hidden, each]
            y = torch.einsum("be,ebo->bo", routing.dense_weights().to(each.dtype), each)
        elif len(self.middle) > 1:  # an MLP: one expert
            hidden = self.middle[:-1](z)
            y = self.middle[-1](hidden)
            between = [hidden, y]
        else:
            y = self.middle(z)
            between = [y.relu()]
        return [read, z, *between, self.last(y.relu())]


class Critic(nn.Module):
    """Two Q-values of a pair of observation and action, with a trunk between them."""

    def __init__(self, trunk: Trunk, dim: int, hidden: int, action: int, norm: bool) -> None:
        super().__init__()
        self.trunk = trunk
        self.q1, self.q2 = (_mlp([dim + action, hidden, hidden, 1], norm) for _ in range(2))

    def forward(
        self,
        features: Float[Tensor, "batch features"],
        action: Float[Tensor, "batch action"],
        state: Float[Tensor, "batch state"] | None = None,
    ) -> tuple[Float[Tensor, " batch"], Float[Tensor, " batch"]]:
        pair = torch.cat([self.trunk(features, state), action], -1)
        return self.q1(pair).squeeze(-1), self.q2(pair).squeeze(-1)


class Value(nn.Module):
    """V of an observation."""

    def __init__(self, trunk: Trunk, dim: int, hidden: int, norm: bool) -> None:
        super().__init__()
        self.trunk, self.v = trunk, _mlp([dim, hidden, hidden, 1], norm)

    def forward(
        self, features: Float[Tensor, "batch features"], state: Float[Tensor, "batch state"] | None = None
    ) -> Float[Tensor, " batch"]:
        value: Tensor = self.v(self.trunk(features, state)).squeeze(-1)
        return value


class MLPGate(Gate):
    """Two layers with dropout between: H -> hidden -> one logit per expert."""

    def __init__(self, dim: int, num_experts: int, hidden: int, dropout: float) -> None:
        super().__init__(num_experts)
        self.first, self.last, self.dropout = nn.Linear(dim, hidden), nn.Linear(hidden, num_experts), dropout

    def forward(
        self, x: Float[Tensor, "tokens dim"], task_id: Int[Tensor, "tokens *slots"] | None = None
    ) -> Float[Tensor, "tokens experts"]:
        hidden = self.first(x.to(self.first.weight.dtype)).relu()
        logits: Tensor = self.last(nn.functional.dropout(hidden, self.dropout, self.training))
        return logits


def official_aux_loss(routing: Routing) -> Float[Tensor, ""]:
    """What the released code adds to the actor's loss: variance of slots per observation and expert (no gradient) plus
    the mean entropy of the router."""
    tokens = routing.scores.shape[0]
    load = slot_counts(routing.indices, routing.num_experts, routing.scores.dtype) / tokens
    entropy = torch.special.entr(routing.scores).sum(-1).mean()
    loss: Tensor = load.var(correction=1) + entropy
    return loss


@torch.no_grad()
def orthogonal(module: nn.Module) -> None:
    """DrQ-v2's start: orthogonal weights (gain sqrt 2 before a convolution's ReLU), biases zero; experts one by one."""
    if isinstance(module, nn.Linear | nn.Conv2d):
        nn.init.orthogonal_(module.weight, nn.init.calculate_gain("relu") if isinstance(module, nn.Conv2d) else 1.0)
    elif isinstance(module, StackedLinear):
        for weight in module.weight:
            nn.init.orthogonal_(weight)
    else:
        return
    if module.bias is not None:
        module.bias.zero_()


def _middle(
    hidden: int,
    experts: int,
    top_k: int,
    expert_hidden: int,
    gate_hidden: int,
    gate_dropout: float,
    balance: Balance,
    aux_coef: float,
) -> MoE | nn.Sequential:
    if experts == 0:
        return nn.Sequential(nn.Linear(hidden, hidden))
    if experts == 1:
        return _mlp([hidden, expert_hidden, hidden])
    router = TopKRouter(
        hidden,
        experts,
        top_k,
        norm_topk_prob=top_k > 1,
        balance={"switch": "aux", "bias": "bias"}.get(balance, "none"),  # type: ignore[arg-type]
        aux_coef=aux_coef,
        gate=MLPGate(hidden, experts, gate_hidden, gate_dropout),
    )
    return MoE(router, MLPExperts(experts, hidden, expert_hidden, act="relu"))


def _mlp(widths: Sequence[int], norm: bool = False) -> nn.Sequential:
    """Linear layers with ReLU between, each preceded by dropout 0.01 and layer normalisation if asked for."""
    layers: list[nn.Module] = []
    for inputs, outputs in pairwise(widths[:-1]):
        layers += [nn.Linear(inputs, outputs), *([nn.Dropout(0.01), nn.LayerNorm(outputs)] if norm else []), nn.ReLU()]
    return nn.Sequential(*layers, nn.Linear(widths[-2], widths[-1]))
