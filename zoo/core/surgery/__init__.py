"""Surgery on trained networks: dense ones become mixtures, mixtures become smaller, experts are read and switched."""

from .dense import read_mlp
from .prune import MergedRouter, group_alike, merge_experts, prune_experts, take_experts
from .split import EmergentRouter, balanced_clusters, split_mlp
from .upcycle import MixtureOfAttention, diversify_experts, upcycle, upcycle_mlp

__all__ = [
    "EmergentRouter",
    "MergedRouter",
    "MixtureOfAttention",
    "balanced_clusters",
    "diversify_experts",
    "group_alike",
    "merge_experts",
    "prune_experts",
    "read_mlp",
    "split_mlp",
    "take_experts",
    "upcycle",
    "upcycle_mlp",
]
