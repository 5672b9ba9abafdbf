"""The `moezoo` command. Words are told apart before anything heavy is imported."""

import argparse
import sys
from collections.abc import Sequence
from difflib import get_close_matches
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import NoReturn

from . import __version__
from .errors import UserError

RUN_VERBS = {
    "fit": "train a recipe, test it, and leave weights, metrics and pictures in a run folder",
    "validate": "metrics of trained weights on the validation split",
    "test": "metrics of trained weights on the test split, as the leaderboard computes them",
    "predict": "write predictions as Parquet or CSV",
}
OTHER_VERBS = {
    "list": "the recipes there are",
    "show": "a recipe, as YAML",
    "weights": "list, download, verify and publish trained weights",
    "leaderboard": "run recipes x seeds, draw the leaderboard",
    "surgery": "what a trained model loses without some experts, or with fewer bits for them",
    "bench": "time the MoE core against other libraries and against the floor",
}
HELP = """usage: moezoo COMMAND ...

Mixture-of-Experts outside language modelling: train, evaluate, rank, download.

{commands}

examples:
  moezoo fit --config ranking/awmoe
  moezoo fit --config ranking/awmoe --data.source long --data.files.events purchases.parquet
  moezoo test --config ranking/awmoe
  moezoo leaderboard run 'ranking/*' --seeds 0-4 --jobs 2

`moezoo COMMAND --help` says more."""


def main(argv: Sequence[str] | None = None) -> int:
    """Carry out a command line; returns the exit code: 0 well, 1 failed, 2 the user's mistake, 130 interrupted."""
    words = list(sys.argv[1:] if argv is None else argv)
    try:
        return _dispatch(words)
    except UserError as error:
        print(f"moezoo: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("moezoo: interrupted; `--resume` goes on with a run", file=sys.stderr)
        return 130


def _dispatch(words: list[str]) -> int:
    if not words or words[0] in {"-h", "--help", "help"}:
        commands = "\n".join(f"  {verb:12} {text}" for verb, text in (RUN_VERBS | OTHER_VERBS).items())
        print(HELP.format(commands=commands))
        return 0
    verb, rest = words[0], words[1:]
    if verb in {"-V", "--version"}:
        print(f"moezoo {__version__}")
        return 0
    if verb in RUN_VERBS:
        return _run(verb, rest)
    if verb == "list":
        return _list(rest)
    if verb == "show":
        return _show(rest)
    if verb == "weights":
        return int(import_module(".zoo.weights_commands", __package__).main(rest))
    if verb == "leaderboard":
        return int(import_module(".leaderboard.commands", __package__).main(rest))
    if verb == "surgery":
        return int(import_module(".surgery", __package__).main(rest))
    if verb == "bench":
        return int(import_module(".leaderboard.bench.commands", __package__).main(rest))
    # Domain commands: `moezoo <domain> <verb>` lives in tasks/<domain>_commands.py and is found by name.
    if verb.isidentifier() and find_spec(f"{__package__}.tasks.{verb}_commands"):
        return int(import_module(f".tasks.{verb}_commands", __package__).main(rest))
    near = get_close_matches(verb, [*RUN_VERBS, *OTHER_VERBS], n=1)
    raise UserError(f"no command '{verb}'; " + (f"did you mean '{near[0]}'?" if near else "see `moezoo --help`"))


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message} (see `{self.prog} --help`)")


def _run(verb: str, words: list[str]) -> int:
    parser = _Parser(
        prog=f"moezoo {verb}",
        description=RUN_VERBS[verb],
        epilog="Any value of the recipe can be changed: --trainer.max_epochs 3 --model.optimizer.lr 1e-3 "
        "--model.model.num_experts 8 --data.batch_size 512. `moezoo show NAME` prints the recipe.",
        allow_abbrev=False,
    )
    parser.add_argument("--config", "-c", required=True, metavar="NAME|PATH", help="recipe, e.g. ranking/awmoe")
    parser.add_argument("--seed", type=int, help="random seed (default: the recipe's)")
    if verb == "fit":
        parser.add_argument("--run_dir", type=Path, help="default: runs/<domain>/<recipe>/s<seed>")
        parser.add_argument("--resume", action="store_true", help="go on with an interrupted run")
        parser.add_argument("--overwrite", action="store_true", help="replace the run in the run folder")
    else:
        parser.add_argument("--weights", metavar="NAME|DIR|none", help="default: beside the recipe, else published")
    if verb == "predict":
        parser.add_argument("--output", type=Path, help="file to write (default: predictions.parquet)")
    known, overrides = parser.parse_known_args(words)
    from . import recipes

    changes = recipes.join_values(overrides)
    recipes.read(known.config)  # a misspelt name is told at once, before torch is imported
    from . import runs

    runs.quiet()
    request = runs.Request(**vars(known), overrides=changes)
    return int(getattr(runs, verb)(request))


def _list(words: list[str]) -> int:
    parser = _Parser(prog="moezoo list", description=OTHER_VERBS["list"], allow_abbrev=False)
    parser.add_argument("pattern", nargs="?", default="*", help="shell pattern, e.g. 'ranking/*'")
    pattern = parser.parse_args(words).pattern
    from rich.console import Console
    from rich.table import Table

    from .recipes import list_recipes, metadata

    names = list_recipes(pattern)
    if not names:
        raise UserError(f"no recipe matches '{pattern}'; `moezoo list` shows all")
    table = Table("recipe", "kind", "what", "cost", "paper")
    table.columns[0].no_wrap = True
    for name in names:
        info = metadata(name)
        table.add_row(name, info.kind, info.title, info.cost, info.paper)
    Console().print(table)
    return 0


def _show(words: list[str]) -> int:
    parser = _Parser(prog="moezoo show", description=OTHER_VERBS["show"], allow_abbrev=False)
    parser.add_argument("name", metavar="NAME|PATH")
    name = parser.parse_args(words).name
    from .recipes import resolve

    print(resolve(name).read_text(), end="")
    return 0


if __name__ == "__main__":
    sys.exit(main())
