"""The shared MoE layer: a router says who, a plan says where, experts compute, combine brings it back."""

from .dispatch import Plan, combine, dispatch, make_plan
from .experts import Experts, MLPExperts, ModuleExperts, StackedLinear
from .grouped import grouped_linear, select_backend
from .moe import MoE
from .routing import DenseRouter, FixedRouter, NoisyTopKRouter, Router, Routing, TopKRouter

__all__ = [
    "DenseRouter",
    "Experts",
    "FixedRouter",
    "MLPExperts",
    "MoE",
    "ModuleExperts",
    "NoisyTopKRouter",
    "Plan",
    "Router",
    "Routing",
    "StackedLinear",
    "TopKRouter",
    "combine",
    "dispatch",
    "grouped_linear",
    "make_plan",
    "select_backend",
]
