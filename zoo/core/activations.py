"""The non-linearities of the experts, with their derivatives for the fused layer."""

from typing import Literal, cast, get_args

import torch
from torch import Tensor
from torch.nn import functional as F

Activation = Literal["relu", "gelu", "silu", "tanh", "reglu", "geglu", "swiglu"]
ACTIVATIONS = get_args(Activation)
GATED: dict[str, Literal["relu", "gelu", "silu"]] = {"reglu": "relu", "geglu": "gelu", "swiglu": "silu"}

_aten = torch.ops.aten


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
    """The gradient of `z` from that of `activate(z, act)`."""
    if act in GATED:
        gate, value = z.chunk(2, dim=-1)
        inner = GATED[act]
        grad_z = torch.empty_like(z)
        grad_gate, grad_value = grad_z.chunk(2, dim=-1)
        torch.mul(grad, activate(gate, inner), out=grad_value)
        grad_gate.copy_(activate_backward(grad * value, gate, inner))
        return grad_z
    if act == "gelu":
        return cast(Tensor, _aten.gelu_backward(grad, z))
    if act == "relu":
        return cast(Tensor, _aten.threshold_backward(grad, z, 0))
    if act == "silu":
        return cast(Tensor, _aten.silu_backward(grad, z))
    return cast(Tensor, _aten.tanh_backward(grad, z.tanh()))
