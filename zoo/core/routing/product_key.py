"""Product keys: experts on a grid, found by their row and their column (Lample et al. 2019; PEER, He 2024)."""

import math
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from ..losses import switch_balance_loss
from .gates import linear_logits
from .record import Routing
from .router import ExpertMask, Router, choose, drop_padding, full_precision, switched_off


class ProductKeys(nn.Module):
    """Scores of the rows and columns of a grid of `rows × columns` experts, for each of `heads` queries.

    A head's query `q = W x` has two halves; a row scores its key's product with the first, a column with the
    second, and expert `row · columns + column` their sum: `rows + columns` keys for `rows × columns` experts.

    Args:
        key_dim: the width of a half query.
    """

    def __init__(self, dim: int, grid: tuple[int, int], heads: int = 1, key_dim: int = 16) -> None:
        super().__init__()
        if min(*grid, heads, key_dim) < 1:
            raise ValueError(f"grid={grid}, heads={heads} and key_dim={key_dim} must all be at least 1")
        self.grid = grid
        self.query = nn.Parameter(torch.empty(heads * 2 * key_dim, dim).normal_(0.0, dim**-0.5))
        self.row_keys = nn.Parameter(torch.empty(heads, grid[0], key_dim).normal_(0.0, key_dim**-0.5))
        self.column_keys = nn.Parameter(torch.empty(heads, grid[1], key_dim).normal_(0.0, key_dim**-0.5))

    def forward(
        self, x: Float[Tensor, "tokens dim"]
    ) -> tuple[Float[Tensor, "tokens heads rows"], Float[Tensor, "tokens heads columns"]]:
        """In at least fp32."""
        heads, _, key_dim = self.row_keys.shape
        queries = linear_logits(x, self.query).view(-1, heads, 2, key_dim)
        keys = (self.row_keys.to(queries.dtype), self.column_keys.to(queries.dtype))
        rows, columns = (torch.einsum("nhd,hrd->nhr", queries[:, :, i], keys[i]) for i in (0, 1))
        return rows, columns


def product_top_k(
    rows: Float[Tensor, "*tokens rows"], columns: Float[Tensor, "*tokens columns"], k: int
) -> tuple[Float[Tensor, "*tokens k"], Int[Tensor, "*tokens k"]]:
    """The k best sums of a row's and a column's score, best first, and their numbers `row · columns + column`.

    They are among the pairs of the k best rows and k best columns: of E pairs only k² are looked at.
    """
    best_rows, row = rows.topk(min(k, rows.shape[-1]), dim=-1)
    best_columns, column = columns.topk(min(k, columns.shape[-1]), dim=-1)
    sums = (best_rows[..., :, None] + best_columns[..., None, :]).flatten(-2)
    numbers = (row[..., :, None] * columns.shape[-1] + column[..., None, :]).flatten(-2)
    best, place = sums.topk(k, dim=-1)
    return best, numbers.gather(-1, place)


class ProductKeyRouter(Router):
    """Top-k per head over the sums of row and column scores; softmax over the chosen, the mean over heads.

    PEER's retrieval as a router for any experts, up to some thousands: the record's `scores` has a column for
    each, the mean over heads of `softmax(rows) ⊗ softmax(columns)`, and `aux_coef` times their Switch balance loss is
    `aux_loss` in training. For very many tiny experts use the layer `PEER`, which never looks at all of them.

    Args:
        grid: rows and columns; by default the most nearly square one.
        heads: a token has `heads · top_k` slots, some of which may name the same expert.
    """

    def __init__(
        self,
        dim: int,
        num_experts: int,
        top_k: int,
        heads: int = 1,
        key_dim: int = 16,
        grid: tuple[int, int] | None = None,
        aux_coef: float = 1e-2,
    ) -> None:
        super().__init__(num_experts, top_k)
        if top_k == 1:
            raise ValueError("ProductKeyRouter needs top_k >= 2: with top_k=1 every weight is the same")
        grid = squarest_grid(num_experts) if grid is None else grid
        if grid[0] * grid[1] != num_experts:
            raise ValueError(f"grid={grid} has {grid[0] * grid[1]} places for num_experts={num_experts}")
        self.keys = ProductKeys(dim, grid, heads, key_dim)
        self.heads = heads
        self.aux_coef = aux_coef

    @property
    def active_experts(self) -> float:
        return float(min(self.heads * self.top_k, self.num_experts))

    def forward(
        self,
        x: Float[Tensor, "tokens dim"],
        *,
        token_mask: Bool[Tensor, "tokens"] | None = None,
        task_id: Int[Tensor, "tokens *slots"] | None = None,
        expert_mask: ExpertMask | None = None,
        state: Any = None,
    ) -> Routing:
        with full_precision(x):
            rows, columns = self.keys(x)
            scores = (rows.softmax(-1)[..., :, None] * columns.softmax(-1)[..., None, :]).mean(1).flatten(1)
            if expert_mask is None:
                best, indices = product_top_k(rows, columns, self.top_k)
            else:
                best, indices, scores = self._masked(rows, columns, scores, expert_mask)
            weights = best.softmax(-1) / self.heads
            if expert_mask is not None:
                weights = weights.masked_fill(indices < 0, 0.0)
            weights, indices = drop_padding(weights.flatten(1), indices.flatten(1), token_mask)
            aux_loss = scores.new_zeros(())
            complete = token_mask is None and expert_mask is None
            if self.training and self.aux_coef != 0:
                aux_loss = switch_balance_loss(scores, indices, token_mask, dropless=complete, coef=self.aux_coef)
        return Routing(
            weights=weights,
            indices=indices,
            scores=scores,
            logits=scores.clamp_min(1e-30).log(),
            aux_loss=aux_loss,
            state=state,
            dropless=complete,
        )

    def _masked(
        self, rows: Tensor, columns: Tensor, scores: Tensor, expert_mask: ExpertMask
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The choice with experts switched off or on, which takes a look at every pair."""
        off = switched_off(expert_mask)
        sums = (rows[..., :, None] + columns[..., None, :]).flatten(2)
        indices = choose(sums.flatten(0, 1), self.top_k, expert_mask).view(*sums.shape[:2], self.top_k)
        best = sums.gather(2, indices.clamp_min(0)).masked_fill(indices < 0, -1e9)
        kept = scores.masked_fill(off, 0.0)
        return best, indices, kept / kept.sum(-1, keepdim=True).clamp_min(1e-20)

    def extra_repr(self) -> str:
        return f"num_experts={self.num_experts}, top_k={self.top_k}, heads={self.heads}, grid={self.keys.grid}"


def squarest_grid(num_experts: int) -> tuple[int, int]:
    """Rows and columns of the most nearly square grid of this many places."""
    rows = next(r for r in range(math.isqrt(num_experts), 0, -1) if num_experts % r == 0)
    return rows, num_experts // rows
