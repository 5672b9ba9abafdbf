"""AdvMoE: a CNN whose convolutions are experts, and a router that sends each image through one pathway of them.

Zhang et al., "Robust Mixture-of-Expert Training for Convolutional Neural Networks", ICCV 2023, arXiv 2308.10110.
Letters: E experts, each of the backbone's width times `ratio`. The default is what the authors' code does: one router
on the image chooses the expert of every routed layer. Their Fig. A1 shows a router per layer: `router_scope`.
"""

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from ..errors import UserError
from .base import ZooModel
from .cnns import build_backbone
from .core import Gate, Routed, Routing, StraightThroughRouter, collect_routing, moeify
from .core.pathways import block_convs

RouterScope = Literal["global", "stage", "layer"]
_STAGE = re.compile(r"(^|\.)(stages\.\d+|(layer|stage|denseblock)\d+)$")
_ROUTER_PIXELS = 64  # images larger than this are pooled before the router: it would cost more than the network


class RobustOutput(NamedTuple):
    """Class logits, and per router its logits and record; a token is an image. Networks without router have none."""

    logits: Float[Tensor, "batch classes"]
    router_logits: dict[str, Float[Tensor, "batch experts"]]
    routing: dict[str, Routing]


class RobustModel(ZooModel):
    """A classifier of images in [0, 1]: normalisation, by mean and std of the schema, is part of the model."""

    mean: Tensor
    std: Tensor

    def __init__(self, schema: Mapping[str, Any]) -> None:
        super().__init__()
        channels = int(schema["channels"])
        for name in ("mean", "std"):
            values = [float(value) for value in schema[name]]
            if len(values) != channels or (name == "std" and min(values) <= 0):
                raise UserError(f"schema: {name}={values}, expected {channels} numbers, those of std above 0")
            self.register_buffer(name, torch.tensor(values).view(-1, 1, 1), persistent=False)

    def normalise(
        self, image: Float[Tensor, "batch channels height width"]
    ) -> Float[Tensor, "batch channels height width"]:
        """Zero mean and unit variance per channel, over the train images."""
        return (image - self.mean) / self.std

    def router_parameters(self) -> Iterator[nn.Parameter]:
        """Those of all routers."""
        for part in self.modules():
            if isinstance(part, Routed):
                yield from part.router.parameters()

    def expert_parameters(self) -> Iterator[nn.Parameter]:
        """All others: experts, and what every pathway shares."""
        routers = {id(parameter) for parameter in self.router_parameters()}
        return (parameter for parameter in self.parameters() if id(parameter) not in routers)


