"""The router's interface and what all routers share."""

from abc import ABC, abstractmethod
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from jaxtyping import Bool, Float, Int, Int8
from torch import Tensor, nn

from .record import Routing

ExpertMask = Bool[Tensor, "experts"] | Int8[Tensor, "experts"]

# Finite, so that records, z-loss and noise thresholds stay free of NaN; softmax still gives exactly zero.
OFF = -1e9


class Router(nn.Module, ABC):
    """Maps tokens to experts.

    Gating runs in fp32 (fp64 for fp64 input) outside autocast, whatever the experts run in.

    Args of `forward`:
        x: the router's input.
        token_mask: True for real tokens. Padding is routed nowhere (index -1, weight 0) and does not
            count in the balance losses.
        task_id: which task or expert each token belongs to; only routers that say so use it.
        expert_mask: bool, False switches an expert off; or int8, -1 off, 0 as routed, 1 forced on.
        state: what the previous call returned in `Routing.state`, for routers with a memory.
    """

    def __init__(self, num_experts: int, top_k: int) -> None:
        super().__init__()
        if not 1 <= top_k <= num_experts:
            raise ValueError(f"top_k={top_k} must lie between 1 and num_experts={num_experts}")
        self.num_experts = num_experts
        self.top_k = top_k

    @abstractmethod
    def forward(
        self,
        x: Float[Tensor, "tokens dim"],
        *,
        token_mask: Bool[Tensor, "tokens"] | None = None,
        task_id: Int[Tensor, "tokens *slots"] | None = None,
        expert_mask: ExpertMask | None = None,
        state: Any = None,
    ) -> Routing: ...


def full_precision(x: Tensor) -> AbstractContextManager[Any]:
    """Leave autocast for the gating; free of cost where autocast is off."""
    if torch.is_autocast_enabled(x.device.type):
        return torch.autocast(x.device.type, enabled=False)
    return nullcontext()


def linear_logits(
    x: Float[Tensor, "tokens dim"], weight: Float[Tensor, "experts dim"]
) -> Float[Tensor, "tokens experts"]:
    """`x @ weight.T` in at least fp32."""
    dtype = torch.promote_types(torch.promote_types(x.dtype, weight.dtype), torch.float32)
    return nn.functional.linear(x.to(dtype), weight.to(dtype))


def softmax_over_experts(logits: Float[Tensor, "tokens experts"]) -> Float[Tensor, "tokens experts"]:
    if logits.shape[-1] < 16 and logits.device.type == "cpu" and not torch.compiler.is_compiling():
        # The CPU kernel vectorises along tokens here; over so few experts it would not vectorise at all.
        return logits.t().softmax(0).t()
    return logits.softmax(-1)


def switched_off(expert_mask: ExpertMask) -> Bool[Tensor, "experts"]:
    return ~expert_mask if expert_mask.dtype == torch.bool else expert_mask < 0


def switched_on(expert_mask: ExpertMask) -> Bool[Tensor, "experts"]:
    return torch.zeros_like(expert_mask) if expert_mask.dtype == torch.bool else expert_mask > 0


def choose(
    scores: Float[Tensor, "tokens experts"], top_k: int, expert_mask: ExpertMask | None = None
) -> Int[Tensor, "tokens k"]:
    """The `top_k` best experts, best first; -1 where fewer than `top_k` experts are switched on."""
    ranked = scores.detach()
    if expert_mask is None:
        return ranked.topk(top_k, dim=-1).indices
    ranked = ranked.masked_fill(switched_off(expert_mask), -torch.inf)
    ranked = ranked.masked_fill(switched_on(expert_mask), torch.inf)
    values, indices = ranked.topk(top_k, dim=-1)
    return indices.masked_fill(values == -torch.inf, -1)


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
