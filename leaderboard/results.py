"""Results: what one run of one recipe measured, and the folder that keeps them.

A result is a JSON file beside a Parquet file of per-unit scores (one row per session, day or clip). The JSON
file is written last and atomically, so a result exists exactly when its JSON file does.
"""

import dataclasses
import json
import math
import os
import platform
import re
import subprocess
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from importlib import metadata
from pathlib import Path
from typing import Any, Literal, Self, TypedDict

import polars as pl

from ..errors import UserError
from .strict import decode

Goal = Literal["max", "min"]
_PACKAGES = ("torch", "pytorch-lightning", "polars", "transformers", "moezoo")


@dataclass(frozen=True)
class MetricInfo:
    """How to read a metric: which way is better, its unit, and how many units (sessions, days) it covers."""

    goal: Goal
    unit: str
    n: int


@dataclass(frozen=True)
class Parameters:
    """Parameters stored (`total`) and touched per sample (`active`)."""

    total: int
    active: int


@dataclass(frozen=True)
class Hardware:
    """Where the run took place; `gpu` is None when it used none."""

    cpu: str
    cores: int
    gpu: str | None


@dataclass(frozen=True)
class Result:
    """One (recipe, dataset, split, seed).

    `metrics` is flat and snake_case, and has the same keys as `metric_info`. `train_seconds` is wall-clock
    time, `created` an ISO time in UTC, `flops_per_sample` None where it is unknown.

    Raises:
        UserError: a value is out of range, or a metric is NaN or infinite.
    """

    recipe: str
    dataset: str
    split: str
    seed: int
    metrics: dict[str, float]
    metric_info: dict[str, MetricInfo]
    dataset_fingerprint: str
    parameters: Parameters
    flops_per_sample: float | None
    train_seconds: float
    hardware: Hardware
    versions: dict[str, str]
    git_commit: str | None
    recipe_hash: str
    created: str

    def __post_init__(self) -> None:
        _check_names(self)
        _check_metrics(self)
        _check_costs(self)

    @property
    def domain(self) -> str:
        return self.recipe.split("/")[0]

    @property
    def stem(self) -> str:
        """File name in the store, without suffix."""
        return f"{self.dataset}-{self.split}-s{self.seed}"

    def store_path(self, store: Path) -> Path:
        """Where `store` keeps this result's JSON file; its units lie beside it as `.parquet`."""
        return store / self.recipe / f"{self.stem}.json"

    def save(self, folder: Path, units: pl.DataFrame, stem: str | None = None) -> Path:
        """Write the result and its per-unit scores into `folder`, atomically; return the JSON file.

        Without `stem` the files are a run folder's `result.json` and `units.parquet`, with it
        `<stem>.json` and `<stem>.parquet`.

        Raises:
            UserError: `units` is not a table of per-unit scores (see `check_units`).
        """
        check_units(units)
        path = folder / (f"{stem}.json" if stem else "result.json")
        folder.mkdir(parents=True, exist_ok=True)
        # Gone first, so that an interrupted overwrite leaves no old result beside new units.
        path.unlink(missing_ok=True)
        _write_atomically(units_path(path), units.write_parquet)
        text = json.dumps(dataclasses.asdict(self), indent=2, allow_nan=False) + "\n"
        _write_atomically(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))
        return path

    def save_in_store(self, store: Path, units: pl.DataFrame) -> Path:
        """Write the result at its place in `store`; return the JSON file."""
        return self.save(self.store_path(store).parent, units, self.stem)

    @classmethod
    def read(cls, path: Path) -> Self:
        """Read a result file, strictly.

        Raises:
            UserError: naming the file and the key that is unknown, missing or out of range.
        """
        try:
            text = path.read_text(encoding="utf-8")
            document = json.loads(text, object_pairs_hook=_refuse_repeated_keys)
            return decode(cls, document)
        except UserError as error:
            raise UserError(f"{path}: {error}") from None
        except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
            raise UserError(f"{path}: not a readable result file ({error})") from None


class Provenance(TypedDict):
    """The fields of a `Result` that say where it comes from."""

    hardware: Hardware
    versions: dict[str, str]
    git_commit: str | None
    created: str


def provenance(gpu: bool = True) -> Provenance:
    """Fields for `Result(**provenance(), ...)`; give `gpu=False` when the run left an existing GPU unused."""
    return Provenance(
        hardware=Hardware(cpu=_cpu_model(), cores=os.cpu_count() or 1, gpu=_gpu_name() if gpu else None),
        versions={"python": platform.python_version(), **{name: _version(name) for name in _PACKAGES}},
        git_commit=_git_commit(Path(__file__).parents[1]),
        created=datetime.now(UTC).isoformat(timespec="seconds"),
    )


def load_results(folder: Path) -> list[Result]:
    """Every result of a store, ordered by path. Hidden and temporary files are passed over.

    Raises:
        UserError: a file is not a valid result, or does not lie where its content belongs.
    """
    results = []
    for path in sorted(folder.rglob("*.json")):
        if any(part.startswith(".") for part in path.relative_to(folder).parts):
            continue
        result = Result.read(path)
        if (place := result.store_path(folder)) != path:
            raise UserError(f"{path}: 'recipe', 'dataset', 'split' and 'seed' say that it belongs at {place}")
        results.append(result)
    return results


