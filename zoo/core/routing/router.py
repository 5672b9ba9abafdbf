"""The router's interface and what all routers share."""

from abc import ABC, abstractmethod
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float, Int, Int8
from torch import Tensor, nn

from .gates import Gate, LinearGate
from .record import Routing

ExpertMask = Bool[Tensor, "experts"] | Int8[Tensor, "experts"]

# Finite, so that records, z-loss and noise thresholds stay free of NaN; softmax still gives exactly zero.
OFF = -1e9


class Router(nn.Module, ABC):
    """Maps tokens to experts.

    Gating runs in fp32 (fp64 for fp64 input) outside autocast, whatever the experts run in.

    Args:
        num_experts: real experts, with ids from 0.
        top_k: slots per token.
        num_extra: extra experts (zero, copy, constant) with the ids that follow.

    Args of `forward`:
        x: the router's input; [tokens, dim] unless the router's gate reads something else.
        token_mask: True for real tokens. Padding is routed nowhere (index -1, weight 0) and does not
            count in the balance losses.
        task_id: which task or expert each token belongs to; only routers and gates that say so use it.
        expert_mask: one entry per expert, real and extra. Bool, False switches an expert off; or int8,
            -1 off, 0 as routed, 1 forced on.
        state: what the previous call returned in `Routing.state`, for routers with a memory.
    """

    def __init__(self, num_experts: int, top_k: int, num_extra: int = 0) -> None:
        super().__init__()
        if num_extra < 0:
            raise ValueError(f"num_extra={num_extra} must not be negative")
        if not 1 <= top_k <= num_experts + num_extra:
            plus = f" + num_extra={num_extra}" if num_extra else ""
            raise ValueError(f"top_k={top_k} must lie between 1 and num_experts={num_experts}{plus}")
        self.num_experts = num_experts
        self.top_k = top_k
        self.num_extra = num_extra

    @property
    def active_experts(self) -> float:
        """How many experts a token uses on average at most; what a layer's cost follows."""
        return float(self.top_k)

    @abstractmethod
    def forward(
        self,
        x: Float[Tensor, "tokens *features"],
        *,
        token_mask: Bool[Tensor, "tokens"] | None = None,
        task_id: Int[Tensor, "tokens *slots"] | None = None,
        expert_mask: ExpertMask | None = None,
        state: Any = None,
    ) -> Routing: ...


class GatedRouter(Router):
    """A router that asks a gate; by default a `LinearGate(dim, num_experts + num_extra)`."""

    def __init__(self, dim: int, num_experts: int, top_k: int, gate: Gate | None = None, num_extra: int = 0) -> None:
        super().__init__(num_experts, top_k, num_extra)
        columns = num_experts + num_extra
        self.gate = LinearGate(dim, columns) if gate is None else gate
        if self.gate.out_features != columns:
            raise ValueError(f"the gate gives {self.gate.out_features} logits, but the router has {columns} experts")

    @property
    def weight(self) -> Tensor:
        """The gate's weight."""
        return self.gate.get_parameter("weight")

    def gate_logits(
        self, x: Tensor, task_id: Tensor | None, expert_mask: Tensor | None
    ) -> Float[Tensor, "tokens experts"]:
        logits: Tensor = self.gate(x, task_id)
        return logits if expert_mask is None else logits.masked_fill(switched_off(expert_mask), OFF)


class Choice(NamedTuple):
    """What a `ChoosingRouter` makes of logits; `full` if every slot names an expert as long as none is masked."""

    scores: Float[Tensor, "tokens experts"]
    weights: Float[Tensor, "tokens k"]
    indices: Int[Tensor, "tokens k"]
    aux_loss: Float[Tensor, ""] | None = None
    full: bool = True


class ChoosingRouter(GatedRouter):
    """A router whose choice follows from the gate's logits alone."""

    @abstractmethod
    def choice(
        self,
        logits: Float[Tensor, "tokens experts"],
        token_mask: Bool[Tensor, "tokens"] | None,
        expert_mask: ExpertMask | None,
    ) -> Choice:
        """Experts and weights; padding is dropped afterwards."""

    def forward(
        self,
        x: Float[Tensor, "tokens *features"],
        *,
        token_mask: Bool[Tensor, "tokens"] | None = None,
        task_id: Int[Tensor, "tokens *slots"] | None = None,
        expert_mask: ExpertMask | None = None,
        state: Any = None,
    ) -> Routing:
        with full_precision(x):
            logits = self.gate_logits(x, task_id, expert_mask)
            scores, weights, indices, aux_loss, full = self.choice(logits, token_mask, expert_mask)
            weights, indices = drop_padding(weights, indices, token_mask)
        return Routing(
            weights=weights,
            indices=indices,
            scores=scores,
            logits=logits,
            aux_loss=logits.new_zeros(()) if aux_loss is None else aux_loss,
            state=state,
            dropless=full and token_mask is None and expert_mask is None,
        )


