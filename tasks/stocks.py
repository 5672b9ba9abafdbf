"""Stock ranking: losses over the names of a day, information coefficients with significance, a portfolio with costs."""

import math
from inspect import signature
from pathlib import Path
from typing import Any, Literal, NamedTuple

import polars as pl
import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from pytorch_lightning.cli import LRSchedulerCallable, OptimizerCallable
from torch import Tensor, nn

from ..datasets.stocks import StockBatch
from ..errors import UserError
from ..zoo.core import Routing
from .base import BaseTask, MetricInfo, TestResult
from .stocks_metrics import (
    MIN_NAMES,
    NullModels,
    centred_ranks,
    daily_ic,
    day_correlation,
    day_ranks,
    defined_days,
    ends,
    information_ratio,
    newey_west_t,
)
from .stocks_portfolio import Portfolio, excess, topk_dropout

StockLoss = Literal["ic", "rank_ic", "mse", "ic_mse"]
STYLE_BINS = 5
SIGNIFICANT = 2.0  # |z| and |t| below it are called not significant


class Scored(NamedTuple):
    """Scored days of a whole split, on the CPU."""

    day: Int[Tensor, " days"]
    symbol: Int[Tensor, "days names"]
    valid: Bool[Tensor, "days names"]
    score: Float[Tensor, "days names"]
    next_return: Float[Tensor, "days names"]
    benchmark: Float[Tensor, " days"]
    equal: Float[Tensor, " days"]  # mean next_return of the universe
    ic: Float[Tensor, " days"]
    rank_ic: Float[Tensor, " days"]
    long_precision: Float[Tensor, " days"]
    short_precision: Float[Tensor, " days"]
    long_short: Float[Tensor, " days"]
    usage: Float[Tensor, "days cells experts"]  # gate weight by (style, fifth of the day's names); no cells untested


class Trading(NamedTuple):
    """How the test's portfolio trades; costs are shares of the value traded."""

    topk: int
    n_drop: int
    open_cost: float
    close_cost: float


