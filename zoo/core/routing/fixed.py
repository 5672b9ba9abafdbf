"""Routes that nothing learns: given from outside, or a hash."""

import math
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
        x: Float[Tensor, "tokens *features"],
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


class HashRouter(Router):
    """Tokens go to expert `task_id · prime mod E`, with weight 1: `task_id` holds token or item ids, of any sign.

    Nothing is learned, and an id has the same expert for ever (Hash layers, Roller et al. 2021). The prime must
    not divide E; ids that come in runs then fill the experts evenly.
    """

    def __init__(self, num_experts: int, prime: int = 2_147_483_647) -> None:
        super().__init__(num_experts, 1)
        if math.gcd(prime, num_experts) != 1:
            raise ValueError(f"prime={prime} and num_experts={num_experts} must have no common factor")
        self.prime = prime
        self.fixed = FixedRouter(num_experts)

    def forward(
        self,
        x: Float[Tensor, "tokens *features"],
        *,
        token_mask: Bool[Tensor, "tokens"] | None = None,
        task_id: Int[Tensor, "tokens *slots"] | None = None,
        expert_mask: ExpertMask | None = None,
        state: Any = None,
    ) -> Routing:
        if task_id is None:
            raise ValueError("HashRouter needs task_id: the id of every token, shape [tokens]")
        # (id mod E) first: the product of a large id would overflow.
        experts = (task_id.to(torch.int64) % self.num_experts) * self.prime % self.num_experts
        routing: Routing = self.fixed(x, token_mask=token_mask, task_id=experts, expert_mask=expert_mask, state=state)
        routing.dropless = token_mask is None and expert_mask is None
        return routing

    def extra_repr(self) -> str:
        return f"num_experts={self.num_experts}, prime={self.prime}"
