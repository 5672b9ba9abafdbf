"""Finished windows on disk."""

import io
from dataclasses import fields
from pathlib import Path

import polars as pl
import torch

from .cache import load_tensors, save_tensors
from .trajectories_build import Built
from .trajectories_splits import SPLITS
from .trajectories_windows import Tracks


def load_built(file: Path) -> Built | None:
    """Tracks and windows, or None where there are none that can be read."""
    found = load_tensors(file)
    if found is None:
        return None
    tensors, words = found
    return Built(
        tracks=Tracks(**{field.name: tensors[f"tracks.{field.name}"] for field in fields(Tracks)}),
        rows={split: tensors[f"rows.{split}"] for split in SPLITS},
        places=pl.read_ipc(io.BytesIO(tensors["places"].numpy().tobytes())),
        class_balance=words["class_balance"],
    )


def save_built(built: Built, file: Path) -> None:
    """The file appears whole or not at all; places go into it as Arrow's bytes."""
    places = io.BytesIO()
    built.places.write_ipc(places)
    tensors = {f"tracks.{field.name}": getattr(built.tracks, field.name) for field in fields(Tracks)}
    tensors |= {f"rows.{split}": rows for split, rows in built.rows.items()}
    tensors["places"] = torch.frombuffer(bytearray(places.getbuffer()), dtype=torch.uint8)
    save_tensors(file, tensors, {"class_balance": built.class_balance})
