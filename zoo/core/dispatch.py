"""Sort tokens by expert, bring the experts' outputs back. No capacity: every chosen slot is served.

Shapes: N tokens, k slots per token, S = N k rows sorted by expert. Rows of dropped slots (index outside
`[0, experts)`) lie behind the last expert's rows, the "tail".
Nothing here waits for the device, and nothing but the row order is integer work on the autograd path.
"""

from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, cast

import torch
from jaxtyping import Bool, Float, Int, Int32
from torch import Tensor
from torch.autograd.function import once_differentiable


@dataclass
class Plan:
    """Where each (token, slot) pair lies among the rows sorted by expert.

    Attributes:
        slot: the flat pair `token * k + slot` of each row.
        token: the token of each row.
        row: the row of each pair; the inverse of `slot`.
        expert: the expert of each row; the last one for rows of the tail.
        offsets: where each expert's rows end.
        dropless: no row lies in the tail.
    """

    slot: Int[Tensor, "rows"]
    token: Int[Tensor, "rows"]
    row: Int[Tensor, "tokens k"]
    expert: Int32[Tensor, "rows"]
    offsets: Int32[Tensor, "experts"]
    dropless: bool
    _sizes: list[int] | None = field(default=None, init=False, repr=False, compare=False)

    @property
    def num_experts(self) -> int:
        return self.offsets.shape[0]

    @property
    def counts(self) -> Int32[Tensor, "experts"]:
        """Rows of each expert."""
        return torch.diff(self.offsets, prepend=self.offsets.new_zeros(1))

    def sizes(self) -> list[int]:
        """Rows of each expert, on the host. Waits for the device the first time, however many layers ask."""
        if self._sizes is None:
            self._sizes = [end - start for start, end in pairwise([0, *self.offsets.tolist()])]
        return self._sizes


def make_plan(indices: Int[Tensor, "tokens k"], num_experts: int, *, dropless: bool = False) -> Plan:
    """Sort the chosen slots by expert, stably. Indices outside `[0, num_experts)` go to the tail.

    `dropless=True` promises that there are none of those, and spares the masks.
    """
    tokens, k = indices.shape
    keys = indices.reshape(-1)
    if not dropless:
        keys = keys.masked_fill((keys < 0) | (keys >= num_experts), num_experts)
    if num_experts < 256:
        keys = keys.to(torch.uint8)  # sorts five times faster than int64
    keys, slot = torch.sort(keys, stable=True)
    experts = torch.arange(num_experts, dtype=keys.dtype, device=keys.device)
    offsets = torch.searchsorted(keys, experts, right=True, out_int32=True)
    rows = torch.arange(tokens * k, device=slot.device)
    row = torch.empty_like(slot).scatter_(0, slot, rows).view(tokens, k)
    token = slot >> (k.bit_length() - 1) if k & (k - 1) == 0 else slot // k  # shifting is quicker
    expert = keys.to(torch.int32)
    return Plan(slot, token, row, expert if dropless else expert.clamp_max(num_experts - 1), offsets, dropless)


def pad_plan(plan: Plan) -> tuple[Plan, Bool[Tensor, "rows"]] | None:
    """The plan with every expert's rows padded to those of the busiest one, and a mask of what is padding.

    Slots of the tail point to padding, and padding repeats a row that is none. None if there is no such row.
    Waits for the device.
    """
    experts, pairs, device = plan.num_experts, plan.slot.shape[0], plan.slot.device
    longest = int(plan.counts.max())
    if longest == 0:
        return None
    if not plan.dropless:
        longest += 1  # so that there is padding for the tail to point to
    ends = torch.arange(1, experts + 1, dtype=torch.int32, device=device) * longest
    rows = torch.arange(pairs, device=device)
    place = rows + (ends - longest - plan.offsets + plan.counts).index_select(0, plan.expert)
    if not plan.dropless:
        place = torch.where(rows < plan.offsets[-1], place, longest - 1)
    source = torch.zeros(experts * longest, dtype=torch.int64, device=device).index_copy_(0, place, rows)
    padding = torch.ones(experts * longest, dtype=torch.bool, device=device).index_fill_(0, place, False)
    if not plan.dropless:
        source[longest - 1], padding[longest - 1] = 0, True
    slot, token = plan.slot.index_select(0, source), plan.token.index_select(0, source)
    row = place.index_select(0, plan.row.reshape(-1)).view_as(plan.row)
    expert = torch.arange(experts, dtype=torch.int32, device=device).repeat_interleave(longest)
    return Plan(slot, token, row, expert, ends, plan.dropless), padding


