"""Dense-to-sparse gating: all experts at first, one in the end (EvoMoE, Nie et al. 2022)."""

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from ..losses import density_balance_loss
from .gates import Gate
from .router import OFF, Choice, ChoosingRouter, ExpertMask, choose, softmax_over_experts
from .slots import slots_of


class DenseToSparseRouter(ChoosingRouter):
    """Weights are a Gumbel-softmax of the logits, and those below a threshold are left out.

    In training `g = softmax((l + Gumbel noise) / τ)`, and a token uses the experts with `g > threshold`, with weight
    g. At high τ these are all, at low τ one: `tasks.balancing.TemperatureSchedule` lowers τ from its `start` to
    the `temperature` given here (EvoMoE's code falls linearly or exponentially from 1.0 to 0.5 or so). Outside
    training the `top_k` best, weighted with softmax over their `l / τ`: one expert with weight 1, as samples have
    at low τ. That weighting, and starting at 2.0 and ending at 0.3, is our reading of the paper from memory.

    EvoMoE first trains a single expert and copies it with a random part of the weights masked: see
    `diversify_experts`. In training the record has a slot per expert, -1 below the threshold, and `aux_loss` is
    `aux_coef` times `density_balance_loss`.

    Args:
        temperature: the final τ; a plain attribute, so that a schedule may set it.
        threshold: the smallest weight that counts.
        top_k: experts per token outside training.
    """

    def __init__(
        self,
        dim: int,
        num_experts: int,
        top_k: int = 1,
        temperature: float = 0.3,
        threshold: float = 1e-3,
        aux_coef: float = 1e-2,
        gate: Gate | None = None,
    ) -> None:
        super().__init__(dim, num_experts, top_k, gate)
        if temperature <= 0:
            raise ValueError(f"temperature={temperature} must be positive")
        if not 0 <= threshold < 1 / num_experts:
            raise ValueError(f"threshold={threshold} must lie in [0, 1/{num_experts}): a token needs an expert")
        self.temperature = temperature
        self.threshold = threshold
        self.aux_coef = aux_coef

    def choice(
        self,
        logits: Float[Tensor, "tokens experts"],
        token_mask: Bool[Tensor, "tokens"] | None,
        expert_mask: ExpertMask | None,
    ) -> Choice:
        """In training `expert_mask` can only switch experts off."""
        if self.training:
            noise = torch.empty_like(logits).exponential_().log()  # minus Gumbel noise
            scores = softmax_over_experts((logits - noise) / self.temperature)
            kept = scores > self.threshold
            weights, indices = slots_of(scores.masked_fill(~kept, 0.0))
            aux_loss = self.aux_coef * density_balance_loss(scores, kept, token_mask) if self.aux_coef else None
            return Choice(scores, weights, indices, aux_loss, full=False)
        indices = choose(logits, self.top_k, expert_mask)
        idle = indices < 0
        chosen = logits.gather(1, indices.clamp_min(0)).masked_fill(idle, OFF)
        weights = softmax_over_experts(chosen / self.temperature).masked_fill(idle, 0.0)
        return Choice(softmax_over_experts(logits / self.temperature), weights, indices)

    def extra_repr(self) -> str:
        return f"num_experts={self.num_experts}, top_k={self.top_k}, temperature={self.temperature}"
