"""`moezoo rewards label` and `moezoo rewards eval`."""

import argparse
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from ..errors import UserError

if TYPE_CHECKING:
    from .rewards_eval import Report
    from .rewards_label import LabelReport

_PROG = "moezoo rewards"

_MAX_TOKENS = 64


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message} (see `{self.prog} --help`)")


def main(argv: Sequence[str] | None = None) -> int:
    """Carry out a verb; 0 when it went well. A mistake of the user is a UserError, for the command line to print."""
    arguments = _parser().parse_args(list(sys.argv[1:] if argv is None else argv))
    arguments.execute(arguments)
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog=_PROG, description="Reward models: labels from a judge, benchmarks.", allow_abbrev=False)
    verbs = parser.add_subparsers(required=True, metavar="{label,eval}", parser_class=_Parser)
    label = verbs.add_parser(
        "label",
        allow_abbrev=False,
        help="have a judge model compare responses, one capability at a time",
        description="Ask a judge which of two responses is better in each capability, in both orders, and keep the "
        "verdicts that do not depend on the order. Answers are cached: the same command goes on where it stopped. The "
        "key of a hosted model is read from MOEZOO_JUDGE_KEY.",
    )
    label.add_argument("files", nargs="+", metavar="FILE", help="pairs, or lists of responses to a prompt")
    label.add_argument("--output", type=Path, required=True, help="JSON Lines of pairs to write; a report goes beside")
    label.add_argument("--endpoint", help="OpenAI-compatible, e.g. http://localhost:8000/v1")
    label.add_argument("--model", help="the model's name at the endpoint")
    label.add_argument("--judge", metavar="MODULE:FUNCTION", help="a Python callable, text -> answer, instead")
    label.add_argument(
        "--capabilities", metavar="FILE|A,B", help="YAML or JSON, task -> list; or a list for all (default: DMoERM's)"
    )
    label.add_argument("--task", help="of all rows (default: each row's own)")
    label.add_argument("--template", type=Path, help="text with {capability}, {prompt}, {first}, {second}")
    label.add_argument("--cache", type=Path, help="answers so far (default: OUTPUT with .answers.jsonl)")
    label.add_argument("--limit", type=int, help="only the first so many pairs")
    label.add_argument("--jobs", type=int, default=4, help="questions at a time (default: 4)")
    label.add_argument("--max_tokens", type=int, default=_MAX_TOKENS, help="of an answer (default: 64)")
    label.add_argument("--timeout", type=float, default=60.0, help="seconds for an answer (default: 60)")
    label.add_argument("--retries", type=int, default=5, help="further tries of a question (default: 5)")
    label.set_defaults(execute=_label)
    evaluate = verbs.add_parser(
        "eval",
        allow_abbrev=False,
        help="scores on RewardBench 1 and 2, RM-Bench, LLMBar, JudgeBench, pairs, best-of-n pools",
        description="Score the responses of a benchmark's files and report what the benchmark reports, with what the "
        "length rule would get beside every number.",
    )
    evaluate.add_argument("files", nargs="+", metavar="FILE", help="of one benchmark: JSON, JSON Lines, Parquet, CSV")
    source = evaluate.add_mutually_exclusive_group(required=True)
    source.add_argument("--weights", metavar="NAME|DIR", help="a trained reward model, e.g. rewards/dmoerm")
    source.add_argument("--scored", type=Path, help="rewards of any model, a table as --scores writes")
    evaluate.add_argument("--kind", default="auto", help="of the benchmark (default: told by its fields)")
    evaluate.add_argument(
        "--route", choices=("predicted", "oracle"), default="predicted", help="oracle: by the file's task"
    )
    evaluate.add_argument("--batch_size", type=int, default=32, help="pairs of responses at a time (default: 32)")
    evaluate.add_argument("--device", default="auto", help="cpu, cuda (default: cuda where there is one)")
    evaluate.add_argument("--output", type=Path, help="JSON file to write")
    evaluate.add_argument("--scores", type=Path, help="table of rewards to write, .parquet or .csv")
    evaluate.set_defaults(execute=_eval)
    return parser


