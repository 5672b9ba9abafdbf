"""Fill the leaderboard: recipes × seeds, each cell a `moezoo fit` in a process of its own.

A cell is done when the store holds a result of its recipe, seed and recipe hash. Everything else about a run
can be lost: killed at any moment and started again, it does the cells that are missing and no other. Several
runs may share a store: a lock per cell keeps them apart. The cell's own process inherits that lock, so a cell
that outlives its killed runner is waited for and not started twice.
"""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import polars as pl

from .. import recipes as recipe_files
from ..errors import UserError
from .progress import Progress, open_progress
from .results import Result, units_path

FIT = (sys.executable, "-m", "moezoo.cli", "fit")
_POLL_SECONDS = 0.1
_RETRY_SECONDS = 1.0
_GRACE_SECONDS = 5.0


@dataclass(frozen=True)
class Cell:
    """One recipe with one seed: `config` is the recipe as the user gave it, `recipe` its name."""

    config: str
    recipe: str
    seed: int
    recipe_hash: str
    run_dir: Path

    def __str__(self) -> str:
        return f"{self.recipe} s{self.seed}"

    @property
    def log(self) -> Path:
        return self.run_dir.with_name(f"{self.run_dir.name}.log")


@dataclass(frozen=True)
class Failure:
    """A cell that gave no result: the last line it printed, and the log file with the rest."""

    cell: Cell
    message: str

    def __str__(self) -> str:
        return f"{self.cell}: {self.message} (log: {self.cell.log})"


def run(
    recipes: Sequence[str],
    seeds: Sequence[int],
    jobs: int = 1,
    results: Path = Path("leaderboard/results"),
    runs: Path = Path("runs"),
    extra: Sequence[str] = (),
    command: Sequence[str] = FIT,
) -> list[Failure]:
    """Run every cell whose result is missing or stale; return those that failed.

    Args:
        recipes: names or paths of recipe files. Those of kind `rule` run with the first seed only, as a rule
            has nothing random in it.
        seeds: seeds of the others.
        jobs: cells at a time; with more than one, each gets a single thread.
        results: the store that the finished cells go to.
        runs: where the run folders `<domain>/<recipe>/s<seed>` and their logs lie.
        extra: further arguments of `moezoo fit`. Those that change what is computed change the recipe hash.
        command: what runs a cell. It is given `--config RECIPE --seed N --run_dir DIR --resume` and `extra`,
            and must leave `result.json` and `units.parquet` in DIR (`Result.save`).

    Raises:
        UserError: an unknown recipe, or `extra` would replace results of the unchanged recipe.
    """
    if jobs < 1:
        raise UserError(f"--jobs {jobs}: expected 1 or more")
    extra = recipe_files.join_values(extra)
    cells = plan(recipes, seeds, runs, extra)
    _protect_results(cells, results, extra)
    with _sigterm_interrupts(), open_progress(len(cells), jobs) as progress:
        return _Scheduler(results, jobs, extra, command, progress).run(cells)


def plan(recipes: Sequence[str], seeds: Sequence[int], runs: Path, extra: Sequence[str] = ()) -> list[Cell]:
    """The cells of recipes × seeds, in that order, each once."""
    if not seeds:
        raise UserError("--seeds: expected at least one seed")
    by_name: dict[str, str] = {}
    for config in recipes:
        name = recipe_files.name_of(config)
        if recipe_files.resolve(by_name.setdefault(name, config)) != recipe_files.resolve(config):
            raise UserError(f"{by_name[name]} and {config} are both named {name}; rename one")
    cells: list[Cell] = []
    for name, config in by_name.items():
        is_rule = recipe_files.metadata(config).kind == "rule"
        recipe_hash = recipe_files.recipe_hash(config, extra)
        chosen = dict.fromkeys(seeds[:1] if is_rule else seeds)
        cells += [Cell(config, name, seed, recipe_hash, runs / name / f"s{seed}") for seed in chosen]
    return cells


@dataclass
class _Running:
    cell: Cell
    process: subprocess.Popen[bytes]
    locks: "_Locks"
    since: float = field(default_factory=time.monotonic)


