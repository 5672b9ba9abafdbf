"""What every kind of experts can do."""

from abc import ABC, abstractmethod
from typing import Literal

from jaxtyping import Float
from torch import Tensor, nn

from ..dispatch import Plan
from ..grouped import Backend


class Experts(nn.Module, ABC):
    """E experts that can run on rows sorted by expert, or all on every token."""

    def __init__(self, num_experts: int) -> None:
        super().__init__()
        if num_experts < 1:
            raise ValueError(f"num_experts={num_experts} must be at least 1")
        self.num_experts = num_experts

    @abstractmethod
    def forward(
        self,
        x_sorted: Float[Tensor, "rows *dims"],
        plan: Plan,
        *,
        backend: Backend | Literal["auto"] = "auto",
    ) -> Float[Tensor, "rows *out_dims"]:
        """Each row through its own expert. Rows of the plan's tail give zero."""

    @abstractmethod
    def dense(
        self, x: Float[Tensor, "tokens *dims"], weights: Float[Tensor, "tokens experts"] | None = None
    ) -> Float[Tensor, "tokens *out_dims"]:
        """Every expert on every token: [tokens, experts, out], or summed with `weights`: [tokens, out]."""

    def select(self, x: Tensor, top_k: int) -> Backend:
        """The backend that suits `top_k` of these experts on the tokens `x`."""
        return "dense" if top_k == self.num_experts else "segment"


def mix(
    y: Float[Tensor, "tokens experts *dims"], weights: Float[Tensor, "tokens experts"]
) -> Float[Tensor, "tokens *dims"]:
    """Each token's outputs of all experts, weighted and summed."""
    return (y * weights.to(y.dtype).view(*weights.shape, *[1] * (y.dim() - 2))).sum(1)
