"""Low-rank experts: E small updates of one linear layer (Hu et al. 2022; LoRAMoE, Dou et al. 2024)."""

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from ..dispatch import Plan, combine, dispatch, make_plan
from ..grouped import Backend, grouped_linear
from .base import Experts, Sorted, matmul_backend, wide_is_quicker
from .mlp import StackedLinear


class LoRAExperts(Experts):
    """`delta_e(x) = (alpha / rank) B_e A_e x`, A_e [rank, in_dim], B_e [out_dim, rank] (Hu et al. 2022).

    A starts as `nn.Linear` does, B at zero: a new expert changes nothing. Summed with gates, E of them equal
    one LoRA of rank E·rank whose hidden vector is gated block by block, `y = (alpha / rank) ((x A^T) * g) B^T`
    (SMoRA, arXiv 2501.15103): that is how `dense` computes them. `rank=1` makes every rank an expert (SMoRA).

    Args:
        alpha: the scale's numerator; `alpha=rank` scales by one.
        dropout: of the input, in training.
    """

    def __init__(
        self, num_experts: int, in_dim: int, out_dim: int, rank: int, alpha: float, dropout: float = 0.0
    ) -> None:
        super().__init__(num_experts)
        if min(in_dim, out_dim, rank) < 1:
            raise ValueError(f"in_dim={in_dim}, out_dim={out_dim} and rank={rank} must all be positive")
        if not 0.0 <= dropout < 1.0:
            raise ValueError(f"dropout={dropout} must lie in [0, 1)")
        self.dim, self.out, self.rank = in_dim, out_dim, rank
        self.alpha, self.dropout = alpha, dropout
        self.down = StackedLinear(num_experts, in_dim, rank, bias=False)
        self.up = StackedLinear(num_experts, rank, out_dim, bias=False)
        nn.init.zeros_(self.up.weight)

    @property
    def scale(self) -> float:
        return self.alpha / self.rank

    def forward(
        self, x_sorted: Float[Tensor, "rows in_dim"], plan: Plan, *, backend: Sorted = "auto"
    ) -> Float[Tensor, "rows out_dim"]:
        how = matmul_backend(backend)
        h = grouped_linear(self._drop(x_sorted), self.down.weight, plan.offsets, backend=how, dropless=plan.dropless)
        return grouped_linear(h * self.scale, self.up.weight, plan.offsets, backend=how, dropless=plan.dropless)

    def dense(
        self, x: Float[Tensor, "tokens in_dim"], weights: Float[Tensor, "tokens experts"] | None = None
    ) -> Float[Tensor, "tokens *out_dims"]:
        h = self.down.wide(self._drop(x))
        if weights is None:
            return self.up.batched((h * self.scale).transpose(0, 1)).transpose(0, 1)
        h = h * (weights * self.scale).to(h.dtype)[..., None]
        return F.linear(h.flatten(1), self.up.weight.transpose(0, 1).flatten(1))

    def rows(self, x: Float[Tensor, "*batch in_dim"], indices: Int[Tensor, "*rows"]) -> Float[Tensor, "*batch out_dim"]:
        """Each row through the one expert that `indices` names; an index outside `[0, experts)` gives zero.

        `indices` has the leading dimensions of x, all of them or the first few: [batch] for x [batch, time,
        in_dim] gives each sequence its own expert.
        """
        if x.shape[: indices.dim()] != indices.shape or indices.dim() >= x.dim():
            raise ValueError(f"indices {list(indices.shape)} must be leading dimensions of x {list(x.shape)}")
        out_shape = (*x.shape[:-1], self.out)
        time = x.shape[indices.dim() : -1].numel()
        if time >= 2 * self.rank:
            return self._sequences(x.reshape(-1, time, self.dim), indices.reshape(-1)).view(out_shape)
        x, flat = x.reshape(-1, self.dim), indices.reshape(-1, 1).expand(-1, time).reshape(-1, 1)
        if self.select(x, 1) == "dense":
            gate = flat == torch.arange(self.num_experts, device=x.device)
            return self.dense(x, gate.to(x.dtype)).view(out_shape)
        plan = make_plan(flat, self.num_experts)
        served = (flat >= 0) & (flat < self.num_experts)
        return combine(self(dispatch(x, plan), plan), served.to(x.dtype), plan).view(out_shape)

    def _sequences(
        self, x: Float[Tensor, "batch time in_dim"], indices: Int[Tensor, "batch"]
    ) -> Float[Tensor, "batch time out_dim"]:
        """Copies the small matrices to each sequence rather than sorting the large rows."""
        served = (indices >= 0) & (indices < self.num_experts)
        expert = indices.clamp(0, self.num_experts - 1)
        down, up = (layer.weight.index_select(0, expert).transpose(1, 2) for layer in (self.down, self.up))
        h = torch.bmm(self._drop(x), down)
        return torch.bmm(h * (served * self.scale).to(h.dtype)[:, None, None], up)

    def select(self, x: Tensor, top_k: int) -> Backend:
        if x.device.type == "cpu":
            dense = wide_is_quicker(x.numel(), self.rank, self.num_experts, top_k)
        else:  # an estimate: no sort, and no wait for the device
            dense = self.num_experts * self.rank <= 512
        return "dense" if dense else "segment"

    def _drop(self, x: Tensor) -> Tensor:
        return F.dropout(x, self.dropout, self.training) if self.dropout > 0 else x

    def extra_repr(self) -> str:
        return f"rank={self.rank}, alpha={self.alpha}, dropout={self.dropout}"


