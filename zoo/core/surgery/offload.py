"""Experts in host memory, a few of them on the device: a small form of ExpertFlow and its kin."""

from collections import OrderedDict
from collections.abc import Iterable
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from ..activations import activate
from ..dispatch import Plan
from ..experts import Experts, MLPExperts
from ..experts.base import Sorted, mix

_Weights = list[tuple[Tensor, Tensor | None]]


class OffloadedExperts(Experts):
    """`MLPExperts` for inference whose weights stay on the host; the device holds the `cache` last used experts.

    What a batch needs and the cache lacks is fetched (pinned memory, so that copies run beside the work); the least
    recently used make room. `prefetch` fetches ahead, on a stream of its own: ExpertFlow predicts the next layer's
    experts, and the last layer's choice is the simplest prediction. Built from reports of ExpertFlow, which has no
    public code known to us.

    Attributes:
        hits, misses: experts found and not found in the cache when they were needed, since `reset`.

    Args:
        experts: trained; their weights are copied to the host.
        cache: experts on the device at most.
        device: where x is.
    """

    def __init__(self, experts: MLPExperts, cache: int, device: torch.device | str = "cpu") -> None:
        super().__init__(experts.num_experts)
        if not 1 <= cache <= experts.num_experts:
            raise ValueError(f"cache={cache} must lie between 1 and {experts.num_experts} experts")
        self.cache = cache
        self.device = torch.device(device)
        self.act, self.out = experts.act, experts.out
        pin = self.device.type == "cuda"
        self._host: list[_Weights] = [[] for _ in range(experts.num_experts)]
        for layer in experts.layers:
            weight, bias = layer.get_parameter("weight").detach(), layer.bias
            for e, home in enumerate(self._host):
                home.append((_to_host(weight[e], pin), _to_host(bias[e], pin) if isinstance(bias, Tensor) else None))
        self._held: OrderedDict[int, tuple[_Weights, Any]] = OrderedDict()  # with the event that ends the copy
        self._stream = torch.cuda.Stream(self.device) if pin else None
        self.reset()

    def reset(self) -> None:
        """Empty the cache and count anew."""
        self._held.clear()
        self.hits = self.misses = 0

    @property
    def hit_ratio(self) -> float:
        """Share of needed experts that were there; 1 before anything was asked for."""
        asked = self.hits + self.misses
        return self.hits / asked if asked else 1.0

    def prefetch(self, experts: Iterable[int] | Int[Tensor, "*slots"]) -> None:
        """Begin to fetch these experts, as many as the cache holds; the most wanted stay longest. Reads indices."""
        if isinstance(experts, Tensor):
            found, counts = experts[(experts >= 0) & (experts < self.num_experts)].unique(return_counts=True)
            experts = found[counts.argsort(descending=True, stable=True)].tolist()
        wanted = list(dict.fromkeys(experts))[: self.cache][::-1]
        for expert in wanted:  # those there are first out of danger, then the others take the room of what is left
            if expert in self._held:
                self._held.move_to_end(expert)
        for expert in wanted:
            self._fetch(expert)

    @torch.no_grad()
    def forward(
        self, x_sorted: Float[Tensor, "rows dim"], plan: Plan, *, backend: Sorted = "auto"
    ) -> Float[Tensor, "rows out"]:
        """Experts that are there go first. Waits for the device: sizes decide what is fetched."""
        sizes = plan.sizes()
        y = x_sorted.new_zeros(len(x_sorted), self.out)
        groups = list(torch.split(x_sorted[: sum(sizes)], sizes))
        places = list(torch.split(y[: sum(sizes)], sizes))
        needed = [e for e, size in enumerate(sizes) if size]
        for expert in sorted(needed, key=lambda e: e not in self._held):
            places[expert].copy_(self._run(expert, groups[expert]))
        return y

    @torch.no_grad()
    def dense(
        self, x: Float[Tensor, "tokens dim"], weights: Float[Tensor, "tokens experts"] | None = None
    ) -> Float[Tensor, "tokens *out_dims"]:
        order = sorted(range(self.num_experts), key=lambda e: e not in self._held)
        outputs = {expert: self._run(expert, x) for expert in order}
        y = torch.stack([outputs[e] for e in range(self.num_experts)], dim=1)
        return y if weights is None else mix(y, weights)

    def _run(self, expert: int, x: Tensor) -> Tensor:
        if expert in self._held:
            self.hits += 1
        else:
            self.misses += 1
        *hidden, (weight, bias) = self._fetch(expert, wait=True)
        for w, b in hidden:
            x = activate(torch.nn.functional.linear(x, w.to(x.dtype), None if b is None else b.to(x.dtype)), self.act)
        return torch.nn.functional.linear(x, weight.to(x.dtype), None if bias is None else bias.to(x.dtype))

    def _fetch(self, expert: int, wait: bool = False) -> _Weights:
        """The expert's weights on the device, if need be on their way there."""
        if expert not in self._held:
            while len(self._held) >= self.cache:
                self._held.popitem(last=False)
            self._held[expert] = self._copy(expert)
        self._held.move_to_end(expert)
        weights, arrived = self._held[expert]
        if wait and arrived is not None:
            current = torch.cuda.current_stream(self.device)
            current.wait_event(arrived)
            for tensor in (t for layer in weights for t in layer if t is not None):
                tensor.record_stream(current)  # its memory is not given away before the work is done
        return weights

    def _copy(self, expert: int) -> tuple[_Weights, Any]:
        if self._stream is None:
            return self._host[expert], None
        with torch.cuda.stream(self._stream):
            weights: _Weights = [
                (w.to(self.device, non_blocking=True), None if b is None else b.to(self.device, non_blocking=True))
                for w, b in self._host[expert]
            ]
            return weights, self._stream.record_event()


def _to_host(tensor: Tensor, pin: bool) -> Tensor:
    host = tensor.detach().cpu().clone()
    return host.pin_memory() if pin else host
