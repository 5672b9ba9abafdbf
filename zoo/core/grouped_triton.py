"""One linear layer per expert over sorted rows as Triton kernels that never wait for the device.

Imports triton: import this module inside the function that needs it. Nothing is autotuned: that waits for
the device, differs from run to run, and would start again with every new number of rows. Sums are in
float32 and without atomics, hence bitwise repeatable. Float32 factors follow
`torch.backends.cuda.matmul.fp32_precision`; for `tf32` the tensor cores cut them after 10 bits without rounding, so
that a product may lose 2^-9 of itself.
"""

from contextlib import AbstractContextManager, nullcontext
from typing import Any, cast, no_type_check

import torch
import triton
import triton.language as tl
from jaxtyping import Float, Int32
from torch import Tensor
from torch.autograd.function import once_differentiable

_PROGRAMS = 256  # enough to fill a large GPU twice


def triton_grouped_linear(
    x: Float[Tensor, "rows in_dim"],
    weight: Float[Tensor, "experts out_dim in_dim"],
    offsets: Int32[Tensor, "experts"],
    bias: Float[Tensor, "experts out_dim"] | None = None,
) -> Float[Tensor, "rows out_dim"]:
    """`y[r] = x[r] @ weight[e].T + bias[e]` where row r lies before `offsets[e]`; differentiable.

    Rows behind the last offset give zero and get no gradient. Any size; float32, float16 or bfloat16, the
    same for all. Raises ValueError for other dtypes, an empty weight, and CPU tensors unless triton interprets.
    """
    return cast(Tensor, _TritonLinear.apply(x, weight, bias, offsets))


class _TritonLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, offsets: Tensor) -> Tensor:
        x, offsets = x.contiguous(), offsets.contiguous()
        ctx.save_for_backward(x, weight, offsets)
        return triton_matmul(x, weight, offsets, None if bias is None else bias.contiguous())

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None, None]:
        x, weight, offsets = ctx.saved_tensors
        grad = grad.contiguous()
        grad_x = grad_weight = grad_bias = None
        if ctx.needs_input_grad[0]:
            grad_x = triton_matmul(grad, weight.transpose(1, 2), offsets)
        if ctx.needs_input_grad[1] or ctx.needs_input_grad[2]:
            grad_weight, grad_bias = triton_weight_gradients(grad, x, offsets, with_bias=ctx.needs_input_grad[2])
        return grad_x, grad_weight, grad_bias, None


