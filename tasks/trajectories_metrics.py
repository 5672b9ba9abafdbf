"""Metrics of predicted tracks and intentions over the windows of a split.

Errors are in metres. A step whose true position is unknown (NaN: the track ends before it) counts nowhere.
"""

import math
from typing import NamedTuple

import polars as pl
import torch
from jaxtyping import Float, Int
from torch import Tensor
from torchmetrics.functional.classification import (
    multiclass_accuracy,
    multiclass_average_precision,
    multiclass_f1_score,
    multiclass_precision,
    multiclass_recall,
)

from ..zoo.tmmoe import INTENTIONS
from .base import MetricInfo, TestResult

MISS = 2.0  # m; a window whose last step is further off is missed (Argoverse)


class Windows(NamedTuple):
    """Predictions and truth of windows, on the CPU. `gates` has no experts for models without a mixture."""

    position: Float[Tensor, "batch horizon 2"]
    future: Float[Tensor, "batch horizon 2"]
    probability: Float[Tensor, "batch 3"]
    intention: Int[Tensor, " batch"]
    crossing: Float[Tensor, " batch"]
    lateral: Float[Tensor, " batch"]
    velocity: Float[Tensor, "batch 2"]
    gates: Float[Tensor, "batch tasks experts"]
    track: Int[Tensor, " batch"]
    frame: Int[Tensor, " batch"]


class LeadTimes(NamedTuple):
    """One entry a lane crossing: its vehicle, and the seconds before it from which on it was foreseen (0: never)."""

    track: Int[Tensor, " events"]
    seconds: Float[Tensor, " events"]


def distance(
    position: Float[Tensor, "batch horizon 2"], future: Float[Tensor, "batch horizon 2"]
) -> Float[Tensor, "batch horizon"]:
    """Euclidean error of every step; NaN where the truth is."""
    return (position - future).square().sum(-1).sqrt()


def ade(error: Float[Tensor, "batch horizon"]) -> Float[Tensor, " batch"]:
    """Average displacement error of each window: mean over its known steps; NaN without any."""
    return error.nanmean(-1)


def fde(error: Float[Tensor, "batch horizon"]) -> Float[Tensor, " batch"]:
    """Final displacement error: of the horizon's last step; NaN where the track ends before it."""
    return error[:, -1]


def missed(error: Float[Tensor, "batch horizon"]) -> Float[Tensor, " batch"]:
    """1 where the last step is more than 2 m off, else 0; NaN where it is unknown."""
    last = error[:, -1]
    return (last > MISS).to(last.dtype).masked_fill(last.isnan(), torch.nan)


def rmse(error: Float[Tensor, "batch *steps"]) -> Float[Tensor, ""]:
    """Root mean square over all known entries; for `distance` this is the joint RMSE of CS-LSTM."""
    return error.square().nanmean().sqrt()


def lead_times(
    probability: Float[Tensor, "batch 3"],
    intention: Int[Tensor, " batch"],
    crossing: Float[Tensor, " batch"],
    track: Int[Tensor, " batch"],
    frame: Int[Tensor, " batch"],
    frame_rate: float,
) -> LeadTimes:
    """How long before each lane crossing its direction becomes the likeliest intention and stays so.

    Windows of a vehicle that are labelled with the same crossing make an event; of the windows up to the crossing
    the unbroken run of right ones at the end counts, and the lead time is the seconds to the crossing at its start.
    Windows after their crossing, which CS-LSTM's label has, recognise and do not foresee: they are left out.
    """
    labelled = (intention > 0) & (crossing > 0)
    when = (frame.double() + crossing.double() * frame_rate).nan_to_num(nan=0.0).round().long()
    table = pl.DataFrame(
        {
            "track": track[labelled].numpy(),
            "when": when[labelled].numpy(),
            "direction": intention[labelled].numpy(),
            "seconds": crossing[labelled].double().numpy(),
            "right": (probability.argmax(-1) == intention)[labelled].numpy(),
        }
    )
    # From the crossing backwards: right as long as no window nearer to it was wrong.
    events = (
        table.sort("track", "when", "direction", "seconds")
        .with_columns(stays=pl.col("right").cum_min().over("track", "when", "direction"))
        .group_by("track", "when", "direction", maintain_order=True)
        .agg(pl.col("seconds").filter(pl.col("stays")).max().fill_null(0.0))
    )
    return LeadTimes(events["track"].to_torch(), events["seconds"].to_torch())