def full_precision(x: Tensor) -> AbstractContextManager[Any]:
    """Leave autocast for the gating; free of cost where autocast is off."""
    if torch.is_autocast_enabled(x.device.type):
        return torch.autocast(x.device.type, enabled=False)
    return nullcontext()


def softmax_over_experts(logits: Float[Tensor, "tokens experts"]) -> Float[Tensor, "tokens experts"]:
    tokens, experts = logits.shape
    if not torch.compiler.is_compiling() and logits.device.type == "cpu" and experts < 16 and tokens >= 16:
        # The CPU kernel vectorises along tokens here; over so few experts it would not vectorise at all.
        return logits.t().softmax(0).t()
    return logits.softmax(-1)


def switched_off(expert_mask: ExpertMask) -> Bool[Tensor, "experts"]:
    return ~expert_mask if expert_mask.dtype == torch.bool else expert_mask < 0


def switched_on(expert_mask: ExpertMask) -> Bool[Tensor, "experts"]:
    return torch.zeros_like(expert_mask) if expert_mask.dtype == torch.bool else expert_mask > 0


def choose(
    scores: Float[Tensor, "tokens experts"],
    top_k: int,
    expert_mask: ExpertMask | None = None,
    groups: tuple[int, int, int] | None = None,
) -> Int[Tensor, "tokens k"]:
    """The `top_k` best experts, best first; -1 where fewer than `top_k` experts are switched on.

    `groups = (G, g, m)` keeps to the g best of G equal groups of neighbours, a group being as good as its m
    best experts together.
    """
    ranked = scores.detach()
    if expert_mask is None and groups is None:
        return _best(ranked, top_k)
    if expert_mask is not None:
        ranked = ranked.masked_fill(switched_off(expert_mask), -torch.inf)
        ranked = ranked.masked_fill(switched_on(expert_mask), torch.inf)
    if groups is not None:
        ranked = _best_groups(ranked, *groups)
    values, indices = ranked.topk(top_k, dim=-1)
    return indices if expert_mask is None else indices.masked_fill(values == -torch.inf, -1)


def _best_groups(
    ranked: Float[Tensor, "tokens experts"], num_groups: int, topk_groups: int, best: int
) -> Float[Tensor, "tokens experts"]:
    """The scores, with -inf outside each token's best groups."""
    grouped = ranked.unflatten(1, (num_groups, -1))
    group_scores = grouped.topk(min(best, grouped.shape[-1]), dim=-1).values.sum(-1)
    kept = group_scores.topk(topk_groups, dim=-1).indices
    outside = torch.ones_like(group_scores, dtype=torch.bool).scatter_(1, kept, False)
    limited: Tensor = grouped.masked_fill(outside[..., None], -torch.inf).flatten(1)
    return limited


def _best(ranked: Float[Tensor, "tokens experts"], top_k: int) -> Int[Tensor, "tokens k"]:
    tokens, experts = ranked.shape
    if (
        not torch.compiler.is_compiling()
        and ranked.device.type == "cpu"
        and top_k <= 4
        and (top_k == 1 or 8 * top_k <= experts)
        and experts < 64 * top_k
        and tokens >= 128
    ):
        return _best_by_max(ranked, top_k)
    return ranked.topk(top_k, dim=-1).indices


def _best_by_max(ranked: Float[Tensor, "tokens experts"], top_k: int) -> Int[Tensor, "tokens k"]:
    """`top_k` passes of max: in its middle range of sizes the CPU's topk is 1.1 to 5 times slower."""
    found = [ranked.max(-1, keepdim=True).indices]
    for _ in range(top_k - 1):
        # The first pass must leave the scores alone; the later ones work on its copy.
        ranked = (ranked.scatter if len(found) == 1 else ranked.scatter_)(1, found[-1], -torch.inf)
        found.append(ranked.max(-1, keepdim=True).indices)
    return found[0] if top_k == 1 else torch.cat(found, 1)


def drop_padding(
    weights: Float[Tensor, "tokens k"],
    indices: Int[Tensor, "tokens k"],
    token_mask: Bool[Tensor, "tokens"] | None,
) -> tuple[Float[Tensor, "tokens k"], Int[Tensor, "tokens k"]]:
    """Route padding nowhere."""
    if token_mask is None:
        return weights, indices
    padding = ~token_mask[:, None]
    return weights.masked_fill(padding, 0.0), indices.masked_fill(padding, -1)
