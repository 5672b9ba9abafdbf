"""The measurements of a run on disk: every sample as Parquet, and beside it what else there is to know as JSON."""

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import polars as pl

from ...errors import UserError
from .cases import Case, Device, parse_case


@dataclass
class Measured:
    """What a contender did on a case.

    Attributes:
        samples: seconds per step by round; empty when it could not run.
        inner: steps per sample.
        check: "equal" when output and gradient are those of a plain loop over experts, "shape" when only the shape is.
        peak_bytes: most memory held at once during a step, beyond inputs and weights.
        waits: on a GPU, what made the step wait for the device, or "never".
        unavailable: why it could not run.
        unsuited: the reason is the case, not the machine.
    """

    contender: str
    samples: dict[int, float] = field(default_factory=dict)
    inner: int = 0
    check: str = ""
    peak_bytes: int | None = None
    waits: str = ""
    unavailable: str = ""
    unsuited: bool = False

    @property
    def seconds(self) -> float:
        """The best round."""
        return min(self.samples.values())


@dataclass
class Results:
    """A run.

    Attributes:
        run: machine, versions, settings; the contenders with role, note, comparable and install.
        cases: contenders by name of the case, in the order measured.
    """

    run: dict[str, Any]
    cases: dict[str, list[Measured]] = field(default_factory=dict)

    def case_list(self) -> list[Case]:
        return [parse_case(name) for name in self.cases]

    def save(self, folder: Path, device: Device, partial: bool = False) -> None:
        """Write both files; a finished run replaces its partial one."""
        folder.mkdir(parents=True, exist_ok=True)
        records = []
        for name, measured in self.cases.items():
            fields = {"case": name, **asdict(parse_case(name))}
            for one in measured:
                shared = fields | {"contender": one.contender, "inner": one.inner}
                records += [shared | {"round": r, "seconds": s} for r, s in one.samples.items()]
        frame = pl.DataFrame(records, infer_schema_length=None)
        document = {"run": self.run, "cases": {}}
        for name, measured in self.cases.items():
            details = [{k: v for k, v in asdict(one).items() if k != "samples"} for one in measured]
            document["cases"][name] = details
        parquet, text = paths(folder, device, partial)
        frame.write_parquet(parquet.with_suffix(".tmp"))
        parquet.with_suffix(".tmp").replace(parquet)
        text.with_suffix(".tmp").write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
        text.with_suffix(".tmp").replace(text)
        if not partial:
            for path in paths(folder, device, partial=True):
                path.unlink(missing_ok=True)

    @classmethod
    def load(cls, folder: Path, device: Device, partial: bool = False) -> "Results":
        """Read both files.

        Raises:
            UserError: there are none, or they cannot be read.
        """
        parquet, text = paths(folder, device, partial)
        if not parquet.exists() or not text.exists():
            raise UserError(f"{parquet}: no results there; `moezoo bench core --device {device}` measures them")
        try:
            document = json.loads(text.read_text(encoding="utf-8"))
            frame = pl.read_parquet(parquet)
            samples: dict[tuple[str, str], dict[int, float]] = {}
            columns = frame.select("case", "contender", "round", "seconds") if frame.height else frame
            for case, contender, number, seconds in columns.iter_rows():
                samples.setdefault((case, contender), {})[number] = seconds
            cases = {
                name: [Measured(**one, samples=samples.get((name, one["contender"]), {})) for one in measured]
                for name, measured in document["cases"].items()
            }
            return cls(document["run"], cases)
        except (OSError, ValueError, KeyError, TypeError, pl.exceptions.PolarsError) as error:
            raise UserError(f"{parquet}: not the results of a bench ({error})") from None


def paths(folder: Path, device: Device, partial: bool = False) -> tuple[Path, Path]:
    """The Parquet and the JSON file of a device."""
    stem = f"core-{device}.partial" if partial else f"core-{device}"
    return folder / f"{stem}.parquet", folder / f"{stem}.json"