class AdvMoE(RobustModel):
    """A CNN with E pathways; each image takes one.

    Args:
        schema: the data's sizes: `channels`, `num_classes`, `image_size`, and `mean` and `std` of its channels.
        backbone: `resnet18`, `small_resnet`, `wrn28_10`, `vgg16_bn`, `densenet40`, or `timm/<model>`.
        experts: E.
        ratio: width of a pathway over that of the dense backbone.
        router_scope: `global`: one router on the image; `stage`: one on the input of each stage; `layer`: one on
            the input of each routed convolution.
        router_width, router_blocks: of the global router, a ResNet of three stages; (16, 3) is ResNet-20.
        router_pool: images are averaged over squares of so many pixels before the global router; by default as
            many as leave at most 64 pixels a side.
        ste: the straight-through gradient of the class loss reaches the router: outputs are multiplied with
            1 + g - stop_gradient(g), g the probability of the chosen expert.
        widths, blocks, stem_stride: in place of the backbone's own; see `cnns.Sizes`.
        backbone_args: more arguments of a timm model.

    Raises:
        UserError: unknown backbone, sizes that do not fit, or a router scope that the backbone lacks.
    """

    def __init__(
        self,
        schema: Mapping[str, Any],
        backbone: str = "resnet18",
        experts: int = 2,
        ratio: float = 0.5,
        router_scope: RouterScope = "global",
        router_width: int = 16,
        router_blocks: int = 3,
        router_pool: int | None = None,
        ste: bool = False,
        widths: Sequence[int] | None = None,
        blocks: Sequence[int] | None = None,
        stem_stride: int | None = None,
        backbone_args: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__(schema)
        if min(experts, router_width, router_blocks) < 1 or (router_pool is not None and router_pool < 1):
            raise UserError(
                f"experts={experts}, router_width={router_width}, router_blocks={router_blocks}, "
                f"router_pool={router_pool}: expected at least 1 of each"
            )
        channels, size = int(schema["channels"]), int(schema["image_size"])
        network = build_backbone(
            backbone,
            channels,
            int(schema["num_classes"]),
            ratio,
            routed=True,
            widths=widths,
            blocks=blocks,
            stem_stride=stem_stride,
            arguments=backbone_args,
        )
        pool = max(1, -(-size // _ROUTER_PIXELS)) if router_pool is None else router_pool
        if router_scope == "global":
            gate = ResNetGate(channels, experts, router_width, router_blocks, pool)
            self.network: nn.Module = moeify(network, _router(gate), weighted=ste)
        elif router_scope == "stage":
            self.network = _route_stages(network, experts, ste)
        elif router_scope == "layer":
            self.network = _route_layers(network, experts, ste)
        else:
            raise UserError(f"router_scope={router_scope}: expected global, stage or layer")

    def forward(
        self, image: Float[Tensor, "batch channels height width"], expert: Int[Tensor, "batch"] | None = None
    ) -> RobustOutput:
        """Classify images in [0, 1]. `expert` forces the pathway of each image through all routed layers."""
        with collect_routing(self.network, expert) as routing:
            logits = self.network(self.normalise(image))
        return RobustOutput(logits, {name: record.logits for name, record in routing.items()}, routing)


class ResNetGate(Gate):
    """AdvMoE's router: ResNet-20 with zero-padded shortcuts (He et al. 2016), for width 16 and 3 blocks a stage.

    269,202 parameters for two experts and colour images; 0.0406 GMAC at 32 x 32 pixels.
    """

    def __init__(self, in_channels: int, num_experts: int, width: int = 16, blocks: int = 3, pool: int = 1) -> None:
        super().__init__(num_experts)
        self.pool = pool
        self.stem = nn.Sequential(
            nn.Conv2d(in_channels, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU()
        )
        stages = []
        for stage in range(3):
            wide = width << stage
            stages += [GateBlock(wide // 2 if stage and not i else wide, wide) for i in range(blocks)]
        self.blocks = nn.Sequential(*stages)
        self.head = nn.Linear(4 * width, num_experts)

    def forward(
        self, x: Float[Tensor, "tokens channels height width"], task_id: Int[Tensor, "tokens *slots"] | None = None
    ) -> Float[Tensor, "tokens experts"]:
        if self.pool > 1:
            x = F.avg_pool2d(x, self.pool)
        logits: Tensor = self.head(self.blocks(self.stem(x)).mean((2, 3)))
        return logits.to(torch.promote_types(logits.dtype, torch.float32))


class GateBlock(nn.Module):
    """A basic block; where the width doubles, the shortcut takes every other pixel and pads channels with zeros."""

    def __init__(self, in_channels: int, width: int) -> None:
        super().__init__()
        self.stride, self.extra = (1, 0) if in_channels == width else (2, width - in_channels)
        self.conv1 = nn.Conv2d(in_channels, width, 3, self.stride, 1, bias=False)
        self.norm1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, 1, 1, bias=False)
        self.norm2 = nn.BatchNorm2d(width)

    def forward(
        self, x: Float[Tensor, "batch channels height width"]
    ) -> Float[Tensor, "batch out_channels out_height out_width"]:
        y = self.norm2(self.conv2(F.relu(self.norm1(self.conv1(x)))))
        if self.extra:
            x = F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, self.extra // 2, self.extra - self.extra // 2))
        return F.relu(y + x)


class FeatureGate(Gate):
    """A router on features within the network: one strided 3x3 convolution, the mean over pixels, a linear layer."""

    def __init__(self, in_channels: int, num_experts: int, width: int = 16) -> None:
        super().__init__(num_experts)
        self.conv = nn.Conv2d(in_channels, width, 3, 2, 1, bias=False)
        self.norm = nn.BatchNorm2d(width)
        self.head = nn.Linear(width, num_experts)

    def forward(
        self, x: Float[Tensor, "tokens channels height width"], task_id: Int[Tensor, "tokens *slots"] | None = None
    ) -> Float[Tensor, "tokens experts"]:
        logits: Tensor = self.head(F.relu(self.norm(self.conv(x))).mean((2, 3)))
        return logits.to(torch.promote_types(logits.dtype, torch.float32))


def _router(gate: Gate) -> StraightThroughRouter:
    return StraightThroughRouter(0, gate.out_features, gate)


def _route_stages(network: nn.Module, experts: int, ste: bool) -> nn.Module:
    convs = block_convs(network)
    stages = [(path, part) for path, part in network.named_modules() if _STAGE.search(path)]
    if not stages:
        raise UserError("router_scope=stage: this backbone has no stages; expected global or layer")
    for number, (path, stage) in enumerate(stages, 1):
        own = [name.removeprefix(f"{path}.") for name in convs if name.startswith(f"{path}.")]
        first = next(part for part in stage.modules() if isinstance(part, nn.Conv2d))
        router = _router(FeatureGate(first.in_channels, experts))
        _replace(network, path, moeify(stage, router, _among(own), name=f"stage{number}", weighted=ste))
    return network


def _route_layers(network: nn.Module, experts: int, ste: bool) -> nn.Module:
    for path in block_convs(network):
        conv = network.get_submodule(path)
        assert isinstance(conv, nn.Conv2d)
        router = _router(FeatureGate(conv.in_channels, experts))
        _replace(network, path, moeify(conv, router, name=path, weighted=ste))
    return network


def _among(names: list[str]) -> Callable[[str, nn.Conv2d], bool]:
    return lambda name, _: name in names


def _replace(network: nn.Module, path: str, part: nn.Module) -> None:
    parent, _, child = path.rpartition(".")
    setattr(network.get_submodule(parent), child, part)
