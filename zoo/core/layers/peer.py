"""PEER: a million experts of one neuron each (He 2024)."""

from collections.abc import Iterator

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from ..activations import Activation, activate, check_ungated
from ..dispatch import sum_bags
from ..losses import cv_squared
from ..routing import Routing
from ..routing.product_key import ProductKeys, product_top_k
from ..routing.router import full_precision
from .base import TokenLayer


class PEER(TokenLayer):
    """`y = Σ_heads Σ_e softmax(s)_e · act(u_e · x) v_e` over the `top_k` best of n² experts per head.

    Expert e is one neuron: a vector u_e in, a vector v_e out. Scores s are sums of a row's and a column's
    (`ProductKeys`), so that finding the best takes 2n products instead of n² (He 2024, eqs. 1 to 3). A token reads
    `2 · heads · top_k` vectors, whatever the number of experts. The query has no normalisation here; He uses a
    BatchNorm before the keys.

    Args:
        num_experts: a square number n².
        key_dim: width of a half query.
        balance_coef: coefficient of the CV² of the rows' and of the columns' mean probability, in training; 0 as
            in the paper.
    """

    def __init__(
        self,
        dim: int,
        num_experts: int,
        heads: int = 8,
        top_k: int = 16,
        key_dim: int = 64,
        act: Activation = "gelu",
        out: int | None = None,
        balance_coef: float = 0.0,
    ) -> None:
        super().__init__()
        side = round(num_experts**0.5)
        if side * side != num_experts:
            raise ValueError(f"num_experts={num_experts} must be a square number, such as {side * side}")
        check_ungated(act)
        if not 1 <= top_k <= num_experts:
            raise ValueError(f"top_k={top_k} must lie between 1 and num_experts={num_experts}")
        self.num_experts, self.top_k, self.act, self.balance_coef = num_experts, top_k, act, balance_coef
        self.keys = ProductKeys(dim, (side, side), heads, key_dim)
        out = dim if out is None else out
        self.down = nn.Parameter(torch.empty(num_experts, dim).uniform_(-(dim**-0.5), dim**-0.5))
        self.up = nn.Parameter(torch.empty(num_experts, out).normal_(0.0, (heads * top_k) ** -0.5))

    def active_shares(self) -> Iterator[tuple[Tensor, float]]:
        """For `statistics.parameter_counts`: which share of which parameters a token touches."""
        share = min(self.keys.row_keys.shape[0] * self.top_k / self.num_experts, 1.0)
        yield from ((self.down, share), (self.up, share))

    def run(self, x: Float[Tensor, "tokens dim"], record: bool) -> tuple[Float[Tensor, "tokens out"], Routing | None]:
        """The record is over the n rows, then the n columns, as if each were an expert: n² columns would not fit."""
        with full_precision(x):
            rows, columns = self.keys(x)
            best, expert = product_top_k(rows, columns, self.top_k)
            weights = best.softmax(-1).flatten(1)
        expert = expert.flatten(1)
        hidden = torch.einsum("nd,nsd->ns", x, self.down[expert].to(x.dtype))
        share = (weights * activate(hidden, self.act).to(weights.dtype)).to(x.dtype)
        y = _weighted_rows(self.up, expert, share)
        return y, self._record(rows, columns, weights, expert) if record else None

    def _record(self, rows: Tensor, columns: Tensor, weights: Tensor, expert: Tensor) -> Routing:
        side, heads = rows.shape[-1], rows.shape[1]
        scores = torch.cat([rows.softmax(-1).mean(1), columns.softmax(-1).mean(1)], dim=1) / 2
        aux_loss = scores.new_zeros(())
        if self.training and self.balance_coef != 0:
            load = scores.sum(0)
            aux_loss = self.balance_coef * (cv_squared(load[:side]) + cv_squared(load[side:]))
        return Routing(
            weights=torch.cat([weights, weights], dim=1) / (2 * heads),
            indices=torch.cat([expert // side, side + expert % side], dim=1),
            scores=scores,
            logits=scores.clamp_min(1e-30).log(),
            aux_loss=aux_loss,
            dropless=True,
        )

    def extra_repr(self) -> str:
        return f"num_experts={self.num_experts}, top_k={self.top_k}, act={self.act}"


def _weighted_rows(
    table: Float[Tensor, "experts out"], expert: Int[Tensor, "tokens slots"], weights: Float[Tensor, "tokens slots"]
) -> Float[Tensor, "tokens out"]:
    """`Σ_s weights[n, s] · table[expert[n, s]]`, without the rows in between."""
    tokens, slots = expert.shape
    if tokens == 0:
        return weights.new_zeros(0, table.shape[1])
    starts = torch.arange(0, tokens * slots, slots, device=expert.device)
    return sum_bags(table.to(weights.dtype), expert.reshape(-1), starts, weights.reshape(-1))
