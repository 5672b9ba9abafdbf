"""Capacity: how many tokens an expert may take, and who is dropped when more want it."""

import math
from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

Priority = Literal["order", "prob"]


class Capacity:
    """The capacity rule of a router, `C = max(ceil(factor k N / E), minimum)` tokens per real expert.

    Args:
        factor: 1 leaves room for exactly the balanced load.
        minimum: at least this many tokens, which keeps small batches whole (DeepSpeed: 4).
        priority: who goes first, see `limit_capacity`.
    """

    def __init__(self, factor: float, minimum: int = 1, priority: Priority = "order") -> None:
        if factor <= 0:
            raise ValueError(f"capacity_factor={factor} must be positive; None drops nothing")
        if minimum < 1:
            raise ValueError(f"min_capacity={minimum} must be at least 1")
        if priority not in ("order", "prob"):
            raise ValueError(f"priority={priority!r} must be 'order' or 'prob'")
        self.factor, self.minimum, self.priority = factor, minimum, priority

    def of(self, tokens: int, num_experts: int, top_k: int) -> int:
        """C for a batch of this many tokens."""
        return max(math.ceil(self.factor * top_k * tokens / num_experts), self.minimum)

    def limit(
        self, weights: Float[Tensor, "tokens k"], indices: Int[Tensor, "tokens k"], num_experts: int
    ) -> tuple[Float[Tensor, "tokens k"], Int[Tensor, "tokens k"]]:
        """Weights and indices with the slots that find no room dropped."""
        capacity = self.of(indices.shape[0], num_experts, indices.shape[1])
        return limit_capacity(weights, indices, num_experts, capacity, self.priority)


def limit_capacity(
    weights: Float[Tensor, "tokens k"],
    indices: Int[Tensor, "tokens k"],
    num_experts: int,
    capacity: int,
    priority: Priority = "order",
) -> tuple[Float[Tensor, "tokens k"], Int[Tensor, "tokens k"]]:
    """Drop every slot (index -1, weight 0) that comes to a full expert; what stays is not renormalised.

    First choices (slot 0) go before second choices, and so on. Among choices of the same rank, "order" serves
    tokens in order (GShard, Lepikhin et al. 2020, algorithm 1), "prob" those with the larger best weight
    first (batch-prioritised routing of V-MoE, Riquelme et al. 2021, algorithm 2). Extra experts
    (ids from `num_experts`) are never full.
    """
    tokens, k = indices.shape
    limited = (indices >= 0) & (indices < num_experts)
    experts = torch.where(limited, indices, num_experts)
    if priority == "prob":
        served = weights.detach().amax(-1).argsort(descending=True, stable=True)
        experts = experts[served]
    queue = experts.t().reshape(-1)  # first choices, then second choices, ...
    rank = _rank_in_group(queue, num_experts + 1).view(k, tokens).t()
    if priority == "prob":
        rank = torch.empty_like(rank).index_copy_(0, served, rank)
    dropped = limited & (rank >= capacity)
    return weights.masked_fill(dropped, 0.0), indices.masked_fill(dropped, -1)


def _rank_in_group(group: Int[Tensor, "slots"], num_groups: int) -> Int[Tensor, "slots"]:
    """How many earlier slots are of the same group. By a sort: a one-hot cumsum would cost slots × groups."""
    keys = group.to(torch.uint8) if num_groups <= 256 else group
    order = keys.argsort(stable=True)
    sizes = torch.zeros(num_groups, dtype=torch.int64, device=group.device)
    sizes.scatter_add_(0, group, torch.ones_like(group))
    start = sizes.cumsum(0) - sizes
    position = torch.empty_like(order)
    position.scatter_(0, order, torch.arange(group.shape[0], device=group.device))
    return position - start[group]
