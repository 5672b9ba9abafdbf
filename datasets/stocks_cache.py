"""A finished panel on disk."""

from dataclasses import fields
from datetime import date
from pathlib import Path

from torch import Tensor

from .cache import load_tensors, save_tensors
from .stocks_panel import StockPanel


def load_panel(file: Path) -> StockPanel | None:
    """The panel, or None where there is none that can be read."""
    found = load_tensors(file)
    if found is None:
        return None
    tensors, words = found
    return StockPanel(
        **tensors,
        calendar=tuple(date.fromisoformat(day) for day in words["calendar"]),
        symbols=tuple(words["symbols"]),
        styles=tuple(words["styles"]),
        sectors=words["sectors"],
        notes=tuple(words["notes"]),
    )


def save_panel(panel: StockPanel, file: Path) -> None:
    """The file appears whole or not at all."""
    values = {field.name: getattr(panel, field.name) for field in fields(panel)}
    tensors = {name: value for name, value in values.items() if isinstance(value, Tensor)}
    words = {name: value for name, value in values.items() if name not in tensors}
    words["calendar"] = [day.isoformat() for day in panel.calendar]
    save_tensors(file, tensors, words)
