"""One linear layer per expert over rows sorted by expert, and the choice of how to compute it."""

from collections.abc import Sequence
from itertools import pairwise
from typing import Any, Literal, cast

import torch
from jaxtyping import Float, Int32
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

Backend = Literal["dense", "grouped", "segment", "padded"]
BACKENDS = ("dense", "grouped", "segment", "padded")


def grouped_linear(
    x: Float[Tensor, "rows in_dim"],
    weight: Float[Tensor, "experts out_dim in_dim"],
    offsets: Int32[Tensor, "experts"],
    bias: Float[Tensor, "experts out_dim"] | None = None,
    *,
    backend: Literal["auto", "grouped", "segment"] = "auto",
    dropless: bool = False,
) -> Float[Tensor, "rows out_dim"]:
    """`y[r] = x[r] @ weight[e].T + bias[e]` where row r lies before `offsets[e]`.

    Rows behind the last offset give zero and get no gradient; `dropless=True` promises there are none.
    "grouped" is one `torch.nn.functional.grouped_mm`, "segment" one matmul per expert that has rows: it
    takes every dtype and size but reads the offsets on the host. Follows autocast.
    """
    if torch.is_autocast_enabled(x.device.type):
        dtype = torch.get_autocast_dtype(x.device.type)
        x, weight = x.to(dtype), weight.to(dtype)
        bias = None if bias is None else bias.to(dtype)
    legal = grouped_mm_is_legal(weight.shape[1:], x.dtype)
    if backend == "auto":
        backend = "grouped" if legal else "segment"
    elif backend == "grouped" and not legal:
        raise ValueError(
            f"backend='grouped' cannot run {x.dtype} layers of widths {list(weight.shape[1:])}: grouped_mm "
            "needs float32, bfloat16 or float16 and widths that are multiples of 16 bytes; use 'auto'"
        )
    function = _GroupedLinear if backend == "grouped" else _SegmentLinear
    return cast(Tensor, function.apply(x, weight, bias, offsets, dropless))


def grouped_mm_is_legal(dims: Sequence[int], dtype: torch.dtype) -> bool:
    """Whether `grouped_mm` takes these row lengths: multiples of 16 bytes, no float64."""
    if dtype not in (torch.float32, torch.bfloat16, torch.float16) or not hasattr(F, "grouped_mm"):
        return False
    return all(dim > 0 and dim * dtype.itemsize % 16 == 0 for dim in dims)


def select_backend(
    *,
    tokens: int,
    top_k: int,
    num_experts: int,
    dims: Sequence[int],
    dtype: torch.dtype,
    device: torch.device,
    override: Backend | Literal["auto"] = "auto",
) -> Backend:
    """How to compute MLP experts of layer widths `dims` (input first) on `tokens` with `top_k` slots each.

    "dense": all experts on all tokens, nothing sorted. "grouped", "segment": rows sorted by expert, see
    `grouped_linear`. "padded": sorted rows padded to equal groups, batched matmul.
    CPU thresholds are measured; CUDA thresholds are estimates.
    """
    legal = grouped_mm_is_legal(dims, dtype)
    if override != "auto":
        if override not in BACKENDS:
            raise ValueError(f"backend={override!r} must be 'auto' or one of {', '.join(BACKENDS)}")
        return override
    if 4 * top_k >= 3 * num_experts:
        return "dense"  # little to skip, and no sort
    if torch.compiler.is_compiling():
        # The others read group sizes on the host, and torch 2.14 cannot trace grouped_mm in float32.
        return "grouped" if legal and dtype == torch.bfloat16 else "dense"
    largest = max(a * b for a, b in pairwise(dims))
    rows_per_expert = tokens * top_k / num_experts
    if device.type == "cpu":
        if dtype in (torch.bfloat16, torch.float16) and rows_per_expert < 128 and largest <= 2**14:
            return "padded"  # the fixed cost of a bf16 matmul exceeds that of the padding
        return "grouped" if legal else "segment"
    if device.type == "cuda":
        if legal and dtype == torch.bfloat16 and torch.cuda.get_device_capability(device) >= (9, 0):
            return "grouped"
        # Elsewhere grouped_mm is a loop that waits for the device.
        flops = 2 * tokens * num_experts * sum(a * b for a, b in pairwise(dims))
        return "dense" if flops < 1e10 or num_experts <= 4 * top_k else "padded"
    return "segment"


