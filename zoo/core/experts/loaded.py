"""Experts that are too large to keep: each is loaded once per batch, whoever asks for it (Symbolic-MoE)."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from ..dispatch import Plan
from .base import Experts, Sorted, mix


@dataclass
class ExpertGroup:
    """What one expert has to do in a batch: the instances, and the slot in which each chose it."""

    expert: int
    instances: Int[Tensor, "instances"]
    slots: Int[Tensor, "instances"]


def group_by_expert(
    indices: Int[Tensor, "instances k"], num_experts: int, first: int | None = None
) -> Iterator[ExpertGroup]:
    """The batch expert by expert: each that anyone chose comes once, with all its instances.

    For experts that are processes, files or models too large to be held together: load, answer all, let go
    (batched inference of Symbolic-MoE, Chen et al. 2025). `first` comes first, if chosen: the one still loaded.
    Indices outside `[0, num_experts)` are left out. Waits for the device once.
    """
    flat, order = torch.sort(indices.reshape(-1), stable=True)
    experts = range(num_experts) if first is None else [first, *(e for e in range(num_experts) if e != first)]
    ends = torch.searchsorted(flat, torch.arange(-1, num_experts, device=flat.device), right=True).tolist()
    for expert in experts:
        pairs = order[ends[expert] : ends[expert + 1]]
        if len(pairs):
            yield ExpertGroup(expert, pairs // indices.shape[1], pairs % indices.shape[1])


class LoadedExperts(Experts):
    """Experts that `load(e)` fetches when they are needed and that are let go afterwards; no parameters of its own.

    A batch loads each expert that it uses once, however its instances are ordered, and begins with the one that the
    last batch ended with. `loads` counts the calls. For inference: gradients reach x, but a module that is let go
    does not learn.

    Args:
        load: gives expert e as a module on the device of x, [rows, ...] -> [rows, ...]; may read a file.
    """

    def __init__(self, num_experts: int, load: Callable[[int], nn.Module]) -> None:
        super().__init__(num_experts)
        self.load = load
        self.loads = 0
        self._held: list[tuple[int, nn.Module]] = []  # at most one, in a list so that it is no submodule

    def forward(
        self, x_sorted: Float[Tensor, "rows *dims"], plan: Plan, *, backend: Sorted = "auto"
    ) -> Float[Tensor, "rows *out_dims"]:
        """Waits for the device: sizes decide what is loaded."""
        groups = list(torch.split(x_sorted[: sum(plan.sizes())], plan.sizes()))
        outputs: dict[int, Tensor] = {}
        for expert in self._order([e for e, rows in enumerate(groups) if len(rows)] or [0]):
            outputs[expert] = self._fetch(expert)(groups[expert])
        done = torch.cat([outputs[expert] for expert in sorted(outputs)])
        if len(done) < len(x_sorted):
            done = torch.cat([done, done.new_zeros(len(x_sorted) - len(done), *done.shape[1:])])
        return done

    def dense(
        self, x: Float[Tensor, "tokens *dims"], weights: Float[Tensor, "tokens experts"] | None = None
    ) -> Float[Tensor, "tokens *out_dims"]:
        outputs = {expert: self._fetch(expert)(x) for expert in self._order(list(range(self.num_experts)))}
        y = torch.stack([outputs[expert] for expert in range(self.num_experts)], dim=1)
        return y if weights is None else mix(y, weights)

    def _order(self, wanted: list[int]) -> list[int]:
        held = [expert for expert, _ in self._held]
        return sorted(wanted, key=lambda expert: (expert not in held, expert))

    def _fetch(self, expert: int) -> nn.Module:
        if not self._held or self._held[0][0] != expert:
            self._held.clear()  # before the next one comes
            self.loads += 1
            self._held.append((expert, self.load(expert)))
        return self._held[0][1]
