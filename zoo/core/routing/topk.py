"""The router of GShard, Switch, Mixtral, Qwen and (with sigmoid scores) DeepSeek-V3."""

from typing import Any, Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from ..losses import sequence_balance_loss, slot_counts, switch_balance_loss, z_loss
from .capacity import Capacity, Priority
from .gates import Gate
from .record import Routing
from .router import (
    OFF,
    ExpertMask,
    GatedRouter,
    choose,
    drop_padding,
    full_precision,
    softmax_over_experts,
)

Balance = Literal["aux", "seq_aux", "bias", "none"]


class TopKRouter(GatedRouter):
    """Each token goes to the `top_k` experts with the best scores.

    Args:
        score_func: "softmax" over all experts, or independent "sigmoid" scores.
        norm_topk_prob: divide the chosen weights by their sum. With `top_k=1` the weight would be the
            constant 1 and the router would get no gradient, hence an error unless there is one expert.
        routed_scaling_factor: multiplies the weights.
        num_groups, topk_groups: choose only among the experts of the `topk_groups` best of `num_groups` equal
            groups (DeepSeek-V2/V3). A group is as good as its best expert or, with `balance="bias"`, as its
            best two together.
        balance: "aux" adds `aux_coef` times the Switch balance loss of the batch; "seq_aux" that of each
            sequence (DeepSeek-V3, eqs. 17 to 20; `forward` then needs `sequence_id`); "bias" steers the choice
            by `expert_bias` without any loss (Wang et al. 2024), see `update_router_bias`; "none" does nothing.
        z_coef: coefficient of the router z-loss.
        bias_update_rate: the step of `update_router_bias`.
        jitter: in training the router's input is multiplied by U(1-jitter, 1+jitter); the experts see
            the clean input (Fedus et al. 2021).
        num_extra: extra experts (zero, copy, constant) that compete for the slots, with ids from `num_experts`.
        capacity_factor, min_capacity, priority: drop what exceeds `Capacity`; None drops nothing.
        gate: where the logits come from; a `LinearGate` by default.

    The balance losses are zero outside training.
    """

    expert_bias: Tensor
    expert_counts: Tensor

    def __init__(
        self,
        dim: int,
        num_experts: int,
        top_k: int,
        score_func: Literal["softmax", "sigmoid"] = "softmax",
        norm_topk_prob: bool = True,
        routed_scaling_factor: float = 1.0,
        num_groups: int | None = None,
        topk_groups: int | None = None,
        balance: Balance = "aux",
        aux_coef: float = 1e-2,
        z_coef: float = 0.0,
        bias_update_rate: float = 1e-3,
        jitter: float = 0.0,
        num_extra: int = 0,
        capacity_factor: float | None = None,
        min_capacity: int = 1,
        priority: Priority = "order",
        gate: Gate | None = None,
    ) -> None:
        super().__init__(dim, num_experts, top_k, gate, num_extra)
        if norm_topk_prob and top_k == 1 and num_experts + num_extra > 1:
            raise ValueError(
                "norm_topk_prob=True with top_k=1 makes every weight 1, so the router would never learn; "
                "pass norm_topk_prob=False"
            )
        if score_func not in ("softmax", "sigmoid"):
            raise ValueError(f"score_func={score_func!r} must be 'softmax' or 'sigmoid'")
        if balance not in ("aux", "seq_aux", "bias", "none"):
            raise ValueError(f"balance={balance!r} must be 'aux', 'seq_aux', 'bias' or 'none'")
        if not 0 <= jitter < 1:
            raise ValueError(f"jitter={jitter} must lie in [0, 1)")
        _check_groups(num_experts, num_extra, top_k, num_groups, topk_groups)
        self.score_func = score_func
        self.norm_topk_prob = norm_topk_prob
        self.routed_scaling_factor = routed_scaling_factor
        self.num_groups = num_groups
        self.topk_groups = topk_groups
        self.balance = balance
        self.aux_coef = aux_coef
        self.z_coef = z_coef
        self.bias_update_rate = bias_update_rate
        self.jitter = jitter
        self.capacity = None if capacity_factor is None else Capacity(capacity_factor, min_capacity, priority)
        if balance == "bias":
            self.register_buffer("expert_bias", torch.zeros(num_experts + num_extra))
            self.register_buffer("expert_counts", torch.zeros(num_experts + num_extra), persistent=False)

    def forward(
        self,
        x: Float[Tensor, "tokens *features"],
        *,
        token_mask: Bool[Tensor, "tokens"] | None = None,
        task_id: Int[Tensor, "tokens *slots"] | None = None,
        expert_mask: ExpertMask | None = None,
        state: Any = None,
        sequence_id: Int[Tensor, "tokens"] | None = None,
    ) -> Routing:
        """Besides a router's arguments: `sequence_id`, the sequence of every token, below the number of tokens."""
        complete = token_mask is None and expert_mask is None
        with full_precision(x):
            if self.training and self.jitter > 0:
                x = x * torch.empty_like(x).uniform_(1 - self.jitter, 1 + self.jitter)
            logits = self.gate_logits(x, task_id, expert_mask)
            scores = softmax_over_experts(logits) if self.score_func == "softmax" else logits.sigmoid()
            indices = self._choose(scores, logits, expert_mask)
            weights = self._weights(scores, logits, indices, masked=expert_mask is not None)
            weights, indices = drop_padding(weights, indices, token_mask)
            aux_loss = self._aux_loss(scores, logits, indices, token_mask, sequence_id, complete)
            if self.training and self.balance == "bias":
                self._count(indices, complete)
            if self.capacity is not None:  # last: the balance is that of what tokens want
                weights, indices = self.capacity.limit(weights, indices, self.num_experts)
        return Routing(
            weights=weights,
            indices=indices,
            scores=scores,
            logits=logits,
            aux_loss=aux_loss,
            state=state,
            dropless=complete and self.num_extra == 0 and self.capacity is None,
            num_extra=self.num_extra,
        )

    def _choose(self, scores: Tensor, logits: Tensor, expert_mask: Tensor | None) -> Int[Tensor, "tokens k"]:
        biased = self.balance == "bias"
        if not biased and self.num_groups is None:
            return choose(logits, self.top_k, expert_mask)  # both scores grow with the logit; it underflows last
        ranked = scores.detach()
        if biased:
            ranked = ranked + self.expert_bias
        if self.num_groups is not None and self.topk_groups is not None:
            return choose(ranked, self.top_k, expert_mask, (self.num_groups, self.topk_groups, 2 if biased else 1))
        return choose(ranked, self.top_k, expert_mask)

    def _weights(self, scores: Tensor, logits: Tensor, indices: Tensor, masked: bool) -> Tensor:
        # Renormalised softmax scores are the softmax over the chosen logits: half the operations.
        over_chosen = self.norm_topk_prob and self.score_func == "softmax"
        source = logits if over_chosen else scores
        if masked:  # then a slot may have found no expert
            weights = source.gather(1, indices.clamp_min(0)).masked_fill(indices < 0, OFF if over_chosen else 0.0)
        else:
            weights = source.gather(1, indices)
        if over_chosen:
            weights = softmax_over_experts(weights)
            weights = weights.masked_fill(indices < 0, 0.0) if masked else weights
        elif self.norm_topk_prob:
            weights = weights / (weights.sum(-1, keepdim=True) + 1e-20)
        return weights if self.routed_scaling_factor == 1.0 else weights * self.routed_scaling_factor

    def _aux_loss(
        self,
        scores: Tensor,
        logits: Tensor,
        indices: Tensor,
        token_mask: Tensor | None,
        sequence_id: Tensor | None,
        complete: bool,
    ) -> Float[Tensor, ""]:
        terms = []
        if self.training and self.balance in ("aux", "seq_aux") and self.aux_coef != 0:
            shares = scores
            if self.score_func == "sigmoid":
                shares = scores / (scores.sum(-1, keepdim=True) + 1e-20)
            if self.balance == "aux":
                balance = switch_balance_loss(shares, indices, token_mask, dropless=complete, coef=self.aux_coef)
            elif sequence_id is None:
                raise ValueError('balance="seq_aux" needs sequence_id: the sequence of every token, shape [tokens]')
            else:
                balance = self.aux_coef * sequence_balance_loss(shares, indices, sequence_id, token_mask)
            terms.append(balance)
        if self.training and self.z_coef != 0:
            terms.append(self.z_coef * z_loss(logits, token_mask))
        return sum(terms[1:], terms[0]) if terms else logits.new_zeros(())

    @torch.no_grad()
    def _count(self, indices: Tensor, complete: bool) -> None:
        self.expert_counts += slot_counts(indices, self.num_experts + self.num_extra, dropless=complete)

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        """Move the bias along, but keep it in fp32: in bf16 an update of 1e-3 would be lost."""
        kept = {name: getattr(self, name) for name in ("expert_bias", "expert_counts") if self.balance == "bias"}
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for name, before in kept.items():
            after = getattr(self, name)
            if after.dtype != before.dtype:
                setattr(self, name, before.to(after.device))
        return self

    def extra_repr(self) -> str:
        return (
            f"num_experts={self.num_experts}, top_k={self.top_k}, score_func={self.score_func}, "
            f"norm_topk_prob={self.norm_topk_prob}, balance={self.balance}"
        )


def _check_groups(
    num_experts: int, num_extra: int, top_k: int, num_groups: int | None, topk_groups: int | None
) -> None:
    if num_groups is None and topk_groups is None:
        return
    if num_groups is None or topk_groups is None:
        raise ValueError("num_groups and topk_groups go together: give both or neither")
    if num_extra:
        raise ValueError("groups and extra experts do not go together: an extra expert belongs to no group")
    if num_groups < 1 or num_experts % num_groups:
        raise ValueError(f"num_groups={num_groups} must divide num_experts={num_experts}")
    reachable = topk_groups * (num_experts // num_groups)
    if not 1 <= topk_groups <= num_groups or reachable < top_k:
        raise ValueError(
            f"topk_groups={topk_groups} must lie between 1 and num_groups={num_groups} and reach at least "
            f"top_k={top_k} experts; it reaches {reachable}"
        )
