"""What adversarial training minimises, and which expert each class belongs to."""

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor


def log_probability(logits: Float[Tensor, "batch classes"]) -> Float[Tensor, "batch classes"]:
    """Log-softmax, in float32 at least."""
    return logits.to(torch.promote_types(logits.dtype, torch.float32)).log_softmax(-1)


def divergence(log_p: Float[Tensor, "batch classes"], log_q: Float[Tensor, "batch classes"]) -> Float[Tensor, " batch"]:
    """KL(p ‖ q) of each row, from log-probabilities of both.

    Its gradient is finite however far logits lie apart. With probabilities as the target it would not be: they
    underflow to 0, whose logarithm breaks AdvMoE's released code.
    """
    return F.kl_div(log_q, log_p, reduction="none", log_target=True).sum(-1)


def cross_entropy(logits: Float[Tensor, "batch classes"], label: Int[Tensor, " batch"]) -> Float[Tensor, " batch"]:
    """-log p of each row's label, in float32 at least."""
    return -log_probability(logits).gather(1, label.long()[:, None]).squeeze(1)


def routers_divergence(
    log_p: Mapping[str, Float[Tensor, "batch experts"]], logits: Mapping[str, Float[Tensor, "batch experts"]]
) -> Float[Tensor, " batch"] | float:
    """KL between what each router said before and says now, summed over routers."""
    return sum((divergence(log_p[name], log_probability(logits[name])) for name in log_p), 0.0)


def routers_cross_entropy(
    logits: Mapping[str, Float[Tensor, "batch experts"]], expert: Mapping[str, Int[Tensor, " batch"]]
) -> Float[Tensor, " batch"] | float:
    """-log probability of the given expert, summed over routers."""
    return sum((cross_entropy(logits[name], expert[name]) for name in logits), 0.0)


def balanced_groups(means: Float[Tensor, "classes features"], groups: int) -> Int[Tensor, " classes"]:
    """A group for each class: as many in each as can be, classes that look alike together.

    A router that has to tell such groups apart has a coarser, hence more robust task than class modulo E. Starts from
    slices along the first principal component; then the two classes are swapped whose swap lowers the squared
    distances within groups most, until none does.
    """
    means = means.double()
    classes = len(means)
    if classes <= 1 or groups <= 1:
        return torch.zeros(classes, dtype=torch.int64)
    centred = means - means.mean(0)
    order = (centred @ torch.linalg.svd(centred, full_matrices=False).Vh[0]).argsort()
    group = torch.empty(classes, dtype=torch.int64)
    group[order] = torch.arange(classes) * groups // classes
    distance = torch.cdist(means, means).square()
    for _ in range(classes * classes):
        to_group = distance @ F.one_hot(group, groups).double()
        own = to_group.gather(1, group[:, None])
        move = to_group[:, group] - own  # what class i adds by going to the group of class j
        change = move + move.T - 2 * distance
        change[group[:, None] == group] = 0.0
        best = int(change.argmin())
        i, j = best // classes, best % classes
        if change[i, j] > -1e-9 * float(distance.max()):
            break
        group[i], group[j] = int(group[j]), int(group[i])
    return group
