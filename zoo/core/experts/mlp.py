"""E MLPs of one shape with stacked weights: the fast kind."""

from collections.abc import Sequence
from typing import Literal, cast

import torch
from jaxtyping import Float, Int, Int32
from torch import Tensor, nn
from torch.nn import functional as F

from ..activations import ACTIVATIONS, GATED, Activation, activate
from ..dispatch import Plan, combine, dispatch, sum_rows
from ..fused import routed_mlp
from ..grouped import (
    BACKENDS,
    Backend,
    GroupedBackend,
    SortedBackend,
    check_legal,
    computing_dtype,
    follow_autocast,
    grouped_linear,
    grouped_mm_is_legal,
    select_backend,
)
from .base import Experts, mix


class StackedLinear(nn.Module):
    """E linear layers as one parameter [experts, out, in]; each initialised like `nn.Linear`."""

    def __init__(self, num_experts: int, in_dim: int, out_dim: int, bias: bool = True) -> None:
        super().__init__()
        bound = in_dim**-0.5
        self.weight = nn.Parameter(torch.empty(num_experts, out_dim, in_dim).uniform_(-bound, bound))
        self.bias = nn.Parameter(torch.empty(num_experts, out_dim).uniform_(-bound, bound)) if bias else None

    def wide(self, x: Float[Tensor, "tokens in_dim"]) -> Float[Tensor, "tokens experts out_dim"]:
        """All experts on the same tokens: one matmul as wide as all experts together."""
        experts, out_dim, _ = self.weight.shape
        bias = None if self.bias is None else self.bias.reshape(-1)
        return F.linear(x, self.weight.flatten(0, 1), bias).view(-1, experts, out_dim)

    def batched(self, x: Float[Tensor, "experts rows in_dim"]) -> Float[Tensor, "experts rows out_dim"]:
        """Each expert on its own rows."""
        weight = self.weight.transpose(1, 2)
        return torch.bmm(x, weight) if self.bias is None else torch.baddbmm(self.bias[:, None], x, weight)

    def sorted(
        self,
        x: Float[Tensor, "rows in_dim"],
        offsets: Int32[Tensor, "experts"],
        backend: GroupedBackend | Literal["auto"],
        dropless: bool,
    ) -> Float[Tensor, "rows out_dim"]:
        """Each row through its own expert."""
        return grouped_linear(x, self.weight, offsets, self.bias, backend=backend, dropless=dropless)

    def extra_repr(self) -> str:
        experts, out_dim, in_dim = self.weight.shape
        return f"num_experts={experts}, in_dim={in_dim}, out_dim={out_dim}, bias={self.bias is not None}"


