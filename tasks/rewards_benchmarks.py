"""Scores of reward models on benchmarks, from a table of rewards: RewardBench 1 and 2, RM-Bench, LLMBar, JudgeBench.

Tables have a row a response: `item`, `id`, `subset`, `good` (ought to win), `place`, `response` and `reward`.
Conventions: ties of a pair count one half; RM-Bench counts a strictly higher reward, as its code does.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import polars as pl
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from ..datasets.rewards_benchmarks import REWARDBENCH
from ..errors import UserError
from .rewards_bon import best_of_n, overoptimisation
from .rewards_metrics import LengthBias, Share, length_bias, share

_STYLES = 3
_SAFETY = ("safety-refuse", "safety-response")
_TIES = (0.30, 0.30, 0.20, 0.20, 0.01)  # tied accuracy, ref accuracy, preferred, preferred hard, margin


@dataclass(frozen=True)
class BenchmarkScores:
    """A benchmark's outcome.

    Attributes:
        kind: of the benchmark.
        headline: name of the score that ranks models.
        scores: what the benchmark reports, by name, in [0, 1] (the Ties score may exceed it by 0.01).
        subsets: accuracy of each subset with its standard error.
        length: what length alone gets, over the pairs of good and other responses; None for pools.
        notes: what is missing for the official score.
    """

    kind: str
    headline: str
    scores: Mapping[str, float]
    subsets: Mapping[str, Share]
    length: LengthBias | None
    notes: list[str] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        """JSON-able; shares as value, se, n."""
        return {
            "kind": self.kind,
            "headline": self.headline,
            "scores": dict(self.scores),
            "subsets": {name: part._asdict() for name, part in self.subsets.items()},
            "length": None if self.length is None else self.length._asdict(),
            "notes": self.notes,
        }


def score_benchmark(kind: str, table: pl.DataFrame) -> BenchmarkScores:
    """The scores of a benchmark by its own protocol.

    Args:
        table: `Benchmark.table` with a column `reward`.

    Raises:
        UserError: a reward is missing or no number.
    """
    bad = table["reward"].cast(pl.Float64).is_finite().fill_null(False).not_().arg_max()
    if bad is not None and not math.isfinite(table["reward"].cast(pl.Float64).fill_null(math.nan)[bad]):
        raise UserError(f"response {bad + 1} of the benchmark has no finite reward: {table['reward'][bad]}")
    if kind == "pools":
        return BenchmarkScores(kind, *_pools(table), {}, None)
    protocols: Mapping[str, Callable[[pl.DataFrame], tuple[str, dict[str, float], list[str]]]] = {
        "rewardbench": _rewardbench,
        "rewardbench2": _rewardbench2,
        "rmbench": _rmbench,
        "llmbar": _llmbar,
        "judgebench": _plain,
        "pairs": _plain,
    }
    items = item_scores(kind, table)
    headline, scores, notes = protocols[kind](table)
    subsets = {
        str(name): share(items.filter(pl.col("subset") == name)["score"].to_torch())
        for name in items["subset"].unique(maintain_order=True)
        if not (kind == "rewardbench2" and str(name).lower() == "ties")  # has a score of its own
    }
    return BenchmarkScores(kind, headline, scores, subsets, benchmark_length(table), notes)


def item_scores(kind: str, table: pl.DataFrame) -> pl.DataFrame:
    """item, id, subset, score: of one good and one other response the pair's; of several the share of the best place
    (1 / number of responses tied with it; RewardBench 2), in RM-Bench the share of the nine right comparisons."""
    best = pl.col("reward").max()
    tied = (pl.col("reward") == best).sum()
    won = pl.col("good") & (pl.col("reward") == best)
    rows = table.group_by("item", maintain_order=True)
    if kind == "rmbench":
        pairs = pair_table(table)
        won_pairs = pairs.group_by("item").agg(score=(pl.col("chosen") > pl.col("rejected")).mean())
        return rows.agg(pl.col("id", "subset").first()).join(won_pairs, on="item", maintain_order="left", how="left")
    return rows.agg(pl.col("id", "subset").first(), score=won.sum() / tied)


def pair_table(table: pl.DataFrame) -> pl.DataFrame:
    """Every good response beside every other one of its item: item, subset, the places, rewards and lengths."""
    columns: list[Any] = ["item", "subset", "place", "reward", pl.col("response").str.len_chars().alias("length")]
    good = table.filter("good").select(*columns)
    other = table.filter(~pl.col("good")).select("item", *columns[2:])
    pairs = good.join(other, on="item", suffix="_other", maintain_order="left_right")
    return pairs.rename({"reward": "chosen", "reward_other": "rejected"})


def benchmark_length(table: pl.DataFrame) -> LengthBias:
    """Length report over all pairs of a good and another response."""
    pairs = pair_table(table)
    length = torch.stack([pairs[name].cast(pl.Int64).to_torch() for name in ("length", "length_other")], 1)
    return length_bias(pairs["chosen"].to_torch(), pairs["rejected"].to_torch(), length)


def rm_bench_matrix(chosen: Float[Tensor, "items 3"], rejected: Float[Tensor, "items 3"]) -> Float[Tensor, "3 3"]:
    """Share of items whose chosen response in style i has a strictly higher reward than the rejected one in style j."""
    return (chosen[:, :, None] > rejected[:, None, :]).double().mean(0)


def rm_bench_levels(matrix: Float[Tensor, "3 3"]) -> dict[str, float]:
    """Normal: same style. Hard: the rejected response has the richer style (upper triangle). Easy: the chosen has."""
    n = _STYLES * (_STYLES - 1) / 2
    return {
        "easy": float(matrix.tril(-1).sum() / n),
        "normal": float(matrix.diagonal().mean()),
        "hard": float(matrix.triu(1).sum() / n),
    }


def ties_score(
    kind: list[str],
    prompt: list[str],
    rewards: Float[Tensor, "items responses"],
    good: Bool[Tensor, "items responses"],
    there: Bool[Tensor, "items responses"],
) -> dict[str, float]:
    """RewardBench 2's Ties: 0.30 accuracy on tied, 0.30 on reference prompts, 0.20 where the gap to wrong answers
    exceeds the spread among right ones, 0.20 where the smaller gap of both prompts does, 0.01 tanh(gap / spread - 1).

    An item is right where every right answer beats every wrong one. The last three terms are over the prompts that
    have both a reference (`ref`, one right answer) and a tied version; without any they are NaN, as is the score.

    Args:
        kind: "ref" or "tied" of each item.
        prompt: what a reference and its tied version share.
        there: false at padding.
    """
    low = rewards.masked_fill(~(good & there), torch.inf).amin(1).double()
    high = rewards.masked_fill(~(good & there), -torch.inf).amax(1).double()
    wrong = rewards.masked_fill(good | ~there, -torch.inf).amax(1).double()
    gap, spread = low - wrong, high - low
    at = {(k, p): i for i, (k, p) in enumerate(zip(kind, prompt, strict=True))}
    both = [p for k, p in at if k == "tied" and ("ref", p) in at]
    tied: Int[Tensor, " prompts"] = torch.tensor([at["tied", p] for p in both], dtype=torch.long)
    reference = torch.tensor([at["ref", p] for p in both], dtype=torch.long)
    least = torch.minimum(gap[tied], gap[reference])
    margin = (least / spread[tied] - 1).tanh().nan_to_num(nan=0.0)  # no spread and no gap
    right = (gap > 0).double()
    of = {name: torch.tensor([k == name for k in kind], dtype=torch.bool) for name in ("tied", "ref")}
    parts = {
        "tied_accuracy": right[of["tied"]].mean(),
        "ref_accuracy": right[of["ref"]].mean(),
        "preferred": (gap[tied] > spread[tied]).double().mean(),
        "preferred_hard": (least > spread[tied]).double().mean(),
        "margin": margin.mean(),
    }
    values = {name: float(value) for name, value in parts.items()}
    return values | {"ties": sum(weight * value for weight, value in zip(_TIES, values.values(), strict=True))}


def _pools(table: pl.DataFrame) -> tuple[str, dict[str, float]]:
    """Gold reward of the best of n by the reward, for n up to the smallest pool, and how far it falls from its peak."""
    rows = table.with_columns(place=pl.int_range(pl.len()).over("item"), owner=pl.col("item").rank("dense") - 1)
    shape = (int(rows["owner"].max()) + 1, int(rows["place"].max()) + 1)  # type: ignore[arg-type]
    at = rows["owner"].cast(pl.Int64).to_torch(), rows["place"].to_torch()
    proxy, gold = (torch.full(shape, torch.nan).double() for _ in range(2))
    proxy[at], gold[at] = (rows[name].cast(pl.Float64).to_torch() for name in ("reward", "gold"))
    curve = best_of_n(proxy, gold)
    fall = overoptimisation(curve.n, curve.gold)
    scores = {f"gold_{n}": value for n, value in zip(curve.n.tolist(), curve.gold.tolist(), strict=True)}
    return f"gold_{int(curve.n[-1])}", scores | {"overoptimisation": fall.score, "peak_n": float(fall.peak)}


def _plain(table: pl.DataFrame) -> tuple[str, dict[str, float], list[str]]:
    """Micro, and macro over the tasks; over subsets where the file names no task."""
    items = item_scores("pairs", table).join(
        table.group_by("item").agg(pl.col("task").first()), on="item", maintain_order="left"
    )
    means = items.group_by("subset" if items["task"].is_null().all() else "task").agg(pl.col("score").mean())["score"]
    accuracy = {"pair_accuracy": float(items["score"].mean()), "pair_accuracy_macro": float(means.mean())}  # type: ignore[arg-type]
    return "pair_accuracy", accuracy, []


def _llmbar(table: pl.DataFrame) -> tuple[str, dict[str, float], list[str]]:
    """Natural, and the mean over the adversarial sets, as the paper's tables average them; micro over all."""
    headline, scores, _ = _plain(table)
    items = item_scores("llmbar", table)
    natural = pl.col("subset").str.to_lowercase().str.contains("natural")
    for name, rows in (("natural", items.filter(natural)), ("adversarial", items.filter(~natural))):
        if len(rows):
            scores[name] = float(rows.group_by("subset").agg(pl.col("score").mean())["score"].mean())  # type: ignore[arg-type]
    return headline, scores, []


