"""Thin CNNs for small images, in any width: ResNet, Wide ResNet, VGG and DenseNet as trained on CIFAR, and timm's.

Each is a stem, `stages` and a head. Which of its convolutions a mixture of experts routes is the core's `block_convs`:
not the stem, not what is named shortcut, transition or head.
"""

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from ..errors import UserError

BACKBONES = ("resnet18", "small_resnet", "wrn28_10", "vgg16_bn", "densenet40")


class Sizes(NamedTuple):
    """Channels and blocks of each stage (for VGG convolutions, for DenseNet growth and layers), and the stem."""

    widths: Sequence[int]
    blocks: Sequence[int]
    stem: int
    stem_stride: int = 1


_SIZES = {
    "resnet18": Sizes((64, 128, 256, 512), (2, 2, 2, 2), 64),
    "small_resnet": Sizes((32, 64), (1, 1), 32, stem_stride=2),
    "wrn28_10": Sizes((160, 320, 640), (4, 4, 4), 16),
    "vgg16_bn": Sizes((64, 128, 256, 512, 512), (2, 2, 3, 3, 3), 64),
    "densenet40": Sizes((12, 12, 12), (6, 6, 6), 24),
}


def build_backbone(
    name: str,
    in_channels: int,
    num_classes: int,
    ratio: float = 1.0,
    *,
    routed: bool = False,
    widths: Sequence[int] | None = None,
    blocks: Sequence[int] | None = None,
    stem_stride: int | None = None,
    arguments: Mapping[str, Any] | None = None,
) -> nn.Module:
    """A CNN from images to logits, all of whose widths are scaled by `ratio`.

    Args:
        name: one of `BACKBONES`, or `timm/<model>`.
        in_channels, num_classes: of the data.
        ratio: 1 is the dense network.
        routed: for pathways of a mixture, whose ResNet keeps its stem in full width as AdvMoE's does.
        widths, blocks, stem_stride: in place of the backbone's own.
        arguments: more of them for `timm.create_model`.

    Raises:
        UserError: unknown name, sizes that do not fit, or a timm model whose width is not known how to scale.
    """
    if not 0 < ratio <= 4:
        raise UserError(f"ratio={ratio}: expected a number above 0, at most 4")
    if name.startswith("timm/"):
        if widths or blocks or stem_stride:
            raise UserError(f"{name}: takes no widths, blocks or stem_stride; give timm's arguments in backbone_args")
        return _timm_backbone(name.removeprefix("timm/"), in_channels, num_classes, ratio, dict(arguments or {}))
    if name not in _SIZES:
        raise UserError(f"backbone={name!r}: expected one of {', '.join(BACKBONES)} or timm/<model>")
    if arguments:
        raise UserError(f"backbone={name!r} takes no backbone_args; they are for timm models")
    own = _SIZES[name]
    widths, blocks = widths or own.widths, blocks or own.blocks
    if len(widths) != len(blocks) or min(*widths, *blocks) < 1:
        raise UserError(f"widths={list(widths)}, blocks={list(blocks)}: expected as many of each, all at least 1")
    scaled = [scale(width, ratio) for width in widths]
    stride = stem_stride or own.stem_stride
    stem = own.stem if widths is own.widths else widths[0]
    if name == "vgg16_bn":
        if stem_stride:
            raise UserError("vgg16_bn has no stem of its own: leave out stem_stride")
        return VGG(in_channels, num_classes, scaled, blocks)
    if name == "densenet40":
        return DenseNet(in_channels, num_classes, scaled, blocks, 2 * scaled[0], stride)
    if name == "wrn28_10":
        return WideResNet(in_channels, num_classes, scaled, blocks, scale(own.stem, ratio), stride)
    return ResNet(in_channels, num_classes, scaled, blocks, stem if routed else scale(stem, ratio), stride)


def scale(width: int, ratio: float) -> int:
    """A width times `ratio`, rounded, at least 1."""
    return max(1, round(width * ratio))


class ResNet(nn.Module):
    """Basic blocks after a 3x3 stem (He et al. 2016); (64, 128, 256, 512) of two blocks is CIFAR's ResNet-18."""

    def __init__(
        self,
        in_channels: int,
        num_classes: int,
        widths: Sequence[int],
        blocks: Sequence[int],
        stem: int,
        stem_stride: int = 1,
    ) -> None:
        super().__init__()
        self.stem = nn.Sequential(_conv(in_channels, stem, 3, stem_stride), nn.BatchNorm2d(stem), nn.ReLU())
        stages, channels = [], stem
        for i, (width, count) in enumerate(zip(widths, blocks, strict=True)):
            layers = [BasicBlock(channels if j == 0 else width, width, 2 if i and not j else 1) for j in range(count)]
            stages.append(nn.Sequential(*layers))
            channels = width
        self.stages = nn.Sequential(*stages)
        self.head = nn.Linear(channels, num_classes)
        _initialise(self)

    def forward(self, image: Float[Tensor, "batch channels height width"]) -> Float[Tensor, "batch classes"]:
        logits: Tensor = self.head(self.stages(self.stem(image)).mean((2, 3)))
        return logits


