"""The Triton kernels: interpreted, compiled for two generations of GPU, traced; and run where there is a GPU.

Triton reads whether to interpret when it is imported, and torch.compile must not see the tests' shape
checks: those functions run as a script in a process of their own.
"""

import os
import subprocess
import sys
from itertools import accumulate
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("triton")

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
# Rows of each expert, rows of the tail, widths in and out.
CASES = (
    ([3, 0, 5], 2, 7, 5),
    ([40], 0, 33, 17),  # one expert
    ([0, 17, 16, 0, 33], 9, 16, 16),  # tiles that are full, empty, or begun
    ([1] * 5, 0, 70, 66),  # more than one tile in both directions of the weight
    ([0, 0], 0, 4, 4),  # no rows
    ([0, 0, 0], 5, 3, 2),  # nothing but tail
    ([520], 40, 10, 12),  # rows shared by several programs
    ([70, 2], 0, 1, 1),
)


def _problem(sizes, tail, in_dim, out_dim, dtype, device="cpu"):
    torch.manual_seed(sum(sizes) + in_dim)
    rows, experts = sum(sizes) + tail, len(sizes)
    shapes = ((rows, in_dim), (experts, out_dim, in_dim), (experts, out_dim), (rows, out_dim))
    x, weight, bias, grad = (torch.randn(shape, dtype=dtype, device=device) for shape in shapes)
    x[sum(sizes) :] = float("nan")  # the tail may hold anything
    grad[sum(sizes) :] = float("nan")
    return x, weight, bias, grad, torch.tensor(list(accumulate(sizes)), dtype=torch.int32, device=device)


def _outputs(function, x, weight, bias, grad, offsets):
    x, weight, bias = (t.detach().clone().requires_grad_() for t in (x, weight, bias))
    y = function(x, weight, offsets, bias)
    return [y.detach(), *torch.autograd.grad(y, (x, weight, bias), grad)]


def _assert_equals_segment(case, dtype, device="cpu", operands=0.0):
    """To rounding: of the results, and of every product's operands, which each product may lose."""
    from moezoo.zoo.core.grouped import grouped_linear
    from moezoo.zoo.core.grouped_triton import triton_grouped_linear

    def exact(floats):
        return _outputs(lambda x, w, o, b: grouped_linear(x, w, o, b, backend="segment"), *floats, offsets)

    *floats, offsets = _problem(*case, dtype, device)
    got = _outputs(triton_grouped_linear, *floats, offsets)
    doubles = [t.double() for t in floats]
    want, products = exact(doubles), exact([t.abs() for t in doubles])
    close = 1e-4 if dtype == torch.float32 else 0.02
    for name, a, b, size in zip(("y", "grad x", "grad weight", "grad bias"), got, want, products, strict=True):
        assert a.dtype == dtype
        allowed = close * (1 + b.abs()) + operands * size
        excess = ((a.double() - b).abs() - allowed).flatten()
        assert (excess <= 0).all(), f"{name} of {case}, {dtype}: {float(excess.max()):.1e} too much"


def interpreted():
    import triton.language as tl
    from moezoo.zoo.core.grouped_triton import triton_grouped_linear
    from triton.runtime.interpreter import InterpreterBuilder

    # The interpreter multiplies the bit patterns of bfloat16 (triton-lang/triton#11584): give it floats.
    dot = InterpreterBuilder.create_dot

    def dot_of_floats(self, a, b, *rest):
        if a.dtype == tl.bfloat16:
            a, b = self.create_fp_ext(a, tl.float32), self.create_fp_ext(b, tl.float32)
        return dot(self, a, b, *rest)

    InterpreterBuilder.create_dot = dot_of_floats
    for case in CASES:
        for dtype in DTYPES:
            _assert_equals_segment(case, dtype)

    # Strided operands, the expanded gradient of a sum, and gradients of one operand alone.
    x, weight, bias, _, offsets = _problem([5, 0, 20], 0, 18, 21, torch.float32)
    strided = x.t().contiguous().t(), weight.transpose(1, 2).contiguous().transpose(1, 2), offsets
    for operand in range(2):
        plain = [t.clone().requires_grad_(i == operand) for i, t in enumerate((x, weight))]
        y = triton_grouped_linear(*plain, offsets)
        torch.testing.assert_close(triton_grouped_linear(*strided), y.detach(), rtol=0, atol=0)
        y.sum().backward()
        grads = torch.autograd.grad(
            y.detach().new_ones(()) * triton_grouped_linear(*plain, offsets).sum(), plain[operand]
        )
        torch.testing.assert_close(plain[operand].grad, grads[0])
        assert plain[1 - operand].grad is None
    bias.requires_grad_()
    triton_grouped_linear(x, weight, offsets, bias).sum().backward()
    torch.testing.assert_close(bias.grad, torch.tensor([5.0, 0.0, 20.0])[:, None].expand(3, 21))

    _assert_layer_equals_segment("cpu")


