"""A whole run: case after case, kept as they finish."""

import subprocess
import sys
import time
import warnings
from collections.abc import Sequence
from dataclasses import asdict
from fnmatch import fnmatchcase
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from ...errors import UserError
from ..progress import open_progress
from ..results import provenance
from .cases import Case, Device
from .measure import Settings, measure
from .ours import floors, ours
from .peers import peers
from .problem import Contender
from .results import Measured, Results, paths

_PEERS = (
    "transformers", "torchtitan", "tutel", "deepspeed", "mixture-of-experts", "st-moe-pytorch", "soft-moe-pytorch",
    "scattermoe", "megablocks", "fastmoe",
)  # fmt: skip
_IMPORT = "import torch, time; start = time.process_time(); import moezoo.zoo.core; print(time.process_time() - start)"


def contenders(patterns: Sequence[str] = ()) -> list[Contender]:
    """The contenders that names or shell patterns stand for, and always the floor and ours; all for none.

    Raises:
        UserError: a pattern that fits nobody.
    """
    every = [*floors(), *ours(), *peers()]
    for pattern in patterns:
        if not any(fnmatchcase(one.name, pattern) for one in every):
            names = ", ".join(one.name for one in every)
            raise UserError(f"--contenders {pattern}: nobody of that name; there are {names}")
    wanted = ["floor", "ours", *patterns] if patterns else ["*"]
    return [one for one in every if any(fnmatchcase(one.name, pattern) for pattern in wanted)]


def run(
    cases: Sequence[Case],
    rivals: Sequence[Contender],
    device: Device,
    settings: Settings,
    threads: int = 1,
    folder: Path | None = None,
    resume: bool = False,
) -> Results:
    """Measure the cases that are missing; with a folder, keep each as soon as it is finished.

    Raises:
        UserError: no such device, or the interrupted run to go on with was another one.
    """
    check_device(device)
    torch.set_num_threads(threads)
    warnings.filterwarnings("ignore")  # peers', about themselves
    results = Results(_describe(rivals, device, settings, threads))
    if resume and folder is not None and paths(folder, device, partial=True)[0].exists():
        results = _go_on(Results.load(folder, device, partial=True), results)
    with open_progress(len(cases), jobs=1) as progress:
        for case in cases:
            progress.running([case.name])
            if case.name in results.cases:
                progress.finished(case.name, "kept")
                continue
            start = time.monotonic()
            results.cases[case.name] = measure(case, rivals, device, settings)
            progress.finished(case.name, _outcome(results.cases[case.name]), time.monotonic() - start)
            if folder is not None:
                results.save(folder, device, partial=True)
    if folder is not None:
        results.run["import_seconds"] = import_seconds(min(settings.rounds, 7))
        results.save(folder, device)
    return results


def check_device(device: Device) -> None:
    """`UserError` where torch sees no GPU and one is asked for."""
    if device == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: torch sees no GPU here")


def import_seconds(rounds: int) -> list[float]:
    """CPU seconds that importing the core takes once torch is there, each in a process of its own."""
    times = []
    for _ in range(rounds):
        process = subprocess.run([sys.executable, "-c", _IMPORT], capture_output=True, text=True, check=True)
        times.append(float(process.stdout))
    return times


def _describe(rivals: Sequence[Contender], device: Device, settings: Settings, threads: int) -> dict[str, Any]:
    origin: dict[str, Any] = dict(provenance(gpu=device == "cuda"))
    origin["hardware"] = asdict(origin["hardware"])
    versions = {name: _version(name) for name in _PEERS}
    origin["peers"] = {name: version for name, version in versions.items() if version}
    described = {
        one.name: {"role": one.role, "note": one.note, "comparable": one.comparable, "install": one.install}
        for one in rivals
    }
    return origin | {"device": device, "threads": threads, **asdict(settings), "contenders": described}


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _go_on(before: Results, now: Results) -> Results:
    for name in ("hardware", "versions", "git_commit", "threads", "rounds", "sample_seconds", "seed", "contenders"):
        if before.run[name] != now.run[name]:
            raise UserError(
                f"--resume: the interrupted run had another {name} ({before.run[name]!r}, now {now.run[name]!r}); "
                "start afresh without --resume"
            )
    return before


def _outcome(measured: Sequence[Measured]) -> str:
    times = {one.contender: one.seconds for one in measured if one.samples}
    if "floor" not in times or "ours" not in times:
        failed = next((one for one in measured if one.contender == "ours"), None)
        return f"FAILED {failed.unavailable if failed else ''}"
    return f"{times['ours'] * 1e3:.3g} ms, {times['ours'] / times['floor']:.2f} x floor"