def _label(arguments: argparse.Namespace) -> None:
    from ..datasets.rewards_formats import read_candidates
    from .rewards_eval import write_json
    from .rewards_label import TEMPLATE, label

    for name in ("jobs", "max_tokens", "timeout", "limit"):
        if getattr(arguments, name) is not None and not getattr(arguments, name) > 0:
            raise UserError(f"--{name} {getattr(arguments, name)}: expected more than 0")
    if arguments.retries < 0:
        raise UserError(f"--retries {arguments.retries}: expected 0 or more")
    judge, judge_name = _judge(arguments)
    template = TEMPLATE
    if arguments.template is not None:
        if not arguments.template.is_file():
            raise UserError(f"--template {arguments.template}: no such file")
        template = arguments.template.read_text(encoding="utf-8")
    capabilities = _capabilities(arguments.capabilities)
    pairs = read_candidates(arguments.files, arguments.task)[: arguments.limit]
    cache = arguments.cache or arguments.output.with_suffix(".answers.jsonl")
    if cache.is_dir():
        raise UserError(f"--cache {cache}: is a folder; expected a file")
    with _progress("asking") as progress:
        table, report = label(pairs, capabilities, judge, cache, judge_name, arguments.jobs, template, progress)
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    partial = arguments.output.with_name(f".{arguments.output.name}.partial")
    table.write_ndjson(partial)
    partial.replace(arguments.output)
    beside = arguments.output.with_suffix(".report.json")
    write_json(beside, report.to_dict() | {"judge": judge_name})
    _show_labels(report)
    print(f"{len(table):,} pairs written to {arguments.output}, the report to {beside}")
    if report.unparsed:
        print(f"{report.unparsed:,} of {report.pairs:,} had an answer without 1 or 2; all answers are in {cache}")


def _judge(arguments: argparse.Namespace) -> tuple[Callable[[str], str], str]:
    from .. import settings
    from .rewards_judges import OpenAIJudge, callable_judge

    if arguments.judge is not None:
        if arguments.endpoint is not None:
            raise UserError("--judge and --endpoint: give one of them")
        return callable_judge(arguments.judge), arguments.judge
    if arguments.endpoint is None or arguments.model is None:
        raise UserError("who judges? Give --endpoint URL and --model NAME, or --judge MODULE:FUNCTION")
    judge = OpenAIJudge(
        arguments.endpoint,
        arguments.model,
        settings.judge_key(),
        max_tokens=arguments.max_tokens,
        timeout=arguments.timeout,
        retries=arguments.retries,
    )
    # More room for an answer is another judge: what it could not finish before is asked again.
    longer = arguments.max_tokens != _MAX_TOKENS
    return judge, f"{arguments.model} {arguments.max_tokens}" if longer else arguments.model


def _capabilities(given: str | None) -> Mapping[str, Sequence[str]]:
    from .rewards_label import CAPABILITIES

    if given is None:
        return CAPABILITIES
    if not given.endswith((".yaml", ".yml", ".json")):
        names = [name.strip() for name in given.split(",") if name.strip()]
        if not names:
            raise UserError(f"--capabilities {given!r}: expected names with commas between, or a YAML or JSON file")
        return {"*": names}
    file = Path(given)
    if not file.is_file():
        raise UserError(f"--capabilities {file}: no such file")
    import yaml

    try:
        found = yaml.safe_load(file.read_text(encoding="utf-8"))  # JSON is YAML
    except yaml.YAMLError as error:
        raise UserError(f"--capabilities {file}: {' '.join(str(error).split())}; expected task: [names]") from error
    if not isinstance(found, dict) or not all(
        isinstance(names, list) and names and all(isinstance(name, str) for name in names) for names in found.values()
    ):
        raise UserError(f"--capabilities {file}: expected a mapping, task -> list of names")
    return {str(task): names for task, names in found.items()}


