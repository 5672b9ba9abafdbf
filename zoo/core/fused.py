"""Dispatch, MLP experts and combine as one node of the autograd graph."""

from collections.abc import Sequence
from typing import Any, cast

import torch
from jaxtyping import Float
from torch import Tensor
from torch.autograd.function import once_differentiable

from .activations import Activation, activate, activate_backward
from .dispatch import Plan, sum_bags, sum_rows
from .grouped import SortedBackend, add_bias, close, follow_autocast, grad_input, grad_weight, group_rows, matmul


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
    tensors = (plan.slot, plan.token, plan.row, plan.expert, plan.offsets)
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
        dropless: bool,
        act: Activation,
        backend: SortedBackend,
        *layers: Tensor | None,
    ) -> Tensor:
        offsets, tail = close(offsets, token.shape[0], dropless)
        h = x.index_select(0, token)
        if tail is not None:
            h.masked_fill_(tail, 0.0)
        saved = []
        last = len(layers) - 2
        for i in range(0, len(layers), 2):
            weight, bias = layers[i], layers[i + 1]
            assert weight is not None
            z = matmul(h, weight, offsets, backend)
            if bias is not None:
                add_bias(z, bias, expert)
            if i == last and tail is not None:
                z.masked_fill_(tail, 0.0)  # its weights may belong to experts that are not here
            saved += [h, z]
            h = z if i == last else activate(z, act)
        ctx.save_for_backward(weights, slot, token, row, offsets, tail, *saved, *layers)
        ctx.act, ctx.backend = act, backend
        return sum_rows(h, row, weights)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        weights, slot, token, row, offsets, tail, *rest = ctx.saved_tensors
        count = len(rest) // 2
        saved, layers = rest[:count], rest[count:]
        needs = ctx.needs_input_grad
        grad_x = grad_weights = None
        g = grad.index_select(0, token)
        if tail is not None:
            g.masked_fill_(tail, 0.0)
        if needs[1]:
            products = (g * saved[-1]).sum(1, dtype=weights.dtype)
            grad_weights = products.index_select(0, row.view(-1)).view_as(row)
        g.mul_(weights.reshape(-1).index_select(0, slot).to(g.dtype)[:, None])
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


_FIXED = 10  # arguments of forward before the layers