def _rewardbench(table: pl.DataFrame) -> tuple[str, dict[str, float], list[str]]:
    """Each section's accuracy weighs its subsets by the official number of examples; the score is the mean of the
    sections. Subsets that the file lacks are left out and noted."""
    items = item_scores("rewardbench", table)
    mean = dict(items.group_by("subset").agg(pl.col("score").mean()).iter_rows())
    scores: dict[str, float] = {}
    notes = []
    for section, subsets in REWARDBENCH.items():
        found = {name: count for name, count in subsets.items() if name in mean}
        missing = [name for name in subsets if name not in mean]
        if missing:
            notes.append(f"{section}: without {', '.join(missing)}")
        if found:
            scores[section] = sum(mean[name] * count for name, count in found.items()) / sum(found.values())
    scores["rewardbench"] = sum(scores.values()) / len(scores)
    return "rewardbench", scores, notes


def _rewardbench2(table: pl.DataFrame) -> tuple[str, dict[str, float], list[str]]:
    """Best-of-4 accuracy of each subset, the Ties score, and their unweighted mean."""
    ties = table.filter(pl.col("subset").str.to_lowercase() == "ties")
    others = item_scores("rewardbench2", table.join(ties, on="item", how="anti"))
    scores = {_snake(name): value for name, value in others.group_by("subset", maintain_order=True)
              .agg(pl.col("score").mean()).iter_rows()}  # fmt: skip
    if len(ties):
        scores["ties"] = _ties(ties)["ties"]
    expected = {"factuality", "precise_if", "math", "safety", "focus", "ties"}
    missing = sorted(expected - set(scores))
    scores["rewardbench2"] = sum(scores.values()) / len(scores)
    return "rewardbench2", scores, [f"without {', '.join(missing)}"] if missing else []


