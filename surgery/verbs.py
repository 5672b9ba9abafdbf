"""What each verb of `moezoo surgery` does to a patient."""

import argparse
from typing import Any

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor

from .. import runs
from ..errors import UserError
from ..tasks.expert_map import as_labels, draw_answers, field_of
from ..zoo.core import Routing
from ..zoo.core.statistics import expert_similarity, label_expert_nmi
from ..zoo.core.surgery import (
    OffloadedExperts,
    allocate_bits,
    answers_by_label,
    expert_importance,
    group_alike,
    replaced,
    rounding_errors,
    split_mlp,
    stored_bits,
    upcycle,
)
from .patient import Call, Dense, Mixture
from .report import Report, draw_curve

Known = argparse.Namespace


def rank(request: runs.Request, known: Known) -> None:
    patient = Mixture(request, known.pool)
    report = _report(patient, ["without", "its share"], "rank")
    load = patient.calibrate().load
    order = load.argsort(descending=True).tolist()[: known.top]
    for expert in _each(order, "experts"):
        with patient.switched([expert]):
            report.row({"without": expert, "its share": float(load[expert])}, patient.test())
    report.show(known.output)


def switch(request: runs.Request, known: Known) -> None:
    if not known.off and not known.on:
        raise UserError("nothing to switch: give --off or --on, such as --off 0,3")
    patient = Mixture(request, known.pool)
    with patient.switched(known.off, known.on):  # mistakes before any test
        pass
    report = _report(patient, ["variant"], "switch")
    parts = [f"{what} {', '.join(map(str, which))}" for what, which in (("off", known.off), ("on", known.on)) if which]
    with patient.switched(known.off, known.on):
        report.row({"variant": "; ".join(parts), "off": known.off, "on": known.on}, patient.test())
    report.show(known.output)


def prune(request: runs.Request, known: Known) -> None:
    patient = Mixture(request, known.pool)
    _check_keep(patient, known.keep)
    report = _report(patient, ["experts kept", "of them"], "prune")
    order = patient.calibrate().load.argsort(descending=True).tolist()
    for keep in _each(sorted(known.keep, reverse=True), "pruning"):
        with patient.switched(order[keep:]):
            report.row({"experts kept": keep, "of them": keep / patient.number}, patient.test())
    report.show(known.output)


@torch.no_grad()
def merge(request: runs.Request, known: Known) -> None:
    patient = Mixture(request, known.pool)
    _check_keep(patient, known.keep)
    experts = patient.mlp_experts
    report = _report(patient, ["experts left", "how", "largest group"], "merge")
    calibration = patient.calibrate()
    likeness = expert_similarity(experts.dense(calibration.x))
    order = calibration.load.argsort(descending=True).tolist()
    for keep in _each(sorted(known.keep, reverse=True), "merging"):
        groups = group_alike(likeness, keep)
        cells = {"experts left": keep, "largest group": max(map(len, groups))}
        with patient.merged(groups, calibration.load):
            report.row({**cells, "how": "merged"}, patient.test())
        with patient.switched(order[keep:]):
            report.row({**cells, "how": "pruned", "largest group": 1}, patient.test())
    report.show(known.output)


def quantise(request: runs.Request, known: Known) -> None:
    choices = sorted(set(known.choices))
    if min(choices) < 1:
        raise UserError("--choices must be whole numbers of bits from 1")
    if min(known.bits) < choices[0]:
        raise UserError(f"--bits {min(known.bits):g}: the smallest of --choices is {choices[0]}")
    patient = Mixture(request, known.pool)
    number, experts = patient.number, patient.experts
    report = _report(patient, ["bits", "how", "size"], "quantise")
    calibration = patient.calibrate()
    importance = expert_importance(calibration.weights)
    errors = rounding_errors(experts, calibration.x, calibration.weights, choices)
    full = stored_bits(experts, [16] * number)
    plans: list[tuple[str, list[int]]] = []
    for budget in known.bits:
        alike = max(bits for bits in choices if bits <= budget)
        for plan in (
            ("alike", [alike] * number),
            ("allocated", allocate_bits(importance, errors, choices, budget).tolist()),
        ):
            if plan not in plans:
                plans.append(plan)
    for how, bits in _each(plans, "rounding"):
        with patient.rounded(bits):
            size = stored_bits(experts, bits) / full
            cells = {"bits": sum(bits) / number, "how": how, "size": size, "bits of each": bits}
            report.row(cells, patient.test())
    _show_curve(report, known, "size", "size of the experts, 16 bits = 1")


def online(request: runs.Request, known: Known) -> None:
    patient = Mixture(request, known.pool)
    with patient.pruned_online(0.0, 0.0, 0.0):  # mistakes before any test
        pass
    report = _report(patient, ["beta", "skip", "experts per token"], "online")
    plans = [(beta, 0.0) for beta in known.beta] + [(beta, known.skip) for beta in known.beta if known.skip]
    for beta, skip in _each(plans, "pruning"):
        with patient.pruned_online(beta, skip, known.spare if skip else 0.0) as counted:
            metrics = patient.test()
        used = counted["slots"] / max(counted["tokens"], 1)
        report.row({"beta": beta, "skip": skip, "experts per token": used}, metrics)
    report.show(known.output)


