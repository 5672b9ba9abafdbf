"""Surgery on trained networks: dense ones become mixtures, mixtures become smaller, experts are read and switched."""

from .bits import (
    allocate_bits,
    expert_importance,
    quantise_experts,
    round_to_bits,
    rounding_errors,
    stored_bits,
)
from .dense import read_mlp
from .offload import OffloadedExperts
from .online import OnlinePruning, token_importance
from .pools import dense_mlps, expert_pools, replaced, restored, routers_of, stacked_layers, watched_inputs
from .prune import MergedRouter, average_experts, group_alike, merge_experts, prune_experts, take_experts
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
    "average_experts",
    "balanced_clusters",
    "dense_mlps",
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
    "replaced",
    "restored",
    "round_to_bits",
    "rounding_errors",
    "routers_of",
    "silenced_experts",
    "split_mlp",
    "stacked_layers",
    "stored_bits",
    "switched_experts",
    "take_experts",
    "token_importance",
    "upcycle",
    "upcycle_mlp",
    "watched_inputs",
]
