"""Metrics of a cross-section a day: information coefficients, their significance, precision at both ends.

Everything works on padded days at once. A day is undefined (NaN) with fewer than `MIN_NAMES` names or without any
variance of the label.
"""

from collections.abc import Iterable
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

MIN_NAMES = 20
RANK_SCALE = 12**0.5  # uniform ranks of unit variance, the field's 3.46
_TINY = 1e-16


def defined_days(
    label: Float[Tensor, "days names"], mask: Bool[Tensor, "days names"], min_names: int = MIN_NAMES
) -> Bool[Tensor, " days"]:
    """Days with enough names and a label that differs between them."""
    top = label.masked_fill(~mask, -torch.inf).amax(1)
    bottom = label.masked_fill(~mask, torch.inf).amin(1)
    return (mask.sum(1) >= min_names) & (top > bottom)


def day_correlation(
    x: Float[Tensor, "days names"], y: Float[Tensor, "days names"], mask: Bool[Tensor, "days names"]
) -> Float[Tensor, " days"]:
    """Pearson's correlation over the names of each day; 0, with gradient 0, where one side is constant."""
    count = mask.sum(1, keepdim=True).clamp(min=1)

    def centred(values: Tensor) -> Tensor:
        values = values.masked_fill(~mask, 0.0)
        return (values - values.sum(1, keepdim=True) / count) * mask

    x, y = centred(x), centred(y)
    # Normalised by its largest entry first, so that the floor means the same for returns of any unit.
    y = y / y.abs().amax(1, keepdim=True).clamp(min=_TINY)
    square_x, square_y = x.square().sum(1).clamp(min=_TINY), y.square().sum(1).clamp(min=_TINY)
    return (x * y).sum(1) / (square_x.sqrt() * square_y.sqrt())


def day_ranks(values: Float[Tensor, "*rows names"], mask: Bool[Tensor, "*rows names"]) -> Float[Tensor, "*rows names"]:
    """Ranks from 1 (lowest), ties sharing their mean rank; 0 outside the mask."""
    filled = values.masked_fill(~mask, torch.inf).contiguous()
    ordered = filled.sort(-1).values
    below = torch.searchsorted(ordered, filled, right=False)
    up_to = torch.searchsorted(ordered, filled, right=True)
    # Past the mask's count lie the fillers, which tie with a true infinity: they must not count.
    up_to = torch.minimum(up_to, mask.sum(-1, keepdim=True))
    return (below + up_to + 1).to(values.dtype) / 2 * mask


def centred_ranks(values: Float[Tensor, "days names"], mask: Bool[Tensor, "days names"]) -> Float[Tensor, "days names"]:
    """Ranks of each day with mean 0 and unit variance; 0 outside the mask (Qlib's CSRankNorm, centred)."""
    count = mask.sum(1, keepdim=True)
    return (day_ranks(values, mask) - (count + 1) / 2) / count.clamp(min=1) * RANK_SCALE * mask


def daily_ic(
    score: Float[Tensor, "days names"],
    label: Float[Tensor, "days names"],
    mask: Bool[Tensor, "days names"],
    min_names: int = MIN_NAMES,
) -> tuple[Float[Tensor, " days"], Float[Tensor, " days"]]:
    """IC (Pearson) and RankIC (Spearman, mean ranks for ties) of each day, in float64; NaN where undefined.

    A day on which all scores are equal counts 0: saying nothing is no reason to be left out.
    """
    score, label = score.double(), label.double()
    undefined = ~defined_days(label, mask, min_names)
    ic = day_correlation(score, label, mask)
    rank_ic = day_correlation(day_ranks(score, mask), day_ranks(label, mask), mask)
    return ic.masked_fill(undefined, torch.nan), rank_ic.masked_fill(undefined, torch.nan)


def information_ratio(series: Float[Tensor, " days"]) -> float:
    """Mean over standard deviation (ddof 1) of the defined days; NaN without any variance."""
    series = series[~series.isnan()].double()
    spread = float(series.std()) if len(series) > 1 else 0.0
    return float(series.mean()) / spread if spread > 0 else float("nan")


def newey_west_t(series: Float[Tensor, " days"], lag: int) -> float:
    """t-statistic of the mean with autocorrelation up to `lag`, Bartlett weights (Newey & West, 1987).

    Labels of h days overlap, so their ICs are correlated over h - 1 days: that is the lag to give. Undefined days
    are left out.
    """
    series = series[~series.isnan()].double()
    n = len(series)
    if n < 2:
        return float("nan")
    deviation = series - series.mean()
    variance = (deviation @ deviation) / n
    for distance in range(1, min(lag, n - 1) + 1):
        weight = 1 - distance / (lag + 1)
        variance += 2 * weight * (deviation[distance:] @ deviation[:-distance]) / n
    return float(series.mean() / (variance / n).sqrt()) if variance > 0 else float("nan")


