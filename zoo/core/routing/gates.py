"""Gates: from what the router sees to one logit per expert. Routers are composed with them."""

from abc import ABC, abstractmethod

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn


class Gate(nn.Module, ABC):
    """Anything that scores experts: `gate(x, task_id) -> logits`, in at least fp32.

    `out_features` is the number of logits: the router's experts, real and extra.
    """

    def __init__(self, out_features: int) -> None:
        super().__init__()
        self.out_features = out_features

    @abstractmethod
    def forward(
        self, x: Float[Tensor, "tokens *features"], task_id: Int[Tensor, "tokens *slots"] | None = None
    ) -> Float[Tensor, "tokens experts"]: ...


class LinearGate(Gate):
    """`W x + b`: the gate of nearly every MoE.

    Args:
        bias: learn `b`, from zero.
        std: the standard deviation of the initial W; 0 starts with all experts alike (Shazeer et al. 2017).
    """

    def __init__(self, dim: int, num_experts: int, bias: bool = False, std: float = 0.02) -> None:
        super().__init__(num_experts)
        self.weight = nn.Parameter(torch.empty(num_experts, dim).normal_(0.0, std))
        self.bias = nn.Parameter(torch.zeros(num_experts)) if bias else None

    def forward(
        self, x: Float[Tensor, "tokens dim"], task_id: Int[Tensor, "tokens *slots"] | None = None
    ) -> Float[Tensor, "tokens experts"]:
        return linear_logits(x, self.weight, self.bias)

    def extra_repr(self) -> str:
        return f"{self.weight.shape[1]}, {self.out_features}, bias={self.bias is not None}"


class TaskGate(Gate):
    """A linear gate per task, `W_t x` with `t = task_id` of the token (M³ViT, Liang et al. 2022).

    All tasks' logits are computed and one row of each token kept: for a handful of tasks cheaper than fetching
    a matrix per token.
    """

    def __init__(self, dim: int, num_experts: int, num_tasks: int, std: float = 0.02) -> None:
        super().__init__(num_experts)
        if num_tasks < 1:
            raise ValueError(f"num_tasks={num_tasks} must be at least 1")
        self.weight = nn.Parameter(torch.empty(num_tasks, num_experts, dim).normal_(0.0, std))

    def forward(
        self, x: Float[Tensor, "tokens dim"], task_id: Int[Tensor, "tokens *slots"] | None = None
    ) -> Float[Tensor, "tokens experts"]:
        if task_id is None or task_id.shape != x.shape[:1]:
            given = "none" if task_id is None else f"shape {list(task_id.shape)}"
            raise ValueError(f"TaskGate needs task_id, the task of every token, shape [{x.shape[0]}]; got {given}")
        tasks, experts, _ = self.weight.shape
        every_task = linear_logits(x, self.weight.flatten(0, 1)).unflatten(1, (tasks, experts))
        own = task_id.to(torch.int64).view(-1, 1, 1).expand(-1, 1, experts)
        logits: Tensor = every_task.gather(1, own).squeeze(1)
        return logits

    def extra_repr(self) -> str:
        tasks, experts, dim = self.weight.shape
        return f"{dim}, {experts}, num_tasks={tasks}"


class StaticGate(Gate):
    """The same learned logits for every token, or for every token of a task: a choice that no input changes.

    Args:
        num_tasks: with more than one, `task_id` [tokens] says whose logits a token gets.
    """

    def __init__(self, num_experts: int, num_tasks: int = 1, std: float = 0.02) -> None:
        super().__init__(num_experts)
        if num_tasks < 1:
            raise ValueError(f"num_tasks={num_tasks} must be at least 1")
        self.weight = nn.Parameter(torch.empty(num_tasks, num_experts).normal_(0.0, std))

    def forward(
        self, x: Float[Tensor, "tokens *features"], task_id: Int[Tensor, "tokens *slots"] | None = None
    ) -> Float[Tensor, "tokens experts"]:
        weight = self.weight.to(torch.promote_types(self.weight.dtype, torch.float32))
        if len(weight) == 1:
            return weight.expand(x.shape[0], -1)
        if task_id is None or task_id.shape != x.shape[:1]:
            given = "none" if task_id is None else f"shape {list(task_id.shape)}"
            raise ValueError(f"StaticGate needs task_id, the task of every token, shape [{x.shape[0]}]; got {given}")
        return weight.index_select(0, task_id)

    def extra_repr(self) -> str:
        return f"{self.out_features}, num_tasks={len(self.weight)}"


def linear_logits(
    x: Float[Tensor, "tokens dim"],
    weight: Float[Tensor, "experts dim"],
    bias: Float[Tensor, "experts"] | None = None,
) -> Float[Tensor, "tokens experts"]:
    """`x @ weight.T + bias` in at least fp32."""
    dtype = x.dtype
    if dtype != weight.dtype or (dtype != torch.float32 and dtype != torch.float64):
        dtype = torch.promote_types(torch.promote_types(dtype, weight.dtype), torch.float32)
        x, weight, bias = x.to(dtype), weight.to(dtype), bias if bias is None else bias.to(dtype)
    return nn.functional.linear(x, weight, bias)