def _eval(arguments: argparse.Namespace) -> None:
    import polars as pl

    from ..datasets.rewards_benchmarks import read_benchmark
    from .rewards_eval import read_scored, report, write_json

    if arguments.scores is not None and arguments.scores.suffix not in (".parquet", ".csv"):
        raise UserError(f"--scores {arguments.scores}: expected a name that ends in .parquet or .csv")
    if arguments.batch_size < 1:
        raise UserError(f"--batch_size {arguments.batch_size}: expected at least 1")
    benchmark = read_benchmark(arguments.files, arguments.kind)
    schema: dict[str, Any] | None = None
    if arguments.scored is not None:
        name, scored = str(arguments.scored), read_scored(arguments.scored, benchmark.table)
    else:
        name, (scored, schema) = arguments.weights, _score(arguments, benchmark.table)
    found = report(benchmark.kind, benchmark.table, scored, schema)
    _show_scores(name, found)
    if arguments.output is not None:
        files = [str(file) for file in benchmark.files]
        write_json(arguments.output, {"model": name, "files": files, "route": arguments.route} | found.to_dict())
        print(f"written to {arguments.output}")
    if arguments.scores is not None:
        table = benchmark.table.with_columns(reward=pl.Series(scored.reward.numpy()))
        arguments.scores.parent.mkdir(parents=True, exist_ok=True)
        partial = arguments.scores.with_name(f".{arguments.scores.name}.partial")
        table.write_parquet(partial) if arguments.scores.suffix == ".parquet" else table.write_csv(partial)
        partial.replace(arguments.scores)
        print(f"{len(table):,} rewards written to {arguments.scores}")


def _score(arguments: argparse.Namespace, table: Any) -> tuple[Any, dict[str, Any]]:
    import torch

    from ..zoo import weights
    from .rewards_eval import model_schema, score_responses

    try:
        device = torch.device(
            ("cuda" if torch.cuda.is_available() else "cpu") if arguments.device == "auto" else arguments.device
        )
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"--device {arguments.device}: {str(error).splitlines()[0]}") from error
    model = weights.load(arguments.weights)
    schema = model_schema(model, arguments.weights)
    with _progress("scoring") as progress:
        scored = score_responses(model.to(device), schema, table, arguments.route, arguments.batch_size, progress)
    return scored, schema


@contextmanager
def _progress(what: str) -> Iterator[Callable[[int, int], None]]:
    """A bar on stderr, where someone looks at it."""
    from rich.console import Console
    from rich.progress import Progress

    console = Console(stderr=True)
    with Progress(console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task(what, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


def _show_labels(report: "LabelReport") -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table("what", "value", title="judge")
    for name, value in report.to_dict().items():
        if isinstance(value, dict):
            for capability, share in value.items():
                table.add_row(f"kept: {capability}", f"{share:.3f}")
        else:
            table.add_row(name.replace("_", " "), f"{value:.3f}" if isinstance(value, float) else f"{value:,}")
    Console().print(table)


def _show_scores(name: str, found: "Report") -> None:
    from rich.console import Console
    from rich.table import Table

    console = Console()
    rule = found.length_rule
    table = Table(found.scores.kind, name, "length rule", title=f"{found.scores.headline} ranks models")
    for score, value in found.scores.scores.items():
        table.add_row(score, f"{value:.4f}", f"{rule.scores[score]:.4f}")
    console.print(table)
    if found.scores.subsets:
        table = Table("subset", "n", "score", "± se", "length rule")
        for subset, part in found.scores.subsets.items():
            table.add_row(
                subset, f"{part.n:,}", f"{part.value:.4f}", f"{part.se:.4f}", f"{rule.subsets[subset].value:.4f}"
            )
        console.print(table)
    if (length := found.scores.length) is not None:
        console.print(
            f"prefers the longer response in {length.prefers_longer:.3f} of {length.n:,} pairs; right where the better "
            f"one is longer {length.accuracy_longer:.3f}, shorter {length.accuracy_shorter:.3f}"
        )
    if found.router is not None:
        router = found.router
        console.print(f"router: accuracy {router.accuracy:.4f}, macro-F1 {router.macro_f1:.4f} on {router.n:,} items")
    for note in found.scores.notes:
        console.print(f"note: {note}")