def dispatch(x: Float[Tensor, "tokens *dims"], plan: Plan) -> Float[Tensor, "rows *dims"]:
    """Copy each token to its k rows, sorted by expert."""
    return cast(Tensor, _Dispatch.apply(x, plan.token, plan.row))


def restore(y: Float[Tensor, "rows *dims"], plan: Plan) -> Float[Tensor, "tokens *dims"]:
    """The rows in the order of the tokens again, for plans of one slot: what `dispatch` undoes."""
    return cast(Tensor, _Dispatch.apply(y, plan.row.view(-1), plan.slot.view(-1, 1)))


def combine(
    y: Float[Tensor, "rows *dims"], weights: Float[Tensor, "tokens k"], plan: Plan
) -> Float[Tensor, "tokens *dims"]:
    """Sum each token's k rows, weighted; in the dtype of `y`. Slots of the tail need weight zero."""
    return cast(Tensor, _Combine.apply(y, weights, plan.slot, plan.token, plan.row))


class _Dispatch(torch.autograd.Function):
    """A gather whose gradient is summed by token (not scattered), hence deterministic and fast."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, token: Tensor, row: Tensor) -> Tensor:
        ctx.save_for_backward(row)
        return _take(x, token)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        (row,) = ctx.saved_tensors
        return sum_rows(grad, row, None), None, None


class _Combine(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, y: Tensor, weights: Tensor, slot: Tensor, token: Tensor, row: Tensor) -> Tensor:
        ctx.save_for_backward(y, weights, slot, token, row)
        return sum_rows(y, row, weights)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None, None, None]:
        y, weights, slot, token, row = ctx.saved_tensors
        grad_y = grad_weights = None
        grad_rows = grad.index_select(0, token)
        if ctx.needs_input_grad[1]:
            products = (grad_rows * y).reshape(y.shape[0], y.shape[1:].numel())
            grad_weights = products.sum(1, dtype=weights.dtype).index_select(0, row.reshape(-1)).view_as(row)
        if ctx.needs_input_grad[0]:
            row_weights = weights.reshape(-1).index_select(0, slot).to(y.dtype)
            grad_y = grad_rows.mul_(row_weights.view(-1, *[1] * (y.dim() - 1)))
        return grad_y, grad_weights, None, None, None


def sum_rows(y: Tensor, row: Tensor, weights: Tensor | None) -> Tensor:
    """`out[n] = Σ_j weights[n, j] y[row[n, j]]` in one fused pass."""
    tokens, k = row.shape
    if tokens == 0:
        return y.new_zeros(0, *y.shape[1:])
    if weights is None and k == 1:
        return _take(y, row.view(-1))
    starts = torch.arange(0, tokens * k, k, device=row.device)
    weights = None if weights is None else weights.reshape(-1).to(y.dtype)
    out = sum_bags(y.reshape(y.shape[0], -1), row.reshape(-1), starts, weights)
    return out.view(tokens, *y.shape[1:])


def _take(x: Tensor, rows: Tensor) -> Tensor:
    """`x[rows]`; images keep their memory format, which `index_select` alone would change."""
    if x.dim() == 4 and not x.is_contiguous() and x.is_contiguous(memory_format=torch.channels_last):
        return x.permute(0, 2, 3, 1).index_select(0, rows).permute(0, 3, 1, 2)
    return x.index_select(0, rows)


def sum_bags(table: Tensor, rows: Tensor, starts: Tensor, weights: Tensor | None = None) -> Tensor:
    """Sums of `weights · table[rows]` over the stretches of rows that begin at `starts`.

    What `torch.nn.functional.embedding_bag` does, past its Python checks: they take longer than a small sum.
    """
    sums: Tensor = torch.embedding_bag(table, rows, starts, False, 0, False, weights)[0]
    return sums
