"""Reading a dense MLP: what a surgery starts from."""

from typing import NamedTuple

import torch
from torch import nn

from ..activations import Activation
from ..experts import MLPExperts

_ACTIVATIONS: dict[type[nn.Module], Activation] = {nn.ReLU: "relu", nn.GELU: "gelu", nn.SiLU: "silu", nn.Tanh: "tanh"}


class DenseMLP(NamedTuple):
    """The linear layers of an MLP, what lies between them, and its dropout."""

    layers: list[nn.Linear]
    act: Activation
    dropout: float


def read_mlp(mlp: nn.Module) -> DenseMLP:
    """The layers of an `nn.Sequential` of Linear and, between them, one activation each and perhaps Dropout.

    Raises:
        ValueError: it is something else, or its activation is none of ReLU, GELU (exact), SiLU, Tanh.
    """
    parts = list(mlp) if isinstance(mlp, nn.Sequential) else [mlp]
    layers = [part for part in parts if isinstance(part, nn.Linear)]
    between = [part for part in parts if type(part) in _ACTIVATIONS]
    dropouts = [part.p for part in parts if isinstance(part, nn.Dropout)]
    kinds = [type(part).__name__ for part in parts]
    shape = [part for part in parts if not isinstance(part, nn.Dropout)]
    regular = all(isinstance(part, nn.Linear) == (i % 2 == 0) for i, part in enumerate(shape)) and len(shape) % 2
    if not layers or not regular or len(between) != len(layers) - 1 or len({type(part) for part in between}) > 1:
        raise ValueError(
            "needs an nn.Sequential of nn.Linear with one and the same activation (ReLU, GELU, SiLU or Tanh) between "
            f"them, got {', '.join(kinds)}"
        )
    if any(isinstance(part, nn.GELU) and part.approximate != "none" for part in between):
        raise ValueError("GELU(approximate='tanh') is not what the experts compute; use GELU()")
    if len({layer.bias is None for layer in layers}) > 1 or len(set(dropouts)) > 1:
        raise ValueError("all layers need a bias, or none, and all dropouts one rate")
    act = _ACTIVATIONS[type(between[0])] if between else "gelu"
    return DenseMLP(layers, act, dropouts[0] if dropouts else 0.0)


def experts_like(mlp: DenseMLP, num_experts: int, hidden: list[int] | None = None) -> MLPExperts:
    """Experts of the MLP's form, of other hidden widths if asked; weights are yet to be filled in."""
    first = mlp.layers[0]
    widths = [layer.out_features for layer in mlp.layers[:-1]] if hidden is None else hidden
    with torch.random.fork_rng(devices=[]):  # the weights that this draws are thrown away
        experts = MLPExperts(
            num_experts,
            first.in_features,
            widths,
            mlp.layers[-1].out_features,
            mlp.act,
            first.bias is not None,
            mlp.dropout,
        )
    return experts.to(first.weight.device, first.weight.dtype)