class MLPExperts(Experts):
    """E MLPs of the same shape with stacked weights.

    Args:
        hidden: width of the hidden layer, or of each of several; none at all makes linear experts.
        out: output width, `dim` by default.
        act: after each hidden layer; "reglu", "geglu" and "swiglu" double the layer and gate one half with the
            other.
        dropout: after each activation.
        backend: how to compute sorted rows, see `select_backend`; "auto" decides by shape.
    """

    def __init__(
        self,
        num_experts: int,
        dim: int,
        hidden: int | Sequence[int],
        out: int | None = None,
        act: Activation = "gelu",
        bias: bool = True,
        dropout: float = 0.0,
        backend: Backend | Literal["auto"] = "auto",
    ) -> None:
        super().__init__(num_experts)
        if act not in ACTIVATIONS:
            raise ValueError(f"act={act!r} must be one of {', '.join(ACTIVATIONS)}")
        if backend != "auto" and backend not in BACKENDS:
            raise ValueError(f"backend={backend!r} must be 'auto' or one of {', '.join(BACKENDS)}")
        hidden = [hidden] if isinstance(hidden, int) else list(hidden)
        widths = [dim, *hidden, dim if out is None else out]
        if min(widths) < 1:
            raise ValueError(f"layer widths {widths} (input, hidden, output) must all be positive")
        self.dim = dim
        self.out = widths[-1]
        self.act = act
        self.dropout = dropout
        self.backend: Backend | Literal["auto"] = backend
        gated = 2 if act in GATED else 1
        produced = [gated * width for width in hidden] + [self.out]
        self.layers = nn.ModuleList(
            StackedLinear(num_experts, i, o, bias) for i, o in zip(widths, produced, strict=False)
        )
        self.dims = [dim, *(size for layer in self._stack() for size in layer.weight.shape[1:]), self.out]

    def forward(
        self,
        x_sorted: Float[Tensor, "rows dim"],
        plan: Plan,
        *,
        backend: Backend | Literal["auto"] = "auto",
    ) -> Float[Tensor, "rows out"]:
        backend = self._sorted_backend(backend, x_sorted, plan)
        if backend == "padded":
            backend = "segment"  # padding happens on the way to the experts, see routed()
        h = x_sorted
        *hidden, last = self._stack()
        for layer in hidden:
            h = self._activate(layer.sorted(h, plan.offsets, backend, plan.dropless))
        return last.sorted(h, plan.offsets, backend, plan.dropless)

    def routed(
        self,
        x: Float[Tensor, "tokens dim"],
        weights: Float[Tensor, "tokens k"],
        plan: Plan,
        *,
        backend: Backend | Literal["auto"] = "auto",
    ) -> Float[Tensor, "tokens out"]:
        backend = self._sorted_backend(backend, x, plan)
        if self.dropout > 0 and self.training:
            return combine(self(dispatch(x, plan), plan, backend=backend), weights, plan)
        layers = [(layer.weight, layer.bias) for layer in self._stack()]
        return routed_mlp(x, weights, plan, layers, self.act, backend)

    def batched(self, x: Float[Tensor, "experts rows dim"]) -> Float[Tensor, "experts rows out"]:
        *hidden, last = self._stack()
        for layer in hidden:
            x = self._activate(layer.batched(x))
        return last.batched(x)

    def gather(
        self, x: Float[Tensor, "tokens dim"], weights: Float[Tensor, "tokens k"], indices: Int[Tensor, "tokens k"]
    ) -> Float[Tensor, "tokens out"]:
        """One small product per pair of token and expert: the quickest for a token or two on a CPU, without gradients.

        Every index must name an expert.
        """
        layers = [(layer.weight, layer.bias) for layer in self._stack()]
        if torch.is_autocast_enabled(x.device.type):
            x = follow_autocast(x)[0]
            layers = [follow_autocast(*layer) for layer in layers]
        *hidden, (weight, bias) = layers
        weights = weights.to(x.dtype)
        experts = indices.reshape(-1).tolist()
        rows = [row for row in x.unbind() for _ in range(indices.shape[1])]
        for w, b in hidden:
            z = [_affine(w[e], row, None if b is None else b[e]) for row, e in zip(rows, experts, strict=True)]
            rows = list(self._activate(torch.stack(z)).unbind())
        y = x.new_zeros(x.shape[0], self.out) if bias is None else sum_rows(bias, indices, weights)
        targets = [row for row in y.unbind() for _ in range(indices.shape[1])]
        scaled = (torch.stack(rows) * weights.reshape(-1, 1)).unbind() if rows else ()
        for target, row, e in zip(targets, scaled, experts, strict=True):
            target.addmv_(weight[e], row)
        return y

    def dense(
        self, x: Float[Tensor, "tokens dim"], weights: Float[Tensor, "tokens experts"] | None = None
    ) -> Float[Tensor, "tokens *out_dims"]:
        first, *rest = self._stack()
        if first.weight.shape[2] >= first.weight.shape[1]:
            h = first.wide(x).transpose(0, 1)
        else:  # a narrow input is cheaper to read once per expert than a wide output is to rearrange
            h = first.batched(x.expand(self.num_experts, *x.shape))
        for layer in rest:
            h = layer.batched(self._activate(h))
        return h.transpose(0, 1) if weights is None else mix(h.transpose(0, 1), weights)

    def select(self, x: Tensor, top_k: int, tokens: int | None = None) -> Backend:
        return select_backend(
            tokens=x.shape[0] if tokens is None else tokens,
            top_k=top_k,
            num_experts=self.num_experts,
            dims=self.dims,
            dtype=computing_dtype(x),
            device=x.device,
            override=self.backend,
        )

    def _sorted_backend(self, backend: Backend | Literal["auto"], x: Tensor, plan: Plan) -> SortedBackend:
        """The backend for rows that are sorted already, or soon will be."""
        chosen = self.select(x, plan.row.shape[1], tokens=plan.row.shape[0]) if backend == "auto" else backend
        free = backend == "auto" and self.backend == "auto"
        dtype = computing_dtype(x)
        if chosen in ("dense", "gather") or (free and chosen == "padded" and _skewed(plan)):
            chosen = "grouped" if grouped_mm_is_legal(self.dims, dtype) else "segment"
        check_legal(chosen, self.dims, dtype)
        return cast(SortedBackend, chosen)

    def _activate(self, h: Tensor) -> Tensor:
        h = activate(h, self.act)
        return F.dropout(h, self.dropout, self.training) if self.dropout > 0 else h

    def _stack(self) -> list[StackedLinear]:
        return cast("list[StackedLinear]", list(self.layers))

    def extra_repr(self) -> str:
        return f"act={self.act}, dropout={self.dropout}, backend={self.backend}"


def _affine(weight: Float[Tensor, "out dim"], x: Float[Tensor, "dim"], bias: Tensor | None) -> Float[Tensor, "out"]:
    return torch.mv(weight, x) if bias is None else torch.addmv(bias, weight, x)


def _skewed(plan: Plan) -> bool:
    """Whether padding to the busiest expert would cost more than it saves; waits for the device."""
    return bool(plan.counts.max() > max(64, 2 * plan.slot.numel() // plan.num_experts))
