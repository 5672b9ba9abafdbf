"""`moezoo surgery`: what a trained model's experts do, and what it costs to take some away or to store them smaller.

Whatever decides (who gets tokens, what rounding changes) is measured on validation data; effects are shown on the test
split, with the recipe's own metrics. Nothing is written: the weights in the store stay as they are.
"""

import argparse
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import torch
from pytorch_lightning.callbacks import ProgressBar
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor

from . import recipes, runs
from .errors import UserError
from .tasks.expert_map import as_labels, draw_answers, field_of
from .zoo.core import MLPExperts, Routing
from .zoo.core.statistics import label_expert_nmi
from .zoo.core.surgery import (
    allocate_bits,
    answers_by_label,
    expert_importance,
    expert_pools,
    quantise_experts,
    rounding_errors,
    routers_of,
    silenced_experts,
    stored_bits,
    switched_experts,
    watched_inputs,
)

CALIBRATION_TOKENS = 4096


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message} (see `{self.prog} --help`)")


def main(words: Sequence[str]) -> int:
    """Carry out `moezoo surgery VERB`; mistakes of the user raise UserError."""
    known, overrides = _parser().parse_known_args(list(words))
    recipes.read(known.config)  # a misspelt name is told at once
    request = runs.Request(
        config=known.config, overrides=recipes.join_values(overrides), seed=known.seed, weights=known.weights
    )
    runs.quiet()
    patient = Patient(request, known.pool)
    known.verb(patient, known)
    return 0


def _parser() -> _Parser:
    parser = _Parser(prog="moezoo surgery", description=__doc__, allow_abbrev=False)
    verbs = parser.add_subparsers(required=True, metavar="VERB", parser_class=_Parser)
    common = _Parser(add_help=False)
    common.add_argument("--config", "-c", required=True, metavar="NAME|PATH", help="recipe, e.g. ranking/awmoe")
    common.add_argument("--weights", metavar="NAME|DIR", help="default: beside the recipe, else published")
    common.add_argument("--seed", type=int, help="random seed (default: the recipe's)")
    common.add_argument("--pool", metavar="MODULE", help="which experts, where the model has several pools")

    def add(name: str, verb: Any, text: str) -> argparse.ArgumentParser:
        command = verbs.add_parser(name, help=text, description=text, parents=[common], allow_abbrev=False)
        command.set_defaults(verb=verb)
        return command

    rank = add("rank", _rank, "each expert's load, and the test metrics without it")
    rank.add_argument("--top", type=int, default=8, help="try the N experts with the most load (default 8)")
    switch = add("switch", _switch, "test metrics with chosen experts off, or forced on")
    switch.add_argument("--off", type=_numbers, default=[], metavar="E,E,...", help="experts to switch off")
    switch.add_argument("--on", type=_numbers, default=[], metavar="E,E,...", help="experts to force on")
    prune = add("prune", _prune, "test metrics with only the most used experts left")
    prune.add_argument(
        "--keep", type=_numbers, required=True, metavar="N,N,...", help="how many to keep; several: curve"
    )
    quantise = add("quantise", _quantise, "test metrics with experts rounded to few bits, allocated or alike")
    quantise.add_argument(
        "--bits", type=_decimals, default=[4.0, 3.0, 2.5, 2.0], metavar="B,B,...", help="mean bits per expert; a curve"
    )
    quantise.add_argument(
        "--choices", type=_numbers, default=[1, 2, 3, 4, 6, 8], metavar="B,B,...", help="bits to give"
    )
    answers = add("map", _map, "what each expert answers to: its share of weight by any field of the batches")
    answers.add_argument("--by", required=True, metavar="FIELD[:COLUMN]", help="such as label, user or candidates:2")
    answers.add_argument("--output", type=Path, default=Path("expert_map.png"), help="picture (default: %(default)s)")
    return parser


class Calibration(NamedTuple):
    """Some inputs of a pool on validation data, and the weights that its routers gave."""

    x: Tensor
    weights: Tensor


