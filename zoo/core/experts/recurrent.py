"""LSTMs or GRUs as experts: all of them advance together, one batched matmul per time step."""

from collections.abc import Sequence
from itertools import pairwise
from typing import Any, Literal, cast

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from ..dispatch import Plan
from ..grouped import Backend, group_sizes, row_experts
from .base import Experts, Sorted, keep_own, mix
from .mlp import StackedLinear


class RecurrentExperts(Experts):
    """E one-layer LSTMs or GRUs that start from zero; rows are sequences [rows, time, dim].

    `nn.LSTM` and `nn.GRU` per expert, same equations, gate order and initialisation: `input.weight` [experts,
    gates·hidden, dim] and `recurrent.weight` [experts, gates·hidden, hidden] are their `weight_ih_l0` and
    `weight_hh_l0`, stacked.

    Sorted rows are padded to equal groups, so group sizes are read on the host; where that would more than
    double the work, experts run one after another. Compiled code, and `backend="dense"`, run every expert on
    every row instead and keep each row's own.

    Args:
        last: give the state after the last step, [rows, hidden], instead of every step's.
    """

    def __init__(
        self,
        num_experts: int,
        dim: int,
        hidden: int,
        kind: Literal["lstm", "gru"] = "lstm",
        bias: bool = True,
        last: bool = False,
    ) -> None:
        super().__init__(num_experts)
        if kind not in ("lstm", "gru"):
            raise ValueError(f"kind={kind!r} must be 'lstm' or 'gru'")
        if min(dim, hidden) < 1:
            raise ValueError(f"dim={dim} and hidden={hidden} must be positive")
        self.dim, self.out, self.kind, self.last = dim, hidden, kind, last
        gates = (4 if kind == "lstm" else 3) * hidden
        self.input = StackedLinear(num_experts, dim, gates, bias)
        self.recurrent = StackedLinear(num_experts, hidden, gates, bias)
        for parameter in self.parameters():
            nn.init.uniform_(parameter, -(hidden**-0.5), hidden**-0.5)

    @classmethod
    def from_modules(cls, modules: Sequence[nn.LSTM] | Sequence[nn.GRU], last: bool = False) -> "RecurrentExperts":
        """Experts with copies of the weights of `nn.LSTM`s or `nn.GRU`s of one shape: one layer, one direction."""
        shapes = {(type(m), m.input_size, m.hidden_size, m.bias) for m in modules}
        if len(shapes) != 1 or not isinstance(modules[0], nn.LSTM | nn.GRU):
            raise ValueError("modules must be nn.LSTM or nn.GRU, at least one, all of one size and kind")
        first = modules[0]
        if any(m.num_layers > 1 or m.bidirectional or m.proj_size for m in modules):
            raise ValueError("modules must have one layer, one direction and no projection")
        kind: Literal["lstm", "gru"] = "lstm" if isinstance(first, nn.LSTM) else "gru"
        experts = cls(len(modules), first.input_size, first.hidden_size, kind, first.bias, last)
        experts.to(cast(Tensor, first.weight_ih_l0))
        with torch.no_grad():
            for layer, suffix in ((experts.input, "ih_l0"), (experts.recurrent, "hh_l0")):
                for name, parameter in layer.named_parameters():
                    parameter.copy_(torch.stack([getattr(m, f"{name}_{suffix}") for m in modules]))
        return experts

    def forward(
        self, x_sorted: Float[Tensor, "rows time dim"], plan: Plan, *, backend: Sorted = "auto"
    ) -> Float[Tensor, "rows *out_dims"]:
        if backend == "dense" or torch.compiler.is_compiling():
            return keep_own(self.dense(x_sorted), plan)
        sizes = group_sizes(plan.offsets)
        rows, served = x_sorted.shape[0], sum(sizes)
        if self.num_experts * max(sizes) > 2 * served > 0:
            groups = [(e, x) for e, x in enumerate(x_sorted[:served].split(sizes)) if x.shape[0] > 0]
            y = torch.cat([self._run(x[None], slice(e, e + 1))[0] for e, x in groups])
        else:
            place = _places(plan, max(sizes), served)
            padded = x_sorted.new_zeros(self.num_experts * max(sizes), *x_sorted.shape[1:])
            padded = padded.index_copy(0, place, x_sorted[:served])
            y = self._run(padded.unflatten(0, (self.num_experts, max(sizes)))).flatten(0, 1).index_select(0, place)
        return y if served == rows else torch.cat([y, y.new_zeros(rows - served, *y.shape[1:])])

    def dense(
        self, x: Float[Tensor, "tokens time dim"], weights: Float[Tensor, "tokens experts"] | None = None
    ) -> Float[Tensor, "tokens *out_dims"]:
        y = self._run(x.expand(self.num_experts, *x.shape)).transpose(0, 1)
        return y if weights is None else mix(y, weights)

    def select(self, x: Tensor, top_k: int) -> Backend:
        # Steps wait for each other: a few rows more per step cost less than a sort and the padding.
        compiling = torch.compiler.is_compiling()
        return "dense" if compiling or 4 * top_k >= 3 * self.num_experts else "segment"

    def _run(
        self, x: Float[Tensor, "experts rows time dim"], experts: slice = slice(None)
    ) -> Float[Tensor, "experts rows *out_dims"]:
        parameters = [self.input.weight, self.recurrent.weight, self.input.bias, self.recurrent.bias]
        chosen = [None if p is None else p[experts] for p in parameters]
        if torch.is_autocast_enabled(x.device.type):
            dtype = torch.get_autocast_dtype(x.device.type)
            x, chosen = x.to(dtype), [None if p is None else p.to(dtype) for p in chosen]
        function = _LSTM if self.kind == "lstm" else _GRU
        states = cast(Tensor, function.apply(x.transpose(1, 2), *chosen, self.last))
        return states if self.last else states.transpose(1, 2)

    def extra_repr(self) -> str:
        return f"kind={self.kind}, last={self.last}"


