"""Linear experts."""

from .mlp import MLPExperts


class LinearExperts(MLPExperts):
    """E linear layers, `y = W_e x + b_e`; `dense(x)` is one matmul as wide as all of them (MIGA)."""

    def __init__(self, num_experts: int, dim: int, out: int, bias: bool = True) -> None:
        super().__init__(num_experts, dim, hidden=[], out=out, bias=bias)
