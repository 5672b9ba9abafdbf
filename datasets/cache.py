"""Finished data on disk: safetensors files mapped into memory, so that several runs share their pages."""

import hashlib
import json
import os
import time
import uuid
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from .. import settings

_MOST_BYTES = 8 * 2**30  # of one domain's files together


def content_hash(files: Iterable[Path], arguments: Any) -> str:
    """sha256 (hex) of the files' bytes in order, and of what they are read with."""
    digest = hashlib.sha256(json.dumps(arguments, sort_keys=True, default=str).encode())
    for file in files:
        with file.open("rb") as stream:
            digest.update(hashlib.file_digest(stream, "sha256").digest())
    return digest.hexdigest()


def cache_file(domain: str, fingerprint: str, arguments: Any) -> Path:
    """Where what was made of this content, with these arguments, by this version of the domain's code lies."""
    makers = sorted(Path(__file__).parent.glob(f"{domain}*.py"))
    key = content_hash(makers, [fingerprint, arguments])
    return settings.cache_dir() / "datasets" / domain / f"{key[:32]}.safetensors"


def load_tensors(file: Path) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
    """Tensors and the words beside them, or None where there is no file that can be read."""
    try:
        with safe_open(file, "pt") as store:
            tensors = {name: store.get_tensor(name) for name in store.keys()}  # noqa: SIM118
            words = json.loads(store.metadata()["words"])
        _mark_used(file)
        return tensors, words
    except (OSError, SafetensorError, KeyError, TypeError):
        return None


def save_tensors(file: Path, tensors: Mapping[str, Tensor], words: Mapping[str, Any]) -> None:
    """The file appears whole or not at all; those of its folder not used for longest make room for it.

    Args:
        words: JSON-able.
    """
    file.parent.mkdir(parents=True, exist_ok=True)
    partial = file.with_suffix(f".{uuid.uuid4().hex}.partial")
    try:
        save_file(dict(tensors), partial, metadata={"words": json.dumps(words)})
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
