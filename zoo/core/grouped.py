"""One linear layer per expert over rows sorted by expert, and the choice of how to compute it."""

from collections.abc import Sequence
from importlib.util import find_spec
from itertools import pairwise
from typing import Any, Literal, cast, get_args

import torch
from jaxtyping import Float, Int32
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from .dispatch import sum_bags

GroupedBackend = Literal["grouped", "segment", "triton"]
SortedBackend = GroupedBackend | Literal["padded"]
Backend = Literal["dense", "grouped", "segment", "triton", "padded", "gather"]
BACKENDS = get_args(Backend)
_TRITON_IS_THERE = find_spec("triton") is not None
FEW_ROWS = 4  # up to which "gather" wins without gradients
# Forward and backward by "dense" take about 0.6 ms + 33 ps an element of its layers on an H100 in fp32 (18 cases, up to
# a third off), "triton" 1.4 ms of launches. In bf16 "grouped" took 1.4 to 1.7 times as long as "dense" on an H200 in
# six cases of 256 tokens, the largest of 2^24; none beyond was tried.
_FEW_ELEMENTS, _FEW_ELEMENTS_BF16 = 2**25, 2**24


def grouped_linear(
    x: Float[Tensor, "rows in_dim"],
    weight: Float[Tensor, "experts out_dim in_dim"],
    offsets: Int32[Tensor, "experts"],
    bias: Float[Tensor, "experts out_dim"] | None = None,
    *,
    backend: GroupedBackend | Literal["auto"] = "auto",
    dropless: bool = False,
) -> Float[Tensor, "rows out_dim"]:
    """`y[r] = x[r] @ weight[e].T + bias[e]` where row r lies before `offsets[e]`.

    Rows behind the last offset give zero and get no gradient; `dropless=True` promises there are none.
    "grouped" is one `torch.nn.functional.grouped_mm`, "segment" one matmul per expert that has rows: it
    takes every dtype and size but reads the offsets on the host. "triton" takes every size on a GPU and never
    waits for it. Follows autocast.
    """
    x, weight, bias = follow_autocast(x, weight, bias)
    if backend == "auto":
        backend = "grouped" if grouped_mm_is_legal(weight.shape[1:], x.dtype) else "segment"
    check_legal(backend, weight.shape[1:], x.dtype)
    return cast(Tensor, _GroupedLinear.apply(x, weight, bias, offsets, dropless, backend))


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

    "dense": all experts on all tokens, nothing sorted. "grouped", "segment", "triton": rows sorted by expert,
    see `grouped_linear`. "padded": sorted rows padded to equal groups, batched matmul. "gather": a few rows
    without gradients, one after another. Thresholds are measured: on one core of an EPYC and on an H100.
    """
    if override != "auto":
        if override not in BACKENDS:
            raise ValueError(f"backend={override!r} must be 'auto' or one of {', '.join(BACKENDS)}")
        return override
    legal = grouped_mm_is_legal(dims, dtype)
    compiling = torch.compiler.is_compiling()
    if device.type == "cpu" and not compiling and tokens * top_k <= FEW_ROWS and not torch.is_grad_enabled():
        return "gather"
    if 4 * top_k >= 3 * num_experts:
        return "dense"  # little to skip, and no sort
    largest = max(a * b for a, b in pairwise(dims))
    rows_per_expert = tokens * top_k / num_experts
    if device.type == "cpu":
        low = dtype in (torch.bfloat16, torch.float16)
        if low and rows_per_expert <= 256 and largest <= 2**14 and not compiling:
            return "padded"  # the fixed cost of a bf16 matmul exceeds that of the padding
        return "grouped" if legal and rows_per_expert < 256 else "segment"
    if device.type == "cuda":
        capability = torch.cuda.get_device_capability(device)
        in_one = legal and dtype == torch.bfloat16 and capability >= (9, 0)
        if tokens * num_experts * sum(dims) <= (_FEW_ELEMENTS_BF16 if in_one else _FEW_ELEMENTS):
            return "dense"
        if in_one:
            return "grouped"
        # Elsewhere grouped_mm is a loop that waits for the device.
        if _TRITON_IS_THERE and dtype != torch.float64 and capability >= (8, 0):
            return "triton"
        return "dense" if compiling else "padded"
    return "segment"


def grouped_mm_is_legal(dims: Sequence[int], dtype: torch.dtype) -> bool:
    """Whether `grouped_mm` takes these row lengths: multiples of 16 bytes, no float64."""
    if dtype not in (torch.float32, torch.bfloat16, torch.float16) or not hasattr(F, "grouped_mm"):
        return False
    return all(dim > 0 and dim * dtype.itemsize % 16 == 0 for dim in dims)


def check_legal(backend: str, dims: Sequence[int], dtype: torch.dtype) -> None:
    """Raise ValueError where "grouped" was asked for and cannot run."""
    if backend == "grouped" and not grouped_mm_is_legal(dims, dtype):
        raise ValueError(
            f"backend='grouped' cannot run {dtype} layers of widths {list(dims)}: grouped_mm "
            "needs float32, bfloat16 or float16 and widths that are multiples of 16 bytes; use 'auto'"
        )


def computing_dtype(x: Tensor) -> torch.dtype:
    """What the experts compute in: the dtype of autocast where it is on, else that of `x`."""
    return torch.get_autocast_dtype(x.device.type) if torch.is_autocast_enabled(x.device.type) else x.dtype


def follow_autocast(x: Tensor, *tensors: Tensor | None) -> tuple[Any, ...]:
    """The tensors in the dtype of autocast where it is on."""
    if not torch.is_autocast_enabled(x.device.type):
        return (x, *tensors)
    dtype = torch.get_autocast_dtype(x.device.type)
    return tuple(tensor if tensor is None else tensor.to(dtype) for tensor in (x, *tensors))


def group_sizes(offsets: Int32[Tensor, "experts"]) -> list[int]:
    """Rows of each expert, on the host: waits for the device."""
    ends = offsets.tolist()
    return [end - start for start, end in zip([0, *ends[:-1]], ends, strict=True)]


def row_experts(offsets: Int32[Tensor, "experts"], rows: int) -> Tensor:
    """The expert of each row; the number of experts for rows of the tail."""
    return torch.searchsorted(offsets, torch.arange(rows, device=offsets.device, dtype=torch.int32), right=True)


class _GroupedLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        offsets: Tensor,
        dropless: bool,
        backend: SortedBackend,
    ) -> Tensor:
        offsets, tail = close(offsets, x.shape[0], dropless)
        x = x.contiguous() if tail is None else x.masked_fill(tail[:, None], 0.0).contiguous()
        ctx.save_for_backward(x, weight, offsets, tail)
        ctx.backend = backend
        out = matmul(x, weight, offsets, backend, bias)
        return out if tail is None else out.masked_fill_(tail[:, None], 0.0)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, offsets, tail = ctx.saved_tensors
        # Expanded gradients, as of sum(), have strides that grouped_mm refuses.
        grad = grad.contiguous() if tail is None else grad.masked_fill(tail[:, None], 0.0).contiguous()
        needs_x, needs_weight, needs_bias, *_ = ctx.needs_input_grad
        grad_x = grad_input(grad, weight, offsets, ctx.backend) if needs_x else None
        grad_w = grad_weight(grad, x, offsets, ctx.backend) if needs_weight else None
        grad_bias = sum_bags(grad, *group_rows(offsets, grad.shape[0])) if needs_bias else None
        return grad_x, grad_w, grad_bias, None, None, None


def close(offsets: Tensor, rows: int, dropless: bool) -> tuple[Tensor, Tensor | None]:
    """Offsets that cover every row, and a mask [rows] of the tail that this adds to the last expert.

    grouped_mm leaves rows behind the last offset uninitialised; computing and then masking them needs
    neither their number on the host nor a second kernel.
    """
    if dropless:
        return offsets, None
    tail = torch.arange(rows, device=offsets.device) >= offsets[-1]
    closed = torch.cat([offsets[:-1], offsets.new_full((1,), rows)])
    return closed, tail


# The three products below take offsets that cover every row, and contiguous rows; for "padded" equal groups.


def matmul(
    x: Tensor,
    weight: Tensor,
    offsets: Tensor,
    backend: SortedBackend,
    bias: Tensor | None = None,
    expert: Tensor | None = None,
) -> Tensor:
    """`x[r] @ weight[e].T + bias[e]`: [rows, in] with [experts, out, in] and [experts, out]; e = expert[r]."""
    if backend == "grouped" and _direct(x):
        return _grouped_matmul(x, weight, offsets, bias, expert)
    return cast(Tensor, _op_or_function(_matmul_op, _matmul)(x, weight, offsets, backend, bias, expert))


def grad_input(grad: Tensor, weight: Tensor, offsets: Tensor, backend: SortedBackend) -> Tensor:
    """`grad[r] @ weight[e]`: [rows, out] with [experts, out, in]."""
    if backend == "grouped" and _direct(grad):
        return F.grouped_mm(grad, weight.contiguous(), offs=offsets)
    return cast(Tensor, _op_or_function(_grad_input_op, _grad_input)(grad, weight, offsets, backend))


def grad_weight(grad: Tensor, x: Tensor, offsets: Tensor, backend: SortedBackend) -> Tensor:
    """`Σ_r grad[r] ⊗ x[r]` per expert: [experts, out, in]."""
    if backend == "grouped" and _direct(grad):
        return F.grouped_mm(grad.t(), x, offs=offsets)
    return cast(Tensor, _op_or_function(_grad_weight_op, _grad_weight)(grad, x, offsets, backend))


def group_rows(offsets: Int32[Tensor, "experts"], rows: int) -> tuple[Tensor, Tensor]:
    """Every row, and where each expert's rows begin: what `sum_bags` needs to sum by expert."""
    starts = torch.cat([offsets.new_zeros(1), offsets[:-1]])
    return torch.arange(rows, dtype=torch.int32, device=offsets.device), starts


