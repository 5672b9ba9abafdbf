"""Null experts: tokens that need less computation choose experts that do nothing."""

from typing import Any

from jaxtyping import Bool, Float, Int
from torch import Tensor

from ..losses import null_balance_loss
from .gates import Gate
from .record import Routing
from .router import OFF, ExpertMask, GatedRouter, choose, drop_padding, full_precision, softmax_over_experts


class NullExpertRouter(GatedRouter):
    """Top-k over real and null experts; the weights of those that are not null sum to one (AdaMoE, Zeng et al. 2024).

    One softmax ranks all of them. How many true experts a token uses thus varies from 0 to `top_k`; a token
    that chose only null experts gets weights 0, so the layer needs a residual path around it.

    Ids: the real experts, then `num_other` extra ones (copy, constant), then `num_null` null ones, whose slots
    keep their id and have weight 0. One null and a few others give the router of MoE++ (Jin et al. 2024),
    whose zero expert is the null one.

    In training `aux_loss` is `aux_coef` times `null_balance_loss`.
    """

    def __init__(
        self,
        dim: int,
        num_experts: int,
        num_null: int,
        top_k: int,
        aux_coef: float = 1e-3,
        num_other: int = 0,
        gate: Gate | None = None,
    ) -> None:
        if num_null < 1 or num_other < 0:
            raise ValueError(f"num_null={num_null} must be at least 1 and num_other={num_other} at least 0")
        if top_k == 1:
            raise ValueError("NullExpertRouter needs top_k >= 2: with top_k=1 every weight is 0 or 1")
        super().__init__(dim, num_experts, top_k, gate, num_extra=num_other + num_null)
        self.num_null = num_null
        self.aux_coef = aux_coef

    @property
    def first_null(self) -> int:
        """The id from which experts are null."""
        return self.num_experts + self.num_extra - self.num_null

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
            indices = choose(logits, self.top_k, expert_mask)
            idle = (indices < 0) | (indices >= self.first_null)
            chosen = logits.gather(1, indices.clamp_min(0)).masked_fill(idle, OFF)
            weights = softmax_over_experts(chosen).masked_fill(idle, 0.0)
            weights, indices = drop_padding(weights, indices, token_mask)
            aux_loss = logits.new_zeros(())
            if self.training and self.aux_coef != 0:
                aux_loss = self.aux_coef * null_balance_loss(scores, indices, self.num_null, token_mask)
        return Routing(
            weights=weights,
            indices=indices,
            scores=scores,
            logits=logits,
            aux_loss=aux_loss,
            state=state,
            num_extra=self.num_extra,
        )

    def extra_repr(self) -> str:
        return f"num_experts={self.num_experts}, num_null={self.num_null}, top_k={self.top_k}"
