"""The non-linearities of the experts, with their derivatives for the fused layer."""

from typing import Literal, cast, get_args

import torch
from torch import Tensor
from torch.nn import functional as F

Activation = Literal["relu", "gelu", "silu", "tanh", "reglu", "geglu", "swiglu"]
ACTIVATIONS = get_args(Activation)
GATED: dict[str, Literal["relu", "gelu", "silu"]] = {"reglu": "relu", "geglu": "gelu", "swiglu": "silu"}

_aten = torch.ops.aten


def check_ungated(act: str) -> None:
    """Refuse an activation that halves what it is given."""
    if act not in ACTIVATIONS or act in GATED:
        raise ValueError(f"act={act!r} must be one of {', '.join(a for a in ACTIVATIONS if a not in GATED)}")


def activate(z: Tensor, act: Activation) -> Tensor:
    """`act(z)`; a gated one is `act(z_1) · z_2` over the two halves of the last dimension (Shazeer 2020)."""
    if act in GATED:
        gate, value = z.chunk(2, dim=-1)
        return activate(gate, GATED[act]) * value
    if act == "gelu":
        return F.gelu(z)
    if act == "relu":
        return F.relu(z)
    return F.silu(z) if act == "silu" else z.tanh()


def activate_backward(grad: Tensor, z: Tensor, act: Activation) -> Tensor:
    """The gradient of `z` from that of `activate(z, act)`, which may be overwritten."""
    if act not in GATED:
        return _backward(grad, z, act)
    inner = GATED[act]
    gate, value = z.chunk(2, dim=-1)
    if torch.compiler.is_compiling():
        return torch.cat([_backward(grad * value, gate, inner), grad * activate(gate, inner)], dim=-1)
    grad_z = torch.empty_like(z)
    grad_gate, grad_value = grad_z.chunk(2, dim=-1)
    torch.mul(grad, activate(gate, inner), out=grad_value)
    _backward(grad.mul_(value), gate, inner, grad_input=grad_gate)
    return grad_z


def _backward(grad: Tensor, z: Tensor, act: Activation, **out: Tensor) -> Tensor:
    if act == "gelu":
        return cast(Tensor, _aten.gelu_backward(grad, z, **out))
    if act == "relu":
        return cast(Tensor, _aten.threshold_backward(grad, z, 0, **out))
    if act == "silu":
        return cast(Tensor, _aten.silu_backward(grad, z, **out))
    return cast(Tensor, _aten.tanh_backward(grad, z.tanh(), **out))
