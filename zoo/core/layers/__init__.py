"""Layers that are more, or other, than a router with experts."""

from .momentum import AdamResidual, MomentumResidual
from .monet import Monet
from .peer import PEER
from .soft import SoftMoE

__all__ = ["PEER", "AdamResidual", "MomentumResidual", "Monet", "SoftMoE"]
