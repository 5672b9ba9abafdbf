"""Experts that cost next to nothing: tokens may choose not to compute.

They take the ids after the real experts (AdaMoE, Zeng et al. 2024; MoE++, Jin et al. 2024).
"""

import torch
from jaxtyping import Float
from torch import Tensor, nn


class ZeroExpert(nn.Module):
    """`y = 0`: the token skips this slot."""

    def forward(self, x: Float[Tensor, "tokens dim"]) -> Float[Tensor, "tokens dim"]:
        return torch.zeros_like(x)


class CopyExpert(nn.Module):
    """`y = x`: the token passes as it is."""

    def forward(self, x: Float[Tensor, "tokens dim"]) -> Float[Tensor, "tokens dim"]:
        return x


class ConstantExpert(nn.Module):
    """`y = a_0 x + a_1 v`, `a = softmax(W x)` in R², with a trainable vector v (MoE++, Jin et al. 2024)."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        if dim < 1:
            raise ValueError(f"dim={dim} must be positive")
        self.gate = nn.Linear(dim, 2, bias=False)
        self.constant = nn.Parameter(torch.empty(dim).uniform_(-(dim**-0.5), dim**-0.5))

    def forward(self, x: Float[Tensor, "tokens dim"]) -> Float[Tensor, "tokens dim"]:
        share: Tensor = self.gate(x).softmax(-1).to(x.dtype)
        return share[:, :1] * x + share[:, 1:] * self.constant.to(x.dtype)