class StocksTask(BaseTask):
    """Trains and tests any model whose forward takes fields of `StockBatch` by name and returns `score` and `routing`.

    Validation and test use every name that has a label: nothing is dropped by its label there.

    Args:
        model: a stocks model of the zoo.
        optimizer: factory for the optimiser.
        lr_scheduler: factory for the scheduler.
        loss: over the names of a day: `ic` (negative Pearson correlation with the label), `rank_ic` (with the label's
            rank), `mse` (to the label's centred rank), `ic_mse` (the sum of the last two).
        trim: share of the extreme labels at each end that *training* leaves out; 0.025 is usual.
        topk: names the test's portfolio holds.
        n_drop: names it swaps on a day at most.
        open_cost: cost of buying, as a share of the value.
        close_cost: cost of selling.
        null_models: how many shuffled-label models the test's z compares with (two signs each); 0 leaves z out.
        schema: the data's schema, linked by the command line.

    Raises:
        UserError: trim out of [0, 0.5), or a portfolio that cannot be.
    """

    mode = "max"
    headline = "rank_ic"
    monitor = "val/rank_ic"

    def __init__(
        self,
        model: nn.Module,
        optimizer: OptimizerCallable = torch.optim.AdamW,
        lr_scheduler: LRSchedulerCallable | None = None,
        loss: StockLoss = "ic",
        trim: float = 0.0,
        topk: int = 50,
        n_drop: int = 5,
        open_cost: float = 0.0005,
        close_cost: float = 0.0015,
        null_models: int = 30,
        schema: dict[str, Any] | None = None,
    ) -> None:
        super().__init__(model, optimizer, lr_scheduler)
        if not 0 <= trim < 0.5:
            raise UserError(f"model.trim={trim}: expected a share from 0 to below 0.5")
        if not 1 <= n_drop <= topk:
            raise UserError(f"model.n_drop={n_drop}: expected 1 to topk={topk}")
        self.loss_name, self.trim, self.null_models = loss, trim, null_models
        self.trading = Trading(topk, n_drop, open_cost, close_cost)
        self.schema = schema or {"horizon": 1, "styles": [], "days_per_year": 252}
        self.inputs = [name for name in signature(model.forward).parameters if name in StockBatch._fields]
        self.null: NullModels | None = None
        self._scored: list[Scored] = []

    def forward(self, batch: StockBatch) -> Any:
        """The model's output for the fields of the batch that its forward names."""
        return self.model(**{name: getattr(batch, name) for name in self.inputs})

    def training_step(self, batch: StockBatch, batch_idx: int) -> Tensor:
        output = self(batch)
        score, label, valid = output.score, batch.label, batch.valid
        if output.members is not None:  # each member learns by itself
            score = output.members.movedim(-1, 0).flatten(0, 1)
            label, valid = (values.repeat(output.members.shape[-1], 1) for values in (label, valid))
        stock_loss_ = stock_loss(score, label, valid, self.loss_name, self.trim)
        loss = stock_loss_ + self.record(output.routing)
        self.log("train/loss", loss, prog_bar=True, batch_size=len(batch.day))
        self.log("train/stock_loss", stock_loss_, batch_size=len(batch.day))
        return loss

    def validation_step(self, batch: StockBatch, batch_idx: int) -> None:
        self._collect(batch)

    def on_validation_epoch_end(self) -> None:
        scored = self._take()
        rank_ic = float(scored.rank_ic.nanmean())
        if rank_ic != rank_ic and not self.trainer.sanity_checking:
            raise UserError(
                f"{self.monitor} is undefined: no validation day has {MIN_NAMES} names with a label; "
                f"give {MIN_NAMES} symbols or more, with prices on the validation days"
            )
        self.log("val/rank_ic", rank_ic, prog_bar=True, sync_dist=True)
        self.log("val/ic", float(scored.ic.nanmean()), sync_dist=True)
        self.log("val/rank_icir", information_ratio(scored.rank_ic), sync_dist=True)

    def on_test_start(self) -> None:
        self._reset()
        data: Any = getattr(self.trainer, "datamodule", None)
        self.null = None
        if self.null_models and data is not None:
            # A seed of its own: the null is part of the measure and the same for every model.
            generator = torch.Generator().manual_seed(0)
            self.null = NullModels.fit(data.train_dataloader(), len(data.symbols), self.null_models, generator)

    def test_step(self, batch: StockBatch, batch_idx: int) -> None:
        self._collect(batch, test=True)
        if self.null is not None:
            self.null.update(batch.features, batch.label, batch.valid & ~batch.label.isnan())

    def on_test_epoch_end(self) -> None:
        data: Any = getattr(self.trainer, "datamodule", None)
        self.tested = self._take()
        self.portfolio = self._trade(self.tested, data)
        spread = (math.nan, math.nan) if self.null is None else self.null.spread()
        self.result = evaluate(
            self.tested, self.portfolio, spread, self.schema["horizon"], self.schema.get("days_per_year", 252)
        )
        self.dates = None if data is None else [data.calendar[day] for day in self.tested.day.tolist()]
        if self.dates is not None:  # dates say more than positions in a calendar
            unit = pl.Series("unit", self.dates).dt.strftime("%Y%m%d").cast(pl.Int64)
            self.result = TestResult(self.result.metrics, self.result.info, self.result.units.with_columns(unit))
        self.log_dict({f"test/{name}": value for name, value in self.result.metrics.items()}, sync_dist=True)
        self.print(significance(self.result.metrics))

    def on_predict_start(self) -> None:
        self._reset()

    def predict_step(self, batch: StockBatch, batch_idx: int) -> pl.DataFrame:
        """One row a name and day: score, rank (1 is best), the experts that voted, best first, and their entropy.

        Also for days without a label yet: tomorrow's ranking is the last day's.
        """
        output = self(batch)
        valid = batch.valid
        columns = {
            "day": batch.day[:, None].expand_as(valid),
            "symbol": batch.symbol,
            "score": output.score,
            "rank": day_ranks(-output.score, valid),
        }
        table = pl.DataFrame({name: values[valid].cpu().numpy() for name, values in columns.items()})
        for record in list(output.routing.values())[:1]:
            experts = pl.DataFrame(record.indices[valid.flatten()].cpu().numpy())
            weight = record.weights[valid.flatten()].float()
            entropy = -torch.special.xlogy(weight, weight).sum(-1)
            table = table.with_columns(
                experts=experts.select(pl.concat_str(pl.all(), separator=" ")).to_series(),
                gate_entropy=pl.Series(entropy.cpu().numpy()),
            )
        return table

    def draw(self, folder: Path) -> list[Path]:
        """Equity curve, IC by month, and which experts are used on which style."""
        from . import stocks_plots

        return stocks_plots.draw(self.tested, self.portfolio, self.dates, self.schema["styles"], folder)

    def _reset(self) -> None:
        """Models with a memory (TRA) start a test or a prediction without it."""
        reset = getattr(self.model, "reset", None)
        if callable(reset):
            reset()

    def _collect(self, batch: StockBatch, test: bool = False) -> None:
        output = self(batch)
        self.record(output.routing)
        known = batch.valid & ~batch.label.isnan()
        ic, rank_ic = daily_ic(output.score, batch.label, known)
        long, short, spread = ends(output.score, batch.label, known)
        scored = Scored(
            day=batch.day,
            symbol=batch.symbol,
            valid=batch.valid,
            score=output.score.float(),
            next_return=batch.next_return,
            benchmark=batch.benchmark,
            equal=batch.next_return.masked_fill(~batch.valid, torch.nan).nanmean(1),
            ic=ic,
            rank_ic=rank_ic,
            long_precision=long,
            short_precision=short,
            long_short=spread,
            usage=style_usage(batch, output.routing if test else {}),
        )
        self._scored.append(Scored(*(values.cpu() for values in scored)))

    def _take(self) -> Scored:
        """The collected days of all batches and processes, each once and in order."""
        batches, self._scored = self._scored, []
        if self.trainer.world_size > 1:
            gathered: list[Any] = [None] * self.trainer.world_size
            torch.distributed.all_gather_object(gathered, batches)
            batches = [batch for part in gathered for batch in part]
        return join(batches)

    def _trade(self, scored: Scored, data: Any) -> Portfolio:
        """The portfolio of the scores; a held name that leaves the universe still earns its return."""
        names = len(data.symbols) if data is not None else int(scored.symbol.max()) + 1
        score = to_panel(scored.score.masked_fill(~scored.valid, torch.nan), scored, names)
        earned = to_panel(scored.next_return, scored, names)
        panel = getattr(data, "panel", None)
        if panel is not None:
            earned = panel.next_return.cpu()[scored.day]
        return topk_dropout(score, earned, **self.trading._asdict())


