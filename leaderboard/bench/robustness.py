"""`moezoo bench robustness`: what sorting images by expert saves over the dense CNN, and over masking as AdvMoE's code.

CIFAR's ResNet-18 with two experts of half width; the images' experts are given, half of them each. Spec A3: in
evaluation at most 0.40 of the dense network's time and 0.75 of masking's.
"""

import copy
import json
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal

import torch
from jaxtyping import Float
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from ...zoo.advmoe import ResNetGate
from ...zoo.cnns import build_backbone
from ...zoo.core import Gate, RoutedConv2d, StraightThroughRouter, collect_routing, moeify
from ..results import provenance
from .cases import Device
from .measure import Step, interleaved
from .ratios import ratio
from .terminal import brackets

Mode = Literal["eval", "train"]
GOALS = {"dense": 0.40, "mask-all": 0.75}  # of the sorted network's time in evaluation
_EXPERTS, _RATIO, _PIXELS, _CLASSES = 2, 0.5, 32, 10
_TOLERANCE = 1e-5


class GivenGate(Gate):
    """Image i goes to expert i modulo E: routing that costs nothing."""

    def forward(self, x: Float[Tensor, "tokens *features"], task_id: Tensor | None = None) -> Tensor:
        expert = torch.arange(len(x), device=x.device) % self.out_features
        return nn.functional.one_hot(expert, self.out_features).float()


class MaskAll(nn.Module):
    """Every expert on every image, of whose outputs the chosen one's are kept."""

    def __init__(self, conv: RoutedConv2d) -> None:
        super().__init__()
        self.conv = conv

    def forward(self, x: Tensor) -> Tensor:
        rows = torch.arange(len(x), device=x.device)
        return self.conv.dense(x)[rows, rows % self.conv.num_experts]


def contenders() -> dict[str, nn.Module]:
    """Networks by name; "sorted" and "mask-all" hold the same weights."""
    routed = moeify(_network(routed=True), StraightThroughRouter(0, _EXPERTS, GivenGate(_EXPERTS)))
    masked = copy.deepcopy(routed.body)
    for path, part in list(masked.named_modules()):
        if isinstance(part, RoutedConv2d):
            parent, _, child = path.rpartition(".")
            setattr(masked.get_submodule(parent), child, MaskAll(part))
    return {
        "dense": build_backbone("resnet18", 3, _CLASSES),
        "narrow": build_backbone("resnet18", 3, _CLASSES, _RATIO),
        "mask-all": masked,
        "sorted": routed,
        "sorted+router": _WithRouter(routed),
    }


class _WithRouter(nn.Module):
    """The same and ResNet-20 beside it, whose decision is not obeyed: an untrained one may favour one expert."""

    def __init__(self, routed: nn.Module) -> None:
        super().__init__()
        self.routed, self.gate = copy.deepcopy(routed), ResNetGate(3, _EXPERTS)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.gate(x)
        with collect_routing(self.routed, torch.arange(len(x), device=x.device) % _EXPERTS):
            y: Tensor = self.routed(x)
        return y + 0 * logits.sum()


def run(
    rounds: int, batch: int = 64, device: Device = "cpu", threads: int = 1, output: Path | None = None
) -> dict[str, dict[str, dict[int, float]]]:
    """Seconds per batch by case, contender and round, shown as a table; with `output`, kept there as JSON."""
    torch.set_num_threads(threads)
    console = Console()
    results: dict[str, dict[str, dict[int, float]]] = {}
    for mode in ("eval", "train"):
        for memory_format in (torch.contiguous_format, torch.channels_last):
            name = f"resnet18-{mode}-{'nhwc' if memory_format == torch.channels_last else 'nchw'}-{batch}"
            results[name] = measure(mode, memory_format, rounds, batch, device)
            _show(console, name, results[name], batch)
    if output is not None:
        document = {"run": _describe(rounds, batch, device, threads), "seconds": results}
        output.parent.mkdir(parents=True, exist_ok=True)
        output.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
        console.print(str(output), markup=False)
    return results


def measure(
    mode: Mode, memory_format: torch.memory_format, rounds: int, batch: int, device: Device = "cpu"
) -> dict[str, dict[int, float]]:
    """Seconds per step of every contender in interleaved rounds of random order.

    Raises:
        RuntimeError: sorting and masking do not agree.
    """
    torch.manual_seed(0)
    image = torch.rand(batch, 3, _PIXELS, _PIXELS, device=device).to(memory_format=memory_format)
    networks: dict[str, nn.Module] = {
        name: network.train(mode == "train").to(device).to(memory_format=memory_format)
        for name, network in contenders().items()
    }
    with torch.no_grad(), torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        one, other = networks["sorted"](image), networks["mask-all"](image)
        if (error := float((one - other).abs().max())) > _TOLERANCE:
            raise RuntimeError(f"sorting and masking differ by {error:.1e}")
    steps = {name: _step(network, image, mode) for name, network in networks.items()}
    for step in steps.values():
        step()
    return interleaved(steps, rounds, device)


def _step(network: nn.Module, image: Tensor, mode: Mode) -> Step:
    if mode == "eval":

        def infer() -> None:
            with torch.no_grad():
                network(image)

        return infer
    parameters = list(network.parameters())

    def train() -> None:
        torch.autograd.grad(network(image).logsumexp(-1).sum(), parameters, allow_unused=True)

    return train


def _network(routed: bool) -> nn.Module:
    return build_backbone("resnet18", 3, _CLASSES, _RATIO, routed=routed)


def _show(console: Console, name: str, samples: dict[str, dict[int, float]], batch: int) -> None:
    table = Table(title=name, title_justify="left", title_style="bold", box=None)
    for column in ("contender", "ms per image", "sorted is so much of it", "goal"):
        table.add_column(column, justify="left" if column == "contender" else "right", no_wrap=True)
    for contender, seconds in samples.items():
        goal = f"{GOALS[contender]:.2f}" if "eval" in name and contender in GOALS else ""
        shown = brackets(ratio(samples["sorted"], seconds))
        table.add_row(contender, f"{min(seconds.values()) / batch * 1e3:.3g}", shown, goal)
    console.print(table)


def _describe(rounds: int, batch: int, device: Device, threads: int) -> dict[str, Any]:
    origin: dict[str, Any] = dict(provenance(gpu=device == "cuda"))
    origin["hardware"] = asdict(origin["hardware"])
    return origin | {"rounds": rounds, "batch": batch, "device": device, "threads": threads}