def _assert_layer_equals_segment(device):
    from moezoo.zoo.core import MLPExperts, MoE, TopKRouter

    torch.manual_seed(0)
    moe = MoE(TopKRouter(20, 6, 2), MLPExperts(6, 20, 30, act="swiglu")).to(device)
    x = torch.randn(50, 20, device=device, requires_grad=True)
    results = []
    for moe.backend in ("segment", "triton"):
        y = moe(x)
        results.append([y.detach(), *torch.autograd.grad(y.square().sum(), [x, *moe.parameters()])])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


def traced():
    """Without a GPU, torch.compile takes no Triton kernel: say that there is one, trace, and stop there."""
    import torch.utils._triton
    import triton
    from torch._dynamo.backends.common import aot_autograd
    from triton.backends.compiler import GPUTarget

    torch.utils._triton.has_triton = lambda: True
    import torch._dynamo.variables.builder

    torch._dynamo.variables.builder.has_triton = lambda: True
    hopper = SimpleNamespace(get_current_target=lambda: GPUTarget("cuda", 90, 32), get_current_device=lambda: 0)
    triton.runtime.driver.set_active(hopper)
    from moezoo.zoo.core.grouped_triton import triton_grouped_linear

    launches = []

    def count(graph, _):
        launches.append(sum("triton_kernel_wrapper" in str(node.target) for node in graph.graph.nodes))
        results = [r if r is None else r.meta["val"].shape for r in graph.graph.output_node().args[0]]
        return lambda *_: [r if r is None else torch.empty(r, device="meta") for r in results]

    operands = [torch.empty(shape, device="meta", requires_grad=True) for shape in ((300, 20), (4, 30, 20), (4, 30))]
    offsets = torch.empty(4, dtype=torch.int32, device="meta")
    layer = torch.compile(
        lambda x, weight, bias: triton_grouped_linear(x.relu(), weight, offsets, bias).relu(),
        fullgraph=True,
        backend=aot_autograd(fw_compiler=count, bw_compiler=count),
    )
    layer(*operands).backward(torch.empty(300, 30, device="meta"))
    assert launches == [1, 2], launches


