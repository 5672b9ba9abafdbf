"""A finished panel on disk: one safetensors file, mapped into memory, so that several runs share its pages."""

import hashlib
import json
import os
import time
import uuid
from collections.abc import Iterable
from dataclasses import fields
from datetime import date
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from .. import settings
from .stocks_panel import StockPanel

_MOST_BYTES = 8 * 2**30  # of all panels together; the newest two of CSI300 with Alpha158 take half


def content_hash(files: Iterable[Path], arguments: Any) -> str:
    """sha256 (hex) of the files' bytes in order, and of what they are read with."""
    digest = hashlib.sha256(json.dumps(arguments, sort_keys=True, default=str).encode())
    for file in files:
        with file.open("rb") as stream:
            digest.update(hashlib.file_digest(stream, "sha256").digest())
    return digest.hexdigest()


def cache_file(fingerprint: str, arguments: Any) -> Path:
    """Where the panel of this content, these arguments and this version of the code lies."""
    makers = sorted(Path(__file__).parent.glob("stocks*.py"))
    key = content_hash(makers, [fingerprint, arguments])
    return settings.cache_dir() / "datasets" / "stocks" / f"{key[:32]}.safetensors"


def load_panel(file: Path) -> StockPanel | None:
    """The panel, or None where there is none that can be read."""
    try:
        with safe_open(file, "pt") as store:
            tensors = {name: store.get_tensor(name) for name in store.keys()}  # noqa: SIM118
            words = json.loads(store.metadata()["panel"])
        _mark_used(file)
        return StockPanel(
            **tensors,
            calendar=tuple(date.fromisoformat(day) for day in words["calendar"]),
            symbols=tuple(words["symbols"]),
            styles=tuple(words["styles"]),
            sectors=words["sectors"],
            notes=tuple(words["notes"]),
        )
    except (OSError, SafetensorError, KeyError, TypeError):
        return None


def save_panel(panel: StockPanel, file: Path) -> None:
    """The file appears whole or not at all; those not used for longest make room for it."""
    values = {field.name: getattr(panel, field.name) for field in fields(panel)}
    tensors = {name: value for name, value in values.items() if isinstance(value, Tensor)}
    words = {name: value for name, value in values.items() if name not in tensors}
    words["calendar"] = [day.isoformat() for day in panel.calendar]
    file.parent.mkdir(parents=True, exist_ok=True)
    partial = file.with_suffix(f".{uuid.uuid4().hex}.partial")
    try:
        save_file(tensors, partial, metadata={"panel": json.dumps(words)})
        partial.replace(file)
        _mark_used(file)
    finally:
        partial.unlink(missing_ok=True)
    _make_room(file.parent)


def _mark_used(file: Path) -> None:
    """Now, to the nanosecond: the file system's own clock ticks too slowly to tell two quick uses apart."""
    now = time.time_ns()
    os.utime(file, ns=(now, now))


def _make_room(folder: Path) -> None:
    total = 0
    for file in sorted(folder.glob("*.safetensors"), key=lambda file: file.stat().st_mtime, reverse=True):
        total += file.stat().st_size
        if total > _MOST_BYTES:
            file.unlink(missing_ok=True)
