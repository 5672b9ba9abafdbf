"""Finding the experts in any model, and what they are asked."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ..experts import Experts, StackedLinear
from ..routing import Router
from .dense import read_mlp


def stacked_layers(experts: Experts) -> list[StackedLinear]:
    """The layers that hold the experts' weights, [experts, out, in] each; none where they are stored otherwise."""
    return [part for part in experts.modules() if isinstance(part, StackedLinear)]


def expert_pools(model: nn.Module) -> dict[str, Experts]:
    """The model's pools of several experts that are nothing but stacked linear layers, by module name.

    `MLPExperts` and whatever else is built of `StackedLinear` alone: its answers are zero where its weights are.
    """
    return {
        name: part
        for name, part in model.named_modules()
        if isinstance(part, Experts) and part.num_experts > 1 and _is_stacked(part)
    }


def dense_mlps(model: nn.Module) -> dict[str, nn.Sequential]:
    """The model's dense MLPs with one hidden layer, which `split_mlp` and `upcycle` take, by module name."""
    found = {}
    for name, part in model.named_modules():
        if isinstance(part, nn.Sequential):
            try:
                layers = read_mlp(part).layers
            except ValueError:
                continue
            if len(layers) == 2:
                found[name] = part
    return found


def routers_of(model: nn.Module, experts: Experts) -> dict[str, Router]:
    """The model's routers over as many experts as the pool has: those that may send it tokens."""
    return {
        name: part
        for name, part in model.named_modules()
        if isinstance(part, Router) and part.num_experts == experts.num_experts
    }


@contextmanager
def watched_inputs(experts: Experts) -> Iterator[list[Tensor]]:
    """A list that fills with the tokens [tokens, dim] of every call of the pool within the block."""
    seen: list[Tensor] = []

    def watching(method: Any) -> Any:
        def call(x: Tensor, *args: Any, **kwargs: Any) -> Any:
            seen.append(x.detach())
            return method(x, *args, **kwargs)

        return call

    names = ("dense", "routed", "gather")
    for name in names:
        object.__setattr__(experts, name, watching(getattr(experts, name)))
    try:
        yield seen
    finally:
        for name in names:
            object.__delattr__(experts, name)


@contextmanager
def restored(module: nn.Module) -> Iterator[None]:
    """The module's parameters are after the block what they were before it, whatever was written into them."""
    before = [(parameter, parameter.detach().clone()) for parameter in module.parameters()]
    try:
        yield
    finally:
        with torch.no_grad():
            for parameter, old in before:
                parameter.copy_(old)


@contextmanager
def replaced(model: nn.Module, name: str, part: nn.Module) -> Iterator[None]:
    """Another module in the place of the one of this name, within the block."""
    owner, _, leaf = name.rpartition(".")
    home, before = model.get_submodule(owner), model.get_submodule(name)
    setattr(home, leaf, part)
    try:
        yield
    finally:
        setattr(home, leaf, before)


def _is_stacked(experts: Experts) -> bool:
    layers = stacked_layers(experts)
    held = sum(parameter.numel() for layer in layers for parameter in layer.parameters())
    return bool(layers) and held == sum(parameter.numel() for parameter in experts.parameters())