def _ties(table: pl.DataFrame) -> dict[str, float]:
    items = table.group_by("item", maintain_order=True).agg(pl.col("id").first(), "reward", "good")
    width = int(items["reward"].list.len().max())  # type: ignore[arg-type]
    shape = (len(items), width)
    rewards, good, there = torch.zeros(shape).double(), torch.zeros(shape).bool(), torch.zeros(shape).bool()
    for i, (values, flags) in enumerate(items.select("reward", "good").iter_rows()):
        rewards[i, : len(values)], good[i, : len(values)] = torch.tensor(values).double(), torch.tensor(flags)
        there[i, : len(values)] = True
    kinds, prompts = zip(*(str(name).split(":", 1) for name in items["id"]), strict=True)
    return ties_score(list(kinds), list(prompts), rewards, good, there)


def _rmbench(table: pl.DataFrame) -> tuple[str, dict[str, float], list[str]]:
    """Each domain's easy, normal and hard accuracy, safety being the mean of refusing and responding; the total is
    the mean over domains of the mean over the nine comparisons."""
    scores: dict[str, float] = {}
    levels: dict[str, dict[str, float]] = {}
    for domain in table["subset"].unique(maintain_order=True):
        rows = table.filter(pl.col("subset") == domain).sort("item", "place", maintain_order=True)
        sides = [rows.filter(pl.col("good") == good)["reward"].to_torch().view(-1, _STYLES) for good in (True, False)]
        matrix = rm_bench_matrix(*sides)
        levels[str(domain)] = rm_bench_levels(matrix) | {"average": float(matrix.mean())}
    parts = [levels.pop(name) for name in _SAFETY if name in levels]
    if parts:
        levels["safety"] = {level: sum(part[level] for part in parts) / len(parts) for level in parts[0]}
    for domain, values in levels.items():
        scores |= {
            f"{_snake(domain)}_{level}" if level != "average" else _snake(domain): v for level, v in values.items()
        }
    for level in ("easy", "normal", "hard"):
        scores[level] = sum(values[level] for values in levels.values()) / len(levels)
    scores["rmbench"] = sum(values["average"] for values in levels.values()) / len(levels)
    missing = [name for name in ("chat", "math", "code", "safety") if name not in levels]
    return "rmbench", scores, [f"without {', '.join(missing)}"] if missing else []


def _snake(name: str) -> str:
    return "_".join("".join(c if c.isalnum() else " " for c in name.lower()).split())