class BasicBlock(nn.Module):
    """Two 3x3 convolutions beside a shortcut, which is a 1x1 convolution where the size changes."""

    def __init__(self, in_channels: int, width: int, stride: int) -> None:
        super().__init__()
        self.conv1, self.norm1 = _conv(in_channels, width, 3, stride), nn.BatchNorm2d(width)
        self.conv2, self.norm2 = _conv(width, width, 3), nn.BatchNorm2d(width)
        self.shortcut: nn.Module = nn.Identity()
        if stride > 1 or in_channels != width:
            self.shortcut = nn.Sequential(_conv(in_channels, width, 1, stride), nn.BatchNorm2d(width))

    def forward(
        self, x: Float[Tensor, "batch channels height width"]
    ) -> Float[Tensor, "batch out_channels out_height out_width"]:
        y = F.relu(self.norm1(self.conv1(x)))
        return F.relu(self.norm2(self.conv2(y)) + self.shortcut(x))


class WideResNet(nn.Module):
    """Pre-activated basic blocks (Zagoruyko & Komodakis 2016); projections are routed like the other convolutions."""

    def __init__(
        self,
        in_channels: int,
        num_classes: int,
        widths: Sequence[int],
        blocks: Sequence[int],
        stem: int,
        stem_stride: int = 1,
    ) -> None:
        super().__init__()
        self.stem = _conv(in_channels, stem, 3, stem_stride)
        stages, channels = [], stem
        for i, (width, count) in enumerate(zip(widths, blocks, strict=True)):
            layers = [PreActBlock(channels if j == 0 else width, width, 2 if i and not j else 1) for j in range(count)]
            stages.append(nn.Sequential(*layers))
            channels = width
        self.stages = nn.Sequential(*stages)
        self.norm = nn.BatchNorm2d(channels)
        self.head = nn.Linear(channels, num_classes)
        _initialise(self)

    def forward(self, image: Float[Tensor, "batch channels height width"]) -> Float[Tensor, "batch classes"]:
        x = F.relu(self.norm(self.stages(self.stem(image))))
        logits: Tensor = self.head(x.mean((2, 3)))
        return logits


class PreActBlock(nn.Module):
    """BN, ReLU and convolution, twice; where the size changes, the sum gets a projection of the activated input."""

    def __init__(self, in_channels: int, width: int, stride: int) -> None:
        super().__init__()
        self.norm1, self.conv1 = nn.BatchNorm2d(in_channels), _conv(in_channels, width, 3, stride)
        self.norm2, self.conv2 = nn.BatchNorm2d(width), _conv(width, width, 3)
        self.project = _conv(in_channels, width, 1, stride) if stride > 1 or in_channels != width else None

    def forward(
        self, x: Float[Tensor, "batch channels height width"]
    ) -> Float[Tensor, "batch out_channels out_height out_width"]:
        activated = F.relu(self.norm1(x))
        y: Tensor = self.conv2(F.relu(self.norm2(self.conv1(activated))))
        return y + (x if self.project is None else self.project(activated))


class VGG(nn.Module):
    """3x3 convolutions with BN, halved between stages (Simonyan & Zisserman 2015), and an MLP on 2x2 features."""

    def __init__(
        self, in_channels: int, num_classes: int, widths: Sequence[int], blocks: Sequence[int], hidden: int = 256
    ) -> None:
        super().__init__()
        stages, channels = [], in_channels
        for i, (width, count) in enumerate(zip(widths, blocks, strict=True)):
            layers: list[nn.Module] = [nn.MaxPool2d(2, ceil_mode=True)] if i else []
            for _ in range(count):
                layers += [_conv(channels, width, 3), nn.BatchNorm2d(width), nn.ReLU()]
                channels = width
            stages.append(nn.Sequential(*layers))
        self.stages = nn.Sequential(*stages)
        widths = [4 * channels, hidden, hidden]
        layers = [part for a, b in pairwise(widths) for part in (nn.Linear(a, b), nn.ReLU())]
        self.head = nn.Sequential(*layers, nn.Linear(hidden, num_classes))
        _initialise(self)

    def forward(self, image: Float[Tensor, "batch channels height width"]) -> Float[Tensor, "batch classes"]:
        features = F.adaptive_avg_pool2d(self.stages(image), 2)
        logits: Tensor = self.head(features.flatten(1))
        return logits


