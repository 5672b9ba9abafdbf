"""TopkDropout: hold k names, each day swap at most n of the worst for better ones (Qlib's strategy), with costs."""

import math
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor


class Portfolio(NamedTuple):
    """One entry a day, as shares of the account's value before the day's trades."""

    gross: Float[Tensor, " days"]  # return before costs
    cost: Float[Tensor, " days"]
    turnover: Float[Tensor, " days"]  # value bought plus value sold
    held: Float[Tensor, " days"]  # names held after the trades

    @property
    def net(self) -> Float[Tensor, " days"]:
        """Return after costs."""
        return self.gross - self.cost


class Excess(NamedTuple):
    """A series of returns over a benchmark, added up and not compounded (Qlib's default)."""

    annual: float  # mean x days per year
    ratio: float  # information ratio: annual mean over annual standard deviation (ddof 1)
    drawdown: float  # of the running sum: 0 or negative


def topk_dropout(
    score: Float[Tensor, "days names"],
    next_return: Float[Tensor, "days names"],
    tradable: Bool[Tensor, "days names"] | None = None,
    topk: int = 50,
    n_drop: int = 5,
    open_cost: float = 0.0005,
    close_cost: float = 0.0015,
    invested: float = 0.95,
) -> Portfolio:
    """Trade a panel of scores, days in order.

    Each day the best `n_drop` candidates (more until `topk` are held) meet the held names; of both together those
    among the `n_drop` worst that are held get sold, and as many are bought with `invested` of the cash in equal
    parts. A held name without a score ranks last. What cannot be traded is neither bought nor sold.

    Args:
        score: known after close t, NaN for names out of the universe.
        next_return: what a holding earns from close t+1, when it is bought, to close t+2; NaN earns nothing.
        tradable: at close t+1; default: where `next_return` is known.
        topk: names to hold.
        n_drop: most names sold on a day.
        open_cost: share of the value bought.
        close_cost: share of the value sold.
        invested: share of the cash that is spent.
    """
    names = score.shape[1]
    if tradable is None:
        tradable = ~next_return.isnan()
    # The state of one day decides the next, so days are a loop; on the CPU, in float64, whatever the scores were on.
    score = score.double().cpu().nan_to_num(nan=-torch.inf)
    earned, tradable = next_return.double().cpu().nan_to_num(nan=0.0), tradable.cpu()
    value, cash = torch.zeros(names, dtype=torch.double), torch.ones((), dtype=torch.double)
    rows = []
    for s, r, can in zip(score, earned, tradable, strict=True):
        held = value > 0
        total = cash + value.sum()
        free = topk - int(held.sum())
        bids = _best(s.masked_fill(held, -torch.inf), n_drop + free) & (s > -torch.inf)
        rejected = _best(-s.masked_fill(~(held | bids), torch.inf), n_drop) & (held | bids)
        exits = held & rejected
        wanted = _best(s.masked_fill(~bids, -torch.inf), int(exits.sum()) + free) & bids
        exits, entries = exits & can, wanted & can
        sold = value[exits].sum()
        cash = cash + sold * (1 - close_cost)
        value = value.masked_fill(exits, 0.0)
        count = int(wanted.sum())
        each = cash * invested / max(count, 1)  # the part of one that cannot be bought stays cash
        bought = each * entries.sum()
        each = each / (1 + open_cost)
        value = torch.where(entries, each, value)
        cash = cash - bought
        spent = each * entries.sum() * open_cost + sold * close_cost
        profit = (value * r).sum()
        value = value * (1 + r)
        traded = sold + each * entries.sum()
        rows.append(torch.stack([profit / total, spent / total, traded / total, (value > 0).sum().double()]))
    table = torch.stack(rows, 1) if rows else torch.zeros(4, 0, dtype=torch.double)
    return Portfolio(*table)


def excess(returns: Float[Tensor, " days"], benchmark: Float[Tensor, " days"], days_per_year: int) -> Excess:
    """Risk figures of returns over a benchmark; days without a benchmark are left out."""
    series = (returns - benchmark.to(returns))[~benchmark.isnan()]
    if len(series) < 2:
        return Excess(math.nan, math.nan, math.nan)
    running = torch.cat([series.new_zeros(1), series.cumsum(0)])
    drawdown = float((running - running.cummax(0).values).min())
    mean, spread = float(series.mean()), float(series.std())
    ratio = mean / spread * days_per_year**0.5 if spread > 0 else math.nan
    return Excess(mean * days_per_year, ratio, drawdown)


def _best(score: Float[Tensor, " names"], count: int) -> Bool[Tensor, " names"]:
    """The `count` highest entries; equal ones in the names' order."""
    best = torch.zeros(len(score), dtype=torch.bool)
    best[score.argsort(descending=True, stable=True)[: max(count, 0)]] = True
    return best
