"""Routing by how few neurons of an expert a token will wake (MoE-X, Yang et al. 2025)."""

from typing import cast

import torch
from jaxtyping import Float, Int
from torch import Tensor

from ..experts import MLPExperts, StackedLinear
from .gates import Gate, linear_logits
from .router import full_precision


class SparsityGate(Gate):
    """Scores each expert with the share of its ReLU neurons that it expects to stay silent; no parameters.

    If the incoming weights of expert e's neurons are taken as Gaussian, with mean μ_e and variance σ_e² per input,
    then a neuron's input on x is Gaussian with mean `μ_e · x` and variance `σ_e² · x²`, and
    `score_e = -erf(μ_e · x / √(2 σ_e² · x²))` is its chance of being silent less that of being awake, in (-1, 1).
    A bias counts as the weight of an input that is always 1. The equation is our reading of MoE-X from memory.

    The gate reads the first layer of the experts it scores, and its gradient reaches them: give a router
    `gate=SparsityGate(experts)` and the layer the same `experts`. They are no submodule of the gate.

    Args:
        experts: with act "relu" or "reglu" (the gating half is read).
    """

    experts: MLPExperts

    def __init__(self, experts: MLPExperts) -> None:
        super().__init__(experts.num_experts)
        if experts.act not in ("relu", "reglu"):
            raise ValueError(f"SparsityGate needs experts with act 'relu' or 'reglu', not {experts.act!r}")
        if len(experts.layers) < 2:
            raise ValueError("SparsityGate needs experts with a hidden layer")
        object.__setattr__(self, "experts", experts)  # no submodule: they belong to the layer

    def forward(
        self, x: Float[Tensor, "tokens dim"], task_id: Int[Tensor, "tokens *slots"] | None = None
    ) -> Float[Tensor, "tokens experts"]:
        with full_precision(x):
            layer = cast(StackedLinear, self.experts.layers[0])
            weight: Tensor = layer.weight
            bias: Tensor | None = layer.bias
            if self.experts.act == "reglu":
                half = weight.shape[1] // 2
                weight, bias = weight[:, :half], None if bias is None else bias[:, :half]
            weight = weight.to(torch.promote_types(weight.dtype, torch.float32))
            mean = linear_logits(x, weight.mean(1))
            variance = linear_logits(x.to(mean.dtype).square(), weight.var(1, correction=0))
            if bias is not None:
                mean = mean + bias.to(mean.dtype).mean(1)
                variance = variance + bias.to(mean.dtype).var(1, correction=0)
            scores: Tensor = -torch.special.erf(mean / (2 * variance).clamp_min(1e-20).sqrt())
            return scores

    def extra_repr(self) -> str:
        return f"num_experts={self.out_features}"
