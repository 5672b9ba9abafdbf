"""One expert per token."""

from jaxtyping import Bool, Float
from torch import Tensor

from .capacity import Priority
from .gates import Gate
from .router import Choice, ChoosingRouter, ExpertMask, choose, softmax_over_experts
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


class StraightThroughRouter(ChoosingRouter):
    """The most probable expert with weight 1; the gradient is that of its probability.

    `weight = 1 + p - stop_gradient(p)`: the output is not scaled, yet the gate learns (the hard pathways of
    AdvMoE, Zhang et al. 2023). Without balance loss.
    """

    def __init__(self, dim: int, num_experts: int, gate: Gate | None = None) -> None:
        super().__init__(dim, num_experts, 1, gate)

    def choice(
        self,
        logits: Float[Tensor, "tokens experts"],
        token_mask: Bool[Tensor, "tokens"] | None,
        expert_mask: ExpertMask | None,
    ) -> Choice:
        scores = softmax_over_experts(logits)
        indices = choose(logits, 1, expert_mask)
        chosen = scores.gather(1, indices.clamp_min(0))
        weights = 1.0 + (chosen - chosen.detach())
        return Choice(scores, weights if expert_mask is None else weights.masked_fill(indices < 0, 0.0), indices)

    def extra_repr(self) -> str:
        return f"num_experts={self.num_experts}"
