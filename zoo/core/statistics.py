"""What to watch in a router, from its record. One definition of every quantity; torch only.

c_e is the load of the real expert e: the slots it got or, where every token uses every expert, its share of
the absolute weights. u_e = E c_e / Σ c is its utilisation, 1 at balance. Extra experts (zero, copy, constant)
have no load; `extra_share` says what they take.
"""

from typing import TypedDict

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from . import losses
from .experts import Experts
from .losses import cv_squared, normalised_entropy, slot_counts
from .pathways import routed_experts
from .routing import Router, Routing


def expert_load(routing: Routing) -> Float[Tensor, "experts"]:
    """Share of the work that each expert gets; sums to one (zeros for a batch without tokens)."""
    load = _slots_per_expert(routing)
    if routing.top_k == routing.num_experts:
        named = (routing.indices >= 0) & (routing.indices < routing.num_experts)
        dense = (named.all(-1) | ~named.any(-1)).all()  # else experts chose tokens, or some were switched off
        load = torch.where(dense, routing.dense_weights().detach().abs().sum(0), load)
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
    return normalised_entropy(expert_load(routing))


def token_entropy(routing: Routing) -> Float[Tensor, ""]:
    """Mean entropy of a token's scores over ln E: 0 for sure routers; 0 for one expert.

    Scores that are no distribution (sigmoid or raw gates) are taken in absolute value and normalised.
    """
    scores = routing.scores.detach().abs()
    return losses.token_entropy(scores / scores.sum(-1, keepdim=True).clamp_min(1e-20), _routed(routing))


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
    outside = (routing.indices < 0) | (routing.indices >= routing.num_experts + routing.num_extra)
    return _mean(outside, routing)


def extra_share(routing: Routing) -> Float[Tensor, ""]:
    """Share of all slots that went to extra experts."""
    extra = (routing.indices >= routing.num_experts) & (routing.indices < routing.num_experts + routing.num_extra)
    return _mean(extra, routing)


def zero_weight_rate(routing: Routing) -> Float[Tensor, ""]:
    """Share of the slots that name an expert but give it weight zero, as those of null experts do."""
    named = routing.indices >= 0
    idle = named & (routing.weights.detach() == 0)
    return idle.sum().to(routing.weights.dtype) / named.sum().clamp_min(1)


def true_experts_per_token(routing: Routing) -> Float[Tensor, ""]:
    """Mean number of real experts with a weight, over the tokens that go anywhere."""
    real = (routing.indices >= 0) & (routing.indices < routing.num_experts) & (routing.weights.detach() != 0)
    return real.sum().to(routing.weights.dtype) / _routed(routing).sum().clamp_min(1)


def co_activation(routing: Routing) -> Float[Tensor, "experts experts"]:
    """Share of the routed tokens that use both of two real experts; on the diagonal, that use the one."""
    uses = _uses(routing)[:, : routing.num_experts]
    return uses.t() @ uses / _routed(routing).sum().clamp_min(1)


def switch_rate(before: Routing, after: Routing) -> Float[Tensor, ""]:
    """Share of the slots that a token did not give to the same expert before: of the same tokens, a step apart."""
    now, then = _uses(after), _uses(before)
    return (now * (1 - then)).sum() / now.sum().clamp_min(1)


def expert_similarity(outputs: Float[Tensor, "tokens experts out"]) -> Float[Tensor, "experts experts"]:
    """Mean cosine similarity of what two experts make of the same token: all near 1 if experts are copies."""
    directions = nn.functional.normalize(outputs.detach(), dim=-1)
    similarity: Tensor = torch.einsum("neo,nfo->ef", directions, directions) / max(outputs.shape[0], 1)
    return similarity


def confidence(routing: Routing) -> Float[Tensor, ""]:
    """Mean best score of a token."""
    routed = _routed(routing)
    best = routing.scores.detach().amax(-1).masked_fill(~routed, 0.0)
    return best.sum() / routed.sum().clamp_min(1)


