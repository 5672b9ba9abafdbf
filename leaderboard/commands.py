"""`moezoo leaderboard run`, `report` and `curves`. Nothing heavy is imported before a command runs."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from ..errors import UserError

RESULTS = Path("leaderboard/results")
SITE = Path("leaderboard/site")


def main(argv: Sequence[str] | None = None) -> int:
    """Run `moezoo leaderboard ...`; `argv` is what follows the word `leaderboard`.

    Returns:
        0 when all went well, 1 when a cell failed, 2 for a mistake of the user, 130 after Ctrl-C.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    # argparse would hand what follows `--` to RECIPES.
    cut = words.index("--") if "--" in words else len(words)
    arguments = _Parser.build().parse_args(words[:cut])
    arguments.extra = words[cut + 1 :]
    return execute(arguments)


def execute(arguments: argparse.Namespace) -> int:
    """Carry out parsed arguments; for a caller that used `add_parser`."""
    try:
        return int(arguments.execute(arguments))
    except UserError as error:
        print(f"moezoo leaderboard: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("moezoo leaderboard: interrupted; the same command goes on where this one stopped", file=sys.stderr)
        return 130


def add_parser(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add `leaderboard` with its commands to a parser; `execute` carries out what it parsed."""
    parser = subparsers.add_parser("leaderboard", help="run recipes × seeds and draw the leaderboard")
    _add_commands(parser)


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message} (see {self.prog} --help)\n")

    @classmethod
    def build(cls) -> "_Parser":
        parser = cls(prog="moezoo leaderboard", allow_abbrev=False)
        _add_commands(parser)
        return parser


def _add_commands(parser: argparse.ArgumentParser) -> None:
    commands = parser.add_subparsers(metavar="{run,report,curves}", required=True)
    run = commands.add_parser(
        "run",
        help="train and test the cells whose result is missing",
        description="Train and test recipes × seeds. Finished cells are kept: interrupted, the same command "
        "goes on. Arguments after '--' go to `moezoo fit`.",
        allow_abbrev=False,
    )
    run.add_argument("recipes", nargs="*", metavar="RECIPE", help="names, patterns or files; default: all")
    run.add_argument("--domain", help="only the recipes of this domain, e.g. ranking")
    run.add_argument("--seeds", nargs="+", default=["0-4"], help="e.g. 0 1 2 or 0-4 (default: 0-4)")
    run.add_argument("--jobs", type=int, default=1, help="cells at a time (default: 1)")
    run.add_argument("--results", type=Path, default=RESULTS, help=f"the store (default: {RESULTS})")
    run.add_argument("--runs", type=Path, default=Path("runs"), help="run folders and logs (default: runs)")
    run.set_defaults(execute=_run, extra=[])
    report = commands.add_parser(
        "report",
        help="draw the results as HTML and Markdown",
        description="Draw the results as a web page and as Markdown. Reads result files only, runs nothing.",
        allow_abbrev=False,
    )
    report.add_argument("--results", type=Path, help=f"the store (default: {RESULTS}, else the shipped results)")
    report.add_argument("--output", type=Path, default=SITE, help=f"folder to write (default: {SITE})")
    report.set_defaults(execute=_report, extra=[])
    curves = commands.add_parser(
        "curves",
        help="draw learning curves of control, ours and published ones",
        description="Interquartile mean over environment frames of the runs in `eval.csv` files, or in CSV files of "
        "DrQ-v2's layout (agent, task, seed, frame, episode_reward), with a 95 %% stratified bootstrap band.",
        allow_abbrev=False,
    )
    curves.add_argument("files", nargs="+", type=Path, metavar="CSV", help="e.g. runs/control/*/s*/eval.csv")
    curves.add_argument("--output", type=Path, default=Path("curves.png"), help="PNG file (default: curves.png)")
    curves.add_argument("--metric", choices=("episode_reward", "success_rate"), default="episode_reward")
    curves.add_argument("--scale", type=float, default=1.0, help="divide scores by it (default: 1)")
    curves.add_argument("--tasks", nargs="+", default=[], help="only these tasks")
    curves.set_defaults(execute=_curves, extra=[])


def _run(arguments: argparse.Namespace) -> int:
    recipes, seeds = select_recipes(arguments.recipes, arguments.domain), parse_seeds(arguments.seeds)
    if not any(word.startswith("--data.files") for word in arguments.extra):
        recipes = without_own_files(recipes, arguments.recipes)
    from .run import run

    failures = run(recipes, seeds, arguments.jobs, arguments.results, arguments.runs, extra=arguments.extra)
    for failure in failures:
        print(f"moezoo leaderboard: {failure}", file=sys.stderr)
    return 1 if failures else 0


def _report(arguments: argparse.Namespace) -> int:
    if arguments.extra:
        raise UserError(f"{' '.join(arguments.extra)}: report takes nothing after '--'")
    if arguments.results is not None and not arguments.results.is_dir():
        raise UserError(f"--results {arguments.results}: no such folder; `moezoo leaderboard run` fills one")
    from .report import write_report

    shipped = Path(__file__).parent / "results"
    for path in write_report(arguments.results or (RESULTS if RESULTS.is_dir() else shipped), arguments.output):
        print(path)
    return 0


def _curves(arguments: argparse.Namespace) -> int:
    from .curves import write_curves

    given = (arguments.files, arguments.output, arguments.metric, arguments.scale, arguments.tasks)
    for path in write_curves(*given):
        print(path)
    return 0


def select_recipes(patterns: Sequence[str], domain: str | None = None) -> list[str]:
    """The recipes that names, shell patterns or paths stand for, in the order given; all of them for none.

    Raises:
        UserError: nothing fits a pattern or the domain.
    """
    from ..recipes import list_recipes, name_of, resolve

    chosen: list[str] = []
    for pattern in patterns or ["*"]:
        found = list_recipes(pattern)
        if not found and any(character in pattern for character in "*?["):
            raise UserError(f"{pattern}: no recipe fits; `moezoo list` shows what there is")
        if not found:
            resolve(pattern)
        chosen += found or [pattern]
    if domain is not None:
        chosen = [recipe for recipe in chosen if name_of(recipe).startswith(f"{domain}/")]
    if not chosen:
        raise UserError(f"--domain {domain}: no such recipe; `moezoo list` shows what there is")
    return list(dict.fromkeys(chosen))


def without_own_files(recipes: Sequence[str], named: Sequence[str]) -> list[str]:
    """The recipes but for those that wait for the user's files; what is left out is said.

    Raises:
        UserError: one that was asked for by name.
    """
    from ..recipes import metadata

    kept = []
    for recipe in recipes:
        files = metadata(recipe).own_files
        if files and recipe in named:
            raise UserError(f"{recipe}: needs your files; give {files} after '--'")
        if files:
            print(f"moezoo leaderboard: {recipe} left out: it needs your files, {files}", file=sys.stderr)
        else:
            kept.append(recipe)
    return kept


def parse_seeds(words: Sequence[str]) -> list[int]:
    """Seeds from words such as `0`, `0-4` or `0,2,5`, each once.

    Raises:
        UserError: a word that is none of these.
    """
    seeds: list[int] = []
    for word in (part for text in words for part in text.split(",")):
        first, dash, last = word.partition("-")
        if not (first.isdecimal() and (last.isdecimal() if dash else not last)):
            raise UserError(f"--seeds {word}: expected whole numbers or a range such as 0-4")
        if dash and int(last) < int(first):
            raise UserError(f"--seeds {word}: the range runs backwards")
        seeds += range(int(first), int(last or first) + 1)
    return list(dict.fromkeys(seeds))
