"""The planted market: two hidden styles with opposite laws, so that only a model that routes can predict.

Momentum names continue their past return, reversal names undo it; the style shows in a noisy cue alone. A linear
model sees no signal, an oracle that knows the style reaches a RankIC of about 0.275 (spec A10).
"""

from datetime import date, timedelta

import torch

from ..errors import UserError
from .stocks_panel import StockPanel

FEATURES = ("past_return", "volatility_cue", "noise_1", "noise_2")
STYLES = ("momentum",)
_SIGNAL = 0.3  # slope of the label in the past return, of either sign
_CUE_NOISE = 0.3
_DAILY = 0.01  # returns of about one percent a day, so that portfolios stay plausible
_LEAST = 20  # names that a rank correlation takes
SPLITS = {"train": 800, "valid": 100, "test": 200}


def planted_panel(lookback: int, names: int = 300, seed: int = 0) -> StockPanel:
    """A market of 1,100 days, every name new each day.

    `style` holds one column, the true style: 0 reversal, 1 momentum. The label is one day's return.

    Args:
        lookback: days of a window; only the last one tells anything.
        names: stocks a day.
        seed: of the generator.

    Raises:
        UserError: too few names for a rank correlation.
    """
    if names < _LEAST:
        raise UserError(f"data.files.names={names}: expected at least {_LEAST}")
    generator = torch.Generator().manual_seed(seed)
    days = lookback - 1 + sum(SPLITS.values())
    shape = (names, days)
    momentum = torch.rand(shape, generator=generator) < 0.5
    sign = momentum.float() * 2 - 1
    past = torch.randn(shape, generator=generator)
    cue = sign + _CUE_NOISE * torch.randn(shape, generator=generator)
    noise = torch.randn(*shape, 2, generator=generator)
    label = (_DAILY * (_SIGNAL * sign * past + torch.randn(shape, generator=generator))).T.contiguous()
    valid = torch.ones(days, names, dtype=torch.bool)
    valid[: lookback - 1] = False
    return StockPanel(
        features=torch.cat([past[..., None], cue[..., None], noise], -1),
        label=label,
        valid=valid,
        next_return=label.clone(),
        weight=valid / names,
        style=momentum.float().T.contiguous()[..., None],
        benchmark=label.mean(1),
        calendar=_weekdays(days),
        symbols=tuple(f"P{i:03d}" for i in range(names)),
        styles=STYLES,
        sectors={},
    )


def split_days(lookback: int, horizon: int) -> dict[str, list[int]]:
    """Day indices of each split, purged as those of real data are."""
    first, days = lookback - 1, {}
    for name, count in SPLITS.items():
        gap = 0 if name == "test" else horizon + 1
        days[name] = list(range(first, first + count - gap))
        first += count
    return {**days, "predict": days["test"]}


def _weekdays(count: int) -> tuple[date, ...]:
    first = date(2000, 1, 3)
    return tuple(first + timedelta(days=7 * (i // 5) + i % 5) for i in range(count))
