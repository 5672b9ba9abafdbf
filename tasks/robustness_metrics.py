"""What a robustness test reports: accuracies under attacks, who goes to which expert, and what an image costs."""

import time
from collections.abc import Mapping
from typing import Any, NamedTuple

import polars as pl
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from ..zoo.advmoe import RobustModel
from ..zoo.core import Routed
from .base import MetricInfo, TestResult

_TIMED = 5  # repetitions; the quickest counts


class Attacked(NamedTuple):
    """What a test knows of each image, on the CPU.

    `unit`: its index in the split. `right`: classified rightly. `attacked`: the attacks were tried on it. `pgd`,
    `route`: right after PGD, after every attack of the route-aware set. `flipped`: an attack on the router changes its
    expert. `expert`: where it goes, one column a router.
    """

    unit: Int[Tensor, " batch"]
    label: Int[Tensor, " batch"]
    right: Bool[Tensor, " batch"]
    attacked: Bool[Tensor, " batch"]
    pgd: Bool[Tensor, " batch"]
    route: Bool[Tensor, " batch"]
    flipped: Bool[Tensor, " batch"]
    expert: Int[Tensor, "batch routers"]


class Cost(NamedTuple):
    """Multiply-adds (10⁹) per image of everything and of the routers alone; milliseconds per image."""

    gmacs: float
    gmacs_router: float
    ms_per_image: float
    images: int


def measure_cost(model: RobustModel, image: Float[Tensor, "batch channels height width"]) -> Cost:
    """One forward of the batch, counted operation by operation and timed by the wall clock, in eval mode."""
    with torch.no_grad():
        with FlopCounterMode(display=False) as counter:
            model(image)
        own = counter.get_flop_counts()
        names = [f"{path}.router" for path, part in model.named_modules() if isinstance(part, Routed)]
        root = type(model).__name__
        router = sum(sum(own.get(f"{root}.{name}", {}).values()) for name in names)
        best = min(_seconds(model, image) for _ in range(_TIMED))
    count = len(image)
    return Cost(counter.get_total_flops() / 2e9 / count, router / 2e9 / count, 1e3 * best / count, count)


def _seconds(model: RobustModel, image: Tensor) -> float:
    synchronise(image)
    started = time.perf_counter()
    model(image)
    synchronise(image)
    return time.perf_counter() - started


def synchronise(image: Tensor) -> None:
    """Wait for a CUDA device to finish."""
    if image.is_cuda:
        torch.cuda.synchronize(image.device)


def evaluate(
    table: Attacked,
    experts: int,
    cost: Cost | None = None,
    steps: int = 50,
    auto: Mapping[int, bool] | None = None,
    flags: Mapping[str, str] | None = None,
) -> TestResult:
    """Every leaderboard metric and a table with one row an image.

    Args:
        table: as collected; an image that a distributed sampler repeats counts once.
        experts: of each router; 0 for networks without.
        cost: of one image.
        steps: of PGD, which name its metric.
        auto: whether each image, by index, withstands AutoAttack; None or empty where it was not run.
        flags: that AutoAttack raised.
    """
    table = each_once(table)
    metrics: dict[str, float] = {}
    info: dict[str, MetricInfo] = {}

    def add(name: str, value: Any, n: int, unit: str = "", goal: str = "max") -> None:
        if n:
            metrics[name], info[name] = float(value), MetricInfo("min" if goal == "min" else "max", unit, n)

    count, tried = len(table.unit), int(table.attacked.sum())
    add("sa", table.right.double().mean(), count)
    add(f"ra_pgd{steps}", table.pgd[table.attacked].double().mean(), tried)
    units = pl.DataFrame({"unit": table.unit.long().numpy(), "sa": table.right.double().numpy()})
    columns = {f"ra_pgd{steps}": table.pgd, "ra_route": table.route}
    add("ra_route", table.route[table.attacked].double().mean(), tried)
    if auto:
        add("ra_aa", sum(auto.values()) / len(auto), len(auto))
        add("aa_flags", len(flags or {}), len(auto), goal="min")
        for name in flags or {}:
            add(f"aa_flag_{name}", 1, len(auto), goal="min")
    if experts:
        columns["route_flip"] = table.flipped
        add("route_flip", table.flipped[table.attacked].double().mean(), tried, goal="min")
        share = torch.stack([torch.bincount(e, minlength=experts) for e in table.expert.T]).double() / count
        add("expert_share_min", share.min(), count)
        add("expert_share_max", share.max(), count, goal="min")
    if cost is not None:
        add("gmacs", cost.gmacs, cost.images, "GMAC", "min")
        if experts:
            add("gmacs_router", cost.gmacs_router, cost.images, "GMAC", "min")
        add("ms_per_image", cost.ms_per_image, cost.images, "ms", "min")
    for name, values in columns.items():
        units = units.with_columns(
            pl.Series(name, values.double().masked_fill(~table.attacked, torch.nan).numpy()).fill_nan(None)
        )
    if auto:
        robust = [float(auto[i]) if i in auto else None for i in table.unit.tolist()]
        units = units.with_columns(pl.Series("ra_aa", robust, dtype=pl.Float64))
    return TestResult(metrics, info, units)


def expert_by_class(
    expert: Int[Tensor, " batch"], label: Int[Tensor, " batch"], experts: int, classes: int
) -> Float[Tensor, "classes experts"]:
    """Share of each class's images that goes to each expert; zeros for a class without images."""
    counts = torch.bincount(label.long() * experts + expert.long(), minlength=classes * experts)
    counts = counts.view(classes, experts).double()
    return counts / counts.sum(1, keepdim=True).clamp(min=1)


def each_once(table: Attacked) -> Attacked:
    """Images by index, each once."""
    _, inverse = torch.unique(table.unit, return_inverse=True)
    first = torch.full((int(inverse.max()) + 1,), len(inverse)).scatter_reduce(
        0, inverse, torch.arange(len(inverse)), "amin"
    )
    return Attacked(*(values[first] for values in table))
