"""What to watch in a router, from its record. One definition of every quantity; torch only.

c_e is the load of expert e: the slots it got or, where every token uses every expert, its share of the
absolute weights. u_e = E c_e / Σ c is its utilisation, 1 at balance.
"""

import math
from typing import TypedDict

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from .experts import Experts
from .losses import cv_squared, slot_counts
from .routing import Router, Routing


def expert_load(routing: Routing) -> Float[Tensor, "experts"]:
    """Share of the work that each expert gets; sums to one (zeros for a batch without tokens)."""
    weights, experts = routing.weights.detach(), routing.num_experts
    if routing.top_k == experts:
        load = routing.dense_weights().detach().abs().sum(0)
    else:
        load = slot_counts(routing.indices, experts, weights.dtype)
    return load / load.sum().clamp_min(torch.finfo(load.dtype).tiny)


def utilisation(routing: Routing) -> Float[Tensor, "experts"]:
    """Load over the balanced load: 1 at balance, 0 for a dead expert."""
    return expert_load(routing) * routing.num_experts


def max_violation(routing: Routing) -> Float[Tensor, ""]:
    """MaxVio: how far the busiest expert is above balance (Wang et al. 2024, loss-free balancing)."""
    return utilisation(routing).max() - 1


def min_violation(routing: Routing) -> Float[Tensor, ""]:
    """How far the idlest expert is below balance: 1 if it got nothing."""
    return 1 - utilisation(routing).min()


def load_entropy(routing: Routing) -> Float[Tensor, ""]:
    """Entropy of the load over ln E: 1 at balance; 0 for one expert."""
    return _normalised_entropy(expert_load(routing)[None])


def token_entropy(routing: Routing) -> Float[Tensor, ""]:
    """Mean entropy of a token's scores over ln E: 0 for sure routers; 0 for one expert.

    Scores that are no distribution (sigmoid or raw gates) are taken in absolute value and normalised.
    """
    scores = _routed_scores(routing).abs()
    return _normalised_entropy(scores / scores.sum(-1, keepdim=True).clamp_min(1e-20))


def load_cv_squared(routing: Routing) -> Float[Tensor, ""]:
    """Squared coefficient of variation of the load."""
    return cv_squared(expert_load(routing))


def importance_cv_squared(routing: Routing) -> Float[Tensor, ""]:
    """Squared coefficient of variation of the summed weights per expert."""
    return cv_squared(routing.dense_weights().detach().sum(0))


def dead_experts(routing: Routing) -> Int[Tensor, ""]:
    """How many experts get less than 1 % of the balanced load."""
    return (utilisation(routing) < 0.01).sum()


def drop_rate(routing: Routing) -> Float[Tensor, ""]:
    """Share of slots that go nowhere: dropped, or of padding."""
    outside = (routing.indices < 0) | (routing.indices >= routing.num_experts)
    return outside.to(routing.weights.dtype).sum() / max(outside.numel(), 1)


def confidence(routing: Routing) -> Float[Tensor, ""]:
    """Mean best score of a token."""
    best = _routed_scores(routing).amax(-1)
    return best.sum() / max(best.numel(), 1)


def label_expert_nmi(routing: Routing, labels: Int[Tensor, "tokens"]) -> Float[Tensor, ""]:
    """Normalised mutual information of a label and the expert with the largest weight, in [0, 1].

    Arithmetic normalisation, as in scikit-learn; 0 where label or expert is constant. Dropped tokens are
    left out.
    """
    slot = routing.weights.detach().argmax(-1, keepdim=True)
    expert = routing.indices.gather(1, slot)[:, 0]
    kept = expert >= 0
    label: Tensor = torch.unique(labels[kept], return_inverse=True)[1]
    expert = expert[kept]
    if label.numel() == 0:
        return routing.weights.new_zeros(())
    classes = int(label.max()) + 1
    table = torch.zeros(classes * routing.num_experts, dtype=torch.float64, device=label.device)
    pairs = label * routing.num_experts + expert
    table.scatter_add_(0, pairs, torch.ones_like(pairs, dtype=torch.float64))
    joint = table.view(classes, -1) / label.numel()
    h_label, h_expert = _entropy(joint.sum(1)), _entropy(joint.sum(0))
    mutual = h_label + h_expert - _entropy(joint.flatten())
    mean = (h_label + h_expert) / 2
    informative = (h_label > 1e-12) & (h_expert > 1e-12)
    return torch.where(informative, mutual / mean.clamp_min(1e-12), 0.0).clamp(0, 1).to(routing.weights.dtype)


def routing_statistics(routing: Routing) -> dict[str, Tensor]:
    """Every scalar of this file that needs nothing but the record, by its log name."""
    return {
        "max_violation": max_violation(routing),
        "min_violation": min_violation(routing),
        "load_cv2": load_cv_squared(routing),
        "importance_cv2": importance_cv_squared(routing),
        "load_entropy": load_entropy(routing),
        "token_entropy": token_entropy(routing),
        "dead_experts": dead_experts(routing),
        "drop_rate": drop_rate(routing),
        "confidence": confidence(routing),
        "aux_loss": routing.aux_loss.detach(),
    }


class ParameterCounts(TypedDict):
    total: int
    active: int


def parameter_counts(module: nn.Module) -> ParameterCounts:
    """Parameters in all, and those that one token touches.

    In any submodule that has a `router` and `experts` (as `MoE` does) a token touches the share k / E of the
    experts' parameters; everything else counts in full. Shared parameters count once.
    """
    share: dict[int, float] = {}
    for part in module.modules():
        router, experts = getattr(part, "router", None), getattr(part, "experts", None)
        if isinstance(router, Router) and isinstance(experts, Experts):
            for parameter in experts.parameters():
                share[id(parameter)] = router.top_k / experts.num_experts
    sizes = {id(parameter): parameter.numel() for parameter in module.parameters()}
    active = sum(size * share.get(key, 1.0) for key, size in sizes.items())
    return {"total": sum(sizes.values()), "active": round(active)}


def _entropy(p: Tensor) -> Tensor:
    entropy: Tensor = -torch.special.xlogy(p, p).sum()
    return entropy


def _normalised_entropy(p: Float[Tensor, "rows experts"]) -> Float[Tensor, ""]:
    rows, experts = p.shape
    if experts == 1 or rows == 0:
        return p.new_zeros(())
    entropy: Tensor = -torch.special.xlogy(p, p).sum() / (rows * math.log(experts))
    return entropy


def _routed_scores(routing: Routing) -> Float[Tensor, "routed experts"]:
    """The scores of the tokens that go anywhere, which leaves out padding."""
    return routing.scores.detach()[(routing.indices >= 0).any(-1)]