class LoRALinear(nn.Module):
    """`y = W_0 x + b + Σ_e w_e delta_e(x)`: a linear layer with E low-rank experts beside it.

    Each call says which experts apply: `weights` [*, E] mixes them, `indices` [*] names one per row (an index
    outside `[0, experts)` none), neither leaves the base alone. Both may lack trailing dimensions of x.

    Args:
        base: the layer, kept as it is under the name `base`; may have low-rank experts of its own.
        freeze_base: take the base out of training.

    Raises:
        ValueError: both `weights` and `indices` are given, or either while an expert is merged.
    """

    in_features: int
    out_features: int

    def __init__(
        self,
        base: "nn.Linear | LoRALinear",
        num_experts: int,
        rank: int,
        alpha: float,
        dropout: float = 0.0,
        freeze_base: bool = True,
    ) -> None:
        super().__init__()
        self.base = base.requires_grad_(False) if freeze_base else base
        experts = LoRAExperts(num_experts, base.in_features, base.out_features, rank, alpha, dropout)
        self.experts = experts.to(base.weight)
        self.in_features, self.out_features = base.in_features, base.out_features
        self.merged: int | None = None
        self._unmerged: Tensor | None = None

    @property
    def weight(self) -> Tensor:
        """The base's weight."""
        return self.base.weight

    def forward(
        self,
        x: Float[Tensor, "*batch in_dim"],
        weights: Float[Tensor, "*rows experts"] | None = None,
        indices: Int[Tensor, "*rows"] | None = None,
    ) -> Float[Tensor, "*batch out_dim"]:
        y: Tensor = self.base(x)
        if weights is None and indices is None:
            return y
        if self.merged is not None:
            raise ValueError(f"expert {self.merged} is merged into the base: call unmerge() before routing")
        if indices is not None:
            if weights is not None:
                raise ValueError("give weights or indices, not both")
            return y + self.experts.rows(x, indices)
        assert weights is not None
        if x.shape[: weights.dim() - 1] != weights.shape[:-1]:
            raise ValueError(f"weights {list(weights.shape)} must be leading dimensions of x {list(x.shape)}, then E")
        trailing = x.dim() - weights.dim()
        weights = weights.view(*weights.shape[:-1], *[1] * trailing, -1).expand(*x.shape[:-1], -1)
        delta = self.experts.dense(x.reshape(-1, self.in_features), weights.reshape(-1, weights.shape[-1]))
        return y + delta.view_as(y)

    @torch.no_grad()
    def merge(self, expert: int) -> None:
        """Add one expert to the base's weight, `W_0 + delta_e`, for inference at the base's cost."""
        if self.merged is not None:
            raise ValueError(f"expert {self.merged} is merged already: call unmerge() first")
        if not 0 <= expert < self.experts.num_experts:
            raise ValueError(f"expert={expert} must lie in [0, {self.experts.num_experts})")
        self._unmerged = self.base.weight.clone()
        delta = self.experts.up.weight[expert] @ self.experts.down.weight[expert]
        self.base.weight.add_(delta, alpha=self.experts.scale)
        self.merged = expert

    @torch.no_grad()
    def unmerge(self) -> None:
        """Take the base's weight back to what it was, bit by bit."""
        if self._unmerged is None:
            raise ValueError("no expert is merged")
        self.base.weight.copy_(self._unmerged)
        self.merged = self._unmerged = None

    def extra_repr(self) -> str:
        return "" if self.merged is None else f"merged={self.merged}"
