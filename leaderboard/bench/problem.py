"""The inputs that all contenders of a case share, and what a contender is."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

from .cases import Case, Device

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


class Unavailable(Exception):
    """A contender cannot take part in a case; the message says why."""


class Unsuited(Unavailable):
    """It is not made for this case, whatever the machine."""


@dataclass(frozen=True)
class Problem:
    """Data and weights of a case. Where a contender's weights can be set, these are copied into it.

    Attributes:
        grad: the gradient of the output.
        weights, indices: the routing that "ffn" is given.
        gate: the router of "layer".
        w1, w2: the experts' layers as `nn.Linear` stores them; SwiGLU has the gate's rows first.
    """

    case: Case
    x: Float[Tensor, "tokens dim"]
    grad: Float[Tensor, "tokens dim"]
    weights: Float[Tensor, "tokens k"]
    indices: Int[Tensor, "tokens k"]
    gate: Float[Tensor, "experts dim"]
    w1: Float[Tensor, "experts wide dim"]
    w2: Float[Tensor, "experts dim hidden"]

    def float(self) -> "Problem":
        """The same in fp32."""
        fields = ("x", "grad", "gate", "w1", "w2")
        return replace(self, **{name: getattr(self, name).float() for name in fields})


@dataclass
class Built:
    """A contender made ready for one problem.

    Attributes:
        forward: the output, and with a router the balance loss.
        parameters: what gets a gradient besides x.
        exact: computes our function with the weights of the problem, which is then checked.
    """

    forward: Callable[[Tensor], Sequence[Tensor]]
    parameters: list[Tensor]
    exact: bool = True


@dataclass(frozen=True)
class Contender:
    """Something that is timed.

    Attributes:
        build: makes it ready; raises `Unavailable` where it cannot run.
        note: what a reader must know to compare it.
        comparable: False for another operation; it then counts in no summary.
        install: how to get it.
    """

    name: str
    role: Literal["floor", "ours", "peer"]
    build: Callable[[Problem], Built] = field(repr=False)
    note: str = ""
    comparable: bool = True
    install: str = ""


def make_problem(case: Case, device: Device, seed: int = 0) -> Problem:
    """The same data for the same case and seed."""
    generator = torch.Generator().manual_seed(seed)
    there = generator if device == "cpu" else torch.Generator(device).manual_seed(seed)  # a host draws for a minute

    def normal(*sizes: int, scale: float = 1.0) -> Tensor:
        return (torch.randn(*sizes, generator=there, device=device) * scale).to(DTYPES[case.dtype])

    wide = case.hidden * (2 if case.act == "swiglu" else 1)
    return Problem(
        case,
        x=normal(case.tokens, case.dim),
        grad=normal(case.tokens, case.dim),
        weights=torch.rand(case.tokens, case.top_k, generator=generator).softmax(-1).to(device),
        indices=_draw_experts(case, generator).to(device),
        gate=normal(case.experts, case.dim, scale=case.dim**-0.5),
        w1=normal(case.experts, wide, case.dim, scale=case.dim**-0.5),
        w2=normal(case.experts, case.dim, case.hidden, scale=case.hidden**-0.5),
    )


def _draw_experts(case: Case, generator: torch.Generator) -> Int[Tensor, "tokens k"]:
    """k different experts per token; a bisection finds the slope of preference that gives the wanted skew."""
    uniform = torch.rand(case.tokens, case.experts, generator=generator).clamp_(1e-9, 1 - 1e-7)
    gumbel = -(-uniform.log()).log()
    preference = torch.linspace(1, 0, case.experts)
    low, high = 0.0, 40.0 if case.skew else 0.0
    for _ in range(30):
        slope = (low + high) / 2
        indices = (gumbel + slope * preference).topk(case.top_k).indices
        load = indices.flatten().bincount(minlength=case.experts)
        if load.max() / load.float().mean() < (case.skew or torch.inf):
            low = slope
        else:
            high = slope
    return indices