def triton_matmul(
    x: Float[Tensor, "rows in_dim"],
    weight: Float[Tensor, "experts out_dim in_dim"],
    offsets: Int32[Tensor, "experts"],
    bias: Float[Tensor, "experts out_dim"] | None = None,
) -> Float[Tensor, "rows out_dim"]:
    """`triton_grouped_linear` without its gradient. All but the weight contiguous."""
    _check(x, weight, bias)
    (rows, in_dim), (experts, out_dim, _) = x.shape, weight.shape
    out = x.new_empty(rows, out_dim)
    if rows == 0:
        return out
    largest = _largest_block(in_dim, out_dim)
    block_m, block_n = _block(rows // experts, largest), _block(out_dim, largest)
    block_k = _block(in_dim, largest // x.element_size())
    # An expert may end in a tile that is not full, and so may the tail: see the kernel.
    grid = ((triton.cdiv(rows, block_m) + experts) * triton.cdiv(out_dim, block_n),)
    with _device_of(x):
        _linear_kernel[grid](
            x, weight, bias, offsets, out,
            rows, out_dim, in_dim, experts, *weight.stride(),
            HAS_BIAS=bias is not None, PRECISION=_precision(),
            EXPERTS=triton.next_power_of_2(experts), BLOCK_M=block_m, BLOCK_N=block_n, BLOCK_K=block_k,
            num_warps=_warps(block_m * block_n), num_stages=3,
        )  # fmt: skip
    return out


def triton_weight_gradients(
    grad: Float[Tensor, "rows out_dim"],
    x: Float[Tensor, "rows in_dim"],
    offsets: Int32[Tensor, "experts"],
    with_bias: bool = False,
) -> tuple[Float[Tensor, "experts out_dim in_dim"], Float[Tensor, "experts out_dim"] | None]:
    """`Σ_r grad[r] ⊗ x[r]` per expert and, if asked for, `Σ_r grad[r]`. All contiguous."""
    (rows, out_dim), in_dim, experts = grad.shape, x.shape[1], offsets.shape[0]
    largest = _largest_block(in_dim, out_dim)
    block_o, block_i, block_r = _block(out_dim, largest), _block(in_dim, largest), largest // x.element_size()
    programs = experts * triton.cdiv(out_dim, block_o) * triton.cdiv(in_dim, block_i)
    # Few small experts do not fill the device: several programs then share an expert's rows.
    splits = max(1, min(_PROGRAMS // programs, rows // (experts * 8 * block_r)))
    dtype = torch.float32 if splits > 1 else x.dtype
    grad_weight = x.new_empty(experts, splits, out_dim, in_dim, dtype=dtype)
    grad_bias = x.new_empty(experts, splits, out_dim, dtype=dtype) if with_bias else None
    with _device_of(x):
        _weight_gradient_kernel[(programs * splits,)](
            grad, x, offsets, grad_weight, grad_bias,
            out_dim, in_dim, splits,
            HAS_BIAS=with_bias, PRECISION=_precision(), BLOCK_O=block_o, BLOCK_I=block_i, BLOCK_R=block_r,
            num_warps=_warps(block_o * block_i), num_stages=3,
        )  # fmt: skip
    return (
        grad_weight.sum(1).to(x.dtype) if splits > 1 else grad_weight.squeeze(1),
        None if grad_bias is None else grad_bias.sum(1).to(x.dtype),
    )


def _check(x: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    dtypes = {x.dtype, weight.dtype, x.dtype if bias is None else bias.dtype}
    if len(dtypes) > 1 or x.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        raise ValueError(
            f"backend='triton' cannot mix or run {', '.join(sorted(map(str, dtypes)))}: it needs one of float32, "
            "float16, bfloat16 for rows, weights and biases; use 'auto'"
        )
    if 0 in weight.shape:
        raise ValueError(f"weight of shape {list(weight.shape)} has no elements: experts and widths must be positive")
    if x.device.type == "cpu" and not _INTERPRETED:
        raise ValueError("backend='triton' needs tensors on a GPU, these are on the CPU; use 'auto'")


def _device_of(x: Tensor) -> AbstractContextManager[Any]:
    """Triton launches on the current device; a compiled graph sees to that itself."""
    return nullcontext() if torch.compiler.is_compiling() else torch.cuda.device_of(x)


def _block(size: int, largest: int) -> int:
    """The least power of two that covers the size, from 16, the least a tensor core takes, up to `largest`."""
    block = 16
    while block < min(size, largest):
        block *= 2
    return block


def _largest_block(*dims: int) -> int:
    # Odd rows are read element by element: their addresses would spill out of the registers.
    return 128 if all(dim % 16 == 0 for dim in dims) else 64


def _warps(elements: int) -> int:
    return 8 if elements >= 128 * 64 else 4


# A constant of the compiled graph, which is guarded by the settings of matmul as a whole.
@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _precision() -> str:
    return "tf32" if torch.backends.cuda.matmul.fp32_precision == "tf32" else "ieee"


@triton.jit(do_not_specialize=["rows", "experts"])
@no_type_check  # keeps the tests' shape checks out of the kernel
def _linear_kernel(
    x, weight, bias, offsets, out,
    rows, out_dim, in_dim, experts, stride_e, stride_o, stride_i,
    HAS_BIAS: tl.constexpr, PRECISION: tl.constexpr,
    EXPERTS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """One tile of `out`. The tail counts as the expert behind the last, whose sum is empty."""
    columns = tl.cdiv(out_dim, BLOCK_N)
    tile = tl.program_id(0) // columns
    n = tl.program_id(0) % columns * BLOCK_N + tl.arange(0, BLOCK_N)
    # Expert e owns the tiles from `start // BLOCK_M + e` on: one too many at times, never one too few.
    e = tl.arange(0, EXPERTS)
    ends = tl.load(offsets + e, mask=e < experts, other=0)
    expert = tl.sum(((e < experts) & (ends // BLOCK_M + e < tile)).to(tl.int32), 0)
    start = tl.load(offsets + expert - 1, mask=expert > 0, other=0)
    end = tl.load(offsets + expert, mask=expert < experts, other=rows)
    start += (tile - start // BLOCK_M - expert) * BLOCK_M
    if start >= end:
        return
    m, k = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_K)
    in_rows, in_columns = m < end - start, n < out_dim
    # 64 bits to the first row and to the expert, 32 from there. Rows behind the end repeat the last one,
    # which is cheaper than a mask: they are not stored.
    x += start.to(tl.int64) * in_dim
    weight += expert.to(tl.int64) * stride_e
    x_places = tl.minimum(m, end - start - 1)[:, None] * in_dim + k[None, :]
    weight_places = k[:, None] * stride_i + n[None, :] * stride_o
    total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for first in range(0, tl.where(expert < experts, in_dim, 0), BLOCK_K):
        in_depth = k < in_dim - first
        a = tl.load(x + first + x_places, mask=in_depth[None, :], other=0.0)
        b = tl.load(weight + first * stride_i + weight_places, mask=in_depth[:, None] & in_columns[None, :], other=0.0)
        total = tl.dot(a, b, total, input_precision=PRECISION)
    if HAS_BIAS:
        biased = in_columns & (expert < experts)
        total += tl.load(bias + expert * out_dim + n, mask=biased, other=0.0).to(tl.float32)[None, :]
    places = m[:, None] * out_dim + n[None, :]
    out += start.to(tl.int64) * out_dim
    tl.store(out + places, total.to(out.dtype.element_ty), mask=in_rows[:, None] & in_columns[None, :])


@triton.jit(do_not_specialize=["splits"])
@no_type_check
def _weight_gradient_kernel(
    grad, x, offsets, grad_weight, grad_bias,
    out_dim, in_dim, splits,
    HAS_BIAS: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_O: tl.constexpr, BLOCK_I: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """`Σ_r grad[r, o] x[r, i]` over one share of one expert's rows, one tile of (o, i)."""
    tiles_o, tiles_i = tl.cdiv(out_dim, BLOCK_O), tl.cdiv(in_dim, BLOCK_I)
    pid = tl.program_id(0)
    tile_i, tile_o, share = pid % tiles_i, pid // tiles_i % tiles_o, pid // (tiles_i * tiles_o)
    expert = share // splits
    o, i = tile_o * BLOCK_O + tl.arange(0, BLOCK_O), tile_i * BLOCK_I + tl.arange(0, BLOCK_I)
    in_o, in_i = o < out_dim, i < in_dim
    start = tl.load(offsets + expert - 1, mask=expert > 0, other=0)
    end = tl.load(offsets + expert)
    size = tl.cdiv(end - start, splits * BLOCK_R) * BLOCK_R
    start += share % splits * size
    end = tl.minimum(end, start + size)
    r = tl.arange(0, BLOCK_R)
    g_rows, x_rows = grad + start.to(tl.int64) * out_dim, x + start.to(tl.int64) * in_dim
    g_places, x_places = r[None, :] * out_dim + o[:, None], r[:, None] * in_dim + i[None, :]
    total = tl.zeros((BLOCK_O, BLOCK_I), tl.float32)
    for first in range(start, end, BLOCK_R):
        # Both masked: a stranger's row may be infinite, and zero times that is not zero.
        in_rows = r < end - first
        g = tl.load(g_rows + g_places, mask=in_rows[None, :] & in_o[:, None], other=0.0)
        a = tl.load(x_rows + x_places, mask=in_rows[:, None] & in_i[None, :], other=0.0)
        total = tl.dot(g, a, total, input_precision=PRECISION)
        g_rows += BLOCK_R * out_dim
        x_rows += BLOCK_R * in_dim
    grad_weight += share.to(tl.int64) * out_dim * in_dim
    places = o[:, None] * in_dim + i[None, :]
    tl.store(grad_weight + places, total.to(grad_weight.dtype.element_ty), mask=in_o[:, None] & in_i[None, :])
    if HAS_BIAS:  # noqa: SIM102  (known when compiling, the other is not)
        if tile_i == 0:
            # Again over the rows: a sum in the loop above would pull its tile back from the tensor cores.
            column = tl.zeros((BLOCK_O,), tl.float32)
            g_rows = grad + start.to(tl.int64) * out_dim
            for first in range(start, end, BLOCK_R):
                in_rows = r < end - first
                g = tl.load(g_rows + g_places, mask=in_rows[None, :] & in_o[:, None], other=0.0)
                column += tl.sum(g.to(tl.float32), 1)
                g_rows += BLOCK_R * out_dim
            tl.store(grad_bias + share * out_dim + o, column.to(grad_bias.dtype.element_ty), mask=in_o)


_INTERPRETED = not isinstance(_linear_kernel, triton.JITFunction)
