"""Soft MoE: experts work on mixtures of tokens (Puigcerver et al. 2024)."""

from typing import Literal, overload

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.nn import functional as F

from ..experts import Experts
from ..routing import Routing
from ..routing.router import OFF, full_precision


class SoftMoE(nn.Module):
    """Every expert gets `slots` averages of the sequence's tokens, every token an average of the slots' outputs.

    With logits `L = x̂ Φ`, x̂ the tokens of length 1 and Φ's columns of length `scale`: `D = softmax of L over
    tokens`, slots `Dᵀ x`, `C = softmax of L over slots`, `y = C · experts(slots)` (Puigcerver et al. 2024, eqs. 1
    to 3 and section 2.3). Nothing is chosen or dropped, all is smooth, the load is equal; but tokens of one
    sequence see each other, later ones too, and time and memory grow with tokens × slots: for sets of up to some
    thousand tokens.

    Args:
        experts: E of any kind, for inputs of width `dim`.
        slots: per expert; E · slots near the number of tokens costs what one expert per token does.
    """

    def __init__(self, dim: int, experts: Experts, slots: int = 1) -> None:
        super().__init__()
        if slots < 1:
            raise ValueError(f"slots={slots} must be at least 1")
        self.experts = experts
        self.slots = slots
        self.phi = nn.Parameter(torch.empty(experts.num_experts * slots, dim).normal_(0.0, dim**-0.5))
        self.scale = nn.Parameter(torch.ones(()))

    @overload
    def forward(
        self,
        x: Float[Tensor, "*batch tokens dim"],
        return_routing: Literal[False] = False,
        token_mask: Bool[Tensor, "*batch tokens"] | None = None,
    ) -> Float[Tensor, "*batch tokens out"]: ...

    @overload
    def forward(
        self,
        x: Float[Tensor, "*batch tokens dim"],
        return_routing: Literal[True],
        token_mask: Bool[Tensor, "*batch tokens"] | None = None,
    ) -> tuple[Float[Tensor, "*batch tokens out"], Routing]: ...

    def forward(
        self,
        x: Float[Tensor, "*batch tokens dim"],
        return_routing: bool = False,
        token_mask: Bool[Tensor, "*batch tokens"] | None = None,
    ) -> Float[Tensor, "*batch tokens out"] | tuple[Float[Tensor, "*batch tokens out"], Routing]:
        """Padding (False in `token_mask`) enters no slot and comes out as zero.

        The record's weights are how much of each expert is in a token's output; it has no balance loss.
        """
        *batch, tokens, dim = x.shape
        x = x.reshape(x.shape[:-2].numel(), tokens, dim)
        mask = None if token_mask is None else token_mask.reshape(x.shape[:2])
        with full_precision(x):
            logits = self._logits(x)
            gathered = logits if mask is None else logits.masked_fill(~mask[..., None], OFF)
            into = gathered.softmax(1)
            out_of = logits.softmax(2)
            if mask is not None:  # a sequence of nothing but padding has no average, and padding no output
                into, out_of = into * mask[..., None], out_of * mask[..., None]
        y = out_of.to(x.dtype) @ self._outputs(into.to(x.dtype).mT @ x)
        y = y.reshape(*batch, *y.shape[1:])
        return (y, self._record(logits, out_of, mask)) if return_routing else y

    def _logits(self, x: Float[Tensor, "batch tokens dim"]) -> Float[Tensor, "batch tokens slots"]:
        dtype = torch.promote_types(x.dtype, torch.float32)
        phi = F.normalize(self.phi.to(dtype), dim=1) * self.scale
        return F.linear(F.normalize(x.to(dtype), dim=-1), phi.to(dtype))

    def _outputs(self, inputs: Float[Tensor, "batch slots dim"]) -> Float[Tensor, "batch slots out"]:
        """Slot s of every sequence through expert `s // slots`."""
        batch, experts = inputs.shape[0], self.experts.num_experts
        own = inputs.unflatten(1, (experts, self.slots)).transpose(0, 1).flatten(1, 2)
        y: Tensor = self.experts.batched(own).unflatten(1, (batch, self.slots))
        return y.transpose(0, 1).flatten(1, 2)

    def _record(self, logits: Tensor, out_of: Tensor, mask: Tensor | None) -> Routing:
        experts = self.experts.num_experts
        weights = out_of.unflatten(2, (experts, self.slots)).sum(3).flatten(0, 1)
        indices = torch.arange(experts, device=weights.device).expand(weights.shape)
        return Routing(
            weights=weights,
            indices=indices if mask is None else indices.masked_fill(~mask.reshape(-1, 1), -1),
            scores=weights,
            logits=logits.unflatten(2, (experts, self.slots)).logsumexp(3).flatten(0, 1),
            aux_loss=weights.new_zeros(()),
            dropless=mask is None,
        )

    def extra_repr(self) -> str:
        return f"dim={self.phi.shape[1]}, slots={self.slots}"