def _places(plan: Plan, longest: int, served: int) -> Tensor:
    """Where each sorted row lies once groups are padded to `longest`."""
    expert = row_experts(plan.offsets, served)
    starts = plan.offsets - plan.counts
    return torch.arange(served, device=expert.device) - starts.index_select(0, expert) + expert * longest


class _LSTM(torch.autograd.Function):
    """`i, f, g, o = W_i x_t + W_h h_{t-1} + b`, `c_t = σ(f) c_{t-1} + σ(i) tanh(g)`, `h_t = σ(o) tanh(c_t)`.

    x is [experts, time, rows, dim]. Steps write into one buffer, all factors of the backward pass that do not
    wait for a later step are computed for all steps at once, and so are the weights' gradients.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, w_in: Tensor, w_rec: Tensor, b_in: Tensor | None, b_rec: Tensor | None, last: bool
    ) -> Tensor:
        hidden = w_rec.shape[2]
        gates = _project(x, w_in, None if b_in is None or b_rec is None else b_in + b_rec)
        cells, states = _states(gates, hidden), _states(gates, hidden)
        tanh_cells = torch.empty_like(states[:, 1:])
        recurrent = w_rec.transpose(1, 2)
        for a, (c, c_next), (h, h_next), tanh_c in zip(
            gates.unbind(1), pairwise(cells.unbind(1)), pairwise(states.unbind(1)), tanh_cells.unbind(1), strict=True
        ):
            a.baddbmm_(h, recurrent)
            i, f, g, o = a.chunk(4, -1)
            a[..., : 2 * hidden].sigmoid_()
            _tanh_(g)
            o.sigmoid_()
            c_next.copy_(c).mul_(f).addcmul_(i, g)
            h_next.copy_(_tanh_(tanh_c.copy_(c_next))).mul_(o)
        ctx.save_for_backward(x, w_in, w_rec, gates, cells, tanh_cells, states)
        ctx.last, ctx.bias = last, b_in is not None
        return states[:, -1].clone() if last else states[:, 1:]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, w_in, w_rec, gates, cells, tanh_cells, states = ctx.saved_tensors
        i, f, g, o = gates.chunk(4, -1)
        d_gates = torch.addcmul(gates, gates, gates, value=-1).unflatten(-1, (4, -1))
        d_i, d_f, d_g, d_o = d_gates.unbind(-2)
        d_i.mul_(g)
        d_f.mul_(cells[:, :-1])
        d_g.copy_(i).addcmul_(i * g, g, value=-1)
        d_o.mul_(tanh_cells)
        of_cell = torch.addcmul(o, o * tanh_cells, tanh_cells, value=-1)
        d_state, d_cell = _zero_step(states), _zero_step(states)
        steps = [_by_step(grad, of_cell, ctx.last), of_cell.unbind(1), f.unbind(1), d_gates.unbind(1)]
        for incoming, k, forget, d in reversed(list(zip(*steps, strict=True))):
            d_state = d_state if incoming is None else d_state + incoming
            d_cell.addcmul_(d_state, k)
            d[:, :, :3].mul_(d_cell[:, :, None])
            d[:, :, 3].mul_(d_state)
            d_cell.mul_(forget)
            d_state = torch.bmm(d.flatten(2), w_rec)
        d_gates = d_gates.flatten(-2)
        d_bias = d_gates.sum((1, 2)) if ctx.bias else None
        return *_project_backward(ctx, x, w_in, d_gates), _recurrent_gradient(d_gates, states), d_bias, d_bias, None


class _GRU(torch.autograd.Function):
    """`r, z = σ(W_i x_t + W_h h_{t-1} + b)`, `n = tanh(W_n x_t + b_n + r (W'_n h_{t-1} + b'_n))`,
    `h_t = n + z (h_{t-1} - n)`; x and the order of work as for `_LSTM`."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, w_in: Tensor, w_rec: Tensor, b_in: Tensor | None, b_rec: Tensor | None, last: bool
    ) -> Tensor:
        hidden = w_rec.shape[2]
        gates = _project(x, w_in, b_in)
        states = _states(gates, hidden)
        inner = torch.empty_like(states[:, 1:])
        recurrent = w_rec.transpose(1, 2)
        for a, (h, h_next), inner_n in zip(gates.unbind(1), pairwise(states.unbind(1)), inner.unbind(1), strict=True):
            from_state = torch.bmm(h, recurrent) if b_rec is None else torch.baddbmm(b_rec[:, None], h, recurrent)
            a[..., : 2 * hidden].add_(from_state[..., : 2 * hidden]).sigmoid_()
            inner_n.copy_(from_state[..., 2 * hidden :])
            r, z, n = a.chunk(3, -1)
            _tanh_(n.addcmul_(r, inner_n))
            h_next.copy_(n).lerp_(h, z)
        ctx.save_for_backward(x, w_in, w_rec, gates, inner, states)
        ctx.last, ctx.bias = last, b_in is not None
        return states[:, -1].clone() if last else states[:, 1:]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, w_in, w_rec, gates, inner, states = ctx.saved_tensors
        r, z, n = gates.chunk(3, -1)
        # What the recurrent layer's outputs get differs from what the input layer's get in n alone, by r.
        d_rec = torch.addcmul(gates, gates, gates, value=-1).unflatten(-1, (3, -1))
        d_r, d_z, d_n = d_rec.unbind(-2)
        of_n = (1 - z).mul_(1 - n * n)
        d_r.mul_(inner).mul_(of_n)
        d_z.mul_(states[:, :-1] - n)
        d_n.copy_(of_n).mul_(r)
        d_state = _zero_step(states)
        steps = [_by_step(grad, of_n, ctx.last), of_n.unbind(1), z.unbind(1), d_rec.unbind(1)]
        for incoming, k, keep, d in reversed(list(zip(*steps, strict=True))):
            d_state = d_state if incoming is None else d_state + incoming
            d.mul_(d_state[:, :, None])
            k.mul_(d_state)
            d_state = torch.baddbmm(d_state * keep, d.flatten(2), w_rec)
        d_rec = d_rec.flatten(-2)
        d_in = torch.cat([d_rec[..., : 2 * of_n.shape[-1]], of_n], -1)
        d_b_in, d_b_rec = (d_in.sum((1, 2)), d_rec.sum((1, 2))) if ctx.bias else (None, None)
        return *_project_backward(ctx, x, w_in, d_in), _recurrent_gradient(d_rec, states), d_b_in, d_b_rec, None


