"""A route given from outside."""

from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from .record import Routing
from .router import ExpertMask, Router, drop_padding, switched_off


class FixedRouter(Router):
    """Tokens go where `task_id` says, with weight 1: experts per task, category or style. No parameters.

    `task_id` is [tokens], or [tokens, top_k] for several experts per token; ids outside
    `[0, num_experts)` are routed nowhere. `expert_mask` can only switch experts off.
    """

    def __init__(self, num_experts: int, top_k: int = 1) -> None:
        super().__init__(num_experts, top_k)

    def forward(
        self,
        x: Float[Tensor, "tokens dim"],
        *,
        token_mask: Bool[Tensor, "tokens"] | None = None,
        task_id: Int[Tensor, "tokens *slots"] | None = None,
        expert_mask: ExpertMask | None = None,
        state: Any = None,
    ) -> Routing:
        if task_id is None:
            raise ValueError("FixedRouter needs task_id: the expert of every token, shape [tokens]")
        indices = (task_id[:, None] if task_id.dim() == 1 else task_id).to(torch.int64)
        if indices.shape != (x.shape[0], self.top_k):
            raise ValueError(
                f"task_id has shape {list(task_id.shape)}; {x.shape[0]} tokens with top_k={self.top_k} "
                f"need [{x.shape[0]}]" + (f" or [{x.shape[0]}, {self.top_k}]" if self.top_k > 1 else "")
            )
        indices = indices.masked_fill((indices < 0) | (indices >= self.num_experts), -1)
        if expert_mask is not None:
            off = switched_off(expert_mask)[indices.clamp_min(0)]
            indices = indices.masked_fill(off, -1)
        dtype = torch.promote_types(x.dtype, torch.float32)
        weights, indices = drop_padding((indices >= 0).to(dtype), indices, token_mask)
        scores = weights.new_zeros(x.shape[0], self.num_experts + 1)
        scores = scores.scatter_add_(1, indices + 1, weights / self.top_k)[:, 1:]
        return Routing(
            weights=weights,
            indices=indices,
            scores=scores,
            logits=scores.clamp_min(1e-30).log(),
            aux_loss=scores.new_zeros(()),
            state=state,
        )

    def extra_repr(self) -> str:
        return f"num_experts={self.num_experts}, top_k={self.top_k}"