def evaluate(windows: Windows, frame_rate: float) -> TestResult:
    """Every leaderboard metric of a split's windows, and the table with one row a vehicle track."""
    windows = each_once(windows)
    metrics: dict[str, float] = {}
    info: dict[str, MetricInfo] = {}

    def add(name: str, value: Tensor | float, n: int, unit: str = "", goal: str = "max") -> None:
        if n and math.isfinite(float(value)):
            metrics[name] = float(value)
            info[name] = MetricInfo("min" if goal == "min" else "max", unit, n)

    error = distance(windows.position.double(), windows.future.double())
    axes = (windows.position.double() - windows.future.double()).unbind(-1)
    per_window = {"ade": ade(error), "fde": fde(error), "miss_rate": missed(error)}
    for name, values in per_window.items():
        add(name, values.nanmean(), int((~values.isnan()).sum()), "" if name == "miss_rate" else "m", "min")
    steps = int((~error.isnan()).any(1).sum())
    for name, values in (("rmse", error), ("rmse_lon", axes[0]), ("rmse_lat", axes[1])):
        if name != "rmse":
            add(name, rmse(values), steps, "m", "min")
            add(name.replace("rmse", "mae"), values.abs().nanmean(), steps, "m", "min")
        for second, step in seconds_to_steps(error.shape[1], frame_rate):
            whole = int((~error[:, step].isnan()).sum())
            add(f"{name}_{second}s", rmse(values[:, step]), whole, "m", "min")

    known = windows.intention >= 0
    probability, label = windows.probability[known].float(), windows.intention[known]
    lead = lead_times(
        windows.probability, windows.intention, windows.crossing, windows.track, windows.frame, frame_rate
    )
    for name, value in intention_metrics(probability, label).items():
        add(name, value, len(label))
    add("lead_time", lead.seconds.mean() if len(lead.seconds) else math.nan, len(lead.seconds), "s")
    foreseen = (lead.seconds > 0).double()
    add("recognised", foreseen.mean() if len(foreseen) else math.nan, len(foreseen))
    return TestResult(metrics, info, _per_track(windows, per_window, lead))


def intention_metrics(probability: Float[Tensor, "batch 3"], label: Int[Tensor, " batch"]) -> dict[str, float]:
    """Macro-F1, balanced accuracy, accuracy, and precision, recall, F1 and one-vs-rest AUPRC of each class.

    A class without windows has no recall or AUPRC, and the averages leave it out.
    """
    if not len(label):
        return {}
    classes = len(INTENTIONS)
    present = torch.bincount(label, minlength=classes) > 0
    predicted = probability.argmax(-1)
    recall = multiclass_recall(predicted, label, classes, average="none")
    precision_curve = multiclass_average_precision(probability, label, classes, average="none")
    columns: dict[str, Tensor] = {
        "precision": multiclass_precision(predicted, label, classes, average="none"),
        "recall": recall,
        "f1": multiclass_f1_score(predicted, label, classes, average="none"),
        "auprc": precision_curve,
    }
    metrics = {
        "macro_f1": float(columns["f1"][present].mean()),
        "balanced_accuracy": float(recall[present].mean()),
        "auprc": float(precision_curve[present].mean()),
    }
    for name, values in columns.items():
        metrics |= {f"{name}_{INTENTIONS[c]}": float(values[c]) for c in range(classes) if present[c]}
    return metrics | {"accuracy": float(multiclass_accuracy(predicted, label, classes, average="micro"))}


def seconds_to_steps(horizon: int, frame_rate: float) -> list[tuple[int, int]]:
    """(second, index of its step) for each whole second of the horizon."""
    return [(s, round(s * frame_rate) - 1) for s in range(1, math.floor(horizon / frame_rate + 1e-6) + 1)]


def each_once(windows: Windows) -> Windows:
    """Windows by vehicle and time; those that a distributed sampler repeats once."""
    key = torch.stack([windows.track, windows.frame], 1)
    _, inverse = torch.unique(key, dim=0, return_inverse=True)
    first = torch.full((int(inverse.max()) + 1,), len(key)).scatter_reduce(0, inverse, torch.arange(len(key)), "amin")
    return Windows(*(values[first] for values in windows))


def _per_track(windows: Windows, per_window: dict[str, Tensor], lead: LeadTimes) -> pl.DataFrame:
    right = (windows.probability.argmax(-1) == windows.intention).double()
    columns = per_window | {"accuracy": right.masked_fill(windows.intention < 0, torch.nan)}
    table = pl.DataFrame({"unit": windows.track.long().numpy(), **{k: v.numpy() for k, v in columns.items()}})
    table = table.fill_nan(None).group_by("unit", maintain_order=True).agg(pl.all().mean())
    crossed = pl.DataFrame({"unit": lead.track.long().numpy(), "lead_time": lead.seconds.double().numpy()})
    table = table.join(crossed.group_by("unit").agg(pl.all().mean()), on="unit", how="left", maintain_order="left")
    changes = windows.track[(windows.intention > 0)].unique().long()
    return table.with_columns(changes_lane=pl.col("unit").is_in(changes.tolist()))
