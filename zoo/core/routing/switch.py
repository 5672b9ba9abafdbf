"""One expert per token."""

from typing import Any

from jaxtyping import Bool, Float, Int
from torch import Tensor

from .capacity import Priority
from .gates import Gate
from .record import Routing
from .router import ExpertMask, GatedRouter, choose, drop_padding, full_precision, softmax_over_experts
from .topk import TopKRouter


class SwitchRouter(TopKRouter):
    """Each token goes to its most probable expert, weighted with that probability (Fedus et al. 2021).

    A `TopKRouter` with one slot, the weight not renormalised, and capacity; arguments as there.
    """

    def __init__(
        self,
        dim: int,
        num_experts: int,
        capacity_factor: float | None = 1.25,
        min_capacity: int = 1,
        priority: Priority = "order",
        aux_coef: float = 1e-2,
        z_coef: float = 0.0,
        jitter: float = 0.0,
        gate: Gate | None = None,
    ) -> None:
        super().__init__(
            dim,
            num_experts,
            1,
            norm_topk_prob=False,
            aux_coef=aux_coef,
            z_coef=z_coef,
            jitter=jitter,
            capacity_factor=capacity_factor,
            min_capacity=min_capacity,
            priority=priority,
            gate=gate,
        )


class StraightThroughRouter(GatedRouter):
    """The most probable expert with weight 1; the gradient is that of its probability.

    `weight = 1 + p - stop_gradient(p)`: the output is not scaled, yet the gate learns (the hard pathways of
    AdvMoE, Zhang et al. 2023). Without balance loss.
    """

    def __init__(self, dim: int, num_experts: int, gate: Gate | None = None) -> None:
        super().__init__(dim, num_experts, 1, gate)

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
            scores = softmax_over_experts(logits)
            indices = choose(logits, 1, expert_mask)
            chosen = scores.gather(1, indices.clamp_min(0))
            weights = 1.0 + (chosen - chosen.detach())
            if expert_mask is not None:
                weights = weights.masked_fill(indices < 0, 0.0)
            weights, indices = drop_padding(weights, indices, token_mask)
        return Routing(
            weights=weights,
            indices=indices,
            scores=scores,
            logits=logits,
            aux_loss=logits.new_zeros(()),
            state=state,
            dropless=token_mask is None and expert_mask is None,
        )

    def extra_repr(self) -> str:
        return f"num_experts={self.num_experts}"
