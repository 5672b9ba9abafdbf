"""Routers: which experts a token goes to, with what weight. A router never sees an expert."""

from .bias import update_router_bias
from .capacity import Capacity, limit_capacity
from .dense import DenseRouter
from .expert_choice import ExpertChoiceRouter
from .fixed import FixedRouter, HashRouter
from .gates import Gate, LinearGate, TaskGate
from .noisy import NoisyTopKRouter
from .null import NullExpertRouter
from .record import Routing
from .router import ExpertMask, GatedRouter, Router
from .switch import StraightThroughRouter, SwitchRouter
from .topk import TopKRouter

__all__ = [
    "Capacity",
    "DenseRouter",
    "ExpertChoiceRouter",
    "ExpertMask",
    "FixedRouter",
    "Gate",
    "GatedRouter",
    "HashRouter",
    "LinearGate",
    "NoisyTopKRouter",
    "NullExpertRouter",
    "Router",
    "Routing",
    "StraightThroughRouter",
    "SwitchRouter",
    "TaskGate",
    "TopKRouter",
    "limit_capacity",
    "update_router_bias",
]
