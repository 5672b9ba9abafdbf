"""Routed CNNs: one decision per image, by which it goes through a pathway of expert convolutions (AdvMoE).

The images are sorted by expert once, and stay sorted through every layer of the network that a router rules; with
running statistics in place of those of the batch, each expert's images go through the whole network on their own.
"""

import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from math import prod

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from .dispatch import Plan, dispatch, make_plan, restore
from .experts import ConvExperts, Experts
from .experts.base import Sorted
from .routing import Router, Routing

# Convolutions that all pathways share in AdvMoE: shortcuts, transitions between blocks, heads.
_SHARED = re.compile(r"(^|\.)(downsample|shortcut|transition|trans|pre_logits|head|fc|classifier)\d*(\.|$)")


class Pathway:
    """What the routed convolutions of one router must know of the rows they are given, while it runs them.

    Attributes:
        rows: the plan by which rows are sorted, or the one expert that all rows go to.
        gate: what each row's outputs are multiplied with.
    """

    def __init__(self) -> None:
        self.rows: Plan | int | None = None
        self.gate: Tensor | None = None


class RoutedConv2d(ConvExperts):
    """A convolution of which every expert has its own weight, in the place of an `nn.Conv2d`.

    The weight is packed [experts·out, in / groups, *kernel], as in AdvMoE's checkpoints.

    Args:
        conv: gives sizes, device and dtype.
        num_experts: each has the size of `conv`.
        pathway: shared by all layers of one router.
        upcycle: every expert starts with the weight of `conv`; else with one of its own, Kaiming-normal by fan-out.

    Raises:
        ValueError: `conv` pads with anything but zeros.
    """

    def __init__(self, conv: nn.Conv2d, num_experts: int, pathway: Pathway, upcycle: bool = False) -> None:
        if conv.padding_mode != "zeros":
            raise ValueError(f"padding_mode={conv.padding_mode!r}: expected 'zeros', others cannot be routed")
        super().__init__(
            num_experts,
            conv.in_channels,
            conv.out_channels,
            conv.kernel_size,
            conv.stride,
            conv.padding,  # type: ignore[arg-type]
            conv.dilation,
            conv.groups,
            bias=conv.bias is not None,
        )
        self.to(conv.weight.device, conv.weight.dtype)
        self.pathway = pathway
        with torch.no_grad():
            if upcycle:
                self.weight.copy_(conv.weight.repeat(num_experts, 1, 1, 1))
            else:
                self.weight.normal_(0.0, (2 / (conv.out_channels // conv.groups * prod(self.kernel_size))) ** 0.5)
            if self.bias is not None:
                self.bias.copy_(conv.bias.repeat(num_experts) if upcycle and conv.bias is not None else 0 * self.bias)
        self.train(conv.training)

    def forward(
        self, x_sorted: Float[Tensor, "rows in_channels *size"], plan: Plan | None = None, *, backend: Sorted = "auto"
    ) -> Float[Tensor, "rows out_channels *out_size"]:
        """Each row through its own expert: that of `plan`, or of the router that rules this layer."""
        if plan is not None:
            return super().forward(x_sorted, plan, backend=backend)
        rows, gate = self.pathway.rows, self.pathway.gate
        if rows is None:
            raise RuntimeError("a routed convolution ran outside of its router; call the Routed module around it")
        y = self.one(x_sorted, rows) if isinstance(rows, int) else super().forward(x_sorted, rows, backend=backend)
        return y if gate is None else y * gate.to(y.dtype).view(-1, *[1] * (y.dim() - 1))


class Routed(nn.Module):
    """A network whose routed convolutions all follow one router, image by image; built by `moeify`.

    In training, batch statistics are those of all rows, whichever expert they go to. Compiled code runs every expert
    on every row and keeps each row's own; else group sizes are read on the host once per call.

    Args:
        router: one expert per image; reads what the network reads.
        body: the network with its `RoutedConv2d` layers.
        pathway: that of those layers.
        name: of the routing record.
        weighted: multiply the output of every routed convolution with the routing weight. With a
            `StraightThroughRouter` this changes no value and passes gradient to the gate.

    Raises:
        ValueError: the router has not exactly one slot and no extra experts.
    """

    def __init__(
        self, router: Router, body: nn.Module, pathway: Pathway, name: str = "router", weighted: bool = False
    ) -> None:
        super().__init__()
        if (router.top_k, router.num_extra) != (1, 0):
            raise ValueError(
                f"a pathway has one expert: the router's top_k={router.top_k} must be 1, num_extra={router.num_extra} 0"
            )
        self.router, self.body, self.pathway = router, body, pathway
        self.name, self.weighted = name, weighted
        self._call: _Call | None = None

    def forward(self, x: Float[Tensor, "batch *dims"]) -> Float[Tensor, "batch *out_dims"]:
        routing = self._route(x)
        gate = routing.weights[:, 0] if self.weighted else None
        plan = make_plan(routing.indices, self.router.num_experts, dropless=routing.dropless)
        if torch.compiler.is_compiling():
            return restore(self._run(dispatch(x, plan), plan, _permute(gate, plan)), plan)
        sizes = plan.sizes()
        if sum(sizes) < x.shape[0]:
            raise ValueError(f"{x.shape[0] - sum(sizes)} images have an expert outside 0 to {len(sizes) - 1}")
        if max(sizes) == x.shape[0]:
            return self._run(x, sizes.index(x.shape[0]), gate)
        x, gate = dispatch(x, plan), _permute(gate, plan)
        if self.body.training:
            return restore(self._run(x, plan, gate), plan)
        gates: Sequence[Tensor | None] = [None] * len(sizes) if gate is None else gate.split(sizes)
        groups = enumerate(zip(x.split(sizes), gates, strict=True))
        return restore(torch.cat([self._run(own, e, g) for e, (own, g) in groups if sizes[e]]), plan)

    def _route(self, x: Tensor) -> Routing:
        routing: Routing = self.router(x)
        if self._call is not None:
            if self._call.expert is not None:
                routing = _forced(routing, self._call.expert)
            self._call.records[self.name] = routing
        return routing

    def _run(self, x: Tensor, rows: Plan | int, gate: Tensor | None) -> Tensor:
        self.pathway.rows, self.pathway.gate = rows, gate
        try:
            y: Tensor = self.body(x)
        finally:
            self.pathway.rows = self.pathway.gate = None
        return y

    def extra_repr(self) -> str:
        return f"name={self.name!r}, weighted={self.weighted}"


@dataclass
class _Call:
    expert: Int[Tensor, "batch"] | None
    records: dict[str, Routing] = field(default_factory=dict)


@contextmanager
def collect_routing(module: nn.Module, expert: Int[Tensor, "batch"] | None = None) -> Iterator[dict[str, Routing]]:
    """The records of every `Routed` in `module` that runs inside the block, by name and with their graph.

    `expert`, where given, is the expert of each image in all of them; scores and logits stay the router's own.
    """
    routed = [part for part in module.modules() if isinstance(part, Routed)]
    call = _Call(expert)
    for part in routed:
        part._call = call
    try:
        yield call.records
    finally:
        for part in routed:
            part._call = None


def moeify(
    module: nn.Module,
    router: Router,
    predicate: Callable[[str, nn.Conv2d], bool] | None = None,
    *,
    name: str = "router",
    weighted: bool = False,
    upcycle: bool = False,
) -> Routed:
    """Give every expert of `router` its own weight in the convolutions of a CNN, one pathway through all of them.

    The module is changed in place and becomes one pathway's width: build it narrower to keep the cost. A convolution
    given as `module` is replaced itself.

    Args:
        module: takes and gives one tensor whose first dimension counts images.
        router: one expert per image, for example `StraightThroughRouter` with a gate that reads images.
        predicate: which convolutions, by name and module; default those of `block_convs`.
        name, weighted: as of `Routed`.
        upcycle: every expert starts as the convolution it replaces, as for a pretrained network.

    Raises:
        ValueError: nothing to route, or a chosen convolution is no plain `nn.Conv2d` with zero padding.
    """
    chosen = block_convs(module)
    pathway = Pathway()
    found = [
        (path, conv)
        for path, conv in module.named_modules()
        if isinstance(conv, nn.Conv2d) and (path in chosen if predicate is None else predicate(path, conv))
    ]
    if not found:
        raise ValueError(f"{type(module).__name__} has no convolution to route: none was chosen")
    for path, conv in found:
        if type(conv) is not nn.Conv2d:
            raise ValueError(f"{path or 'module'} is a {type(conv).__name__}: only plain nn.Conv2d can be routed")
        routed = RoutedConv2d(conv, router.num_experts, pathway, upcycle)
        if not path:
            module = routed
        else:
            parent, _, child = path.rpartition(".")
            setattr(module.get_submodule(parent), child, routed)
    return Routed(router, module, pathway, name, weighted)


def block_convs(module: nn.Module) -> list[str]:
    """Names of the convolutions that AdvMoE routes: all but the first (the stem) and those of shortcuts,
    transitions and heads. A convolution given as `module` is its own block."""
    convs = [name for name, part in module.named_modules() if isinstance(part, nn.Conv2d)]
    return convs if convs == [""] else [name for name in convs[1:] if not _SHARED.search(name)]


def routed_experts(module: nn.Module) -> Iterator[tuple[Router, Experts]]:
    """Each layer of routed convolutions in `module`, with its router."""
    for part in module.modules():
        if isinstance(part, Routed):
            for layer in part.body.modules():
                if isinstance(layer, RoutedConv2d) and layer.pathway is part.pathway:
                    yield part.router, layer


def _permute(gate: Tensor | None, plan: Plan) -> Tensor | None:
    return None if gate is None else dispatch(gate, plan)


def _forced(routing: Routing, expert: Int[Tensor, "batch"]) -> Routing:
    """The record with each image's expert given from outside, with the gradient of its score."""
    if expert.shape != routing.indices.shape[:1]:
        raise ValueError(f"expert has shape {list(expert.shape)}, expected one per image: [{len(routing.indices)}]")
    indices = expert.to(torch.int64)[:, None]
    score = routing.scores.gather(1, indices.clamp(0, routing.num_experts - 1))
    return replace(routing, weights=1.0 + (score - score.detach()), indices=indices, dropless=False)
