"""`moezoo relations eval`, `associate`, `shapes` and `video`. Nothing heavy is imported before a command runs."""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from ..errors import UserError
from .relations_files_verbs import add_files
from .relations_video_verb import add_video

if TYPE_CHECKING:
    from .relations_eval import RelationScores

_DIALECTS = ("exact", "helper", "legacy_normalized")
_NAMES = {
    "map": "mAP",
    "recall_at_50": "R@50",
    "recall_at_100": "R@100",
    "precision_at_1": "P@1",
    "precision_at_5": "P@5",
    "precision_at_10": "P@10",
}


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message}; see {self.prog} --help\n")


def main(argv: Sequence[str]) -> int:
    """Run one verb; 0 when it went well, 2 (and one line on stderr) for a mistake of the user."""
    arguments = _parser().parse_args(argv)
    try:
        arguments.verb(arguments)
    except UserError as error:
        print(f"moezoo relations: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="moezoo relations", description="Relations between objects in video.", allow_abbrev=False)
    verbs = parser.add_subparsers(required=True, metavar="VERB", parser_class=_Parser)
    text = "Score predictions against annotations: detection, tagging, zero-shot, each predicate."
    command = verbs.add_parser("eval", help=text, description=text, allow_abbrev=False)
    command.set_defaults(verb=_eval)
    command.add_argument(
        "truth", metavar="GT", type=Path, help="annotations: a folder of VidVRD or VidOR JSON, or a file"
    )
    command.add_argument("predictions", metavar="PRED", type=Path, help="prediction JSON, version 1.0 to 3.0; .gz too")
    command.add_argument(
        "--dialect",
        choices=_DIALECTS,
        default="exact",
        help="exact: vIoU without +1, P@K padded with misses (default); helper: VidVRD-helper and most papers; "
        "legacy_normalized: VidVRD-II before 2022 and MoE-VRD, whose vIoU is inflated",
    )
    command.add_argument("--train", type=Path, metavar="PATH", help="training annotations or a table of triplets: "
                         "adds zero-shot and generalised zero-shot")  # fmt: skip
    command.add_argument("--size", type=_size, metavar="WxH", help="pixels, for files that do not say them")
    command.add_argument("--threshold", type=float, default=0.5, help="of vIoU (default: 0.5)")
    command.add_argument("--predicates", action="store_true", help="also print the AP of each predicate")
    command.add_argument("--json", type=Path, metavar="FILE", help="write all scores, of each video and predicate too")
    add_files(verbs)
    add_video(verbs)
    return parser


def _eval(arguments: argparse.Namespace) -> None:
    if not 0 < arguments.threshold <= 1:
        raise UserError(f"--threshold {arguments.threshold}: expected more than 0 and at most 1")
    if arguments.json is not None and not arguments.json.expanduser().parent.is_dir():
        raise UserError(f"--json {arguments.json}: no folder {arguments.json.parent}; make it first")
    from ..datasets.relations_formats import read_relations, read_triplets
    from .relations_eval import evaluate, evaluate_zero_shot

    truth, predictions = read_relations(arguments.truth), read_relations(arguments.predictions)
    strangers = predictions.videos.keys() - truth.videos.keys()
    if strangers and len(strangers) == len(predictions.videos):
        raise UserError(
            f"{arguments.predictions}: none of its {len(strangers)} videos (such as {min(strangers)}) is in "
            f"{arguments.truth}; expected the same video ids"
        )
    if strangers:
        print(f"moezoo relations: {len(strangers)} predicted videos are not annotated and left out", file=sys.stderr)
    options = {"dialect": arguments.dialect, "threshold": arguments.threshold, "size": arguments.size}
    results: dict[str, RelationScores] = {"all triplets": evaluate(truth, predictions, **options)}
    if arguments.train is not None:
        train = read_triplets(arguments.train)
        for name, generalised in (("zero-shot", False), ("generalised zero-shot", True)):
            scores = evaluate_zero_shot(truth, predictions, train, **options, generalised=generalised)
            if scores is not None:
                results[name] = scores
        if len(results) == 1:
            print("moezoo relations: every triplet occurs in --train: nothing is zero-shot", file=sys.stderr)
    _show(results, arguments)
    if arguments.json is not None:
        content = {name: _as_json(scores) for name, scores in results.items()}
        arguments.json.expanduser().write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def _show(results: "dict[str, RelationScores]", arguments: argparse.Namespace) -> None:
    from rich.console import Console
    from rich.table import Table

    console = Console(markup=False)
    table = Table("percent", "videos", "instances", *_NAMES.values(), box=None, pad_edge=False, title_justify="left")
    for column in table.columns[1:]:
        column.justify = "right"
    for name, scores in results.items():
        counts = (str(len(scores.videos)), str(scores.videos["instances"].sum()))
        table.add_row(name, *counts, *(f"{100 * scores.metrics[key]:.2f}" for key in _NAMES))
        table.add_row("  ceiling", "", "", *(f"{100 * scores.ceilings[key]:.2f}" for key in _NAMES), style="dim")
    console.print(table)
    console.print(
        f"dialect {arguments.dialect}, vIoU >= {arguments.threshold:g}; ceiling: what perfect predictions score"
    )
    first = next(iter(results.values()))
    console.print(f"mean AP over predicates {100 * first.mean_predicate_ap:.2f}")
    if arguments.predicates:
        each = Table("predicate", "instances", "predictions", "hits", "recall", "AP", box=None, pad_edge=False)
        for column in each.columns[1:]:
            column.justify = "right"
        for row in first.predicates.sort("instances", "predicate", descending=[True, False]).iter_rows(named=True):
            shares = ("" if row[key] is None else f"{100 * row[key]:.2f}" for key in ("recall", "ap"))
            each.add_row(row["predicate"], *(str(row[key]) for key in ("instances", "predictions", "hits")), *shares)
        console.print(each)


def _as_json(scores: "RelationScores") -> dict[str, object]:
    return {
        "dialect": scores.dialect,
        "metrics": scores.metrics,
        "ceilings": scores.ceilings,
        "predicates": scores.predicates.to_dicts(),
        "videos": scores.videos.to_dicts(),
    }


def _size(text: str) -> tuple[int, int]:
    width, cross, height = text.lower().partition("x")
    if not (cross and width.isdecimal() and height.isdecimal() and int(width) and int(height)):
        raise argparse.ArgumentTypeError(f"{text}: expected width x height in pixels, e.g. 1280x720")
    return int(width), int(height)
