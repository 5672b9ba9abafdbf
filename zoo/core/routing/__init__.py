"""Routers: which experts a token goes to, with what weight. A router never sees an expert."""

from .bias import update_router_bias
from .capacity import Capacity, limit_capacity
from .comet import CometRouter
from .dense import DenseRouter
from .dense_to_sparse import DenseToSparseRouter
from .dselect import DSelectKRouter
from .expert_choice import ExpertChoiceRouter
from .fixed import FixedRouter, HashRouter
from .gates import Gate, LinearGate, StaticGate, TaskGate
from .noisy import NoisyTopKRouter
from .null import NullExpertRouter
from .permutation import PermutationLearner
from .product_key import ProductKeyRouter
from .record import Routing
from .router import ExpertMask, GatedRouter, Router
from .sparsity import SparsityGate
from .stateful import GatingResidualRouter, RecurrentRouter
from .switch import StraightThroughRouter, SwitchRouter
from .topk import TopKRouter

__all__ = [
    "Capacity",
    "CometRouter",
    "DSelectKRouter",
    "DenseRouter",
    "DenseToSparseRouter",
    "ExpertChoiceRouter",
    "ExpertMask",
    "FixedRouter",
    "Gate",
    "GatedRouter",
    "GatingResidualRouter",
    "HashRouter",
    "LinearGate",
    "NoisyTopKRouter",
    "NullExpertRouter",
    "PermutationLearner",
    "ProductKeyRouter",
    "RecurrentRouter",
    "Router",
    "Routing",
    "SparsityGate",
    "StaticGate",
    "StraightThroughRouter",
    "SwitchRouter",
    "TaskGate",
    "TopKRouter",
    "limit_capacity",
    "update_router_bias",
]