def compiled():
    """On a GPU: the same numbers from torch.compile, in one graph."""
    from moezoo.zoo.core.grouped_triton import triton_grouped_linear

    function = torch.compile(triton_grouped_linear, fullgraph=True)
    for case in (([300, 0, 90], 7, 64, 128), ([3, 0, 5], 2, 7, 5)):
        problem = _problem(*case, torch.float32, "cuda")
        for a, b in zip(_outputs(function, *problem), _outputs(triton_grouped_linear, *problem), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


def _run(name, **environment):
    done = subprocess.run(
        [sys.executable, __file__, name], env={**os.environ, **environment}, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-3000:]


def test_interpreted_kernels_equal_the_segment_backend():
    pytest.importorskip("numpy")
    pytest.importorskip("triton", "3.8", reason="that of triton 3.6 cannot loop up to a loaded number with numpy 2.5")
    _run("interpreted", TRITON_INTERPRET="1", TORCHDYNAMO_DISABLE="1", OMP_NUM_THREADS="1")


def test_traces_to_one_graph():
    _run("traced")


class Compiler:
    """Stands where a kernel is launched, and compiles what the launch asks for."""

    def __init__(self, kernel, target):
        self.kernel, self.target, self.binaries = kernel, target, []

    def __getitem__(self, grid):
        return self

    def __call__(self, *args, **kwargs):
        from triton import compile
        from triton.compiler import ASTSource

        options = {name: kwargs.pop(name) for name in ("num_warps", "num_stages")}
        values = dict(zip(self.kernel.arg_names, args, strict=False)) | kwargs
        signature, constants, attributes = {}, {}, {}
        for place, parameter in enumerate(self.kernel.params):
            value = values[parameter.name]
            special = not parameter.do_not_specialize
            if parameter.is_constexpr or value is None or (special and isinstance(value, int) and value == 1):
                signature[parameter.name], constants[parameter.name] = "constexpr", value
                continue
            pointer = isinstance(value, torch.Tensor)
            signature[parameter.name] = "*" + _short(value.dtype) if pointer else "i32"
            if special and (pointer or value % 16 == 0):
                attributes[(place,)] = [["tt.divisibility", 16]]
        source = ASTSource(self.kernel, signature, constants, attributes)
        self.binaries.append(compile(source, target=self.target, options=options))


def _short(dtype):
    return {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16", torch.int32: "i32"}[dtype]


@pytest.fixture
def float32_precision(request):
    matmul = torch.backends.cuda.matmul
    before, matmul.fp32_precision = matmul.fp32_precision, request.param
    yield request.param
    matmul.fp32_precision = before


WIDE, ODD = (4096, 8, 256, 512), (100, 3, 63, 17)


@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize(
    ("dtype", "float32_precision", "sizes"),
    [
        (torch.float32, "ieee", ODD),
        (torch.float32, "tf32", WIDE),
        (torch.float16, "ieee", ODD),
        (torch.bfloat16, "ieee", WIDE),
    ],
    indirect=["float32_precision"],
)
def test_compiles_for_the_gpu(capability, dtype, float32_precision, sizes, monkeypatch, tmp_path):
    from moezoo.zoo.core import grouped_triton
    from triton.backends.compiler import GPUTarget

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    compilers = [
        Compiler(kernel, GPUTarget("cuda", capability, 32))
        for kernel in (grouped_triton._linear_kernel, grouped_triton._weight_gradient_kernel)
    ]
    for compiler in compilers:
        monkeypatch.setattr(grouped_triton, compiler.kernel.__name__, compiler)
    rows, experts, in_dim, out_dim = sizes
    shapes = ((rows, in_dim), (experts, out_dim, in_dim), (experts, out_dim))
    x, weight, bias = (torch.empty(shape, dtype=dtype, device="meta", requires_grad=True) for shape in shapes)
    y = grouped_triton.triton_grouped_linear(x, weight, torch.empty(experts, dtype=torch.int32, device="meta"), bias)
    torch.autograd.grad(y, (x, weight, bias), torch.empty_like(y))
    binaries = [binary for compiler in compilers for binary in compiler.binaries]
    assert len(binaries) == 3  # forward, backward to the rows, to the weights
    for binary in binaries:
        assert binary.asm["cubin"][:4] == b"\x7fELF"
        assert f".target sm_{capability}" in binary.asm["ptx"]
        assert ("mma" in binary.asm["ptx"]) == (dtype != torch.float32 or float32_precision == "tf32")  # tensor cores
        assert binary.metadata.shared <= 99 * 2**10  # the least that cards from sm_80 on have


def test_refuses_what_it_cannot_run():
    from moezoo.zoo.core.grouped_triton import triton_grouped_linear

    x, weight, offsets = torch.randn(3, 4), torch.randn(2, 5, 4), torch.tensor([1, 3], dtype=torch.int32)
    with pytest.raises(ValueError, match="on the CPU"):
        triton_grouped_linear(x, weight, offsets)
    with pytest.raises(ValueError, match="float64"):
        triton_grouped_linear(x.double(), weight.double(), offsets)
    with pytest.raises(ValueError, match="bfloat16"):
        triton_grouped_linear(x.bfloat16(), weight, offsets)
    with pytest.raises(ValueError, match="no elements"):
        triton_grouped_linear(x[:, :0], weight[:, :, :0], offsets)


gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


@gpu
@pytest.mark.parametrize("float32_precision", ["ieee", "tf32"], indirect=True)
@pytest.mark.parametrize("dtype", DTYPES)
def test_on_the_gpu_equals_the_segment_backend(dtype, float32_precision):
    operands = 2**-9 if float32_precision == "tf32" else 0.0  # two, each cut off after 10 bits
    for case in (*CASES, ([300, 0, 90], 7, 256, 512), ([4000, 100], 0, 64, 128), ([64] * 64, 0, 128, 128)):
        _assert_equals_segment(case, dtype, "cuda", operands)


@gpu
def test_on_the_gpu_the_layer_equals_the_segment_backend():
    _assert_layer_equals_segment("cuda")


@gpu
def test_on_the_gpu_never_waits_and_repeats_itself_bitwise():
    from moezoo.zoo.core.grouped_triton import triton_grouped_linear

    problem = _problem([4000, 0, 100], 9, 64, 128, torch.float32, "cuda")
    first = _outputs(triton_grouped_linear, *problem)
    torch.cuda.set_sync_debug_mode("error")
    try:
        second = _outputs(triton_grouped_linear, *problem)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@gpu
def test_on_the_gpu_compiles():
    _run("compiled")


if __name__ == "__main__":
    torch.set_num_threads(1)
    {"interpreted": interpreted, "traced": traced, "compiled": compiled}[sys.argv[1]]()
