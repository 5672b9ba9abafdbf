"""Every kind of experts equals one plain module per expert, whatever the routing."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from moezoo.zoo.core import make_plan
from moezoo.zoo.core.experts import ConvExperts, LinearExperts, LoRAExperts, ModuleExperts, RecurrentExperts
from torch import nn
from torch.nn import functional as F


def lora(experts, e, x):
    return experts.alpha / experts.rank * x @ experts.down.weight[e].T @ experts.up.weight[e].T


def linear(experts, e, x):
    return F.linear(
        x, experts.layers[0].weight[e], None if experts.layers[0].bias is None else experts.layers[0].bias[e]
    )


def conv(experts, e, x):
    o = experts.out_channels
    bias = None if experts.bias is None else experts.bias[e * o : e * o + o]
    padding = experts.padding
    if padding == "causal":
        x, padding = F.pad(x, ((experts.kernel_size[0] - 1) * experts.dilation[0], 0)), 0
    apply = F.conv1d if experts.dims == 1 else F.conv2d
    return apply(x, experts.weight[e * o : e * o + o], bias, experts.stride, padding, experts.dilation, experts.groups)


def recurrent(experts, e, x):
    """The equations of nn.LSTM and nn.GRU, step by step."""
    h = c = x.new_zeros(x.shape[0], experts.out)
    outputs = [h[:, None][:, :0]]
    for t in range(x.shape[1]):
        own, fed = linear_of(experts.input, e, x[:, t]), linear_of(experts.recurrent, e, h)
        if experts.kind == "lstm":
            i, f, g, o = (own + fed).chunk(4, -1)
            c = f.sigmoid() * c + i.sigmoid() * g.tanh()
            h = o.sigmoid() * c.tanh()
        else:
            (r, z, n), (fed_r, fed_z, fed_n) = own.chunk(3, -1), fed.chunk(3, -1)
            r, z = (r + fed_r).sigmoid(), (z + fed_z).sigmoid()
            h = (1 - z) * (n + r * fed_n).tanh() + z * h
        outputs.append(h[:, None])
    return h if experts.last else torch.cat(outputs, 1)


def linear_of(layer, e, x):
    return F.linear(x, layer.weight[e], None if layer.bias is None else layer.bias[e])


def module(experts, e, x):
    return experts.experts[e](x)


# name: how to build E of them, the shape of a row, one expert on its rows
KINDS = {
    "lora": (lambda e: LoRAExperts(e, 5, 3, 2, alpha=3.0), (5,), lora),
    "lora rank 1": (lambda e: LoRAExperts(e, 4, 4, 1, alpha=1.0), (4,), lora),
    "linear": (lambda e: LinearExperts(e, 5, 3), (5,), linear),
    "linear, no bias": (lambda e: LinearExperts(e, 3, 4, bias=False), (3,), linear),
    "conv2d": (lambda e: ConvExperts(e, 2, 3, 3, padding=1), (2, 4, 5), conv),
    "conv2d, strided": (lambda e: ConvExperts(e, 2, 3, (3, 2), (2, 1), (1, 0), bias=False), (2, 5, 4), conv),
    "conv2d, grouped": (lambda e: ConvExperts(e, 4, 6, 3, padding="same", dilation=2, groups=2), (4, 3, 4), conv),
    "conv1d": (lambda e: ConvExperts(e, 3, 2, 3, stride=2, dims=1), (3, 8), conv),
    "conv1d, causal": (lambda e: ConvExperts(e, 2, 4, 2, padding="causal", dilation=4, dims=1), (2, 6), conv),
    "conv1d, depthwise": (lambda e: ConvExperts(e, 3, 3, 3, padding=1, groups=3, dims=1), (3, 5), conv),
    "lstm": (lambda e: RecurrentExperts(e, 3, 4), (5, 3), recurrent),
    "lstm, last": (lambda e: RecurrentExperts(e, 3, 2, last=True, bias=False), (4, 3), recurrent),
    "lstm, one step": (lambda e: RecurrentExperts(e, 3, 2), (1, 3), recurrent),
    "gru": (lambda e: RecurrentExperts(e, 3, 4, "gru"), (5, 3), recurrent),
    "gru, last": (lambda e: RecurrentExperts(e, 2, 3, "gru", last=True), (4, 2), recurrent),
    "gru, no bias": (lambda e: RecurrentExperts(e, 2, 3, "gru", bias=False), (3, 2), recurrent),
    "modules": (lambda e: ModuleExperts(lambda: nn.Sequential(nn.Linear(4, 3), nn.Tanh()), e), (4,), module),
}


def build(kind, num_experts):
    make, shape, one = KINDS[kind]
    experts = make(num_experts).double()
    with torch.no_grad():
        for p in experts.parameters():
            p.normal_(0, 0.6)  # no LoRA at zero
    return experts, shape, one


@st.composite
def routings(draw):
    experts, k, tokens = draw(st.integers(1, 5)), draw(st.integers(1, 2)), draw(st.integers(0, 7))
    few = draw(st.integers(1, experts))  # skew; experts without rows
    low = draw(st.sampled_from([0, 0, -2]))  # slots that go nowhere
    ids = draw(st.lists(st.integers(low, few - 1), min_size=tokens * k, max_size=tokens * k))
    torch.manual_seed(draw(st.integers(0, 2**16)))
    return experts, torch.tensor(ids, dtype=torch.int64).view(tokens, k)


def assert_same_with_gradients(got, want, inputs):
    torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-10)
    cotangent = torch.randn_like(want)
    grads = [
        torch.autograd.grad(y, inputs, cotangent, allow_unused=True, materialize_grads=True)
        if y.requires_grad
        else [torch.zeros_like(i) for i in inputs]
        for y in (got, want)
    ]
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("backend", ["auto", "segment", "dense"])
@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=12, deadline=None)
@given(routing=routings())
def test_sorted_rows_equal_one_module_per_expert(kind, backend, routing):
    num, indices = routing
    experts, shape, one = build(kind, num)
    plan = make_plan(indices, num)
    x = torch.randn(indices.numel(), *shape, dtype=torch.float64)
    x[int(plan.offsets[-1]) :] = 1e30  # what lies in the tail must not matter
    x.requires_grad_()
    rows = list(x.split([*plan.counts.tolist(), indices.numel() - int(plan.offsets[-1])]))
    parts = [one(experts, e, rows[e]) for e in range(num)]
    want = torch.cat([*parts, parts[0].new_zeros(rows[-1].shape[0], *parts[0].shape[1:])])
    if backend == "dense" and kind.startswith("linear"):
        return  # MLP experts take unsorted rows there
    assert_same_with_gradients(experts(x, plan, backend=backend), want, [x, *experts.parameters()])


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=12, deadline=None)
@given(num=st.integers(1, 4), tokens=st.integers(0, 5), seed=st.integers(0, 2**16))
def test_dense_equals_one_module_per_expert(kind, weighted, num, tokens, seed):
    torch.manual_seed(seed)
    experts, shape, one = build(kind, num)
    x = torch.randn(tokens, *shape, dtype=torch.float64, requires_grad=True)
    weights = torch.randn(tokens, num, dtype=torch.float64, requires_grad=True)
    want = torch.stack([one(experts, e, x) for e in range(num)], 1)
    inputs = [x, *experts.parameters()]
    if weighted:
        want = (want * weights.view(tokens, num, *[1] * (want.dim() - 2))).sum(1)
        inputs.append(weights)
    assert_same_with_gradients(experts.dense(x, weights if weighted else None), want, inputs)


@pytest.mark.parametrize("kind", KINDS)
def test_gradcheck(kind):
    torch.manual_seed(0)
    experts, shape, _ = build(kind, 3)
    plan = make_plan(torch.tensor([[0], [2], [2], [-1]]), 3)  # one expert idle, one row in the tail
    names, values = zip(*experts.named_parameters(), strict=True)
    x = torch.randn(4, *shape, dtype=torch.float64, requires_grad=True)

    def run(x, *values):
        return torch.func.functional_call(experts, dict(zip(names, values, strict=True)), (x, plan))

    assert torch.autograd.gradcheck(run, (x, *values))


REFERENCE = {
    "lora": lambda: nn.Linear(64, 8, bias=False),
    "conv": lambda: nn.Conv2d(16, 24, 3, groups=2),
    "conv1d": lambda: nn.Conv1d(16, 24, 3),
    "lstm": lambda: nn.LSTM(16, 24),
    "gru": lambda: nn.GRU(16, 24),
}
STACKED = {
    "lora": lambda e: LoRAExperts(e, 64, 5, 8, alpha=8.0).down,
    "conv": lambda e: ConvExperts(e, 16, 24, 3, groups=2),
    "conv1d": lambda e: ConvExperts(e, 16, 24, 3, dims=1),
    "lstm": lambda e: RecurrentExperts(e, 16, 24),
    "gru": lambda e: RecurrentExperts(e, 16, 24, "gru"),
}


@pytest.mark.parametrize("kind", REFERENCE)
def test_each_expert_starts_like_the_plain_module(kind):
    torch.manual_seed(0)
    modules = [dict(enumerate(sorted(REFERENCE[kind]().parameters(), key=lambda p: -p.numel()))) for _ in range(32)]
    stacked = sorted(STACKED[kind](32).parameters(), key=lambda p: -p.numel())
    assert len(stacked) == len(modules[0])
    for i, many in enumerate(stacked):
        plain, each = torch.stack([m[i].flatten() for m in modules]), many.reshape(32, -1)
        assert each.shape == plain.shape
        torch.testing.assert_close(each.abs().max(), plain.abs().max(), rtol=0.03, atol=0)
        torch.testing.assert_close(each.std(1).mean(), plain.std(1).mean(), rtol=0.05, atol=0)
        assert (each.std(1) > plain.std(1).min() * 0.7).all()  # every expert, not their mean alone


def test_each_kind_chooses_by_shape():
    """The quicker of the two as measured on one CPU thread, at least twofold apart."""
    few, many = torch.randn(300, 64), torch.randn(4096, 64)
    assert LinearExperts(63, 64, 1).select(few, 8) == "dense"
    assert LinearExperts(8, 64, 64).select(many, 2) != "dense"
    assert LoRAExperts(8, 64, 64, 8, alpha=8.0).select(few, 1) == "dense"
    assert LoRAExperts(64, 64, 64, 8, alpha=8.0).select(many, 1) != "dense"
    images, sequences = torch.randn(8, 3, 4, 4), torch.randn(8, 5, 3)
    assert ConvExperts(4, 3, 3, 3).select(images, 1) != "dense"
    assert ConvExperts(4, 3, 3, 3).select(images, 4) == "dense"
    assert RecurrentExperts(4, 3, 4).select(sequences, 2) != "dense"
    assert RecurrentExperts(4, 3, 4).select(sequences, 4) == "dense"
