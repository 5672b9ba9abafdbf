"""`moezoo bench core`, `robustness`, `control` and `rewards`. Nothing heavy is imported before a command runs."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from ...errors import UserError
from .cases import grid, quick, select_cases

OUTPUT = Path("leaderboard/bench")
_DESCRIPTION = """Time the MoE layer against peers and against the floor (the same floating point operations in one
dense network), interleaved in one run.

A case is named PART-ACT-DTYPE-N,d,h,E,k[-skew3.2][-bias][-infer], for example ffn-gelu-fp32-4096,64,128,8,2; any such
name may be given, in the grid or not. Single cases are shown on the terminal and kept only with --output:

  moezoo bench core --cases ffn-gelu-fp32-256,64,128,8,2 --contenders 'ours*' floor_bmm --rounds 10
  moezoo bench core --cases 'layer-*-fp32-256,*' --contenders 'transformers/*' 'tutel/*'
  moezoo bench core --cases '*-infer' --contenders 'ours*'

The floor and ours always take part. Times are CPU time (events on a GPU), the best round; brackets hold the 95 %
bootstrap interval over rounds. The whole grid is measured by `moezoo bench core` alone (about an hour), which writes
leaderboard/bench/results/core-cpu.parquet, core.md and core.png; `--report` draws those again from the Parquet file.
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run `moezoo bench ...`; returns 0, 1 when a case failed, 2 for a mistake of the user, 130 after Ctrl-C."""
    arguments = _parser().parse_args(list(sys.argv[1:] if argv is None else argv))
    try:
        return int(arguments.run(arguments))
    except UserError as error:
        print(f"moezoo bench: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("moezoo bench: interrupted; --resume goes on where this run stopped", file=sys.stderr)
        return 130


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message} (see {self.prog} --help)\n")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="moezoo bench", allow_abbrev=False)
    commands = parser.add_subparsers(metavar="core|robustness|control|rewards", required=True)
    core = commands.add_parser(
        "core",
        help="the MoE layer against peers and the floor",
        description=_DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    core.add_argument("--cases", nargs="+", default=[], metavar="CASE", help="names or patterns (default: the grid)")
    core.add_argument("--contenders", nargs="+", default=[], metavar="NAME", help="names or patterns (default: all)")
    core.add_argument("--rounds", type=int, help="interleaved rounds (default: 30)")
    core.add_argument("--quick", action="store_true", help="3 short rounds of two small cases, or of --cases")
    core.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="default: cpu")
    core.add_argument("--threads", type=int, default=1, help="of torch (default: 1)")
    core.add_argument("--output", type=Path, help=f"folder to keep results and page in (whole grid: {OUTPUT})")
    core.add_argument("--resume", action="store_true", help="keep the finished cases of an interrupted run")
    core.add_argument("--report", action="store_true", help="only draw the page from the results of --output")
    core.add_argument("--list", action="store_true", help="only name cases and contenders")
    core.set_defaults(run=_core)
    robustness = commands.add_parser(
        "robustness",
        help="a routed ResNet-18 against the dense one and against masking",
        description="Time AdvMoE's sorted pathways (ResNet-18, two experts of half width) against the dense network, "
        "one pathway alone, and masking, interleaved in one run. CPU time (events on a GPU); brackets hold the 95 %% "
        "bootstrap interval over rounds.",
        allow_abbrev=False,
    )
    robustness.add_argument("--rounds", type=int, default=10, help="interleaved rounds (default: 10)")
    robustness.add_argument("--batch", type=int, default=64, help="images per step (default: 64)")
    robustness.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="default: cpu")
    robustness.add_argument("--threads", type=int, default=1, help="of torch (default: 1)")
    robustness.add_argument("--output", type=Path, metavar="FILE", help="JSON file to keep every sample in")
    robustness.set_defaults(run=_robustness)
    control = commands.add_parser(
        "control",
        help="an update of MENTOR at the paper's size, and its experts against a loop",
        description="Time one update of MENTOR (84x84 images, 16 experts, 4 used), eager and on a GPU compiled, and "
        "its mixture against a loop over 16 modules. CPU time (events on a GPU); brackets hold the 95 %% bootstrap "
        "interval over rounds.",
        allow_abbrev=False,
    )
    control.add_argument("--rounds", type=int, default=10, help="interleaved rounds (default: 10)")
    control.add_argument("--batch", type=int, default=256, help="transitions of an update (default: 256)")
    control.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="default: cpu")
    control.add_argument("--threads", type=int, default=1, help="of torch (default: 1)")
    control.add_argument("--output", type=Path, metavar="FILE", help="JSON file to keep every sample in")
    control.set_defaults(run=_control)
    rewards = commands.add_parser(
        "rewards",
        help="DMoERM's six experts in one pass, against switching PEFT's adapters",
        description="Time DMoERM's inner layer on a language model of SmolLM2-135M's shape against PEFT's adapters, "
        "switched one after the other, and on a GPU compare the memory of low-rank and whole bases. CPU time (events "
        "on a GPU); brackets hold the 95 %% bootstrap interval over rounds.",
        allow_abbrev=False,
    )
    rewards.add_argument("--rounds", type=int, default=10, help="interleaved rounds (default: 10)")
    rewards.add_argument("--rows", type=int, nargs="+", default=[2, 8, 32], help="responses (default: 2 8 32)")
    rewards.add_argument("--length", type=int, default=512, help="tokens of a response (default: 512)")
    rewards.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="default: cpu")
    rewards.add_argument("--threads", type=int, default=1, help="of torch (default: 1)")
    rewards.add_argument("--output", type=Path, metavar="FILE", help="JSON file to keep every sample in")
    rewards.set_defaults(run=_rewards)
    return parser


def _rewards(arguments: argparse.Namespace) -> int:
    if min(arguments.rounds, *arguments.rows, arguments.length, arguments.threads) < 1:
        given = f"--rounds {arguments.rounds} --rows {arguments.rows} --length {arguments.length}"
        raise UserError(f"{given} --threads {arguments.threads}: all must be at least 1")
    from . import rewards
    from .run import check_device

    check_device(arguments.device)
    rewards.run(
        arguments.rounds,
        arguments.rows,
        arguments.length,
        arguments.device,
        arguments.threads,
        arguments.output,
    )
    return 0


def _control(arguments: argparse.Namespace) -> int:
    if min(arguments.rounds, arguments.batch, arguments.threads) < 1:
        given = f"--rounds {arguments.rounds} --batch {arguments.batch} --threads {arguments.threads}"
        raise UserError(f"{given}: all must be at least 1")
    from . import control
    from .run import check_device

    check_device(arguments.device)
    control.run(arguments.rounds, arguments.batch, arguments.device, arguments.threads, arguments.output)
    return 0


def _robustness(arguments: argparse.Namespace) -> int:
    if min(arguments.rounds, arguments.batch, arguments.threads) < 1:
        given = f"--rounds {arguments.rounds} --batch {arguments.batch} --threads {arguments.threads}"
        raise UserError(f"{given}: all must be at least 1")
    from . import robustness
    from .run import check_device

    check_device(arguments.device)
    robustness.run(arguments.rounds, arguments.batch, arguments.device, arguments.threads, arguments.output)
    return 0


def _core(arguments: argparse.Namespace) -> int:
    return _report(arguments) if arguments.report else _list(arguments) if arguments.list else _run(arguments)


def _run(arguments: argparse.Namespace) -> int:
    rounds = arguments.rounds if arguments.rounds is not None else 3 if arguments.quick else 30
    if rounds < 1 or arguments.threads < 1:
        raise UserError(f"--rounds {rounds} --threads {arguments.threads}: both must be at least 1")
    whole = not (arguments.cases or arguments.contenders or arguments.quick)
    output = arguments.output or (OUTPUT if whole else None)
    if arguments.resume and output is None:
        raise UserError("--resume needs --output: a run of single cases keeps nothing to go on with")
    small = arguments.quick and not arguments.cases
    cases = quick() if small else select_cases(arguments.cases, arguments.device)
    from . import run
    from .measure import Settings

    settings = Settings(rounds, 1e-3 if arguments.quick else 5e-3)
    rivals = run.contenders(arguments.contenders)
    results = run.run(
        cases, rivals, arguments.device, settings, arguments.threads, output and output / "results", arguments.resume
    )
    if output is None:
        from .terminal import show

        show(results)
    else:
        from .page import write_page

        for path in write_page(output, arguments.device):
            print(path)
    ran = {name: {one.contender for one in measured if one.samples} for name, measured in results.cases.items()}
    return 0 if all({"floor", "ours"} <= names for names in ran.values()) else 1


def _report(arguments: argparse.Namespace) -> int:
    from .page import write_page

    for path in write_page(arguments.output or OUTPUT, arguments.device):
        print(path)
    return 0


def _list(arguments: argparse.Namespace) -> int:
    from .run import contenders

    for case in select_cases(arguments.cases, arguments.device) if arguments.cases else grid(arguments.device):
        print(case.name)
    for contender in contenders(arguments.contenders):
        print(f"{contender.name}: {contender.note}" if contender.note else contender.name)
    return 0