class Patient:
    """A trained recipe on the table: its task, its data and the pool of experts that is meant."""

    def __init__(self, request: runs.Request, pool: str | None) -> None:
        self.cli, self.trainer = runs.evaluation(request)
        bars: list[Any] = self.trainer.callbacks  # type: ignore[attr-defined]
        bars[:] = [callback for callback in bars if not isinstance(callback, ProgressBar)]  # a test each would flicker
        self.task = self.cli.model.eval()
        pools = expert_pools(self.task.model)
        if not pools:
            raise UserError(f"{self.cli.name}: the model has no stacked experts (MLPExperts) to operate on")
        if pool is None and len(pools) > 1:
            raise UserError(f"{self.cli.name} has several pools of experts: choose one with --pool {'|'.join(pools)}")
        if pool is not None and pool not in pools:
            raise UserError(f"--pool {pool}: {self.cli.name} has {', '.join(pools)}")
        self.name = pool if pool is not None else next(iter(pools))
        self.experts: MLPExperts = pools[self.name]

    def test(self) -> dict[str, float]:
        """The recipe's test metrics of the model as it is now."""
        self.trainer.test(self.task, datamodule=self.cli.datamodule, verbose=False)
        self.task.eval()
        return dict(self.task.result.metrics)

    @torch.no_grad()
    def calibrate(self) -> Calibration:
        """Inputs and weights of the pool on validation batches, as many as it takes for `CALIBRATION_TOKENS`."""
        self.cli.datamodule.setup("validate")
        xs, weights, tokens = [], [], 0
        for batch in self.cli.datamodule.val_dataloader():
            batch = self.cli.datamodule.transfer_batch_to_device(batch, self.task.device, 0)
            with watched_inputs(self.experts) as seen:
                output = self.task(batch)
            records = list(getattr(output, "routing", {}).values())
            for x in seen:
                weight = self._weights(records, x)
                routed = (weight != 0).any(1)
                xs.append(x[routed])
                weights.append(weight[routed])
                tokens += len(xs[-1])
            if tokens >= CALIBRATION_TOKENS:
                break
        if not tokens:
            raise UserError(f"{self.cli.name}: no validation token reaches the experts of {self.name}")
        return Calibration(torch.cat(xs)[:CALIBRATION_TOKENS], torch.cat(weights)[:CALIBRATION_TOKENS])

    def _weights(self, records: Iterable[Routing], x: Tensor) -> Tensor:
        """What the records give the pool for its inputs x; all alike where no record is of this pool.

        A record may be of larger units than x, such as sessions of candidates: each then holds for all of its rows.
        """
        number, found = self.experts.num_experts, []
        for record in records:
            times = len(x) // max(len(record.scores), 1)
            if record.num_experts == number and times * len(record.scores) == len(x):
                found.append(record.dense_weights().abs().repeat_interleave(times, 0).to(x.device))
        return torch.stack(found).sum(0) if found else x.new_ones(len(x), number)

    @contextmanager
    def switched(self, off: Sequence[int], on: Sequence[int] = ()) -> Iterator[None]:
        """Experts off or on: by their routers' masks; where the gate is no router, those off answer zero."""
        number = self.experts.num_experts
        for expert in [*off, *on]:
            if not 0 <= expert < number:
                raise UserError(f"expert {expert}: {self.name} has experts 0 to {number - 1}")
        if set(off) & set(on) or len(set(off)) == number:
            raise UserError("an expert cannot be both off and on, and some expert must stay")
        routers = routers_of(self.task.model, self.experts)
        if on and not routers:
            raise UserError(
                f"--on needs a router of the core, and {self.cli.name} has a gate of its own: use --off alone"
            )
        with ExitStack() as stack:
            if routers:
                masks = {name: torch.zeros(number + r.num_extra, dtype=torch.int8) for name, r in routers.items()}
                for mask in masks.values():
                    mask[list(off)], mask[list(on)] = -1, 1
                stack.enter_context(switched_experts(self.task.model, masks))
            else:
                stack.enter_context(silenced_experts(self.experts, list(off)))
            yield

    @contextmanager
    def rounded(self, bits: Sequence[int]) -> Iterator[None]:
        """Experts at so many bits each, and as they were after the block."""
        before = [(parameter, parameter.detach().clone()) for parameter in self.experts.parameters()]
        try:
            quantise_experts(self.experts, bits)
            yield
        finally:
            with torch.no_grad():
                for parameter, old in before:
                    parameter.copy_(old)


class Report:
    """A table of test metrics by variant, the first row being the model as it came."""

    def __init__(self, patient: Patient, columns: Sequence[str]) -> None:
        self.before = patient.test()
        headline = patient.task.headline
        self.names = [headline, *(name for name in self.before if name != headline)][:3]
        pool = f"{patient.name}: {patient.experts.num_experts} experts"
        self.table = Table(*columns, *self.names, "change", title=f"{patient.cli.name}, test split; {pool}")
        self.goal = patient.task.result.info[headline].goal
        self.row(["as trained", *[""] * (len(columns) - 1)], self.before)

    def row(self, cells: Sequence[str], metrics: dict[str, float]) -> None:
        change = metrics[self.names[0]] - self.before[self.names[0]]
        worse = change < 0 if self.goal == "max" else change > 0
        style = "red" if worse else "green" if change else ""
        text = f"[{style}]{change:+.4f}[/]" if style else f"{change:+.4f}"
        self.table.add_row(*cells, *(f"{metrics[name]:.4f}" for name in self.names), text)

    def show(self) -> None:
        Console().print(self.table)


