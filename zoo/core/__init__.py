"""The shared MoE layer: a router says who, a plan says where, experts compute, combine brings it back."""

from typing import TYPE_CHECKING, Any

from .dispatch import Plan, combine, dispatch, make_plan
from .experts import (
    ConstantExpert,
    ConvExperts,
    CopyExpert,
    Experts,
    LinearExperts,
    LoRAExperts,
    LoRALinear,
    MLPExperts,
    ModuleExperts,
    RecurrentExperts,
    StackedLinear,
    ZeroExpert,
)
from .grouped import grouped_linear, select_backend
from .moe import MoE, MultiGateMoE, fine_grained_moe
from .pathways import Routed, RoutedConv2d, collect_routing, moeify
from .routing import (
    DenseRouter,
    ExpertChoiceRouter,
    FixedRouter,
    Gate,
    HashRouter,
    LinearGate,
    NoisyTopKRouter,
    NullExpertRouter,
    Router,
    Routing,
    StraightThroughRouter,
    SwitchRouter,
    TaskGate,
    TopKRouter,
    update_router_bias,
)

if TYPE_CHECKING:
    from .parallel import shard_experts

__all__ = [
    "ConstantExpert",
    "ConvExperts",
    "CopyExpert",
    "DenseRouter",
    "ExpertChoiceRouter",
    "Experts",
    "FixedRouter",
    "Gate",
    "HashRouter",
    "LinearExperts",
    "LinearGate",
    "LoRAExperts",
    "LoRALinear",
    "MLPExperts",
    "MoE",
    "ModuleExperts",
    "MultiGateMoE",
    "NoisyTopKRouter",
    "NullExpertRouter",
    "Plan",
    "RecurrentExperts",
    "Routed",
    "RoutedConv2d",
    "Router",
    "Routing",
    "StackedLinear",
    "StraightThroughRouter",
    "SwitchRouter",
    "TaskGate",
    "TopKRouter",
    "ZeroExpert",
    "collect_routing",
    "combine",
    "dispatch",
    "fine_grained_moe",
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
