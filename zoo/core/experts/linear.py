"""Linear experts."""

from torch import Tensor

from ..grouped import Backend
from .base import wide_is_quicker
from .mlp import MLPExperts


class LinearExperts(MLPExperts):
    """E linear layers, `y = W_e x + b_e`; `dense(x)` is one matmul as wide as all of them (MIGA)."""

    def __init__(self, num_experts: int, dim: int, out: int, bias: bool = True) -> None:
        super().__init__(num_experts, dim, hidden=[], out=out, bias=bias)

    def select(self, x: Tensor, top_k: int, tokens: int | None = None) -> Backend:
        numel = x.numel() if tokens is None else tokens * self.dim
        if x.device.type == "cpu" and wide_is_quicker(numel, self.out, self.num_experts, top_k):
            return "dense"
        return super().select(x, top_k, tokens)