def label_expert_nmi(routing: Routing, labels: Int[Tensor, "tokens"]) -> Float[Tensor, ""]:
    """Normalised mutual information of a label and the expert with the largest weight, in [0, 1].

    Arithmetic normalisation, as in scikit-learn; 0 where label or expert is constant. Dropped tokens are
    left out. Waits for the device.
    """
    slot = routing.weights.detach().argmax(-1, keepdim=True)
    expert = routing.indices.gather(1, slot)[:, 0]
    kept = expert >= 0
    label: Tensor = torch.unique(labels[kept], return_inverse=True)[1]
    expert = expert[kept]
    if label.numel() == 0:
        return routing.weights.new_zeros(())
    classes = int(label.max()) + 1
    columns = routing.num_experts + routing.num_extra
    table = torch.zeros(classes * columns, dtype=torch.float64, device=label.device)
    pairs = label * columns + expert
    table.scatter_add_(0, pairs, torch.ones_like(pairs, dtype=torch.float64))
    joint = table.view(classes, -1) / label.numel()
    h_label, h_expert = _entropy(joint.sum(1)), _entropy(joint.sum(0))
    mutual = h_label + h_expert - _entropy(joint.flatten())
    mean = (h_label + h_expert) / 2
    informative = (h_label > 1e-12) & (h_expert > 1e-12)
    return torch.where(informative, mutual / mean.clamp_min(1e-12), 0.0).clamp(0, 1).to(routing.weights.dtype)


def routing_statistics(routing: Routing) -> dict[str, Tensor]:
    """Every scalar of this file that needs nothing but the record, by its log name.

    Those about extra experts come where there are any.
    """
    statistics = {
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
    if routing.num_extra:
        statistics["extra_share"] = extra_share(routing)
        statistics["zero_weight_rate"] = zero_weight_rate(routing)
        statistics["true_experts_per_token"] = true_experts_per_token(routing)
    return statistics


class ParameterCounts(TypedDict):
    total: int
    active: int


def parameter_counts(module: nn.Module) -> ParameterCounts:
    """Parameters in all, and those that one token touches.

    In any submodule that has a `router` and `experts` (as `MoE` does), and in the routed convolutions of a
    `Routed`, a token touches the share k / E of the experts' parameters (k = `router.active_experts`); everything
    else counts in full. Shared parameters count once. A module whose experts lie otherwise says itself what share of
    which parameters is touched: `active_shares()` yields both.
    """
    pairs = [(getattr(part, "router", None), getattr(part, "experts", None)) for part in module.modules()]
    share: dict[int, float] = {}
    for router, experts in [*pairs, *routed_experts(module)]:
        if isinstance(router, Router) and isinstance(experts, Experts):
            for parameter in experts.parameters():
                share[id(parameter)] = min(router.active_experts / experts.num_experts, 1.0)
    for part in module.modules():
        for parameter, touched in getattr(part, "active_shares", tuple)():
            share[id(parameter)] = touched
    sizes = {id(parameter): parameter.numel() for parameter in module.parameters()}
    active = sum(size * share.get(key, 1.0) for key, size in sizes.items())
    return {"total": sum(sizes.values()), "active": round(active)}


def _entropy(p: Tensor) -> Tensor:
    entropy: Tensor = -torch.special.xlogy(p, p).sum()
    return entropy


def _routed(routing: Routing) -> Bool[Tensor, "tokens"]:
    """Which tokens go anywhere, which leaves out padding."""
    routed: Tensor = (routing.indices >= 0).any(-1)
    return routed


def _slots_per_expert(routing: Routing) -> Float[Tensor, "experts"]:
    columns = routing.num_experts + routing.num_extra
    return slot_counts(routing.indices, columns, routing.weights.dtype)[: routing.num_experts]


def _uses(routing: Routing) -> Float[Tensor, "tokens columns"]:
    """1 where a token's slot names the expert, real or extra."""
    tokens, columns = routing.scores.shape
    uses = routing.weights.new_zeros(tokens, columns + 1)
    return uses.scatter_(1, routing.indices + 1, 1.0)[:, 1:]


def _mean(slots: Tensor, routing: Routing) -> Float[Tensor, ""]:
    return slots.sum().to(routing.weights.dtype) / max(slots.numel(), 1)
