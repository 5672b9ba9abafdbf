"""The layer equals a ten-line loop, forward and backward, on every backend and shape."""

import copy
import pickle

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from moezoo.zoo.core import (
    DenseRouter,
    FixedRouter,
    MLPExperts,
    ModuleExperts,
    MoE,
    NoisyTopKRouter,
    TopKRouter,
    make_plan,
)
from torch import nn
from torch.nn import functional as F


def gated(act):
    return lambda h: act(h[: len(h) // 2]) * h[len(h) // 2 :]


ACTS = {
    "relu": F.relu, "gelu": F.gelu, "silu": F.silu, "tanh": torch.tanh,
    "reglu": gated(F.relu), "geglu": gated(F.gelu), "swiglu": gated(F.silu),
}  # fmt: skip


def loop_reference(x, weights, indices, experts):
    """Σ over slots of weight times expert, one token and slot at a time."""
    rows = []
    for token, ws, ids in zip(x, weights, indices, strict=True):
        y = x.new_zeros(experts.out)
        for w, e in zip(ws, ids.tolist(), strict=True):
            if 0 <= e < experts.num_experts:
                h = token
                for i, layer in enumerate(experts.layers):
                    h = F.linear(h, layer.weight[e], None if layer.bias is None else layer.bias[e])
                    if i < len(experts.layers) - 1:
                        h = ACTS[experts.act](h)
                y = y + w * h
        rows.append(y)
    return torch.stack(rows) if rows else x.new_zeros(0, experts.out)


class GivenRouter(FixedRouter):
    """Routes as told, with learnable weights: lets a test draw any routing, skewed or with holes."""

    def __init__(self, num_experts, indices, weights):
        super().__init__(num_experts, indices.shape[1])
        self.indices, self.weights = indices, nn.Parameter(weights)

    def forward(self, x, **_):
        routing = super().forward(x, task_id=self.indices)
        routing.weights = self.weights * (routing.indices >= 0)
        return routing


@st.composite
def problems(draw, aligned=False):
    experts = draw(st.integers(1, 6))
    k = draw(st.integers(1, experts))
    tokens = draw(st.integers(0, 9))
    width = st.sampled_from([4, 8, 12]) if aligned else st.integers(1, 7)
    dim, out = draw(width), draw(width)
    hidden = draw(st.lists(width, max_size=2))
    skewed = draw(st.booleans())
    seed = draw(st.integers(0, 2**16))
    act = draw(st.sampled_from(sorted(ACTS)))
    g = torch.Generator().manual_seed(seed)
    preference = torch.rand(tokens, experts, generator=g) - 2.0 * skewed * torch.arange(experts)
    indices = preference.topk(k).indices
    if draw(st.booleans()):
        indices = indices.masked_fill(torch.rand(indices.shape, generator=g) < 0.3, -1)
    return dict(
        experts=experts, k=k, tokens=tokens, dim=dim, hidden=hidden, out=out, act=act, seed=seed,
        bias=draw(st.booleans()), indices=indices,
    )  # fmt: skip


def check_against_loop(problem, backend, dtype, tolerance):
    p = problem
    torch.manual_seed(p["seed"])
    experts = MLPExperts(p["experts"], p["dim"], p["hidden"], p["out"], p["act"], p["bias"]).to(dtype)
    router = GivenRouter(p["experts"], p["indices"], torch.randn(p["tokens"], p["k"], dtype=dtype))
    moe = MoE(router, experts, backend=backend)
    x = torch.randn(p["tokens"], p["dim"], dtype=dtype, requires_grad=True)
    inputs = [x, *moe.parameters()]
    y = moe(x)
    want = loop_reference(x, router.weights, p["indices"], experts)
    torch.testing.assert_close(y, want, **tolerance)
    cotangent = torch.randn_like(y)
    got_grads = torch.autograd.grad(y, inputs, cotangent, allow_unused=True, materialize_grads=True)
    want_grads = torch.autograd.grad(want, inputs, cotangent, allow_unused=True, materialize_grads=True) \
        if p["tokens"] and want.requires_grad else [torch.zeros_like(i) for i in inputs]  # fmt: skip
    for got, expected in zip(got_grads, want_grads, strict=True):
        torch.testing.assert_close(got, expected, **tolerance)


@pytest.mark.parametrize("backend", ["auto", "dense", "segment", "padded"])
@settings(max_examples=40, deadline=None)
@given(problem=problems())
def test_layer_equals_the_loop(backend, problem):
    check_against_loop(problem, backend, torch.float64, dict(rtol=1e-9, atol=1e-10))


@pytest.mark.parametrize("backend", ["auto", "grouped"])
@settings(max_examples=40, deadline=None)
@given(problem=problems(aligned=True))
def test_grouped_matmul_equals_the_loop(backend, problem):
    check_against_loop(problem, backend, torch.float32, dict(rtol=1e-4, atol=1e-5))


ROUTERS = {
    "dense": lambda: DenseRouter(3, 4),
    "top2": lambda: TopKRouter(3, 4, 2),
    "sigmoid": lambda: TopKRouter(3, 4, 2, score_func="sigmoid", routed_scaling_factor=2.5),
    "top1": lambda: TopKRouter(3, 4, 1, norm_topk_prob=False, z_coef=1e-3),
    "all": lambda: TopKRouter(3, 4, 4),
    "noisy": lambda: NoisyTopKRouter(3, 4, 2),
}


@pytest.mark.parametrize(
    ("name", "backend"), [*((name, "segment") for name in ROUTERS), ("noisy", "dense"), ("top2", "padded")]
)
def test_gradcheck_of_the_whole_layer(name, backend):
    torch.manual_seed(1)
    moe = MoE(ROUTERS[name](), MLPExperts(4, 3, 2, 2, act="tanh"), backend=backend).double().eval()
    with torch.no_grad():  # logits far apart: a finite difference must not change who is chosen
        moe.router.weight.normal_(0, 1)
    x = torch.randn(4, 3, dtype=torch.float64, requires_grad=True)
    parameters = [p for p in moe.parameters() if p.requires_grad]

    def run(x, *values):
        return torch.func.functional_call(moe, dict(zip(names, values, strict=True)), (x,))

    names = [n for n, _ in moe.named_parameters()]
    assert torch.autograd.gradcheck(run, (x, *parameters))


def test_the_unnormalised_top1_gate_learns():
    moe = MoE(TopKRouter(8, 4, 1, norm_topk_prob=False, balance="none"), MLPExperts(4, 8, 16))
    moe(torch.randn(32, 8)).square().sum().backward()
    assert moe.router.weight.grad.abs().max() > 0


@pytest.mark.parametrize("backend", ["dense", "segment", "padded", "grouped"])
def test_expanded_gradients_and_strided_inputs(backend):
    moe = MoE(TopKRouter(8, 4, 2), MLPExperts(4, 8, 16), backend=backend)
    x = torch.randn(8, 20).t().requires_grad_()
    moe(x).sum().backward()  # sum() sends a gradient of stride zero
    want = torch.autograd.grad((moe(x.contiguous()) * torch.ones(20, 8)).sum(), x)[0]
    torch.testing.assert_close(x.grad, want)


@pytest.mark.parametrize("backend", ["dense", "segment", "padded", "grouped"])
@pytest.mark.parametrize("tokens", [0, 1])
def test_leading_shapes_and_tiny_batches(backend, tokens):
    moe = MoE(TopKRouter(8, 4, 2), MLPExperts(4, 8, 16, 4), backend=backend)
    y, routing = moe(torch.randn(tokens, 3, 8), return_routing=True)
    assert y.shape == (tokens, 3, 4) and routing.indices.shape == (tokens * 3, 2)
    (y.sum() + routing.aux_loss).backward()
    assert all(torch.isfinite(p.grad).all() for p in moe.parameters())


@pytest.mark.parametrize("backend", ["dense", "segment", "padded", "grouped"])
def test_padding_gives_zero_and_leaves_no_trace(backend):
    torch.manual_seed(0)
    moe = MoE(TopKRouter(8, 4, 2, z_coef=0.1), MLPExperts(4, 8, 16), backend=backend)
    real = torch.randn(6, 8)
    mask = torch.tensor([[True, True, False, True, False], [True, False, True, True, False]])
    padded = torch.full((2, 5, 8), 1e3).masked_scatter(mask[..., None], real)
    y, routing = moe(padded, return_routing=True, token_mask=mask)
    want, alone = moe(real, return_routing=True)
    torch.testing.assert_close(y[mask], want)
    assert (y[~mask] == 0).all()
    torch.testing.assert_close(routing.aux_loss, alone.aux_loss)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("backend", ["dense", "segment", "padded", "grouped"])
def test_autocast_keeps_the_gate_in_float32(backend, dtype):
    torch.manual_seed(0)
    moe = MoE(TopKRouter(8, 4, 2), MLPExperts(4, 8, 16), backend=backend)
    x = torch.randn(40, 8)
    exact, routing = moe(x, return_routing=True)
    with torch.autocast("cpu", dtype):
        y, cast = moe(x, return_routing=True)
    assert y.dtype == dtype and cast.weights.dtype == torch.float32
    torch.testing.assert_close(cast.weights, routing.weights, rtol=0, atol=0)
    torch.testing.assert_close(y.float(), exact, rtol=0.05, atol=0.02)
    y.float().square().sum().backward()
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in moe.parameters())


@pytest.fixture
def deterministic():
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("backend", ["dense", "segment", "padded", "grouped"])
def test_runs_are_bitwise_repeatable(backend, deterministic):
    torch.manual_seed(0)
    moe = MoE(TopKRouter(16, 8, 2), MLPExperts(8, 16, 32), backend=backend)
    x = torch.randn(64, 16, requires_grad=True)

    def run():
        y, routing = moe(x, return_routing=True)
        return torch.autograd.grad(y.square().sum() + routing.aux_loss, [x, *moe.parameters()])

    for a, b in zip(run(), run(), strict=True):
        assert torch.equal(a, b)


def test_two_calls_in_one_step_add_their_gradients():
    torch.manual_seed(0)
    moe = MoE(TopKRouter(8, 4, 2), MLPExperts(4, 8, 16))
    a, b = torch.randn(6, 8), torch.randn(7, 8)

    def loss(x):
        y, routing = moe(x, return_routing=True)
        return y.square().mean() + routing.aux_loss

    separate = [torch.autograd.grad(loss(x), list(moe.parameters())) for x in (a, b)]
    together = torch.autograd.grad(loss(a) + loss(b), list(moe.parameters()))
    for one, two, both in zip(*separate, together, strict=True):
        torch.testing.assert_close(one + two, both)


def test_the_kept_record_is_detached_and_never_copied():
    moe = MoE(TopKRouter(8, 4, 2), MLPExperts(4, 8, 16))
    x = torch.randn(6, 8)
    y, routing = moe(x, return_routing=True)
    assert routing.aux_loss.requires_grad and routing.weights.requires_grad
    kept = moe.last_routing
    assert not any(t.requires_grad for t in (kept.weights, kept.scores, kept.logits, kept.aux_loss))
    for twin in (copy.deepcopy(moe), pickle.loads(pickle.dumps(moe))):
        assert twin.last_routing is None
        assert torch.equal(twin(x), y)
    assert moe.last_routing is kept and not any("routing" in key for key in moe.state_dict())


def test_no_grad_gives_the_same_and_records_nothing_alive():
    moe = MoE(TopKRouter(8, 4, 2), MLPExperts(4, 8, 16))
    x = torch.randn(6, 8)
    with torch.no_grad():
        y = moe(x)
    assert not y.requires_grad and torch.equal(y, moe(x))


@settings(max_examples=60, deadline=None)
@given(problem=problems())
def test_gathered_experts_equal_the_loop(problem):
    p = problem
    torch.manual_seed(p["seed"])
    experts = MLPExperts(p["experts"], p["dim"], p["hidden"], p["out"], p["act"], p["bias"]).double()
    router = GivenRouter(p["experts"], p["indices"], torch.randn(p["tokens"], p["k"], dtype=torch.float64))
    x = torch.randn(p["tokens"], p["dim"], dtype=torch.float64)
    with torch.no_grad():
        want = loop_reference(x, router.weights, p["indices"], experts)
        torch.testing.assert_close(MoE(router, experts, backend="gather")(x), want)


def test_one_token_without_gradients_is_gathered(monkeypatch):
    moe = MoE(TopKRouter(8, 4, 2), MLPExperts(4, 8, 16))
    x, calls, original = torch.randn(1, 8), [], moe.experts.gather
    monkeypatch.setattr(moe.experts, "gather", lambda *a: calls.append(1) or original(*a))
    want = moe(x)
    assert not calls
    with torch.no_grad():
        torch.testing.assert_close(moe(x), want)
    assert calls


def test_shared_expert_is_added_and_residual_mixes():
    torch.manual_seed(0)
    x, shared = torch.randn(6, 8), nn.Linear(8, 8)
    plain = MoE(TopKRouter(8, 4, 2), MLPExperts(4, 8, 16))
    added = MoE(plain.router, plain.experts, shared=shared)
    torch.testing.assert_close(added(x), plain(x) + shared(x))
    mixed = MoE(plain.router, plain.experts, shared=shared, residual=True)
    share = mixed.mixture(x).softmax(-1)
    torch.testing.assert_close(mixed(x), share[:, :1] * shared(x) + share[:, 1:] * plain(x))
    with pytest.raises(ValueError, match="needs a shared module"):
        MoE(plain.router, plain.experts, residual=True)


def test_module_experts_equal_stacked_experts():
    torch.manual_seed(0)
    stacked = MLPExperts(4, 8, 16, 3)
    modules = ModuleExperts(lambda: nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 3)), 4)
    with torch.no_grad():
        for e, module in enumerate(modules.experts):
            for layer, source in ((module[0], stacked.layers[0]), (module[2], stacked.layers[1])):
                layer.weight.copy_(source.weight[e])
                layer.bias.copy_(source.bias[e])
    router, x = TopKRouter(8, 4, 2), torch.randn(2, 7, 8)
    mask = torch.rand(2, 7) < 0.5
    for backend in ("dense", "segment"):
        for kw in ({}, {"token_mask": mask}):
            torch.testing.assert_close(MoE(router, modules, backend=backend)(x, **kw), MoE(router, stacked)(x, **kw))


