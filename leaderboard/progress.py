"""What `leaderboard run` shows while it works: a live display on a terminal, plain lines elsewhere."""

import contextlib
import time
from collections.abc import Iterator, Sequence
from typing import Protocol

from rich.console import Console
from rich.live import Live
from rich.text import Text


class Progress(Protocol):
    """Told of what happens; shows it."""

    def running(self, cells: Sequence[str]) -> None:
        """These cells are running now."""

    def finished(self, cell: str, outcome: str, seconds: float | None = None) -> None:
        """A cell is settled; `seconds` of work when it was run here."""


@contextlib.contextmanager
def open_progress(total: int, jobs: int, console: Console | None = None) -> Iterator[Progress]:
    """A display for `total` cells, `jobs` at a time."""
    console = console or Console()
    if not console.is_terminal:
        yield _Lines(console, total, jobs)
        return
    with Live(console=console, refresh_per_second=4) as live:
        yield _Display(live, total, jobs)


class _Count:
    """Cells settled so far, and when the rest will be."""

    def __init__(self, total: int, jobs: int) -> None:
        self.total, self.jobs = total, jobs
        self.settled = 0
        self.durations: list[float] = []

    def add(self, seconds: float | None) -> None:
        self.settled += 1
        if seconds is not None:
            self.durations.append(seconds)

    def __str__(self) -> str:
        if not self.durations or self.settled == self.total:
            return f"[{self.settled}/{self.total}]"
        mean = sum(self.durations) / len(self.durations)
        return f"[{self.settled}/{self.total}, {_duration(mean * (self.total - self.settled) / self.jobs)} left]"


class _Lines:
    def __init__(self, console: Console, total: int, jobs: int) -> None:
        self.console, self.count = console, _Count(total, jobs)
        self.known: set[str] = set()

    def running(self, cells: Sequence[str]) -> None:
        for cell in cells:
            if cell not in self.known:
                self._print(f"{self.count} {cell} started")
        self.known.update(cells)

    def finished(self, cell: str, outcome: str, seconds: float | None = None) -> None:
        self.count.add(seconds)
        self._print(f"{self.count} {cell} {outcome}")

    def _print(self, line: str) -> None:
        self.console.print(line, markup=False, highlight=False, soft_wrap=True)


class _Display:
    def __init__(self, live: Live, total: int, jobs: int) -> None:
        self.live, self.count = live, _Count(total, jobs)
        self.since: dict[str, float] = {}

    def running(self, cells: Sequence[str]) -> None:
        now = time.monotonic()
        self.since = {cell: self.since.get(cell, now) for cell in cells}
        text = Text(str(self.count), style="bold")
        text.append("  " + _bar(self.count.settled, self.count.total), style="green")
        for cell, since in self.since.items():
            text.append(f"\n  {cell}", style="cyan").append(f"  {_duration(now - since)}", style="dim")
        self.live.update(text)

    def finished(self, cell: str, outcome: str, seconds: float | None = None) -> None:
        self.count.add(seconds)
        style = "red" if outcome.startswith("FAILED") else "dim"
        self.live.console.print(Text(f"{cell} {outcome}", style=style), soft_wrap=True)


def _bar(done: int, total: int, width: int = 30) -> str:
    filled = width * done // max(total, 1)
    return "━" * filled + "╌" * (width - filled)


def _duration(seconds: float) -> str:
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"