def stock_loss(
    score: Float[Tensor, "days names"],
    label: Float[Tensor, "days names"],
    valid: Bool[Tensor, "days names"],
    kind: StockLoss,
    trim: float = 0.0,
) -> Float[Tensor, ""]:
    """Mean loss over the days, in at least fp32; days with few names or without label variance are left out."""
    known = valid & ~label.isnan()
    label = label.masked_fill(~known, 0.0)
    score = score.to(torch.promote_types(score.dtype, torch.float32))
    used = defined_days(label, known)
    ranks = centred_ranks(label, known).to(score.dtype)
    part = known
    if trim:
        place = day_ranks(label, known) / known.sum(1, keepdim=True).clamp(min=1)
        part = known & (place > trim) & (place <= 1 - trim)
    target = label.to(score.dtype) if kind == "ic" else ranks
    each = score.new_zeros(len(score))
    if kind != "mse":
        each = each - day_correlation(score, target, part)
    if kind in ("mse", "ic_mse"):
        error = (score - target).square().masked_fill(~part, 0.0)
        each = each + error.sum(1) / part.sum(1).clamp(min=1)
    return (each * used).sum() / used.sum().clamp(min=1)


def evaluate(
    scored: Scored,
    portfolio: Portfolio,
    null_spread: tuple[float, float] = (math.nan, math.nan),
    horizon: int = 1,
    days_per_year: int = 252,
) -> TestResult:
    """Every leaderboard metric of scored days, and the table with one row a day.

    `null_spread`: standard deviation of the mean IC and RankIC of models without skill (`NullModels`).
    """
    metrics: dict[str, float] = {}
    info: dict[str, MetricInfo] = {}
    days = int((~scored.rank_ic.isnan()).sum())

    def add(name: str, value: float, goal: Literal["max", "min"] = "max", unit: str = "", n: int = days) -> None:
        if math.isfinite(value):
            metrics[name], info[name] = value, MetricInfo(goal, unit, n)

    for name, series, spread in (
        ("ic", scored.ic, null_spread[0]),
        ("rank_ic", scored.rank_ic, null_spread[1]),
    ):
        mean, ratio = float(series.nanmean()), information_ratio(series)
        add(name, mean)
        add(f"{name}ir", ratio)
        add(f"{name}ir_annual", ratio * days_per_year**0.5)
        add(f"{name}_t", newey_west_t(series, horizon - 1))
        add(f"{name}_z", mean / spread if spread > 0 else math.nan)
    for name in ("long_precision", "short_precision"):
        add(name, float(getattr(scored, name).nanmean()))
    add("long_short_annual", float(scored.long_short.nanmean()) * days_per_year / horizon, unit="per year")

    traded = int((~scored.benchmark.isnan()).sum())
    for series, suffix in ((portfolio.gross, "gross"), (portfolio.net, "net")):
        figures = excess(series, scored.benchmark, days_per_year)
        add(f"annual_excess_{suffix}", figures.annual, unit="per year", n=traded)
        add(f"information_ratio_{suffix}", figures.ratio, n=traded)
        add(f"drawdown_{suffix}", figures.drawdown, n=traded)
    figures = excess(portfolio.net, scored.equal, days_per_year)
    add("annual_excess_net_equal", figures.annual, unit="per year", n=traded)
    add("information_ratio_net_equal", figures.ratio, n=traded)
    add("turnover", float(portfolio.turnover.nanmean()), "min", "per day", len(portfolio.turnover))

    table = {
        name: getattr(scored, name) for name in ("ic", "rank_ic", "long_precision", "short_precision", "long_short")
    }
    table |= {"return_gross": portfolio.gross, "return_net": portfolio.net, "benchmark": scored.benchmark}
    units = {name: pl.Series(values.double().numpy()).fill_nan(None) for name, values in table.items()}
    return TestResult(metrics, info, pl.DataFrame({"unit": scored.day.long().numpy(), **units}))


