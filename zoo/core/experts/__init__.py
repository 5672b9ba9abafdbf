"""Experts: the same small network E times with different weights, or E arbitrary modules."""

from .base import Experts
from .conv import ConvExperts
from .extra import ConstantExpert, CopyExpert, ZeroExpert
from .linear import LinearExperts
from .loaded import ExpertGroup, LoadedExperts, group_by_expert
from .lora import LoRAExperts, LoRALinear
from .mlp import MLPExperts, StackedLinear
from .modules import ModuleExperts
from .recurrent import RecurrentExperts

__all__ = [
    "ConstantExpert",
    "ConvExperts",
    "CopyExpert",
    "ExpertGroup",
    "Experts",
    "LinearExperts",
    "LoRAExperts",
    "LoRALinear",
    "LoadedExperts",
    "MLPExperts",
    "ModuleExperts",
    "RecurrentExperts",
    "StackedLinear",
    "ZeroExpert",
    "group_by_expert",
]
