"""Noisy top-k gating of "Outrageously large neural networks" (Shazeer et al. 2017)."""

from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from ..losses import importance_loss, load_loss, slot_counts
from .capacity import Capacity, Priority
from .gates import Gate, LinearGate
from .record import Routing
from .router import (
    OFF,
    ExpertMask,
    GatedRouter,
    choose,
    drop_padding,
    full_precision,
    softmax_over_experts,
    switched_off,
)


class NoisyTopKRouter(GatedRouter):
    """Top-k of noisy logits, softmax over the chosen ones (eqs. 3 to 5).

    In training, logits get Gaussian noise of the learned size `softplus(W_noise x)`, and
    `aux_loss = importance_coef CV²(importance) + load_coef CV²(load)`, where load is the smooth probability
    of being chosen again under fresh noise (eqs. 8 to 11). Outside training there is no noise and no loss.

    Args:
        gate, noise_gate: where logits and noise sizes come from; linear by default and zero at first, so that
            all experts start with the same chance.
        capacity_factor, min_capacity, priority: drop what exceeds `Capacity`; None drops nothing. "prob" is the
            batch-prioritised routing of V-MoE.

    `top_k=1` makes every weight 1: only the losses would teach the router, hence an error.
    """

    def __init__(
        self,
        dim: int,
        num_experts: int,
        top_k: int,
        importance_coef: float = 1e-2,
        load_coef: float = 1e-2,
        capacity_factor: float | None = None,
        min_capacity: int = 1,
        priority: Priority = "order",
        gate: Gate | None = None,
        noise_gate: Gate | None = None,
    ) -> None:
        super().__init__(dim, num_experts, top_k, gate or LinearGate(dim, num_experts, std=0.0))
        if top_k == 1 and num_experts > 1:
            raise ValueError("NoisyTopKRouter needs top_k >= 2: with top_k=1 every weight is 1")
        self.importance_coef = importance_coef
        self.load_coef = load_coef
        self.noise_gate = noise_gate or LinearGate(dim, num_experts, std=0.0)
        self.capacity = None if capacity_factor is None else Capacity(capacity_factor, min_capacity, priority)

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
            clean = self.gate(x, task_id)
            logits = clean
            if self.training:
                noise_std = nn.functional.softplus(self.noise_gate(x, task_id)) + 1e-6
                logits = clean + noise_std * torch.randn_like(clean)
            if expert_mask is not None:
                logits = logits.masked_fill(switched_off(expert_mask), OFF)
            indices = choose(logits, self.top_k, expert_mask)
            dropped = indices < 0
            chosen = logits.gather(1, indices.clamp_min(0)).masked_fill(dropped, OFF)
            weights = softmax_over_experts(chosen).masked_fill(dropped, 0.0)
            weights, indices = drop_padding(weights, indices, token_mask)
            aux_loss = clean.new_zeros(())
            if self.training and self.importance_coef != 0:
                gates = clean.new_zeros(clean.shape).scatter_add(1, indices.clamp_min(0), weights)
                aux_loss = aux_loss + self.importance_coef * importance_loss(gates)
            if self.training and self.load_coef != 0:
                load = self._load(clean, logits, noise_std, indices, token_mask)
                aux_loss = aux_loss + self.load_coef * load_loss(load)
            if self.capacity is not None:
                weights, indices = self.capacity.limit(weights, indices, self.num_experts)
        return Routing(
            weights=weights,
            indices=indices,
            scores=softmax_over_experts(logits),
            logits=logits,
            aux_loss=aux_loss,
            state=state,
            dropless=token_mask is None and expert_mask is None and self.capacity is None,
        )

    def _load(
        self,
        clean: Float[Tensor, "tokens experts"],
        noisy: Float[Tensor, "tokens experts"],
        noise_std: Float[Tensor, "tokens experts"],
        indices: Int[Tensor, "tokens k"],
        token_mask: Bool[Tensor, "tokens"] | None,
    ) -> Float[Tensor, "experts"]:
        """How many tokens each expert would get under fresh noise, in expectation; differentiable."""
        if self.top_k == self.num_experts:
            return slot_counts(indices, self.num_experts, clean.dtype)
        best = noisy.topk(self.top_k + 1, dim=-1).values
        threshold_if_out, threshold_if_in = best[:, -2:-1], best[:, -1:]
        threshold = torch.where(noisy > threshold_if_in, threshold_if_in, threshold_if_out)
        probability = torch.special.ndtr((clean - threshold) / noise_std)
        probability = probability.masked_fill(noisy <= OFF, 0.0)
        if token_mask is not None:
            probability = probability.masked_fill(~token_mask[:, None], 0.0)
        load: Tensor = probability.sum(0)
        return load

    def extra_repr(self) -> str:
        return f"num_experts={self.num_experts}, top_k={self.top_k}"