def ends(
    score: Float[Tensor, "days names"],
    label: Float[Tensor, "days names"],
    mask: Bool[Tensor, "days names"],
    share: float = 0.2,
) -> tuple[Float[Tensor, " days"], Float[Tensor, " days"], Float[Tensor, " days"]]:
    """Long precision, short precision and long-short return of each day, by Qlib's definitions.

    The best and worst `share` of the names; precision is the part of them whose label lies above (below) the day's
    mean; the return is half the difference of their mean labels. Equal scores are taken in the names' order.
    """
    undefined = ~defined_days(label, mask)
    label = label.double().masked_fill(~mask, 0.0)
    order = score.double().masked_fill(~mask, torch.inf).argsort(dim=1, stable=True)
    place = torch.empty_like(order).scatter_(
        1, order, torch.arange(order.shape[1], device=order.device).expand_as(order)
    )
    count = mask.sum(1, keepdim=True)
    size = (count * share).long().clamp(min=1)
    worst, best = (place < size) & mask, (place >= count - size) & mask
    relative = label - label.sum(1, keepdim=True) / count.clamp(min=1)

    def mean(values: Tensor, part: Tensor) -> Tensor:
        return ((values * part).sum(1) / size[:, 0]).masked_fill(undefined, torch.nan)

    long, short = mean((relative > 0).double(), best), mean((relative < 0).double(), worst)
    return long, short, (mean(label, best) - mean(label, worst)) / 2


class NullModels:
    """Linear models that were taught nothing: fitted on shuffled labels, they say how far chance alone gets.

    A model without skill still leans on some features for the whole test period, and these have good and bad years:
    its mean IC varies several times more than independent days would have it (fact sheet, pitfall 4). So the null is
    not a shuffle of the test labels, which gives back little more than 1/sqrt(names x days), but ridge regressions
    fitted on *train* labels whose names were shuffled, once for all days, so that each name's series of labels stays
    whole; they are then scored on the true test labels. Every model counts with both signs: the null's mean is 0.

    Args:
        weight: one column a model.
    """

    def __init__(self, weight: Float[Tensor, "features models"]) -> None:
        self.weight = weight
        self._ic: list[Tensor] = []

    @classmethod
    def fit(
        cls, loader: Iterable[Any], names: int, models: int, generator: torch.Generator, penalty: float = 1e-3
    ) -> "NullModels":
        """From one pass over the train days. `names` is how many symbols there are."""
        shuffles = torch.stack([torch.randperm(names, generator=generator) for _ in range(models)])
        gram, moment, samples = torch.zeros(()), torch.zeros(()), 0
        for batch in loader:
            x, valid = _last_day(batch.features, batch.valid), batch.valid
            days, places = valid.nonzero(as_tuple=True)
            symbols = batch.symbol[days, places]
            ranks = centred_ranks(batch.label, valid & ~batch.label.isnan())
            panel = x.new_zeros(len(valid), names).index_put((days, symbols), ranks[days, places])
            shuffled = panel[days[:, None], shuffles.to(days.device)[:, symbols].T]
            rows = x[days, places]
            gram = gram + (rows.mT @ rows).double().cpu()
            moment = moment + (rows.mT @ shuffled).double().cpu()
            samples += len(rows)
        gram = gram + penalty * max(samples, 1) * torch.eye(len(gram), dtype=torch.double)
        return cls(torch.linalg.solve(gram, moment).float())

    def update(
        self,
        features: Float[Tensor, "days names time features"],
        label: Float[Tensor, "days names"],
        mask: Bool[Tensor, "days names"],
    ) -> None:
        """Score a batch of test days."""
        score = (features[:, :, -1] @ self.weight.to(features)).movedim(-1, 0)
        models = len(score)
        both = daily_ic(score.flatten(0, 1), label.repeat(models, 1), mask.repeat(models, 1))
        self._ic.append(torch.stack([ic.view(models, -1) for ic in both]).cpu())

    def spread(self) -> tuple[float, float]:
        """Standard deviation, around 0, of the null's mean IC and mean RankIC over the days seen; NaN without any."""
        if not self._ic:
            return float("nan"), float("nan")
        ic, rank_ic = torch.cat(self._ic, -1).nanmean(-1).square().mean(-1).sqrt().tolist()
        return ic, rank_ic


def _last_day(features: Tensor, valid: Tensor) -> Float[Tensor, "days names features"]:
    """The last day's features less their mean over the day's names; 0 for padding."""
    x = features[:, :, -1] * valid.unsqueeze(-1)
    return (x - x.sum(1, keepdim=True) / valid.sum(1).clamp(min=1)[:, None, None]) * valid.unsqueeze(-1)