def group_sizes(offsets: Int32[Tensor, "experts"]) -> list[int]:
    """Rows of each expert, on the host: waits for the device."""
    ends = offsets.tolist()
    return [end - start for start, end in zip([0, *ends[:-1]], ends, strict=True)]


def row_experts(offsets: Int32[Tensor, "experts"], rows: int) -> Tensor:
    """The expert of each row; the number of experts for rows of the tail."""
    return torch.searchsorted(offsets, torch.arange(rows, device=offsets.device, dtype=torch.int32), right=True)


class _GroupedLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, offsets: Tensor, dropless: bool) -> Tensor:
        offsets, tail = _close(offsets, x.shape[0], dropless)
        x = x.contiguous() if tail is None else x.masked_fill(tail, 0.0).contiguous()
        ctx.save_for_backward(x, weight, offsets, tail)
        out = F.grouped_mm(x, weight.transpose(1, 2), offs=offsets)
        if bias is not None:
            out += bias.index_select(0, row_experts(offsets, x.shape[0]))
        return out if tail is None else out.masked_fill_(tail, 0.0)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None, None, None]:
        x, weight, offsets, tail = ctx.saved_tensors
        # Expanded gradients, as of sum(), have strides that grouped_mm refuses.
        grad = grad.contiguous() if tail is None else grad.masked_fill(tail, 0.0).contiguous()
        grad_x = grad_weight = grad_bias = None
        if ctx.needs_input_grad[0]:
            grad_x = F.grouped_mm(grad, weight.contiguous(), offs=offsets)
        if ctx.needs_input_grad[1]:
            grad_weight = F.grouped_mm(grad.t(), x, offs=offsets)
        if ctx.needs_input_grad[2]:
            grad_bias = grad.new_zeros(weight.shape[:2])
            grad_bias.index_add_(0, row_experts(offsets, x.shape[0]), grad)
        return grad_x, grad_weight, grad_bias, None, None


def _close(offsets: Tensor, rows: int, dropless: bool) -> tuple[Tensor, Tensor | None]:
    """Offsets that cover every row, and a mask of the tail that this adds to the last expert.

    grouped_mm leaves rows behind the last offset uninitialised; computing and then masking them needs
    neither their number on the host nor a second kernel.
    """
    if dropless:
        return offsets, None
    tail = torch.arange(rows, device=offsets.device) >= offsets[-1]
    closed = torch.cat([offsets[:-1], offsets.new_full((1,), rows)])
    return closed, tail[:, None]


class _SegmentLinear(torch.autograd.Function):
    """One matmul per expert that has rows, written in place."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, offsets: Tensor, dropless: bool) -> Tensor:
        sizes = group_sizes(offsets)
        ctx.save_for_backward(x, weight)
        ctx.sizes = sizes
        out = x.new_empty(x.shape[0], weight.shape[1])
        biases = [None] * len(sizes) if bias is None else bias.unbind()
        for rows, target, w, b in zip(
            _segments(x, sizes), _segments(out, sizes), weight.transpose(1, 2).unbind(), biases, strict=True
        ):
            if rows.shape[0] == 0:
                continue
            if b is None:
                torch.mm(rows, w, out=target)
            else:
                torch.addmm(b, rows, w, out=target)
        out[sum(sizes) :] = 0.0
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None, None, None]:
        x, weight = ctx.saved_tensors
        sizes = ctx.sizes
        grad = grad.contiguous()
        grads = _segments(grad, sizes)
        grad_x = grad_weight = grad_bias = None
        if ctx.needs_input_grad[0]:
            grad_x = torch.empty_like(x)
            for g, target, w in zip(grads, _segments(grad_x, sizes), weight.unbind(), strict=True):
                if g.shape[0]:
                    torch.mm(g, w, out=target)
            grad_x[sum(sizes) :] = 0.0
        if ctx.needs_input_grad[1]:
            grad_weight = torch.empty_like(weight)
            for g, rows, target in zip(grads, _segments(x, sizes), grad_weight.unbind(), strict=True):
                torch.mm(g.t(), rows, out=target)  # zero for an expert without rows
        if ctx.needs_input_grad[2]:
            grad_bias = torch.stack([g.sum(0) for g in grads])
        return grad_x, grad_weight, grad_bias, None, None


def _segments(rows: Tensor, sizes: list[int]) -> tuple[Tensor, ...]:
    return torch.split(rows[: sum(sizes)], sizes)