def test_mistakes_are_named():
    with pytest.raises(ValueError, match="router knows 4 experts, but 3"):
        MoE(TopKRouter(8, 4, 2), MLPExperts(3, 8, 16))
    moe = MoE(TopKRouter(7, 4, 2), MLPExperts(4, 7, 15), backend="grouped")
    with pytest.raises(ValueError, match="multiples of 16 bytes"):
        moe(torch.randn(5, 7))


@pytest.mark.parametrize("skewed", [False, True])
def test_auto_pads_small_bfloat16_groups_unless_they_are_skewed(skewed):
    torch.manual_seed(0)
    experts = MLPExperts(8, 8, 16).bfloat16()
    indices = torch.zeros(320, 1, dtype=torch.int64) if skewed else torch.arange(320)[:, None] % 8
    x = torch.randn(320, 8, dtype=torch.bfloat16)
    got = MoE(FixedRouter(8), experts)(x, task_id=indices[:, 0])
    want = MoE(FixedRouter(8), experts, backend="dense")(x, task_id=indices[:, 0])
    backend = experts._sorted_backend("auto", x, make_plan(indices, 8, dropless=True))
    assert backend == ("grouped" if skewed else "padded")
    torch.testing.assert_close(got, want, rtol=0.03, atol=0.03)
