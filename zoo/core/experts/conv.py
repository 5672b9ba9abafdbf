"""Convolutions as experts: each sample, whole, goes through the convolution of its expert."""

from collections.abc import Sequence
from itertools import repeat
from math import prod
from typing import Any, Literal, cast

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from ..dispatch import Plan
from ..grouped import Backend
from .base import Experts, Sorted, keep_own, mix


class ConvExperts(Experts):
    """E convolutions of one shape; rows are samples [rows, in_channels, *size] sorted by expert.

    One plan may serve many of these in a row (AdvMoE, Zhang et al. 2023: one decision per image, a pathway
    through the whole network): rows stay sorted from layer to layer. Rows of one expert alone are convolved
    without a copy. The weight is packed [experts·out, in / groups, *kernel], expert after expert: the layout of
    AdvMoE's checkpoints, and one that `to(memory_format=torch.channels_last)` takes.

    Group sizes are read on the host. Compiled code, and `backend="dense"`, run every expert on every row
    instead and keep each row's own: E times the work, nothing read.

    Args:
        kernel_size, stride, dilation: a number, or one per dimension.
        padding: as of `nn.Conv2d`, or "causal" for one dimension: zeros on the left, `(kernel_size - 1) dilation`.
        dims: 1 for [rows, channels, time], 2 for images.
    """

    def __init__(
        self,
        num_experts: int,
        in_channels: int,
        out_channels: int,
        kernel_size: int | Sequence[int],
        stride: int | Sequence[int] = 1,
        padding: int | Sequence[int] | Literal["same", "valid", "causal"] = 0,
        dilation: int | Sequence[int] = 1,
        groups: int = 1,
        bias: bool = True,
        dims: Literal[1, 2] = 2,
    ) -> None:
        super().__init__(num_experts)
        if dims not in (1, 2):
            raise ValueError(f"dims={dims} must be 1 or 2")
        if min(in_channels, out_channels, groups) < 1 or in_channels % groups or out_channels % groups:
            raise ValueError(
                f"in_channels={in_channels} and out_channels={out_channels} must be positive multiples of "
                f"groups={groups}"
            )
        if padding == "causal" and dims != 1:
            raise ValueError("padding='causal' needs dims=1")
        self.in_channels, self.out_channels, self.groups, self.dims = in_channels, out_channels, groups, dims
        self.kernel_size = _per_dim("kernel_size", kernel_size, dims)
        self.stride = _per_dim("stride", stride, dims)
        self.dilation = _per_dim("dilation", dilation, dims)
        if padding == "same" and max(self.stride) > 1:
            raise ValueError(f"padding='same' needs stride 1, not {stride}")
        self.padding = padding if isinstance(padding, str) else _per_dim("padding", padding, dims, least=0)
        fan_in = in_channels // groups * prod(self.kernel_size)
        shape = (num_experts * out_channels, in_channels // groups, *self.kernel_size)
        self.weight = nn.Parameter(torch.empty(shape).uniform_(-(fan_in**-0.5), fan_in**-0.5))
        self.bias = None
        if bias:
            self.bias = nn.Parameter(torch.empty(shape[0]).uniform_(-(fan_in**-0.5), fan_in**-0.5))

    def forward(
        self, x_sorted: Float[Tensor, "rows in_channels *size"], plan: Plan, *, backend: Sorted = "auto"
    ) -> Float[Tensor, "rows out_channels *out_size"]:
        if backend == "dense" or torch.compiler.is_compiling():
            return keep_own(self._all(x_sorted), plan)
        sizes = plan.sizes()
        rows, served = x_sorted.shape[0], sum(sizes)
        if max(sizes) == rows:
            return self.one(x_sorted, sizes.index(rows))
        weights = self.weight.split(self.out_channels)
        biases = [None] * self.num_experts if self.bias is None else self.bias.split(self.out_channels)
        groups = zip(x_sorted[:served].split(sizes), weights, biases, strict=True)
        outputs = [self._convolve(x, w, b) for x, w, b in groups if x.shape[0] > 0]
        if served < rows:
            outputs.append(self._tail(x_sorted[served:], outputs))
        return torch.cat(outputs)

    def one(
        self, x: Float[Tensor, "rows in_channels *size"], expert: int
    ) -> Float[Tensor, "rows out_channels *out_size"]:
        """Every row through the convolution of one expert, with a view of its weight."""
        own = slice(expert * self.out_channels, (expert + 1) * self.out_channels)
        return self._convolve(x, self.weight[own], None if self.bias is None else self.bias[own])

    def dense(
        self, x: Float[Tensor, "tokens in_channels *size"], weights: Float[Tensor, "tokens experts"] | None = None
    ) -> Float[Tensor, "tokens *out_dims"]:
        """Every expert on every sample, as one convolution with E times the channels."""
        y = self._all(x)
        return y if weights is None else mix(y, weights)

    def select(self, x: Tensor, top_k: int) -> Backend:
        return "dense" if top_k == self.num_experts or torch.compiler.is_compiling() else "segment"

    def _all(self, x: Tensor) -> Tensor:
        experts, groups = self.num_experts, self.groups
        if groups == 1:
            return cast(Tensor, self._convolve(x, self.weight, self.bias).unflatten(1, (experts, self.out_channels)))
        # The wide convolution wants all experts of a channel group side by side.
        each = self.out_channels // groups
        weight = self.weight.unflatten(0, (experts, groups, each)).transpose(0, 1).flatten(0, 2)
        bias = None if self.bias is None else self.bias.view(experts, groups, each).transpose(0, 1).flatten()
        y = self._convolve(x, weight, bias).unflatten(1, (groups, experts, each))
        return cast(Tensor, y.transpose(1, 2).flatten(2, 3))

    def _tail(self, x: Tensor, outputs: list[Tensor]) -> Tensor:
        if outputs:
            return outputs[0].new_zeros(x.shape[0], *outputs[0].shape[1:])
        # No sample has an expert: a convolution of none still tells the size.
        none = self._convolve(x[:0], self.weight[: self.out_channels], None)
        return torch.cat([none, none.new_zeros(x.shape[0], *none.shape[1:])])

    def _convolve(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        padding: Any = self.padding
        if padding == "causal":
            x = F.pad(x, ((self.kernel_size[0] - 1) * self.dilation[0], 0))
            padding = 0
        convolution = F.conv1d if self.dims == 1 else F.conv2d
        return convolution(x, weight, bias, self.stride, padding, self.dilation, self.groups)

    def extra_repr(self) -> str:
        return (
            f"num_experts={self.num_experts}, {self.in_channels}, {self.out_channels}, "
            f"kernel_size={self.kernel_size}, stride={self.stride}, padding={self.padding!r}, "
            f"dilation={self.dilation}, groups={self.groups}, bias={self.bias is not None}"
        )


def _per_dim(name: str, value: int | Sequence[int], dims: int, least: int = 1) -> tuple[int, ...]:
    values = tuple(repeat(value, dims)) if isinstance(value, int) else tuple(value)
    if len(values) != dims or min(values) < least:
        raise ValueError(f"{name}={value!r} must be a number or {dims} numbers, each at least {least}")
    return values