def significance(metrics: dict[str, float] | Any) -> str:
    """One line that says whether the RankIC is told from chance, by the shuffled-label null and over time."""
    if "rank_ic" not in metrics:
        return f"rank IC is undefined: no test day has {MIN_NAMES} names with a label"
    z, t = metrics.get("rank_ic_z", math.nan), metrics.get("rank_ic_t", math.nan)
    small = [name for name, value in (("z", z), ("t", t)) if not abs(value) >= SIGNIFICANT]
    verdict = "not significant: |" + "| and |".join(small) + f"| < {SIGNIFICANT:.0f}" if small else "significant"
    return f"rank IC {metrics['rank_ic']:.4f}, z {z:.1f} (shuffled labels), t {t:.1f} (Newey-West): {verdict}"


def style_usage(batch: StockBatch, routing: dict[str, Routing]) -> Float[Tensor, "days cells experts"]:
    """Gate weight each expert gets from the names in each fifth of each style, summed over the day's names."""
    days, names, styles = batch.style.shape
    records = [record for record in routing.values() if len(record.indices) == days * names]
    if not records or not styles:
        return batch.style.new_zeros(days, 0, 0)
    gate = records[0].dense_weights().abs().to(batch.style.dtype).view(days, names, -1)
    fifth = (batch.style * STYLE_BINS).long().clamp(0, STYLE_BINS - 1)
    cells = F.one_hot(fifth, STYLE_BINS).flatten(2).to(gate.dtype) * batch.valid.unsqueeze(-1)
    return cells.mT @ gate


def join(batches: list[Scored]) -> Scored:
    """All days, each once (a distributed sampler repeats some), in order, padded to the same number of names."""
    width = max(batch.symbol.shape[1] for batch in batches)
    padding = {"symbol": -1, "valid": False, "score": 0.0, "next_return": math.nan}

    def widen(name: str, values: Tensor) -> Tensor:
        return F.pad(values, (0, width - values.shape[1]), value=padding[name]) if name in padding else values

    joined = Scored(*(torch.cat([widen(name, getattr(batch, name)) for batch in batches]) for name in Scored._fields))
    order = joined.day.argsort(stable=True)
    day = joined.day[order]
    order = order[torch.cat([day.new_ones(1, dtype=torch.bool), day[1:] != day[:-1]])]
    return Scored(*(values[order] for values in joined))


def to_panel(values: Float[Tensor, "days names"], scored: Scored, symbols: int) -> Float[Tensor, "days symbols"]:
    """From padded days to a fixed column for each symbol; NaN where a day lacks it."""
    panel = values.new_full((len(values), symbols + 1), torch.nan)
    return panel.scatter(1, scored.symbol.masked_fill(scored.symbol < 0, symbols), values)[:, :symbols]
