"""What every kind of experts can do."""

from abc import ABC, abstractmethod
from typing import Literal, get_args

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from ..dispatch import Plan, combine, dispatch, make_plan
from ..grouped import Backend, GroupedBackend, row_experts

Sorted = Backend | Literal["auto"]


class Experts(nn.Module, ABC):
    """E experts that can run on rows sorted by expert, or all on every token."""

    def __init__(self, num_experts: int) -> None:
        super().__init__()
        if num_experts < 1:
            raise ValueError(f"num_experts={num_experts} must be at least 1")
        self.num_experts = num_experts

    @abstractmethod
    def forward(
        self,
        x_sorted: Float[Tensor, "rows *dims"],
        plan: Plan,
        *,
        backend: Sorted = "auto",
    ) -> Float[Tensor, "rows *out_dims"]:
        """Each row through its own expert. Rows of the plan's tail give zero.

        A kind that lacks the asked backend runs in its own way.
        """

    @abstractmethod
    def dense(
        self, x: Float[Tensor, "tokens *dims"], weights: Float[Tensor, "tokens experts"] | None = None
    ) -> Float[Tensor, "tokens *out_dims"]:
        """Every expert on every token: [tokens, experts, out], or summed with `weights`: [tokens, out]."""

    def routed(
        self,
        x: Float[Tensor, "tokens *dims"],
        weights: Float[Tensor, "tokens k"],
        plan: Plan,
        *,
        backend: Backend | Literal["auto"] = "auto",
    ) -> Float[Tensor, "tokens *out_dims"]:
        """Dispatch, every row through its own expert, combine."""
        return combine(self(dispatch(x, plan), plan, backend=backend), weights, plan)

    def batched(self, x: Float[Tensor, "experts rows *dims"]) -> Float[Tensor, "experts rows *out_dims"]:
        """Every expert on rows of its own, as many for each."""
        expert = torch.arange(self.num_experts, device=x.device).repeat_interleave(x.shape[1])
        y: Tensor = self(x.flatten(0, 1), make_plan(expert[:, None], self.num_experts, dropless=True))
        out: Tensor = y.unflatten(0, x.shape[:2])
        return out

    def gather(
        self, x: Float[Tensor, "tokens *dims"], weights: Float[Tensor, "tokens k"], indices: Int[Tensor, "tokens k"]
    ) -> Float[Tensor, "tokens *out_dims"]:
        """The quickest way for a token or two without gradients; every index names an expert."""
        return self.routed(x, weights, make_plan(indices, self.num_experts, dropless=True))

    def select(self, x: Tensor, top_k: int) -> Backend:
        """The backend that suits `top_k` of these experts on the tokens `x`."""
        return "dense" if top_k == self.num_experts else "segment"


def mix(
    y: Float[Tensor, "tokens experts *dims"], weights: Float[Tensor, "tokens experts"]
) -> Float[Tensor, "tokens *dims"]:
    """Each token's outputs of all experts, weighted and summed."""
    with torch.autocast(y.device.type, enabled=False):  # the sum keeps the dtype of y, as `combine` does
        mixed = torch.bmm(weights.to(y.dtype)[:, None], y.reshape(*weights.shape, y.shape[2:].numel()))
    return mixed.view(weights.shape[0], *y.shape[2:])


def keep_own(y: Float[Tensor, "rows experts *dims"], plan: Plan) -> Float[Tensor, "rows *dims"]:
    """Of every expert's output each row's own, zero in the tail: a way to run sorted rows that reads no sizes."""
    expert = row_experts(plan.offsets, y.shape[0]).view(-1, *[1] * (y.dim() - 1))
    index = expert.clamp(max=y.shape[1] - 1).expand(-1, 1, *y.shape[2:])
    return y.gather(1, index).squeeze(1).masked_fill(expert.squeeze(1) == y.shape[1], 0.0)


def matmul_backend(backend: Sorted) -> GroupedBackend | Literal["auto"]:
    """What `grouped_linear` is asked for; it knows neither "dense" nor "padded" nor "gather"."""
    return backend if backend in get_args(GroupedBackend) else "auto"  # type: ignore[return-value]


def wide_is_quicker(numel: int, width: int, num_experts: int, top_k: int) -> bool:
    """Whether all E layers of `width` on every token cost less on a CPU than sorting for k of them; measured.

    A slot costs as much to move as some 40 more outputs, a plan as much as three million products.
    """
    return (num_experts * width - top_k * (width + 40)) * numel < 3_000_000
