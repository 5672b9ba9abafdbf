"""Surgery on trained networks: dense ones become mixtures, mixtures become smaller, experts are read and switched."""

from .bits import (
    OnlinePruning,
    allocate_bits,
    expert_importance,
    quantise_experts,
    round_to_bits,
    rounding_errors,
    stored_bits,
)
from .dense import read_mlp
from .offload import OffloadedExperts
from .pools import expert_pools, routers_of, watched_inputs
from .prune import MergedRouter, group_alike, merge_experts, prune_experts, take_experts
from .split import EmergentRouter, balanced_clusters, split_mlp
from .switch import (
    Response,
    answers_by_label,
    expert_activity,
    masks_of,
    rank_by_response,
    silenced_experts,
    switched_experts,
)
from .upcycle import MixtureOfAttention, diversify_experts, upcycle, upcycle_mlp

__all__ = [
    "EmergentRouter",
    "MergedRouter",
    "MixtureOfAttention",
    "OffloadedExperts",
    "OnlinePruning",
    "Response",
    "allocate_bits",
    "answers_by_label",
    "balanced_clusters",
    "diversify_experts",
    "expert_activity",
    "expert_importance",
    "expert_pools",
    "group_alike",
    "masks_of",
    "merge_experts",
    "prune_experts",
    "quantise_experts",
    "rank_by_response",
    "read_mlp",
    "round_to_bits",
    "rounding_errors",
    "routers_of",
    "silenced_experts",
    "split_mlp",
    "stored_bits",
    "switched_experts",
    "take_experts",
    "upcycle",
    "upcycle_mlp",
    "watched_inputs",
]
