"""The router of GShard, Switch, Mixtral, Qwen and (with sigmoid scores) DeepSeek-V3."""

from typing import Any, Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from ..losses import switch_balance_loss, z_loss
from .record import Routing
from .router import (
    OFF,
    ExpertMask,
    Router,
    choose,
    drop_padding,
    full_precision,
    linear_logits,
    softmax_over_experts,
    switched_off,
)


class TopKRouter(Router):
    """Each token goes to the `top_k` experts with the best scores.

    Args:
        score_func: "softmax" over all experts, or independent "sigmoid" scores.
        norm_topk_prob: divide the chosen weights by their sum. With `top_k=1` the weight would be the
            constant 1 and the router would get no gradient, hence an error unless there is one expert.
        routed_scaling_factor: multiplies the weights.
        balance: "aux" adds `aux_coef` times the Switch balance loss, "none" nothing.
        z_coef: coefficient of the router z-loss.
        jitter: in training the router's input is multiplied by U(1-jitter, 1+jitter); the experts see
            the clean input (Fedus et al. 2021).

    The balance losses are zero outside training.
    """

    def __init__(
        self,
        dim: int,
        num_experts: int,
        top_k: int,
        score_func: Literal["softmax", "sigmoid"] = "softmax",
        norm_topk_prob: bool = True,
        routed_scaling_factor: float = 1.0,
        balance: Literal["aux", "none"] = "aux",
        aux_coef: float = 1e-2,
        z_coef: float = 0.0,
        jitter: float = 0.0,
    ) -> None:
        super().__init__(num_experts, top_k)
        if norm_topk_prob and top_k == 1 and num_experts > 1:
            raise ValueError(
                "norm_topk_prob=True with top_k=1 makes every weight 1, so the router would never learn; "
                "pass norm_topk_prob=False"
            )
        if score_func not in ("softmax", "sigmoid"):
            raise ValueError(f"score_func={score_func!r} must be 'softmax' or 'sigmoid'")
        if balance not in ("aux", "none"):
            raise ValueError(f"balance={balance!r} must be 'aux' or 'none'")
        if not 0 <= jitter < 1:
            raise ValueError(f"jitter={jitter} must lie in [0, 1)")
        self.score_func = score_func
        self.norm_topk_prob = norm_topk_prob
        self.routed_scaling_factor = routed_scaling_factor
        self.balance = balance
        self.aux_coef = aux_coef
        self.z_coef = z_coef
        self.jitter = jitter
        self.weight = nn.Parameter(torch.empty(num_experts, dim).normal_(0.0, 0.02))

    def forward(
        self,
        x: Float[Tensor, "tokens dim"],
        *,
        token_mask: Bool[Tensor, "tokens"] | None = None,
        task_id: Int[Tensor, "tokens *slots"] | None = None,
        expert_mask: ExpertMask | None = None,
        state: Any = None,
    ) -> Routing:
        with full_precision(x):
            if self.training and self.jitter > 0:
                x = x * torch.empty_like(x).uniform_(1 - self.jitter, 1 + self.jitter)
            logits = linear_logits(x, self.weight)
            if expert_mask is not None:
                logits = logits.masked_fill(switched_off(expert_mask), OFF)
            scores = softmax_over_experts(logits) if self.score_func == "softmax" else logits.sigmoid()
            indices = choose(scores, self.top_k, expert_mask)
            weights = self._weights(scores, logits, indices, masked=expert_mask is not None)
            weights, indices = drop_padding(weights, indices, token_mask)
            dropless = token_mask is None and expert_mask is None
            aux_loss = self._aux_loss(scores, logits, indices, token_mask, dropless)
        return Routing(
            weights=weights,
            indices=indices,
            scores=scores,
            logits=logits,
            aux_loss=aux_loss,
            state=state,
            dropless=dropless,
        )

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
        self, scores: Tensor, logits: Tensor, indices: Tensor, token_mask: Tensor | None, dropless: bool
    ) -> Float[Tensor, ""]:
        terms = []
        if self.training and self.balance == "aux" and self.aux_coef != 0:
            shares = scores
            if self.score_func == "sigmoid":
                shares = scores / (scores.sum(-1, keepdim=True) + 1e-20)
            balance = switch_balance_loss(shares, indices, token_mask, dropless=dropless)
            terms.append(self.aux_coef * balance)
        if self.training and self.z_coef != 0:
            terms.append(self.z_coef * z_loss(logits, token_mask))
        return sum(terms[1:], terms[0]) if terms else logits.new_zeros(())

    def extra_repr(self) -> str:
        return (
            f"num_experts={self.num_experts}, top_k={self.top_k}, score_func={self.score_func}, "
            f"norm_topk_prob={self.norm_topk_prob}, balance={self.balance}"
        )
