"""What every source becomes: one tensor of features over [symbols, calendar], and what is known of each day.

A window is a slice of the calendar, never of a symbol's own rows: a day without a price stays where it is and holds
zeros (spec pitfall 2). Windows are gathered when a batch is made, on the panel's device, and never stored.
"""

from dataclasses import dataclass, fields, replace
from datetime import date
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor


class StockBatch(NamedTuple):
    """Several days, padded to the same number of names. Day t is the last day that a score may know."""

    features: Float[Tensor, "days names time features"]  # robust-scaled, finite, 0 where missing; day t comes last
    label: Float[Tensor, "days names"]  # close t+1 -> close t+1+horizon, simple return; NaN where unknown
    valid: Bool[Tensor, "days names"]  # a member that day, traded, with a full window: a score is wanted
    next_return: Float[Tensor, "days names"]  # close t+1 -> close t+2, return per day; NaN where it cannot be traded
    weight: Float[Tensor, "days names"]  # by cap, else by 20-day mean dollar volume; sums to 1 over valid names
    style: Float[Tensor, "days names styles"]  # percentile of the day's valid names in [0, 1]; 0 for padding
    benchmark: Float[Tensor, "days"]  # the market's return close t+1 -> close t+2; NaN at the calendar's end
    day: Int[Tensor, "days"]  # index into the calendar
    symbol: Int[Tensor, "days names"]  # index into the symbols, -1 for padding


@dataclass(frozen=True)
class StockPanel:
    """A whole dataset in memory.

    Attributes:
        features: float32, finite. Symbol first, so that a window lies in one piece.
        label, next_return, valid, weight, style, benchmark, calendar, symbols: as in `StockBatch`, by day and symbol.
            `next_return` also covers names that are not valid that day, e.g. those a portfolio still holds.
        styles: names of the columns of `style`.
        sectors: symbol -> sector, where the source has them.
        notes: what the user must be told about the data, e.g. dropped rows.
    """

    features: Float[Tensor, "symbols calendar features"]
    label: Float[Tensor, "calendar symbols"]
    valid: Bool[Tensor, "calendar symbols"]
    next_return: Float[Tensor, "calendar symbols"]
    weight: Float[Tensor, "calendar symbols"]
    style: Float[Tensor, "calendar symbols styles"]
    benchmark: Float[Tensor, "calendar"]
    calendar: tuple[date, ...]
    symbols: tuple[str, ...]
    styles: tuple[str, ...]
    sectors: dict[str, str]
    notes: tuple[str, ...] = ()

    def to(self, device: torch.device) -> "StockPanel":
        """The panel with its tensors on `device`."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        moved: dict[str, Any] = {name: x.to(device) for name, x in values.items() if isinstance(x, Tensor)}
        return replace(self, **moved)

    def batch(self, days: list[int], lookback: int, names: int | None = None) -> StockBatch:
        """The days' names with their windows of `lookback` days, made on the panel's device.

        Args:
            names: to pad to; default: as many as the fullest of these days has.
        """
        device = self.features.device
        day = torch.tensor(days, device=device)
        valid = self.valid[day]
        if names is None:
            names = int(valid.sum(1).max())
        # Valid names first, in the symbols' order; what follows them is padding.
        symbol = torch.argsort(valid.logical_not().to(torch.uint8), dim=1, stable=True)[:, :names]
        valid = valid.gather(1, symbol)
        padding = ~valid
        rows = (
            symbol[..., None] * len(self.calendar) + day[:, None, None] + torch.arange(1 - lookback, 1, device=device)
        )
        width = self.features.shape[-1]
        windows = self.features.reshape(-1, width).index_select(0, rows.clamp_(min=0).flatten())
        features = windows.view(*rows.shape, width).masked_fill_(padding[..., None, None], 0)

        def pick(values: Tensor, fill: float) -> Tensor:
            return values[day].gather(1, symbol).masked_fill_(padding, fill)

        styles = torch.stack([pick(self.style[..., i], 0.0) for i in range(len(self.styles))], -1)
        return StockBatch(
            features=features,
            label=pick(self.label, torch.nan),
            valid=valid,
            next_return=pick(self.next_return, torch.nan),
            weight=pick(self.weight, 0.0),
            style=styles,
            benchmark=self.benchmark[day],
            day=day,
            symbol=symbol.masked_fill(padding, -1),
        )
