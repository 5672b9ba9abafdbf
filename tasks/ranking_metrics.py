"""Ranking metrics for many small groups at once: sorts and sums, no loop over sessions or users.

Ties are worth what a random order of the tied items would be worth: half a pair for AUC, the middle of the tied
positions for NDCG and MRR. Metrics of a session are null (NaN) where they are undefined.
"""

from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor


class SessionMetrics(NamedTuple):
    """Each of shape [batch]; NaN where a session lacks a positive (or, for AUCs, a negative)."""

    session_auc: Float[Tensor, " batch"]
    auc_at_5: Float[Tensor, " batch"]
    ndcg: Float[Tensor, " batch"]
    ndcg_at_5: Float[Tensor, " batch"]
    mrr: Float[Tensor, " batch"]


def session_metrics(
    scores: Float[Tensor, "batch cands"], labels: Float[Tensor, "batch cands"], mask: Bool[Tensor, "batch cands"]
) -> SessionMetrics:
    """All metrics of a batch of sessions; padded candidates are left out.

    `auc_at_5` is the AUC among the five best-scored candidates (ties at the border by the candidates' order);
    `ndcg` uses gain 2^label - 1, discount log2(1 + rank) and mid-ranks among ties.
    """
    scores, labels = scores.double(), labels.double() * mask
    rank = mid_ranks(scores, mask)
    order = scores.masked_fill(~mask, -torch.inf).argsort(dim=1, descending=True, stable=True)[:, :5]
    top = [values.gather(1, order) for values in (scores, labels, mask)]
    return SessionMetrics(
        session_auc=pairwise_auc(scores, labels, mask),
        auc_at_5=pairwise_auc(*top),
        ndcg=ndcg(rank, labels, mask, None),
        ndcg_at_5=ndcg(rank, labels, mask, 5),
        mrr=reciprocal_rank(rank, labels, mask),
    )


def mid_ranks(scores: Float[Tensor, "batch cands"], mask: Bool[Tensor, "batch cands"]) -> Float[Tensor, "batch cands"]:
    """Rank from 1 (best); tied items share the middle of their ranks. Padded candidates rank behind all."""
    scores = scores.masked_fill(~mask, -torch.inf)
    above = (scores.unsqueeze(1) > scores.unsqueeze(2)).sum(2)
    tied = (scores.unsqueeze(1) == scores.unsqueeze(2)).sum(2)
    return above + (tied.double() + 1) / 2


def pairwise_auc(
    scores: Float[Tensor, "batch cands"], labels: Float[Tensor, "batch cands"], mask: Bool[Tensor, "batch cands"]
) -> Float[Tensor, " batch"]:
    """Share of (positive, negative) pairs in the right order, a tie counting one half."""
    pairs = ((labels > 0) & mask).unsqueeze(2) & ((labels == 0) & mask).unsqueeze(1)
    difference = scores.unsqueeze(2) - scores.unsqueeze(1)
    right = ((difference > 0).double() + (difference == 0).double() / 2) * pairs
    return right.sum((1, 2)) / pairs.sum((1, 2))  # 0 / 0 is NaN: undefined


def ndcg(
    rank: Float[Tensor, "batch cands"],
    labels: Float[Tensor, "batch cands"],
    mask: Bool[Tensor, "batch cands"],
    k: int | None,
) -> Float[Tensor, " batch"]:
    """Normalised discounted cumulative gain of the items ranked at most k."""
    gain = (torch.exp2(labels) - 1) * mask
    place = torch.arange(1, rank.shape[1] + 1, device=rank.device, dtype=rank.dtype)
    limit = rank.shape[1] if k is None else k
    best = (gain.sort(dim=1, descending=True).values / torch.log2(place + 1))[:, :limit].sum(1)
    return (gain / torch.log2(rank + 1) * (rank <= limit)).sum(1) / best


def reciprocal_rank(
    rank: Float[Tensor, "batch cands"], labels: Float[Tensor, "batch cands"], mask: Bool[Tensor, "batch cands"]
) -> Float[Tensor, " batch"]:
    """1 / rank of the best positive; NaN without one."""
    positive = (labels > 0) & mask
    best = rank.masked_fill(~positive, torch.inf).min(1).values
    return torch.where(positive.any(1), 1 / best, torch.nan)


class GroupedAUC(NamedTuple):
    """AUC per group (user) of a long list of scored samples, and how many samples each group has."""

    auc: Float[Tensor, " groups"]  # NaN where a group has one class only
    size: Int[Tensor, " groups"]
    group: Int[Tensor, " groups"]

    def weighted(self) -> float:
        """gAUC (Zhou et al., 2018): mean weighted by samples; groups of one class are skipped."""
        defined = ~self.auc.isnan()
        return float((self.auc * self.size)[defined].sum() / self.size[defined].sum())

    def mean(self) -> float:
        """Unweighted mean over the groups with both classes."""
        return float(self.auc.nanmean())


def grouped_auc(
    scores: Float[Tensor, " samples"], labels: Float[Tensor, " samples"], group: Int[Tensor, " samples"]
) -> GroupedAUC:
    """AUC of each group by the rank-sum identity, ties by mid-rank: O(n log n) for all groups together."""
    order = scores.argsort(stable=True)
    order = order[group[order].argsort(stable=True)]
    scores, positive, group = scores[order].double(), (labels[order] > 0).double(), group[order]
    new_group = torch.ones_like(group, dtype=torch.bool)
    new_group[1:] = group[1:] != group[:-1]
    new_value = new_group.clone()
    new_value[1:] |= scores[1:] != scores[:-1]
    value, owner = new_value.cumsum(0) - 1, new_group.cumsum(0) - 1
    place = torch.arange(len(scores), device=scores.device, dtype=torch.double)
    first = place[new_group][owner]
    tied = torch.zeros(int(new_value.sum()), device=scores.device, dtype=torch.double)
    rank = place[new_value][value] - first + (tied.index_add(0, value, torch.ones_like(place))[value] + 1) / 2
    zero = torch.zeros(int(new_group.sum()), device=scores.device, dtype=torch.double)
    size, positives = zero.index_add(0, owner, torch.ones_like(place)), zero.index_add(0, owner, positive)
    rank_sum = zero.index_add(0, owner, rank * positive)
    auc = (rank_sum - positives * (positives + 1) / 2) / (positives * (size - positives))
    return GroupedAUC(auc, size.long(), group[new_group])


def log_loss(scores: Float[Tensor, " samples"], labels: Float[Tensor, " samples"]) -> float:
    """Mean binary cross-entropy of logits, in float64."""
    return float(torch.nn.functional.binary_cross_entropy_with_logits(scores.double(), (labels > 0).double()))
