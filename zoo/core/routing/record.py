"""What a router says about a batch of tokens."""

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor


@dataclass
class Routing:
    """Which experts each token goes to, with what weight, and what that costs.

    An index outside `[0, experts)` (by convention -1) marks a dropped slot; routers give it weight zero.
    `scores` are the router's per-expert scores before selection (probabilities for softmax routers),
    `logits` what they were computed from, `aux_loss` the balance losses with their coefficients applied:
    a task adds it with weight 1. `dropless` is the router's promise that no slot is dropped, which lets
    the dispatcher skip every mask without asking the device. `state` is for routers with a memory.
    """

    weights: Float[Tensor, "tokens k"]
    indices: Int[Tensor, "tokens k"]
    scores: Float[Tensor, "tokens experts"]
    logits: Float[Tensor, "tokens experts"]
    aux_loss: Float[Tensor, ""]
    state: Any = None
    dropless: bool = False

    @property
    def num_experts(self) -> int:
        return self.scores.shape[-1]

    @property
    def top_k(self) -> int:
        return self.indices.shape[-1]

    def detach(self) -> "Routing":
        """The same record outside the autograd graph, for telemetry."""
        return Routing(
            weights=self.weights.detach(),
            indices=self.indices,
            scores=self.scores.detach(),
            logits=self.logits.detach(),
            aux_loss=self.aux_loss.detach(),
            state=_detach(self.state),
            dropless=self.dropless,
        )

    def dense_weights(self) -> Float[Tensor, "tokens experts"]:
        """The weights as a matrix with zeros at the experts that a token does not use."""
        tokens, experts = self.scores.shape
        if self.dropless:
            return self.weights.new_zeros(tokens, experts).scatter_add(1, self.indices, self.weights)
        outside = (self.indices < 0) | (self.indices >= experts)
        columns = self.indices.masked_fill(outside, experts)
        return self.weights.new_zeros(tokens, experts + 1).scatter_add(1, columns, self.weights)[:, :experts]


def _detach(state: Any) -> Any:
    if isinstance(state, torch.Tensor):
        return state.detach()
    if isinstance(state, (tuple, list)):
        return type(state)(_detach(s) for s in state)
    return state