def _project(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Every step's input through the gates' layer: [experts, time, rows, gates]."""
    rows, weight = x.flatten(1, 2), weight.transpose(1, 2)
    out = torch.bmm(rows, weight) if bias is None else torch.baddbmm(bias[:, None], rows, weight)
    return out.view(*x.shape[:3], out.shape[2])


def _project_backward(ctx: Any, x: Tensor, weight: Tensor, d_gates: Tensor) -> tuple[Tensor | None, Tensor]:
    flat = d_gates.flatten(1, 2)
    d_x = torch.bmm(flat, weight).view(x.shape) if ctx.needs_input_grad[0] else None
    return d_x, torch.bmm(flat.transpose(1, 2), x.flatten(1, 2))


def _recurrent_gradient(d_gates: Tensor, states: Tensor) -> Tensor:
    return torch.bmm(d_gates.flatten(1, 2).transpose(1, 2), states[:, :-1].flatten(1, 2))


def _states(gates: Tensor, hidden: int) -> Tensor:
    """Room for the state before the first step, which is zero, and after each."""
    experts, time, rows, _ = gates.shape
    states = gates.new_empty(experts, time + 1, rows, hidden)
    states[:, 0] = 0.0
    return states


def _zero_step(states: Tensor) -> Tensor:
    return states.new_zeros(states.shape[0], *states.shape[2:])


def _by_step(grad: Tensor, states: Tensor, last: bool) -> Sequence[Tensor | None]:
    """The gradient that the output hands to each step's state."""
    return [*[None] * (states.shape[1] - 1), grad][-states.shape[1] :] if last else grad.unbind(1)


def _tanh_(x: Tensor) -> Tensor:
    """In place. On the CPU torch's sigmoid is five times as fast as its tanh; in 16 bits it would be too coarse."""
    if x.device.type == "cpu" and x.dtype.itemsize >= 4:
        return x.mul_(2).sigmoid_().mul_(2).sub_(1)
    return x.tanh_()