class DenseNet(nn.Module):
    """DenseNet-BC (Huang et al. 2017): growth `widths[i]` and `blocks[i]` layers in stage i, halved between stages."""

    def __init__(
        self,
        in_channels: int,
        num_classes: int,
        widths: Sequence[int],
        blocks: Sequence[int],
        stem: int,
        stem_stride: int = 1,
        compression: float = 0.5,
    ) -> None:
        super().__init__()
        self.stem = _conv(in_channels, stem, 3, stem_stride)
        stages, transitions, channels = [], [], stem
        for i, (growth, count) in enumerate(zip(widths, blocks, strict=True)):
            if i:
                half = scale(channels, compression)
                transitions.append(
                    nn.Sequential(nn.BatchNorm2d(channels), nn.ReLU(), _conv(channels, half, 1), nn.AvgPool2d(2))
                )
                channels = half
            stages.append(nn.Sequential(*(DenseLayer(channels + j * growth, growth) for j in range(count))))
            channels += count * growth
        self.stages, self.transition = nn.ModuleList(stages), nn.ModuleList(transitions)
        self.norm = nn.BatchNorm2d(channels)
        self.head = nn.Linear(channels, num_classes)
        _initialise(self)

    def forward(self, image: Float[Tensor, "batch channels height width"]) -> Float[Tensor, "batch classes"]:
        x = self.stem(image)
        for i, stage in enumerate(self.stages):
            x = stage(self.transition[i - 1](x) if i else x)
        logits: Tensor = self.head(F.relu(self.norm(x)).mean((2, 3)))
        return logits


class DenseLayer(nn.Module):
    """`growth` new channels by a 1x1 bottleneck of four times that and a 3x3 convolution, behind the given ones."""

    def __init__(self, in_channels: int, growth: int, bottleneck: int = 4) -> None:
        super().__init__()
        self.norm1, self.conv1 = nn.BatchNorm2d(in_channels), _conv(in_channels, bottleneck * growth, 1)
        self.norm2, self.conv2 = nn.BatchNorm2d(bottleneck * growth), _conv(bottleneck * growth, growth, 3)

    def forward(
        self, x: Float[Tensor, "batch channels height width"]
    ) -> Float[Tensor, "batch out_channels height width"]:
        y = self.conv1(F.relu(self.norm1(x)))
        return torch.cat([x, self.conv2(F.relu(self.norm2(y)))], 1)


def _conv(in_channels: int, out_channels: int, kernel: int, stride: int = 1) -> nn.Conv2d:
    return nn.Conv2d(in_channels, out_channels, kernel, stride, kernel // 2, bias=False)


def _initialise(module: nn.Module) -> None:
    """Convolutions Kaiming-normal by fan-out, linear layers N(0, 0.01), as AdvMoE's."""
    for part in module.modules():
        if isinstance(part, nn.Conv2d):
            nn.init.kaiming_normal_(part.weight, mode="fan_out")
        elif isinstance(part, nn.Linear):
            nn.init.normal_(part.weight, 0.0, 0.01)
            nn.init.zeros_(part.bias)


def _timm_backbone(
    model: str, in_channels: int, num_classes: int, ratio: float, arguments: dict[str, Any]
) -> nn.Module:
    import timm  # slow to import, and most backbones need it not
    from timm.models import vgg

    if not timm.is_model(model):
        raise UserError(f"timm/{model}: this timm has no such model; timm.list_models('*{model[:5]}*') lists some")
    arguments |= {"num_classes": num_classes, "in_chans": in_channels}
    family = timm.model_entrypoint(model).__module__.rpartition(".")[2]
    if ratio != 1 and family == "resnet":
        arguments.setdefault("channels", tuple(scale(width, ratio) for width in (64, 128, 256, 512)))
    elif ratio != 1 and family == "densenet":
        arguments.setdefault("growth_rate", scale({"densenet161": 48}.get(model, 32), ratio))
    elif ratio != 1 and family == "vgg":
        # timm's own factory fixes the widths.
        widths = [scale(width, ratio) if isinstance(width, int) else width for width in vgg.cfgs[model.split("_")[0]]]
        if model.endswith("_bn"):
            arguments.setdefault("norm_layer", nn.BatchNorm2d)
        return vgg.VGG(widths, **arguments)
    elif ratio != 1:
        raise UserError(
            f"timm/{model}: how to scale a {family} is not known; give ratio: 1 and its width in backbone_args"
        )
    made: nn.Module = timm.create_model(model, **arguments)
    return made
