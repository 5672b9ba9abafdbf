"""Metrics of reward models: pair accuracy, routing, length bias, agreement of a judge. Functions of tensors.

A pair counts 1 where the chosen response has the higher reward, 1/2 where both are equal, else 0. Rewards of NaN make
the pair NaN, so that a diverged model is seen.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torchmetrics.functional.classification import multiclass_confusion_matrix

from .rewards_bon import BestOfN, Overoptimisation, best_of_n, overoptimisation, pool_matrix

__all__ = [
    "BestOfN",
    "JudgeReport",
    "LengthBias",
    "Overoptimisation",
    "PairAccuracy",
    "RouterReport",
    "Share",
    "best_of_n",
    "judge_report",
    "length_bias",
    "overoptimisation",
    "pair_accuracy",
    "pair_scores",
    "pool_matrix",
    "router_report",
]


class Share(NamedTuple):
    """A mean of pair scores, its binomial standard error, and the number of pairs."""

    value: float
    se: float
    n: int


class PairAccuracy(NamedTuple):
    """`micro` over pairs, `macro` over tasks (all of equal weight), with standard errors, and each task's share."""

    micro: float
    micro_se: float
    macro: float
    macro_se: float
    by_task: dict[str, Share]
    n: int


class RouterReport(NamedTuple):
    """Accuracy and macro-F1 over the tasks that occur or are predicted; confusion counts, row = true task."""

    accuracy: float
    macro_f1: float
    confusion: Int[Tensor, "tasks tasks"]
    n: int


class LengthBias(NamedTuple):
    """What length alone explains: pairs of equal length count one half in the first two.

    Attributes:
        length_accuracy: of the rule that the longer response wins.
        prefers_longer: share of pairs in which the reward prefers the longer response.
        accuracy_longer: pair accuracy where the chosen response is the longer one; NaN without such pairs.
        accuracy_shorter: where it is the shorter one.
        correlation: of the differences of reward and of log(1 + length), each pair taken in both orders.
        n: pairs.
    """

    length_accuracy: float
    prefers_longer: float
    accuracy_longer: float
    accuracy_shorter: float
    correlation: float
    n: int


class JudgeReport(NamedTuple):
    """`consistency`: share of pairs with the same verdict in both orders; `agreement`: share of all pairs whose
    verdict is the same in both orders and the label's (Auto-J, Li et al. 2023)."""

    agreement: float
    consistency: float
    n: int


def pair_scores(chosen: Float[Tensor, " pairs"], rejected: Float[Tensor, " pairs"]) -> Float[Tensor, " pairs"]:
    """1, 1/2 or 0 for each pair (float64); NaN where a reward is NaN."""
    score = (chosen > rejected).double() + (chosen == rejected).double() / 2
    return score.masked_fill(chosen.isnan() | rejected.isnan(), torch.nan)


def share(scores: Float[Tensor, " pairs"]) -> Share:
    """Mean with the binomial standard error sqrt(p (1 - p) / n); NaN for no pairs."""
    n = len(scores)
    p = float(scores.mean()) if n else float("nan")
    return Share(p, max(p * (1 - p), 0.0) ** 0.5 / n**0.5 if n and p == p else float("nan"), n)


def pair_accuracy(
    chosen: Float[Tensor, " pairs"],
    rejected: Float[Tensor, " pairs"],
    task: Int[Tensor, " pairs"] | None = None,
    names: Sequence[str] | None = None,
) -> PairAccuracy:
    """Micro and macro accuracy. Pairs of unknown task (-1) count in micro alone; without tasks macro is micro.

    Args:
        names: of the tasks; default: their numbers.
    """
    scores = pair_scores(chosen, rejected)
    whole = share(scores)
    by_task: dict[str, Share] = {}
    if task is not None:
        for t in task[task >= 0].unique().tolist():
            by_task[names[t] if names is not None else str(t)] = share(scores[task == t])
    parts = list(by_task.values()) or [whole]
    macro = sum(part.value for part in parts) / len(parts)
    macro_se = sum(part.se**2 for part in parts) ** 0.5 / len(parts)
    return PairAccuracy(whole.value, whole.se, macro, macro_se, by_task, whole.n)


def router_report(logits: Float[Tensor, "rows tasks"], task: Int[Tensor, " rows"]) -> RouterReport:
    """How well a router tells the tasks; rows of unknown task (-1) are left out. NaN without rows."""
    known = task >= 0
    tasks = logits.shape[1]
    if not bool(known.any()):
        empty = torch.zeros(tasks, tasks, dtype=torch.long, device=logits.device)
        return RouterReport(float("nan"), float("nan"), empty, 0)
    predicted, truth = logits[known].argmax(-1), task[known]
    confusion = multiclass_confusion_matrix(predicted, truth, tasks)
    right, true, said = confusion.diagonal(), confusion.sum(1), confusion.sum(0)
    f1 = (2 * right).double() / (true + said).clamp(min=1)
    occurs = (true + said) > 0
    return RouterReport(float(right.sum() / true.sum()), float(f1[occurs].mean()), confusion, int(known.sum()))


def length_bias(
    chosen: Float[Tensor, " pairs"], rejected: Float[Tensor, " pairs"], length: Int[Tensor, "pairs 2"]
) -> LengthBias:
    """What the length rule gets, and how much the reward leans to length. `length` in characters, chosen first."""
    scores = pair_scores(chosen, rejected)
    longer, shorter = length[:, 0] > length[:, 1], length[:, 0] < length[:, 1]
    rule = pair_scores(length[:, 0].double(), length[:, 1].double())
    prefers = torch.where(longer, scores, torch.where(shorter, 1 - scores, 0.5))
    ratio = (length.double() + 1).log()
    both = torch.stack([(chosen - rejected).double(), ratio[:, 0] - ratio[:, 1]])
    # A pair and its mirror image are the same fact: the correlation of both together is around zero.
    norm = both.square().sum(1).sqrt().prod()
    correlation = float((both[0] * both[1]).sum() / norm) if norm > 0 else float("nan")
    return LengthBias(
        length_accuracy=share(rule).value,
        prefers_longer=share(prefers).value,
        accuracy_longer=share(scores[longer]).value,
        accuracy_shorter=share(scores[shorter]).value,
        correlation=correlation,
        n=len(scores),
    )


def judge_report(
    forward: Int[Tensor, " pairs"], swapped: Int[Tensor, " pairs"], label: Int[Tensor, " pairs"]
) -> JudgeReport:
    """Agreement and consistency of a judge that saw each pair in both orders.

    Verdicts and labels name the response, whatever its place: 0 or 1, 2 for a tie, -1 for no answer (never right).
    """
    same = (forward == swapped) & (forward >= 0)
    return JudgeReport(share((same & (forward == label)).double()).value, share(same.double()).value, len(label))
