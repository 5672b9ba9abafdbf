"""Dispatch, MLP experts and combine as one node of the autograd graph."""

from collections.abc import Sequence
from typing import Any, cast

import torch
from jaxtyping import Float
from torch import Tensor
from torch.autograd.function import once_differentiable

from .activations import Activation, activate, activate_backward
from .dispatch import Plan, pad_plan, sum_bags, sum_rows
from .grouped import SortedBackend, close, follow_autocast, grad_input, grad_weight, group_rows, matmul


def routed_mlp(
    x: Float[Tensor, "tokens dim"],
    weights: Float[Tensor, "tokens k"],
    plan: Plan,
    layers: Sequence[tuple[Tensor, Tensor | None]],
    act: Activation,
    backend: SortedBackend,
) -> Float[Tensor, "tokens out"]:
    """`combine(mlp(dispatch(x)), weights)` for expert layers `(weight [experts, out, in], bias [experts, out])`.

    The same numbers as the three steps one after another, in one autograd node: at the size of domain experts
    the nodes between them cost as much as the matmuls.
    """
    x, *flat = follow_autocast(x, *(tensor for layer in layers for tensor in layer))
    idle: Tensor | None
    padded = pad_plan(plan) if backend == "padded" else None
    if padded is not None:
        plan, idle = padded
        offsets = plan.offsets
    else:
        backend = "segment" if backend == "padded" else backend  # nobody has rows
        offsets, idle = close(plan.offsets, plan.slot.shape[0], plan.dropless)
    tensors = (plan.slot, plan.token, plan.row, plan.expert, offsets, idle)
    return cast(Tensor, _RoutedMLP.apply(x, weights, *tensors, plan.dropless, act, backend, *flat))


class _RoutedMLP(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weights: Tensor,
        slot: Tensor,
        token: Tensor,
        row: Tensor,
        expert: Tensor,
        offsets: Tensor,
        idle: Tensor | None,  # rows of the tail, or padding: they get no gradient
        dropless: bool,
        act: Activation,
        backend: SortedBackend,
        *layers: Tensor | None,
    ) -> Tensor:
        h = x.index_select(0, token)
        tail = None if idle is None or dropless else idle[:, None]  # rows that slots point to
        if tail is not None:
            h.masked_fill_(tail, 0.0)
        saved = []
        last = len(layers) - 2
        for i in range(0, len(layers), 2):
            weight, bias = layers[i], layers[i + 1]
            assert weight is not None
            z = matmul(h, weight, offsets, backend, bias, expert)
            if i == last and tail is not None:
                z.masked_fill_(tail, 0.0)  # its weights may belong to experts that are not here
            saved += [h, z]
            h = z if i == last else activate(z, act)
        ctx.save_for_backward(weights, slot, token, row, offsets, idle, *saved, *layers)
        ctx.act, ctx.backend = act, backend
        return sum_rows(h, row, weights)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        weights, slot, token, row, offsets, idle, *rest = ctx.saved_tensors
        count = len(rest) // 2
        saved, layers = rest[:count], rest[count:]
        needs = ctx.needs_input_grad
        grad_x = grad_weights = None
        g = grad.index_select(0, token)
        if needs[1]:
            products = (g * saved[-1]).sum(1, dtype=weights.dtype)
            grad_weights = products.index_select(0, row.view(-1)).view_as(row)
        row_weights = weights.reshape(-1).index_select(0, slot).to(g.dtype)
        if idle is not None:
            row_weights.masked_fill_(idle, 0.0)
        g.mul_(row_weights[:, None])
        grads: list[Tensor | None] = [None] * count
        groups = group_rows(offsets, g.shape[0])
        for i in range(count - 2, -1, -2):
            if i < count - 2:
                g = activate_backward(g, saved[i + 1], ctx.act)
            if needs[_FIXED + i]:
                grads[i] = grad_weight(g, saved[i], offsets, ctx.backend)
            if needs[_FIXED + i + 1]:
                grads[i + 1] = sum_bags(g, *groups)
            if i > 0 or needs[0]:
                g = grad_input(g, layers[i], offsets, ctx.backend)
        if needs[0]:
            grad_x = sum_rows(g, row, None)
        return grad_x, grad_weights, *[None] * (_FIXED - 2), *grads


_FIXED = 11  # arguments of forward before the layers
