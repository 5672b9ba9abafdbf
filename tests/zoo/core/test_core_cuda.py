"""On a GPU: the numbers of a float64 run on the CPU, without waiting for the device, compiled or not."""

import copy

import pytest
import torch
from moezoo.zoo.core import (
    PEER,
    CometRouter,
    ConvExperts,
    DenseRouter,
    DenseToSparseRouter,
    DSelectKRouter,
    ExpertChoiceRouter,
    GatingResidualRouter,
    LoRAExperts,
    MLPExperts,
    MoE,
    Monet,
    NoisyTopKRouter,
    NullExpertRouter,
    PermutationLearner,
    ProductKeyRouter,
    RecurrentExperts,
    RecurrentRouter,
    SoftMoE,
    SparsityGate,
    StraightThroughRouter,
    SwitchRouter,
    TopKRouter,
    ZeroExpert,
)
from moezoo.zoo.core.grouped import BACKENDS, grouped_mm_is_legal

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")

SIZES = {"usual": (300, 64, 128, 8, 2), "odd": (37, 7, 15, 3, 2), "one": (1, 16, 32, 4, 2), "none": (0, 16, 32, 4, 2)}
ROUTERS = {
    "topk": lambda: TopKRouter(16, 8, 2),
    "sigmoid": lambda: TopKRouter(16, 8, 2, score_func="sigmoid", balance="bias"),
    "grouped": lambda: TopKRouter(16, 8, 2, num_groups=4, topk_groups=2),
    "noisy": lambda: NoisyTopKRouter(16, 8, 2),
    "dense": lambda: DenseRouter(16, 8),
    "switch": lambda: SwitchRouter(16, 8),
    "straight": lambda: StraightThroughRouter(16, 8),
    "choice": lambda: ExpertChoiceRouter(16, 8),
    "null": lambda: NullExpertRouter(16, 8, num_null=2, top_k=2),
    "dselect": lambda: DSelectKRouter(16, 8, 2),
    "comet": lambda: CometRouter(16, 8, 2),
    "searching": lambda: DSelectKRouter(16, 8, 2, permutation=PermutationLearner(8, temperature=(0.5, 0.1))),
    "dense to sparse": lambda: DenseToSparseRouter(16, 8, 2),
    "recurrent": lambda: RecurrentRouter(16, TopKRouter(12, 8, 2), torch.nn.GRUCell(12, 12)),
    "gating residual": lambda: GatingResidualRouter(NullExpertRouter(16, 8, num_null=2, top_k=2)),
    "product keys": lambda: ProductKeyRouter(16, 8, 2, heads=2),
    "sparsity": lambda: TopKRouter(16, 8, 2, gate=SparsityGate(MLPExperts(8, 16, 24, act="relu"))),
}
LAYERS = {
    "soft": lambda: SoftMoE(16, MLPExperts(4, 16, 24), 3),
    "peer": lambda: PEER(16, 64, heads=2, top_k=4, key_dim=8),
    "horizontal": lambda: Monet(16, 8, heads=2, top_k=2),
    "vertical": lambda: Monet(16, 8, heads=2, top_k=2, form="vertical"),
}


@pytest.fixture(autouse=True)
def _strict_float32():
    matmul = torch.backends.cuda.matmul
    before, matmul.fp32_precision = matmul.fp32_precision, "ieee"
    yield
    matmul.fp32_precision = before


def outputs(layer, x, autocast=False):
    """The result and the gradients of the input and every parameter."""
    x = x.detach().requires_grad_()
    with torch.autocast(x.device.type, torch.bfloat16, enabled=autocast):
        y, routing = layer(x, return_routing=True)
    inputs = [x, *(p for p in layer.parameters() if p.requires_grad)]
    loss = y.float().square().mean() if x.numel() else y.float().sum()
    grads = torch.autograd.grad(loss + routing.aux_loss, inputs, allow_unused=True)
    return [y, *(g for g in grads if g is not None)]


def relative_error(got, want):
    want = want.to(torch.float64)
    return float((got.cpu().double() - want).norm() / want.norm().clamp_min(1e-6))


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("backend", ["auto", *BACKENDS])
def test_every_backend_gives_the_numbers_of_float64_on_the_cpu(backend, size, autocast):
    tokens, dim, hidden, experts, top_k = SIZES[size]
    if backend == "gather":
        pytest.skip("without gradients only")
    if backend == "grouped" and not grouped_mm_is_legal([dim, hidden, dim], torch.bfloat16):
        pytest.skip("widths that grouped_mm does not take")
    torch.manual_seed(0)
    exact = MoE(TopKRouter(dim, experts, top_k, norm_topk_prob=True), MLPExperts(experts, dim, hidden, act="swiglu"))
    torch.nn.init.normal_(exact.router.weight, std=0.5)
    ours, x = copy.deepcopy(exact).cuda(), torch.randn(tokens, dim)
    ours.backend = backend
    limit = 0.03 if autocast else 1e-4
    for got, want in zip(outputs(ours, x.cuda(), autocast), outputs(exact.double(), x.double()), strict=True):
        assert got.isfinite().all() and (not x.numel() or relative_error(got, want) < limit)


