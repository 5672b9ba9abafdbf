"""Fewer experts at inference for tokens that are sure or do not matter: MC-MoE's online pruning (Huang et al. 2024)."""

import dataclasses
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from ..routing import Router, Routing
from ..routing.router import ExpertMask


class OnlinePruning(Router):
    """Leaves out a token's lesser experts where its best one is far ahead, and all of them where it matters little.

    A slot whose weight is less than `beta` times the token's greatest is dropped, and the others are scaled to the
    same sum. Of the tokens of a call, the share `skip` that matters least gets no expert at all, and the share `spare`
    that matters most keeps all of its own. Nothing is dropped in training.

    Args:
        router: the trained router.
        beta: MC-MoE's 0.5 for two experts per token.
        skip, spare: MC-MoE takes 0.1 for both. A skipped token's output is zero: only for layers with a way around
            the experts.
    """

    def __init__(self, router: Router, beta: float = 0.5, skip: float = 0.0, spare: float = 0.0) -> None:
        super().__init__(router.num_experts, router.top_k, router.num_extra)
        if not 0 <= beta <= 1:
            raise ValueError(f"beta={beta} must lie in [0, 1]")
        if min(skip, spare) < 0 or skip + spare > 1:
            raise ValueError(f"skip={skip} and spare={spare} are shares of the tokens: at least 0, together at most 1")
        self.router = router
        self.beta, self.skip, self.spare = beta, skip, spare

    @property
    def active_experts(self) -> float:
        return self.router.active_experts

    def forward(
        self,
        x: Float[Tensor, "tokens *features"],
        *,
        token_mask: Bool[Tensor, "tokens"] | None = None,
        task_id: Int[Tensor, "tokens *slots"] | None = None,
        expert_mask: ExpertMask | None = None,
        state: Any = None,
        importance: Float[Tensor, "tokens"] | None = None,
        **router_kw: Any,
    ) -> Routing:
        """`importance` is each token's; `token_importance(x)` by default, which knows of no attention."""
        record: Routing = self.router(
            x, token_mask=token_mask, task_id=task_id, expert_mask=expert_mask, state=state, **router_kw
        )
        if self.training:
            return record
        size = record.weights.abs()
        dropped = size < self.beta * size.amax(1, keepdim=True)
        if (self.skip or self.spare) and len(x):
            least, most = self._extremes(token_importance(x) if importance is None else importance, token_mask)
            dropped = (dropped & ~most[:, None]) | least[:, None]
        kept = record.weights.masked_fill(dropped, 0.0)
        total = kept.sum(1, keepdim=True)
        scale = torch.where(total == 0, 1.0, record.weights.sum(1, keepdim=True) / total)
        return dataclasses.replace(
            record, weights=kept * scale, indices=record.indices.masked_fill(dropped, -1), dropless=False
        )

    def _extremes(
        self, importance: Float[Tensor, "tokens"], token_mask: Bool[Tensor, "tokens"] | None
    ) -> tuple[Bool[Tensor, "tokens"], Bool[Tensor, "tokens"]]:
        """Which tokens are skipped and which are spared, by their rank among the real ones."""
        known = torch.ones_like(importance, dtype=torch.bool) if token_mask is None else token_mask
        order = importance.masked_fill(~known, torch.inf).argsort(stable=True)
        rank = torch.empty_like(order).scatter_(0, order, torch.arange(len(order), device=order.device))
        count = known.sum()
        return known & (rank < (self.skip * count).long()), known & (rank >= count - (self.spare * count).long())

    def extra_repr(self) -> str:
        return f"beta={self.beta}, skip={self.skip}, spare={self.spare}"


def token_importance(
    x: Float[Tensor, "tokens *features"], attention: Float[Tensor, "tokens"] | None = None
) -> Float[Tensor, "tokens"]:
    """MC-MoE's measure of a token: its L1 norm times the mean attention that others pay to it, where that is known."""
    size = x.detach().flatten(1).abs().sum(1)
    return size if attention is None else size * attention.to(size.dtype)