def _grouped_matmul(x: Tensor, weight: Tensor, offsets: Tensor, bias: Tensor | None, expert: Tensor | None) -> Tensor:
    out = F.grouped_mm(x, weight.transpose(1, 2), offs=offsets)
    if bias is None:
        return out
    return out.add_(bias.index_select(0, row_experts(offsets, x.shape[0]) if expert is None else expert))


def _matmul(
    x: Tensor,
    weight: Tensor,
    offsets: Tensor,
    backend: str,
    bias: Tensor | None = None,
    expert: Tensor | None = None,
) -> Tensor:
    if backend == "grouped":
        return _grouped_matmul(x, weight, offsets, bias, expert)
    if backend == "triton":
        from .grouped_triton import triton_matmul

        return triton_matmul(x, weight, offsets, bias)
    transposed = weight.transpose(1, 2)
    if backend == "padded":
        padded = x.unflatten(0, (weight.shape[0], -1))
        out = padded.bmm(transposed) if bias is None else torch.baddbmm(bias[:, None], padded, transposed)
        return out.flatten(0, 1)
    sizes = group_sizes(offsets)
    out = x.new_empty(x.shape[0], weight.shape[1])
    groups = zip(x.split(sizes), out.split(sizes), transposed.unbind(), strict=True)
    for e, (rows, target, w) in enumerate(groups):
        if rows.shape[0] == 0:
            continue
        if bias is None:
            torch.mm(rows, w, out=target)
        else:
            torch.addmm(bias[e], rows, w, out=target)
    return out


