"""Arbitrary modules as experts."""

from collections.abc import Callable, Sequence

import torch
from jaxtyping import Float
from torch import Tensor, nn

from ..dispatch import Plan
from ..grouped import group_sizes
from .base import Experts, Sorted, mix


class ModuleExperts(Experts):
    """Arbitrary modules as experts, [rows, ...] -> [rows, ...]; they run one after another.

    Prefer `MLPExperts`, `ConvExperts` or `RecurrentExperts` where the experts are such, of one shape.

    Args:
        experts: the modules, or a factory that is called `num_experts` times.
        call_idle: in training, also call experts without rows, on no rows, so that each of their parameters gets
            a gradient of zero: DistributedDataParallel wants one (or `find_unused_parameters=True`). Costs a
            call per idle expert, and moves the running statistics of a BatchNorm, so it is off by default: an
            idle expert is then not called and gets no gradient.
    """

    def __init__(
        self,
        experts: Callable[[], nn.Module] | Sequence[nn.Module],
        num_experts: int | None = None,
        call_idle: bool = False,
    ) -> None:
        if isinstance(experts, Sequence):
            modules = list(experts)
            if num_experts not in (None, len(modules)):
                raise ValueError(f"num_experts={num_experts} but {len(modules)} experts were given")
        elif num_experts is None:
            raise ValueError("a factory of experts needs num_experts")
        else:
            modules = [experts() for _ in range(num_experts)]
        super().__init__(len(modules))
        self.experts = nn.ModuleList(modules)
        self.call_idle = call_idle

    def forward(
        self,
        x_sorted: Float[Tensor, "rows *dims"],
        plan: Plan,
        *,
        backend: Sorted = "auto",
    ) -> Float[Tensor, "rows *out_dims"]:
        sizes = group_sizes(plan.offsets)
        total = sum(sizes)
        groups = zip(self.experts, torch.split(x_sorted[:total], sizes), strict=True)
        everyone = self.call_idle and self.training
        outputs = [expert(rows) for expert, rows in groups if everyone or rows.shape[0] > 0]
        if not outputs:  # no rows at all: ask an expert for the shape of its output
            outputs = [self.experts[0](x_sorted[:0])]
        if total < x_sorted.shape[0]:
            outputs.append(outputs[0].new_zeros(x_sorted.shape[0] - total, *outputs[0].shape[1:]))
        return torch.cat(outputs)

    def dense(
        self, x: Float[Tensor, "tokens *dims"], weights: Float[Tensor, "tokens experts"] | None = None
    ) -> Float[Tensor, "tokens *out_dims"]:
        y = torch.stack([expert(x) for expert in self.experts], dim=1)
        return y if weights is None else mix(y, weights)