@pytest.mark.parametrize("name", ROUTERS)
def test_every_router_routes_as_on_the_cpu(name):
    torch.manual_seed(0)
    router = ROUTERS[name]()
    extra = [ZeroExpert()] * router.num_extra
    experts = router.gate.experts if name == "sparsity" else MLPExperts(8, 16, 24)
    exact = MoE(router, experts, extra_experts=extra).double().eval()  # noise is for training
    for parameter in exact.router.parameters():
        torch.nn.init.normal_(parameter)
    ours, x = copy.deepcopy(exact).cuda(), torch.randn(120, 16, dtype=torch.float64)
    for got, want in zip(outputs(ours, x.cuda()), outputs(exact, x), strict=True):
        torch.testing.assert_close(got.cpu(), want)
    for field in ("indices", "weights", "scores"):
        torch.testing.assert_close(getattr(ours.last_routing, field).cpu(), getattr(exact.last_routing, field))
    ours.train()(x.cuda())


@pytest.mark.parametrize("name", ROUTERS)
def test_no_router_waits_for_the_device(name):
    router, x = ROUTERS[name]().cuda(), torch.randn(64, 16, device="cuda", requires_grad=True)
    if name == "sparsity":
        router.gate.experts.cuda()  # the gate reads experts that belong to a layer

    def step():
        routing = router(x)
        (routing.weights.square().sum() + routing.aux_loss).backward()

    step()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
        router.eval()
        step()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("name", LAYERS)
def test_layers_give_the_numbers_of_the_cpu_without_waiting(name):
    torch.manual_seed(0)
    exact, x = LAYERS[name]().double().eval(), torch.randn(3, 40, 16, dtype=torch.float64)
    ours = copy.deepcopy(exact).cuda()
    for got, want in zip(outputs(ours, x.cuda()), outputs(exact, x), strict=True):
        torch.testing.assert_close(got.cpu(), want)
    ours, x = ours.float().train(), x.cuda().float()
    outputs(ours, x)
    torch.cuda.set_sync_debug_mode("error")
    try:
        outputs(ours, x)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("kind", ["conv", "lora", "lstm"])
def test_other_experts_give_the_numbers_of_the_cpu(kind):
    torch.manual_seed(0)
    experts, shape = {
        "conv": (ConvExperts(4, 6, 8, kernel_size=3), (20, 6, 9, 9)),
        "lora": (LoRAExperts(4, 6, 5, 2, alpha=4.0), (20, 6)),
        "lstm": (RecurrentExperts(4, 6, 5, last=True), (20, 7, 6)),
    }[kind]
    exact, x = experts.double(), torch.randn(shape, dtype=torch.float64)
    weights = torch.rand(20, 4, dtype=torch.float64)
    ours = copy.deepcopy(exact).cuda()
    for parameter in exact.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    ours.load_state_dict(exact.state_dict())
    torch.testing.assert_close(ours.dense(x.cuda(), weights.cuda()).cpu(), exact.dense(x, weights))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("size", [(256, 64, 128, 8, 2), (4096, 64, 128, 64, 2), (16384, 256, 512, 64, 2)])
def test_auto_never_waits_for_the_device(size, dtype):
    tokens, dim, hidden, experts, top_k = size
    layer = MoE(TopKRouter(dim, experts, top_k), MLPExperts(experts, dim, hidden)).to("cuda", dtype)
    x = torch.randn(tokens, dim, device="cuda", dtype=dtype)
    outputs(layer, x)
    torch.cuda.set_sync_debug_mode("error")
    try:
        outputs(layer, x)
        with torch.no_grad():
            layer.eval()(x)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_steps_repeat_bitwise_under_deterministic_algorithms(monkeypatch):
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.manual_seed(0)
    layer, x = MoE(TopKRouter(64, 8, 2), MLPExperts(8, 64, 128)).cuda(), torch.randn(4096, 64, device="cuda")
    torch.use_deterministic_algorithms(True)
    try:
        first, second = outputs(layer, x), outputs(layer, x)
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
