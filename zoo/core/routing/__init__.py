"""Routers: which experts a token goes to, with what weight. A router never sees an expert."""

from .dense import DenseRouter
from .fixed import FixedRouter
from .noisy import NoisyTopKRouter
from .record import Routing
from .router import Router
from .topk import TopKRouter

__all__ = ["DenseRouter", "FixedRouter", "NoisyTopKRouter", "Router", "Routing", "TopKRouter"]
