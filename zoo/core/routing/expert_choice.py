"""Experts choose tokens (Zhou et al. 2022)."""

import math
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from .gates import Gate
from .record import Routing
from .router import ExpertMask, GatedRouter, drop_padding, full_precision, softmax_over_experts, switched_off


class ExpertChoiceRouter(GatedRouter):
    """Each expert takes its `ceil(capacity N / E)` best tokens of the batch, weighted with `softmax(gate(x))`.

    The load is equal by construction, so there is no balance loss; a token may get no expert or all of them.
    The record has a slot per expert, -1 where the expert did not take the token.

    A token's experts depend on the rest of the batch: not causal, and not the same when served in other
    batches. At N = 1 every expert takes the token, so the layer becomes the dense mixture, at
    E / `capacity` times the price per token. Padding is never taken.

    Args:
        capacity: experts per token on average.
    """

    def __init__(self, dim: int, num_experts: int, capacity: float = 2.0, gate: Gate | None = None) -> None:
        super().__init__(dim, num_experts, num_experts, gate)
        if not 0 < capacity <= num_experts:
            raise ValueError(f"capacity={capacity} must lie in (0, num_experts={num_experts}]: experts per token")
        self.capacity = capacity

    @property
    def active_experts(self) -> float:
        return self.capacity

    def forward(
        self,
        x: Float[Tensor, "tokens *features"],
        *,
        token_mask: Bool[Tensor, "tokens"] | None = None,
        task_id: Int[Tensor, "tokens *slots"] | None = None,
        expert_mask: ExpertMask | None = None,
        state: Any = None,
    ) -> Routing:
        """`expert_mask` can only switch experts off."""
        with full_precision(x):
            logits = self.gate_logits(x, task_id, expert_mask)
            scores = softmax_over_experts(logits)
            ranked = scores.detach()
            if token_mask is not None:  # last, and dropped below if taken for want of others
                ranked = ranked.masked_fill(~token_mask[:, None], -1.0)
            taken = torch.zeros_like(ranked, dtype=torch.bool)
            per_expert = min(math.ceil(self.capacity * x.shape[0] / self.num_experts), x.shape[0])
            taken.scatter_(0, ranked.topk(per_expert, dim=0).indices, True)
            if expert_mask is not None:
                taken = taken & ~switched_off(expert_mask)
            weights = scores.masked_fill(~taken, 0.0)
            indices = torch.arange(self.num_experts, device=x.device).expand(scores.shape).masked_fill(~taken, -1)
            weights, indices = drop_padding(weights, indices, token_mask)
        return Routing(
            weights=weights,
            indices=indices,
            scores=scores,
            logits=logits,
            aux_loss=logits.new_zeros(()),
            state=state,
        )

    def extra_repr(self) -> str:
        return f"num_experts={self.num_experts}, capacity={self.capacity}"
