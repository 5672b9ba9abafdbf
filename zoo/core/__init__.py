"""The shared MoE layer: a router says who, a plan says where, experts compute, combine brings it back."""

from typing import TYPE_CHECKING, Any

from .dispatch import Plan, combine, dispatch, make_plan
from .experts import (
    ConstantExpert,
    ConvExperts,
    CopyExpert,
    Experts,
    LinearExperts,
    LoadedExperts,
    LoRAExperts,
    LoRALinear,
    MLPExperts,
    ModuleExperts,
    RecurrentExperts,
    StackedLinear,
    ZeroExpert,
    group_by_expert,
)
from .grouped import grouped_linear, select_backend
from .layers import PEER, AdamResidual, MomentumResidual, Monet, SoftMoE
from .moe import MoE, MultiGateMoE, fine_grained_moe
from .pathways import Routed, RoutedConv2d, collect_routing, moeify
from .routing import (
    CometRouter,
    DenseRouter,
    DenseToSparseRouter,
    DSelectKRouter,
    ExpertChoiceRouter,
    FixedRouter,
    Gate,
    GatingResidualRouter,
    HashRouter,
    LinearGate,
    NoisyTopKRouter,
    NullExpertRouter,
    PermutationLearner,
    ProductKeyRouter,
    RecurrentRouter,
    Router,
    Routing,
    SparsityGate,
    StaticGate,
    StraightThroughRouter,
    SwitchRouter,
    TaskGate,
    TopKRouter,
    update_router_bias,
)

if TYPE_CHECKING:
    from .parallel import shard_experts

__all__ = [
    "PEER",
    "AdamResidual",
    "CometRouter",
    "ConstantExpert",
    "ConvExperts",
    "CopyExpert",
    "DSelectKRouter",
    "DenseRouter",
    "DenseToSparseRouter",
    "ExpertChoiceRouter",
    "Experts",
    "FixedRouter",
    "Gate",
    "GatingResidualRouter",
    "HashRouter",
    "LinearExperts",
    "LinearGate",
    "LoRAExperts",
    "LoRALinear",
    "LoadedExperts",
    "MLPExperts",
    "MoE",
    "ModuleExperts",
    "MomentumResidual",
    "Monet",
    "MultiGateMoE",
    "NoisyTopKRouter",
    "NullExpertRouter",
    "PermutationLearner",
    "Plan",
    "ProductKeyRouter",
    "RecurrentExperts",
    "RecurrentRouter",
    "Routed",
    "RoutedConv2d",
    "Router",
    "Routing",
    "SoftMoE",
    "SparsityGate",
    "StackedLinear",
    "StaticGate",
    "StraightThroughRouter",
    "SwitchRouter",
    "TaskGate",
    "TopKRouter",
    "ZeroExpert",
    "collect_routing",
    "combine",
    "dispatch",
    "fine_grained_moe",
    "group_by_expert",
    "grouped_linear",
    "make_plan",
    "moeify",
    "select_backend",
    "shard_experts",
    "update_router_bias",
]


def __getattr__(name: str) -> Any:
    # PEP 562: torch's DTensor takes longer to import than all of the core.
    if name == "shard_experts":
        from .parallel import shard_experts

        return shard_experts
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