def offload(request: runs.Request, known: Known) -> None:
    patient = Mixture(request, known.pool)
    experts = patient.mlp_experts
    if not all(1 <= cache <= patient.number for cache in known.cache):
        raise UserError(f"--cache must lie between 1 and {patient.number}: {patient.name} has {patient.number} experts")
    report = _report(patient, ["cache", "of them", "hit ratio"], "offload")
    for cache in _each(known.cache, "offloading"):
        small = OffloadedExperts(experts, cache, next(experts.parameters()).device)
        with replaced(patient.task.model, patient.name, small):
            metrics = patient.test()
        cells = {"cache": cache, "of them": cache / patient.number, "hit ratio": small.hit_ratio}
        report.row({**cells, "hits": small.hits, "misses": small.misses}, metrics)
    report.show(known.output)


def split(request: runs.Request, known: Known) -> None:
    patient = Dense(request, known.part)
    if not all(1 <= keep <= known.experts for keep in known.keep):
        raise UserError(f"--keep must lie between 1 and --experts {known.experts}")
    try:
        layers = {
            keep: split_mlp(patient.mlp, known.experts, keep, torch.Generator().manual_seed(0)).eval()
            for keep in sorted(known.keep, reverse=True)
        }
    except ValueError as error:
        raise UserError(str(error)) from None
    report = Report(patient, ["active", "of them"], f"{patient.name} in {known.experts} experts", "split")
    for keep, layer in _each(list(layers.items()), "splitting"):
        with replaced(patient.task.model, patient.name, layer):
            report.row({"active": keep, "of them": keep / known.experts}, patient.test())
    report.show(known.output)


def start_mixture(request: runs.Request, known: Known) -> None:
    """`moezoo surgery upcycle`."""
    patient = Dense(request, known.part)
    try:
        layer = upcycle(patient.mlp, known.experts, known.top, noise=known.noise)
    except ValueError as error:
        raise UserError(str(error)) from None
    report = Report(
        patient, ["variant"], f"{patient.name} as {known.experts} experts, {known.top} per token", "upcycle"
    )
    with replaced(patient.task.model, patient.name, layer.eval()):
        report.row({"variant": "upcycled"}, patient.test())
    for copies in (0, known.experts) if known.train else ():
        fresh = Dense(request, known.part)  # training moves more than weights: targets, counters, what was played
        part = upcycle(fresh.mlp, copies, known.top, noise=known.noise) if copies else fresh.mlp
        with replaced(fresh.task.model, fresh.name, part):
            _train_on(fresh)
            report.row({"variant": "upcycled, trained on" if copies else "dense, trained on"}, fresh.test())
    report.show(known.output)


@torch.no_grad()
def expert_map(request: runs.Request, known: Known) -> None:
    """`moezoo surgery map`."""
    patient = Mixture(request, known.pool)
    weights: list[Tensor] = []
    values: list[Tensor] = []

    def keep(call: Call) -> None:
        own = [record for record in call.records if record.num_experts == patient.number]
        if not own:
            raise UserError(f"{patient.cli.name}: no routing record has the {patient.number} experts")
        for record in own:
            weights.append(record.dense_weights().cpu())
            values.append(field_of(call.batch, known.by, len(record.scores), call.output).cpu())

    patient.watch(keep)
    called = patient.task.value_names(known.by)
    labels = as_labels(torch.cat(values), called)
    weight = torch.cat(weights)
    share = answers_by_label(weight, labels.values, len(labels.names))
    routed = weight.abs().sum(1) > 0
    spread = _information(labels.values[routed], weight.abs().argmax(1)[routed])
    table = Table(known.by, "tokens", "most weight to", title=f"{patient.cli.name}, validation split; {patient.name}")
    # Names have no order of their own: those of one expert come together.
    rows = list(range(len(share))) if called is None else share.argmax(1).argsort(stable=True).tolist()
    for row in rows:
        best = share[row].argsort(descending=True)[:3].tolist()
        tokens = int((labels.values[routed] == row).sum())
        table.add_row(labels.names[row], f"{tokens:,}", ", ".join(f"{e}: {float(share[row, e]):.1%}" for e in best))
    draw_answers(share[rows], [labels.names[row] for row in rows], patient.cli.name, known.output, known.by)
    console = Console()
    console.print(table)
    console.print(f"normalised mutual information of {known.by} and the top expert: {spread:.3f}")
    console.print(f"picture {known.output}", soft_wrap=True)


def _information(labels: Tensor, experts: Tensor) -> float:
    kept = labels >= 0
    ones = torch.ones(int(kept.sum()), 1)
    scores = torch.zeros(len(ones), int(experts.max()) + 1) if len(experts) else torch.zeros(0, 1)
    top = experts[kept][:, None]
    return float(label_expert_nmi(Routing(ones, top, scores, scores, torch.zeros(())), labels[kept]))


def _train_on(patient: Dense) -> None:
    """The recipe's training from where the weights are; `--trainer.max_epochs` says how long."""
    patient.task.train()
    trainer = patient.cli.make_trainer(None)
    trainer.fit(patient.task, datamodule=patient.cli.datamodule)
    patient.task.eval()


def _report(patient: Mixture, columns: list[str], verb: str) -> Report:
    return Report(patient, columns, f"{patient.name}: {patient.number} experts", verb)


def _show_curve(report: Report, known: Known, x: str, label: str) -> None:
    report.show(known.output)
    if known.output is not None:
        picture = known.output.with_suffix(".png")
        draw_curve(report.raw(), x, label, picture)
        Console().print(f"picture {picture}", soft_wrap=True)


def _check_keep(patient: Mixture, keep: list[int]) -> None:
    if not all(1 <= number < patient.number for number in keep):
        raise UserError(
            f"--keep must lie between 1 and {patient.number - 1}: {patient.name} has {patient.number} experts"
        )


def _each(items: list[Any], what: str) -> Any:
    return track(items, description=what, transient=True)