def units_path(path: Path) -> Path:
    """The Parquet file of per-unit scores that belongs to a result's JSON file."""
    return path.with_name("units.parquet") if path.name == "result.json" else path.with_suffix(".parquet")


def check_units(units: pl.DataFrame) -> None:
    """Per-unit scores: `unit` (Int64, each once), Float64 metrics (null where undefined), Boolean slices.

    Raises:
        UserError: naming the column at fault.
    """
    if units.schema.get("unit") != pl.Int64:
        raise UserError(f"units: column 'unit' is {units.schema.get('unit')}; expected Int64")
    if units["unit"].null_count() or units["unit"].n_unique() != units.height:
        raise UserError("units: column 'unit' must hold each unit once and no null")
    for name, dtype in units.schema.items():
        if name != "unit" and dtype not in (pl.Float64, pl.Boolean):
            raise UserError(f"units: column {name!r} is {dtype}; expected Float64 (a metric) or Boolean (a slice)")
        if dtype == pl.Float64 and not units[name].drop_nulls().is_finite().all():
            raise UserError(f"units: column {name!r} holds NaN or infinity; a score that is undefined is null")


def _check_names(result: Result) -> None:
    if not re.fullmatch(r"[a-z0-9_]+/[A-Za-z0-9_.-]+", result.recipe):
        raise UserError(f"'recipe' is {result.recipe!r}; expected <domain>/<recipe>, such as ranking/awmoe")
    for key in ("dataset", "split"):
        if not re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9_.-]*", getattr(result, key)):
            raise UserError(f"{key!r} is {getattr(result, key)!r}; expected letters, digits, '_', '.', '-'")
    for key in ("dataset_fingerprint", "recipe_hash"):
        if not getattr(result, key):
            raise UserError(f"{key!r} is empty")
    if result.seed < 0:
        raise UserError(f"'seed' is {result.seed}; expected 0 or more")
    try:
        in_utc = datetime.fromisoformat(result.created).utcoffset() == timedelta(0)
    except ValueError:
        in_utc = False
    if not in_utc:
        raise UserError(f"'created' is {result.created!r}; expected an ISO time in UTC")


def _check_metrics(result: Result) -> None:
    if not result.metrics:
        raise UserError("'metrics' is empty")
    if lonely := sorted(set(result.metrics) ^ set(result.metric_info)):
        raise UserError(f"{lonely[0]!r} is in only one of 'metrics' and 'metric_info'; expected it in both")
    for name, value in result.metrics.items():
        if not re.fullmatch(r"[a-z][a-z0-9_]*", name):
            raise UserError(f"'metrics.{name}' is not a snake_case name")
        if not math.isfinite(value):
            raise UserError(f"'metrics.{name}' is {value}; expected a finite number (leave out what is undefined)")
        if result.metric_info[name].goal not in ("max", "min"):
            raise UserError(f"'metric_info.{name}.goal' is {result.metric_info[name].goal!r}; expected max or min")
        if result.metric_info[name].n < 1:
            raise UserError(f"'metric_info.{name}.n' is {result.metric_info[name].n}; expected 1 or more")


def _check_costs(result: Result) -> None:
    if not 0 <= result.parameters.active <= result.parameters.total:
        raise UserError(f"'parameters' is {result.parameters}; expected 0 <= active <= total")
    for key in ("flops_per_sample", "train_seconds"):
        value = getattr(result, key)
        if value is not None and not (math.isfinite(value) and value >= 0):
            raise UserError(f"{key!r} is {value}; expected a finite number, 0 or more")


def _refuse_repeated_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    document = dict(pairs)
    if len(document) != len(pairs):
        repeated = next(key for i, (key, _) in enumerate(pairs) if key in dict(pairs[:i]))
        raise UserError(f"key {repeated!r} is given twice")
    return document


def _write_atomically(path: Path, write: Callable[[Path], object]) -> None:
    descriptor, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp")
    temporary = Path(name)
    try:
        write(temporary)
        temporary.chmod(0o644)  # mkstemp makes the file private; a result is to be shared
        os.fsync(descriptor)
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    finally:
        os.close(descriptor)


def _cpu_model() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass  # not Linux
    return platform.processor() or platform.machine() or "unknown"


def _gpu_name() -> str | None:
    import torch  # here, because reading results must not cost a second of import

    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    return "Apple GPU (MPS)" if torch.backends.mps.is_available() else None


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed"


def _git_commit(checkout: Path) -> str | None:
    if not (checkout / ".git").exists():  # an installed copy may lie inside another project's checkout
        return None
    commit = _git(checkout, "rev-parse", "HEAD")
    # Code and recipes, new files included; not the results, which a leaderboard run itself is writing.
    changes = _git(checkout, "status", "--porcelain", "--", "*.py", "*.yaml", "*.toml")
    return f"{commit}+dirty" if commit and changes else commit


def _git(checkout: Path, *arguments: str) -> str | None:
    try:
        run = subprocess.run(["git", *arguments], cwd=checkout, capture_output=True, text=True, timeout=30)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return run.stdout.strip() if run.returncode == 0 else None