class _Scheduler:
    def __init__(
        self, results: Path, jobs: int, extra: Sequence[str], command: Sequence[str], progress: Progress
    ) -> None:
        self.results, self.jobs, self.extra, self.command = results, jobs, extra, command
        self.progress = progress
        self.running: list[_Running] = []
        self.failures: list[Failure] = []

    def run(self, cells: Sequence[Cell]) -> list[Failure]:
        pending, locked_elsewhere = deque(cells), deque[Cell]()
        retry_at = time.monotonic()
        try:
            while pending or locked_elsewhere or self.running:
                self._reap()
                while pending and len(self.running) < self.jobs:
                    if not self._begin(pending[0]):
                        locked_elsewhere.append(pending[0])
                    pending.popleft()
                if time.monotonic() >= retry_at:
                    pending.extend(locked_elsewhere)
                    locked_elsewhere.clear()
                    retry_at = time.monotonic() + _RETRY_SECONDS
                self.progress.running([str(entry.cell) for entry in self.running])
                if self.running or locked_elsewhere or pending:
                    time.sleep(_POLL_SECONDS)
        finally:
            self._kill_children()
        return self.failures

    def _begin(self, cell: Cell) -> bool:
        """Settle or start a cell; False when another run holds it."""
        if is_done(cell, self.results):
            self.progress.finished(str(cell), "already done")
            return True
        locks = _Locks.acquire(self._lock_paths(cell))
        if locks is None:
            return False
        with contextlib.ExitStack() as stack:
            stack.callback(locks.release)
            # Another run may have finished it, or been killed before it could collect the result.
            if is_done(cell, self.results):
                self.progress.finished(str(cell), "already done")
                return True
            if self._collect(cell) is None:
                self.progress.finished(str(cell), f"collected from {cell.run_dir}")
                return True
            _set_stale_folder_aside(cell, self.extra)
            self.running.append(_Running(cell, self._start(cell, locks), locks))
            stack.pop_all()
        return True

    def _start(self, cell: Cell, locks: "_Locks") -> subprocess.Popen[bytes]:
        arguments = ["--config", cell.config, "--seed", str(cell.seed), "--run_dir", str(cell.run_dir)]
        environment = dict(os.environ)  # handed on unread
        if self.jobs > 1:
            environment |= {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
        with cell.log.open("ab") as log:
            return subprocess.Popen(
                [*self.command, *arguments, "--resume", *self.extra],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=environment,
                pass_fds=locks.descriptors,
                start_new_session=True,  # so that a cell can be killed together with its own workers
            )

    def _reap(self) -> None:
        for entry in [entry for entry in self.running if entry.process.poll() is not None]:
            problem = self._collect(entry.cell)
            if problem is not None and entry.process.returncode != 0:
                problem = f"exit code {entry.process.returncode}: {_last_line(entry.cell.log)}"
            self.running.remove(entry)
            entry.locks.release()
            seconds = time.monotonic() - entry.since
            if problem is None:
                self.progress.finished(str(entry.cell), f"done in {seconds:.0f} s", seconds)
            else:
                self.failures.append(Failure(entry.cell, problem))
                self.progress.finished(str(entry.cell), f"FAILED: {problem}")

    def _collect(self, cell: Cell) -> str | None:
        """Copy a finished cell's result from its run folder into the store, or say why it cannot be."""
        path = cell.run_dir / "result.json"
        if not path.exists():
            return f"no {path.name} in {cell.run_dir}"
        try:
            result = Result.read(path)
            if _identity(result) != (cell.recipe, cell.seed, cell.recipe_hash):
                return f"{path} is of {_identity(result)}, not of {(cell.recipe, cell.seed, cell.recipe_hash)}"
            result.save_in_store(self.results, pl.read_parquet(units_path(path)))
        except (UserError, OSError, pl.exceptions.PolarsError) as error:
            return str(error)
        return None

    def _lock_paths(self, cell: Cell) -> list[Path]:
        """One lock against runs that share the store, one against those that share the run folder."""
        folder = self.results / ".locks"
        folder.mkdir(parents=True, exist_ok=True)
        cell.run_dir.parent.mkdir(parents=True, exist_ok=True)
        if not (ignore := folder / ".gitignore").exists():
            ignore.write_text("*\n")
        name = f"{cell.recipe.replace('/', '__')}__s{cell.seed}.lock"
        return [folder / name, cell.run_dir.with_name(f"{cell.run_dir.name}.lock")]

    def _kill_children(self) -> None:
        for entry in self.running:
            _signal_group(entry.process, signal.SIGTERM)
        deadline = time.monotonic() + _GRACE_SECONDS
        for entry in self.running:
            with contextlib.suppress(subprocess.TimeoutExpired):
                entry.process.wait(max(0.0, deadline - time.monotonic()))
            _signal_group(entry.process, signal.SIGKILL)
            entry.process.wait()
            entry.locks.release()


class _Locks:
    """Exclusive locks that live as long as any process that inherited their descriptors.

    That is why this is `flock` itself: it belongs to the open file, not to the process, so a cell keeps its
    lock when its runner is killed.
    """

    def __init__(self, descriptors: list[int]) -> None:
        self.descriptors = descriptors

    @classmethod
    def acquire(cls, paths: Sequence[Path]) -> "_Locks | None":
        """All of the locks, or None when one of them is held elsewhere."""
        try:
            import fcntl
        except ImportError:
            raise UserError("moezoo leaderboard run needs POSIX file locks (Linux or macOS)") from None
        locks = cls([])
        for path in paths:
            locks.descriptors.append(os.open(path, os.O_RDWR | os.O_CREAT, 0o644))
            try:
                fcntl.flock(locks.descriptors[-1], fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                locks.release()
                return None
        return locks

    def release(self) -> None:
        while self.descriptors:
            os.close(self.descriptors.pop())


def is_done(cell: Cell, results: Path) -> bool:
    """Whether the store holds the cell's result."""
    return any(_identity(result) == (cell.recipe, cell.seed, cell.recipe_hash) for result in _stored(cell, results))


def _stored(cell: Cell, results: Path) -> Iterator[Result]:
    for path in (results / cell.recipe).glob(f"*-s{cell.seed}.json"):
        with contextlib.suppress(FileNotFoundError):
            yield Result.read(path)


def _identity(result: Result) -> tuple[str, int, str]:
    return result.recipe, result.seed, result.recipe_hash


def _protect_results(cells: Sequence[Cell], results: Path, extra: Sequence[str]) -> None:
    for cell in cells:
        plain_hash = recipe_files.recipe_hash(cell.config)
        if cell.recipe_hash != plain_hash and any(r.recipe_hash == plain_hash for r in _stored(cell, results)):
            raise UserError(
                f"{' '.join(extra)}: changes {cell.recipe}, whose own results in {results} it would replace; "
                "give another folder with --results"
            )


def _set_stale_folder_aside(cell: Cell, extra: Sequence[str]) -> None:
    """`--resume` must not go on from checkpoints of another recipe, so such a run folder is renamed."""
    marker = cell.run_dir.with_name(f"{cell.run_dir.name}.cell.json")
    content = json.dumps({"recipe_hash": cell.recipe_hash, "extra": list(extra)})
    known = marker.read_text(encoding="utf-8") if marker.exists() else None
    if known == content:
        return
    if cell.run_dir.exists():
        numbers = range(1, len(list(cell.run_dir.parent.iterdir())) + 2)
        names = (cell.run_dir.with_name(f"{cell.run_dir.name}.old{number}") for number in numbers)
        cell.run_dir.rename(next(name for name in names if not name.exists()))
    marker.write_text(content, encoding="utf-8")


def _last_line(log: Path) -> str:
    with log.open("rb") as file:
        file.seek(max(0, log.stat().st_size - 4096))
        lines = file.read().decode("utf-8", errors="replace").split("\n")
    return next((line.strip() for line in reversed(lines) if line.strip()), "it printed nothing")


def _signal_group(process: subprocess.Popen[bytes], number: int) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, number)


@contextlib.contextmanager
def _sigterm_interrupts() -> Iterator[None]:
    """Treat a polite kill like Ctrl-C, so that no cell is left running; only the main thread may do so."""

    def interrupt(number: int, frame: Any) -> None:
        raise KeyboardInterrupt

    try:
        previous: Callable[..., Any] | int | None = signal.signal(signal.SIGTERM, interrupt)
    except ValueError:
        yield
        return
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous)
