"""Single cases on the terminal."""

from rich.console import Console
from rich.table import Table

from .ratios import Ratio, ratio
from .results import Results


def show(results: Results, console: Console | None = None) -> None:
    """One table per case on the terminal."""
    console = console or Console()
    if not console.is_terminal:
        console.width = 120
    for name, measured in results.cases.items():
        by_name = {one.contender: one for one in measured}
        table = Table(title=name, title_justify="left", title_style="bold", box=None)
        for column in ("contender", "ms", "x floor", "x ours", "peak MB", "check"):
            table.add_column(column, justify="left" if column in ("contender", "check") else "right", no_wrap=True)
        for one in measured:
            if one.samples:
                against = [ratio(one.samples, by_name[other].samples) for other in ("floor", "ours")]
                peak = "" if one.peak_bytes is None else f"{one.peak_bytes / 1e6:.2f}"
                times = [f"{one.seconds * 1e3:.4g}", *(brackets(r) for r in against)]
                table.add_row(one.contender, *times, peak, one.check)
        console.print(table)
        for one in measured:
            if one.unavailable and not one.unsuited:
                console.print(f"{one.contender}: {one.unavailable}", style="dim", markup=False, highlight=False)
        console.print()


def brackets(of: Ratio | None) -> str:
    return "" if of is None else f"{of.value:.2f} [{of.low:.2f}, {of.high:.2f}]"
