"""Experts: the same small network E times with different weights, or E arbitrary modules."""

from .base import Experts
from .mlp import MLPExperts, StackedLinear
from .modules import ModuleExperts

__all__ = ["Experts", "MLPExperts", "ModuleExperts", "StackedLinear"]
