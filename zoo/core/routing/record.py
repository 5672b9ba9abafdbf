"""What a router says about a batch of tokens."""

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor


@dataclass
class Routing:
    """Which experts each token goes to, with what weight, and what that costs.

    An index in `[num_experts, num_experts + num_extra)` names an extra expert (zero, copy, constant), which
    costs no matrix product; one outside both ranges (by convention -1) marks a dropped slot, with weight zero.
    `scores` are the router's scores before selection (probabilities for softmax routers), `logits` what they
    were computed from; their columns are the experts, then the extra ones. `aux_loss` holds the balance losses
    with their coefficients applied: a task adds it with weight 1. `dropless` is the router's promise that every
    slot names a real expert, which lets the dispatcher skip every mask without asking the device. `state` is
    for routers with a memory.
    """

    weights: Float[Tensor, "tokens k"]
    indices: Int[Tensor, "tokens k"]
    scores: Float[Tensor, "tokens columns"]
    logits: Float[Tensor, "tokens columns"]
    aux_loss: Float[Tensor, ""]
    state: Any = None
    dropless: bool = False
    num_extra: int = 0

    @property
    def num_experts(self) -> int:
        """Real experts; the extra ones come after them."""
        return self.scores.shape[-1] - self.num_extra

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
            num_extra=self.num_extra,
        )

    def dense_weights(self, extra: bool = False) -> Float[Tensor, "tokens columns"]:
        """The weights as a matrix with zeros at the experts that a token does not use.

        Its columns are the real experts; with `extra=True` those of the extra ones follow.
        """
        tokens, columns = self.weights.shape[0], self.num_experts + (self.num_extra if extra else 0)
        if self.dropless:
            return self.weights.new_zeros(tokens, columns).scatter_add(1, self.indices, self.weights)
        outside = (self.indices < 0) | (self.indices >= columns)
        indices = self.indices.masked_fill(outside, columns)
        return self.weights.new_zeros(tokens, columns + 1).scatter_add(1, indices, self.weights)[:, :columns]


def _detach(state: Any) -> Any:
    if isinstance(state, torch.Tensor):
        return state.detach()
    if isinstance(state, (tuple, list)):
        return type(state)(_detach(s) for s in state)
    return state
