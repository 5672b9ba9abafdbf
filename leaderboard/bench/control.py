"""`moezoo bench control`: one update of MENTOR at the paper's size, and its actor against a loop over experts.

84x84 images, three stacked, batch 256, sixteen experts of which four are used. The loop is sixteen modules that all
compute every observation, whose chosen outputs are then gathered, as the released code does.
"""

import json
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from ...datasets.control import ControlBatch, Observation
from ...tasks.control_mentor import MentorTask
from ...zoo.core import MoE, Routing
from ...zoo.mentor import Mentor
from ..results import provenance
from .cases import Device
from .measure import Step, interleaved
from .ratios import ratio
from .terminal import brackets

GOALS = {"update": "6 ms", "update-compiled": "4 ms", "actor-loop": "at least 3 times ours"}  # on a data centre's GPU
ACTIONS = 6


class Bare(MentorTask):
    """The update alone, without a Trainer."""

    def __init__(self, model: Mentor, device: Device) -> None:
        super().__init__(model, lambda parameters: torch.optim.Adam(parameters, 1e-4, fused=True), perturbation="none")
        self.to(device)
        self.generator = torch.Generator(device).manual_seed(0)
        self.ready = self.configure_optimizers()

    def optimizers(self, use_pl_optimizer: bool = True) -> Any:
        return self.ready

    def manual_backward(self, loss: Tensor, *args: Any, **kwargs: Any) -> None:
        loss.backward()

    @property
    def data(self) -> Any:
        return SimpleNamespace(frame=0)


class Loop(nn.Module):
    """Sixteen MLPs one after the other, all on all observations, then a gather."""

    def __init__(self, moe: MoE) -> None:
        super().__init__()
        layers: Any = moe.experts.layers
        up, down = layers
        self.router = moe.router
        self.each = nn.ModuleList()
        for e in range(moe.router.num_experts):
            pair = (
                nn.Linear(up.weight.shape[2], up.weight.shape[1]),
                nn.Linear(down.weight.shape[2], down.weight.shape[1]),
            )
            for layer, stacked in zip(pair, (up, down), strict=True):
                layer.load_state_dict({"weight": stacked.weight[e], "bias": stacked.bias[e]})
            self.each.append(nn.Sequential(pair[0], nn.ReLU(), pair[1]))

    def forward(self, z: Tensor) -> tuple[Tensor, Routing]:
        routing: Routing = self.router(z)
        outputs = torch.stack([expert(z) for expert in self.each], 1)
        chosen = outputs.gather(1, routing.indices[..., None].expand(-1, -1, outputs.shape[-1]))
        return (routing.weights[..., None] * chosen).sum(1), routing


def run(
    rounds: int, batch: int = 256, device: Device = "cpu", threads: int = 1, output: Path | None = None
) -> dict[str, dict[int, float]]:
    """Seconds by contender and round, shown as a table with the peak memory of all; with `output`, kept as JSON."""
    torch.set_num_threads(threads)
    torch.set_float32_matmul_precision("high")
    torch.manual_seed(0)
    schema = {"dataset": "bench", "pixels": [9, 84, 84], "state": 0, "action": ACTIONS}
    pixels = torch.randint(0, 256, (2, batch, 9, 84, 84), dtype=torch.uint8, device=device)
    action = torch.rand(batch, ACTIONS, device=device) * 2 - 1
    numbers = torch.randn(batch, device=device), torch.full((batch,), 0.97, device=device)
    drawn = ControlBatch(Observation(pixels[0], None), action, *numbers, Observation(pixels[1], None))
    task = Bare(Mentor(schema), device)
    steps: dict[str, Step] = {"update": _updates(task, drawn)}
    if device == "cuda":
        compiled = Bare(Mentor(schema), device)
        compiled.compile_parts()
        steps["update-compiled"] = _updates(compiled, drawn)
    moe = task.model.actor.middle
    assert isinstance(moe, MoE)
    z = torch.randn(batch, 1024, device=device)
    loop = Loop(moe).to(device)
    with torch.no_grad():
        moe.eval()
        loop.eval()
        if (error := float((moe(z) - loop(z)[0]).abs().max())) > 2e-2:  # TF32 has ten bits
            raise RuntimeError(f"the mixture and the loop differ by {error:.1e}")
        moe.train()
        loop.train()
    steps["actor"] = _backward(lambda: moe(z), list(moe.parameters()))
    steps["actor-loop"] = _backward(lambda: loop(z)[0], list(loop.parameters()))
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    samples = _sample(steps, rounds, device)
    memory = torch.cuda.max_memory_allocated() / 2**30 if device == "cuda" else None
    _show(samples, memory)
    if output is not None:
        origin: dict[str, Any] = dict(provenance(gpu=device == "cuda"))
        origin["hardware"] = asdict(origin["hardware"])
        origin |= {"rounds": rounds, "batch": batch, "device": device, "threads": threads, "peak_gib": memory}
        output.parent.mkdir(parents=True, exist_ok=True)
        output.write_text(json.dumps({"run": origin, "seconds": samples}, indent=1) + "\n", encoding="utf-8")
        Console().print(str(output), markup=False)
    return samples


def _updates(task: Bare, batch: ControlBatch) -> Step:
    def step() -> None:
        task.update(batch)

    return step


def _backward(forward: Callable[[], Tensor], parameters: list[nn.Parameter]) -> Step:
    def step() -> None:
        torch.autograd.grad(forward().square().mean(), parameters, allow_unused=True)

    return step


def _sample(steps: dict[str, Step], rounds: int, device: Device) -> dict[str, dict[int, float]]:
    for step in steps.values():
        for _ in range(5 if device == "cuda" else 1):
            step()
    return interleaved(steps, rounds, device, 10 if device == "cuda" else 1)


def _show(samples: dict[str, dict[int, float]], memory: float | None) -> None:
    console, table = Console(), Table(title="MENTOR, batch of 84x84 images", title_justify="left", box=None)
    for column in ("what", "ms", "over ours", "goal on a GPU"):
        table.add_column(column, justify="left" if column == "what" else "right", no_wrap=True)
    for name, seconds in samples.items():
        ours = samples["actor" if name.startswith("actor") else "update"]
        table.add_row(name, f"{min(seconds.values()) * 1e3:.3g}", brackets(ratio(seconds, ours)), GOALS.get(name, ""))
    console.print(table)
    if memory is not None:
        console.print(f"peak memory {memory:.2f} GiB (goal: below 4)")
