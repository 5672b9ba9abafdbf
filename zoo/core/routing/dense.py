"""A gate that uses every expert: classic MoE, MMoE, dense-to-sparse and activation gates."""

from collections.abc import Callable
from typing import Any, Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from .gates import Gate
from .record import Routing
from .router import (
    OFF,
    ExpertMask,
    GatedRouter,
    drop_padding,
    full_precision,
    softmax_over_experts,
    switched_off,
)


class DenseRouter(GatedRouter):
    """Every token uses every expert: `norm(activation(gate(x)) / temperature + b_0)`.

    Args:
        temperature: softens (above 1) or sharpens the weights; a plain attribute, so that a schedule may set it.
        gate_norm: "softmax" (weights sum to one), "sigmoid" (independent gates) or "none" (raw).
        activation: applied to the logits before the temperature; a non-linear one gives the activation
            gate of "Statistical perspective on temperature in MoE" (Nguyen et al. 2024).
        bias: learn b_0, one number per expert after the temperature, from zero.
        gate: where the logits come from; a `LinearGate` by default.
    """

    def __init__(
        self,
        dim: int,
        num_experts: int,
        temperature: float = 1.0,
        gate_norm: Literal["softmax", "none", "sigmoid"] = "softmax",
        activation: Callable[[Tensor], Tensor] | None = None,
        bias: bool = False,
        gate: Gate | None = None,
    ) -> None:
        super().__init__(dim, num_experts, num_experts, gate)
        if temperature <= 0:
            raise ValueError(f"temperature={temperature} must be positive")
        if gate_norm not in ("softmax", "none", "sigmoid"):
            raise ValueError(f"gate_norm={gate_norm!r} must be 'softmax', 'none' or 'sigmoid'")
        self.temperature = temperature
        self.gate_norm = gate_norm
        self.activation = activation
        self.bias = nn.Parameter(torch.zeros(num_experts)) if bias else None

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
            logits = self.gate(x, task_id)
            if self.activation is not None:
                logits = self.activation(logits)
            if self.temperature != 1.0:
                logits = logits / self.temperature
            if self.bias is not None:
                logits = logits + self.bias
            if expert_mask is not None:
                logits = logits.masked_fill(switched_off(expert_mask), OFF)
            scores = self._scores(logits)
            if expert_mask is not None and self.gate_norm == "none":
                scores = scores.masked_fill(switched_off(expert_mask), 0.0)
            indices = torch.arange(self.num_experts, device=x.device).expand(scores.shape)
            weights, indices = drop_padding(scores, indices, token_mask)
        return Routing(
            weights=weights,
            indices=indices,
            scores=scores,
            logits=logits,
            aux_loss=logits.new_zeros(()),
            state=state,
            dropless=token_mask is None,
        )

    def _scores(self, logits: Tensor) -> Tensor:
        if self.gate_norm == "softmax":
            return softmax_over_experts(logits)
        return logits.sigmoid() if self.gate_norm == "sigmoid" else logits

    def extra_repr(self) -> str:
        return f"num_experts={self.num_experts}, temperature={self.temperature}, gate_norm={self.gate_norm}"