def _grad_input(grad: Tensor, weight: Tensor, offsets: Tensor, backend: str) -> Tensor:
    if backend == "grouped":
        return F.grouped_mm(grad, weight.contiguous(), offs=offsets)
    return _matmul(grad, weight.transpose(1, 2), offsets, backend)


def _grad_weight(grad: Tensor, x: Tensor, offsets: Tensor, backend: str) -> Tensor:
    if backend == "grouped":
        return F.grouped_mm(grad.t(), x, offs=offsets)
    if backend == "triton":
        from .grouped_triton import triton_weight_gradients

        return triton_weight_gradients(grad, x, offsets)[0]
    experts = offsets.shape[0]
    if backend == "padded":
        return torch.bmm(grad.unflatten(0, (experts, -1)).transpose(1, 2), x.unflatten(0, (experts, -1)))
    sizes = group_sizes(offsets)
    out = x.new_empty(experts, grad.shape[1], x.shape[1])
    for g, rows, target in zip(grad.split(sizes), x.split(sizes), out.unbind(), strict=True):
        torch.mm(g.t(), rows, out=target)  # zero for an expert without rows
    return out


# torch 2.14 cannot trace grouped_mm in float32, and the loops read the offsets: a compiled graph calls the
# same functions as opaque operators.
def _direct(x: Tensor) -> bool:
    return not torch.compiler.is_compiling() or (x.dtype == torch.bfloat16 and x.device.type == "cuda")


def _op_or_function(operator: Any, function: Any) -> Any:
    return operator if torch.compiler.is_compiling() else function


_matmul_op = torch.library.custom_op("moezoo::grouped_matmul", _matmul, mutates_args=())
_grad_input_op = torch.library.custom_op("moezoo::grouped_grad_input", _grad_input, mutates_args=())
_grad_weight_op = torch.library.custom_op("moezoo::grouped_grad_weight", _grad_weight, mutates_args=())


@_matmul_op.register_fake
def _(
    x: Tensor, weight: Tensor, offsets: Tensor, backend: str, bias: Tensor | None = None, expert: Tensor | None = None
) -> Tensor:
    return x.new_empty(x.shape[0], weight.shape[1])


@_grad_input_op.register_fake
def _(grad: Tensor, weight: Tensor, offsets: Tensor, backend: str) -> Tensor:
    return grad.new_empty(grad.shape[0], weight.shape[2])


@_grad_weight_op.register_fake
def _(grad: Tensor, x: Tensor, offsets: Tensor, backend: str) -> Tensor:
    return x.new_empty(offsets.shape[0], grad.shape[1], x.shape[1])
