"""Finding the experts in any model, and what they are asked."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from ..experts import MLPExperts
from ..routing import Router


def expert_pools(model: nn.Module) -> dict[str, MLPExperts]:
    """The model's pools of several stacked experts, by module name."""
    return {name: part for name, part in model.named_modules() if isinstance(part, MLPExperts) and part.num_experts > 1}


def routers_of(model: nn.Module, experts: MLPExperts) -> dict[str, Router]:
    """The model's routers over as many experts as the pool has: those that may send it tokens."""
    return {
        name: part
        for name, part in model.named_modules()
        if isinstance(part, Router) and part.num_experts == experts.num_experts
    }


@contextmanager
def watched_inputs(experts: MLPExperts) -> Iterator[list[Tensor]]:
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