def _rank(patient: Patient, known: argparse.Namespace) -> None:
    load = _load(patient.calibrate())
    report = Report(patient, ["without", "its share"])
    order = load.argsort(descending=True).tolist()[: known.top]
    for expert in track(order, description="experts", transient=True):
        with patient.switched([expert]):
            report.row([str(expert), f"{float(load[expert]):.1%}"], patient.test())
    report.show()


def _switch(patient: Patient, known: argparse.Namespace) -> None:
    if not known.off and not known.on:
        raise UserError("nothing to switch: give --off or --on, such as --off 0,3")
    with patient.switched(known.off, known.on):  # mistakes before any test
        pass
    report = Report(patient, ["variant"])
    parts = [f"{what} {', '.join(map(str, which))}" for what, which in (("off", known.off), ("on", known.on)) if which]
    with patient.switched(known.off, known.on):
        report.row(["; ".join(parts)], patient.test())
    report.show()


def _prune(patient: Patient, known: argparse.Namespace) -> None:
    number = patient.experts.num_experts
    if not all(1 <= keep < number for keep in known.keep):
        raise UserError(f"--keep must lie between 1 and {number - 1}: {patient.name} has {number} experts")
    order = _load(patient.calibrate()).argsort(descending=True).tolist()
    report = Report(patient, ["experts kept", "of them"])
    for keep in track(sorted(known.keep, reverse=True), description="pruning", transient=True):
        with patient.switched(order[keep:]):
            report.row([str(keep), f"{keep / number:.0%}"], patient.test())
    report.show()


def _quantise(patient: Patient, known: argparse.Namespace) -> None:
    number, choices = patient.experts.num_experts, sorted(set(known.choices))
    if min(choices) < 1:
        raise UserError("--choices must be whole numbers of bits from 1")
    if min(known.bits) < choices[0]:
        raise UserError(f"--bits {min(known.bits):g}: the smallest of --choices is {choices[0]}")
    calibration = patient.calibrate()
    importance = expert_importance(calibration.weights)
    errors = rounding_errors(patient.experts, calibration.x, calibration.weights, choices)
    full = stored_bits(patient.experts, [16] * number)
    report = Report(patient, ["bits", "how", "size"])
    plans: list[tuple[str, list[int]]] = []
    for budget in known.bits:
        alike = max(bits for bits in choices if bits <= budget)
        for plan in (
            ("alike", [alike] * number),
            ("allocated", allocate_bits(importance, errors, choices, budget).tolist()),
        ):
            if plan not in plans:
                plans.append(plan)
    for how, bits in track(plans, description="rounding", transient=True):
        with patient.rounded(bits):
            size = stored_bits(patient.experts, bits) / full
            report.row([f"{sum(bits) / number:.2f}", how, f"{size:.0%}"], patient.test())
    report.show()


@torch.no_grad()
def _map(patient: Patient, known: argparse.Namespace) -> None:
    patient.cli.datamodule.setup("validate")
    records: list[Routing] = []
    values: list[Tensor] = []
    for batch in patient.cli.datamodule.val_dataloader():
        batch = patient.cli.datamodule.transfer_batch_to_device(batch, patient.task.device, 0)
        routing = getattr(patient.task(batch), "routing", {}).values()
        own = [record for record in routing if record.num_experts == patient.experts.num_experts]
        if not own:
            raise UserError(f"{patient.cli.name}: no routing record has the {patient.experts.num_experts} experts")
        for record in own:
            records.append(record)
            values.append(field_of(batch, known.by, len(record.scores)).cpu())
    labels = as_labels(torch.cat(values))
    weights = torch.cat([record.dense_weights() for record in records]).cpu()
    share = answers_by_label(weights, labels.values, len(labels.names))
    routed = weights.abs().sum(1) > 0
    top = weights.abs().argmax(1)[routed]
    spread = _information(labels.values[routed], top)
    table = Table(known.by, "tokens", "most weight to", title=f"{patient.cli.name}, validation split; {patient.name}")
    for row, name in enumerate(labels.names):
        best = share[row].argsort(descending=True)[:3].tolist()
        tokens = int((labels.values[routed] == row).sum())
        table.add_row(name, f"{tokens:,}", ", ".join(f"{e}: {float(share[row, e]):.1%}" for e in best))
    draw_answers(share, labels.names, f"{patient.cli.name}: experts by {known.by}", known.output)
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


def _load(calibration: Calibration) -> Tensor:
    weight = calibration.weights.abs().sum(0)
    return weight / weight.sum().clamp_min(1e-12)


def _numbers(text: str) -> list[int]:
    try:
        return [int(word) for word in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r}: expected whole numbers with commas, such as 0,3") from None


def _decimals(text: str) -> list[float]:
    try:
        return [float(word) for word in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r}: expected numbers with commas, such as 4,2.5") from None
