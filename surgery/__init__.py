"""`moezoo surgery`: what a trained model's experts do, and what it costs to take some away or to store them smaller.

Whatever decides (who gets tokens, what rounding changes) is measured on validation data; effects are shown on the test
split, with the recipe's own metrics. The weights in the store stay as they are.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

from .. import recipes, runs
from ..errors import UserError
from . import verbs
from .patient import CALIBRATION_TOKENS, Calibration, Dense, Mixture

__all__ = ["CALIBRATION_TOKENS", "Calibration", "Dense", "Mixture", "main"]


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
    known.verb(request, known)
    return 0


def _parser() -> _Parser:
    parser = _Parser(prog="moezoo surgery", description=__doc__, allow_abbrev=False)
    commands = parser.add_subparsers(required=True, metavar="VERB", parser_class=_Parser)
    common = _Parser(add_help=False)
    common.add_argument("--config", "-c", required=True, metavar="NAME|PATH", help="recipe, e.g. ranking/awmoe")
    common.add_argument("--weights", metavar="NAME|DIR", help="default: beside the recipe, else published")
    common.add_argument("--seed", type=int, help="random seed (default: the recipe's)")
    raw = _Parser(add_help=False)
    raw.add_argument("--output", type=Path, metavar="FILE.json", help="also write the raw numbers")
    mixture = _Parser(add_help=False)
    mixture.add_argument("--pool", metavar="MODULE", help="which experts, where the model has several pools")
    dense = _Parser(add_help=False)
    dense.add_argument("--part", metavar="MODULE", help="which MLP, where the model has several")
    dense.add_argument("--experts", type=int, default=8, metavar="N", help="how many experts to make (default 8)")

    def add(name: str, verb: Any, text: str, *parents: _Parser) -> argparse.ArgumentParser:
        command = commands.add_parser(name, help=text, description=text, parents=[common, *parents], allow_abbrev=False)
        command.set_defaults(verb=verb)
        return command

    def numbers(command: argparse.ArgumentParser, option: str, text: str, **more: Any) -> None:
        command.add_argument(option, type=_numbers, metavar="N,N,...", help=text, **more)

    rank = add("rank", verbs.rank, "each expert's load, and the test metrics without it", mixture, raw)
    rank.add_argument("--top", type=int, default=8, help="try the N experts with the most load (default 8)")
    switch = add("switch", verbs.switch, "test metrics with chosen experts off, or forced on", mixture, raw)
    numbers(switch, "--off", "experts to switch off", default=[])
    numbers(switch, "--on", "experts to force on", default=[])
    prune = add("prune", verbs.prune, "test metrics with only the most used experts left", mixture, raw)
    numbers(prune, "--keep", "how many to keep; several: curve", required=True)
    merge = add("merge", verbs.merge, "test metrics with experts that do alike averaged, beside pruning", mixture, raw)
    numbers(merge, "--keep", "how many to leave; several: curve", required=True)
    quantise = add(
        "quantise", verbs.quantise, "test metrics with experts rounded to few bits, allocated or alike", mixture, raw
    )
    quantise.add_argument(
        "--bits", type=_decimals, default=[4.0, 3.0, 2.5, 2.0], metavar="B,B,...", help="mean bits per expert; a curve"
    )
    numbers(quantise, "--choices", "bits to give", default=[1, 2, 3, 4, 6, 8])
    online = add("online", verbs.online, "test metrics with fewer experts for tokens that are sure", mixture, raw)
    online.add_argument(
        "--beta", type=_decimals, default=[0.25, 0.5, 0.75], metavar="B,B,...",
        help="drop experts with less than this share of the first one's weight",
    )  # fmt: skip
    online.add_argument("--skip", type=float, default=0.0, help="also no expert for this share of tokens, the smallest")
    online.add_argument("--spare", type=float, default=0.1, help="with --skip: all experts for so many, the largest")
    offload = add("offload", verbs.offload, "how often a cache holds the experts that are needed", mixture, raw)
    numbers(offload, "--cache", "experts on the device; several: curve", required=True)
    split = add("split", verbs.split, "test metrics of a dense MLP split into experts", dense, raw)
    numbers(split, "--keep", "experts active per token; several: curve", required=True)
    upcycle = add("upcycle", verbs.start_mixture, "test metrics of a dense MLP made a mixture", dense, raw)
    upcycle.add_argument("--top", type=int, default=2, metavar="K", help="experts per token (default 2)")
    upcycle.add_argument("--noise", type=float, default=0.0, help="sets experts apart, in weights' deviations")
    upcycle.add_argument("--train", action="store_true", help="train both on, by the recipe")
    answers = add("map", verbs.expert_map, "what experts answer to: weight by any field of batches or output", mixture)
    answers.add_argument("--by", required=True, metavar="FIELD[:COLUMN]", help="such as label, user or candidates:2")
    answers.add_argument("--output", type=Path, default=Path("expert_map.png"), help="picture (default: %(default)s)")
    return parser


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
