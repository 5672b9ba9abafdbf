"""Which days train, validate and test: by date, with a gap so that no label reaches into the next split."""

from bisect import bisect_left, bisect_right
from collections.abc import Mapping, Sequence
from datetime import date

from ..errors import UserError

_NAMES = ("train", "valid", "test")
_SHARES = (0.6, 0.8, 1.0)  # where each split ends, for data without dates of its own


def split_days(
    calendar: Sequence[date], splits: Mapping[str, Sequence[str]] | None, lookback: int, horizon: int, name: str
) -> dict[str, list[int]]:
    """Day indices of train, valid, test and predict.

    The last horizon + 1 days of train and valid are dropped: a label of day t ends at close t+1+horizon. Test ends
    where labels end; predict is the test days and all later ones.

    Raises:
        UserError: the calendar is too short, a split is missing, malformed, out of order or empty.
    """
    gap, last = horizon + 1, len(calendar) - horizon - 2  # last day with a label
    needed = lookback - 1 + 3 * (gap + 1)
    if len(calendar) < needed:
        raise UserError(
            f"{name}: {len(calendar)} trading days; expected at least {needed} for windows of {lookback} days, labels "
            f"of {horizon} and three splits; give more history or lower data.lookback and data.horizon"
        )
    bounds = _by_share(len(calendar), lookback) if splits is None else _by_date(calendar, splits)
    days = {}
    for split, (first, end) in bounds.items():
        end = min(end, last + 1) if split == "test" else end - gap
        days[split] = list(range(max(first, lookback - 1), end))
        if not days[split]:
            given = f" ({splits[split][0]} to {splits[split][1]})" if splits else ""
            raise UserError(
                f"{name}: split '{split}'{given} has no day with a window of {lookback} days and a label of {horizon}; "
                f"the prices reach from {calendar[0]} to {calendar[-1]}; set data.splits.{split} within"
            )
    return {**days, "predict": list(range(days["test"][0], len(calendar)))}


def _by_share(days: int, lookback: int) -> dict[str, tuple[int, int]]:
    first = lookback - 1
    ends = [first + round((days - first) * share) for share in _SHARES]
    return dict(zip(_NAMES, zip([first, *ends[:-1]], ends, strict=True), strict=True))


def _by_date(calendar: Sequence[date], splits: Mapping[str, Sequence[str]]) -> dict[str, tuple[int, int]]:
    if set(splits) != set(_NAMES):
        raise UserError(f"data.splits: got {', '.join(splits) or 'nothing'}; expected train, valid and test")
    bounds, before = {}, None
    for name in _NAMES:
        try:
            first, last = (date.fromisoformat(str(day)) for day in splits[name])
        except ValueError:
            raise UserError(
                f"data.splits.{name}={list(splits[name])}: expected [first day, last day], each YYYY-MM-DD"
            ) from None
        if first > last or (before is not None and first <= before):
            raise UserError(
                f"data.splits.{name}: {first} to {last}; expected a first day before the last one and after "
                f"the split before"
            )
        before = last
        bounds[name] = bisect_left(calendar, first), bisect_right(calendar, last)
    return bounds
