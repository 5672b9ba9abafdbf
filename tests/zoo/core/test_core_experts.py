"""MLP experts: initialisation, and dense evaluation against one network per expert."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from moezoo.zoo.core import MLPExperts, ModuleExperts
from torch import nn
from torch.nn import functional as F


def one_expert(experts, e, x):
    for i, layer in enumerate(experts.layers):
        x = F.linear(x, layer.weight[e], None if layer.bias is None else layer.bias[e])
        if i < len(experts.layers) - 1:
            x = ACTS[experts.act](x)
    return x


def swiglu(x):
    gate, value = x.chunk(2, -1)
    return gate * gate.sigmoid() * value


ACTS = {"relu": F.relu, "gelu": F.gelu, "silu": F.silu, "tanh": torch.tanh, "swiglu": swiglu}


@settings(max_examples=60, deadline=None)
@given(
    num=st.integers(1, 5), dim=st.integers(1, 6), hidden=st.lists(st.integers(1, 6), max_size=3), out=st.integers(1, 8),
    act=st.sampled_from(sorted(ACTS)), bias=st.booleans(), tokens=st.integers(0, 7), weighted=st.booleans(),
)  # fmt: skip
def test_dense_equals_one_network_per_expert(num, dim, hidden, out, act, bias, tokens, weighted):
    experts = MLPExperts(num, dim, hidden, out, act, bias).double()
    x = torch.randn(tokens, dim, dtype=torch.float64, requires_grad=True)
    weights = torch.randn(tokens, num, dtype=torch.float64, requires_grad=True)
    each = torch.stack([one_expert(experts, e, x) for e in range(num)], dim=1)
    want = (each * weights[..., None]).sum(1) if weighted else each
    got = experts.dense(x, weights if weighted else None)
    torch.testing.assert_close(got, want)
    inputs = [x, *experts.parameters(), *([weights] if weighted else [])]
    cotangent = torch.randn_like(want)
    for a, b in zip(
        torch.autograd.grad(got, inputs, cotangent), torch.autograd.grad(want, inputs, cotangent), strict=True
    ):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("hidden", [[4], [4, 3], []])
def test_gradcheck_of_dense(hidden):
    torch.manual_seed(0)
    experts = MLPExperts(2, 3, hidden, 2, act="tanh").double()
    x = torch.randn(3, 3, dtype=torch.float64, requires_grad=True)
    weights = torch.randn(3, 2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x, w: experts.dense(x, w), (x, weights))
    assert torch.autograd.gradcheck(lambda x: experts.dense(x), x)


def test_each_expert_starts_like_nn_linear():
    torch.manual_seed(0)
    experts = MLPExperts(32, 64, 128)
    for layer, fan_in in zip(experts.layers, (64, 128), strict=True):
        bound = fan_in**-0.5
        for parameter in (layer.weight, layer.bias):
            assert parameter.abs().max() <= bound
            spread = parameter.flatten(1).std(dim=1)  # per expert, as of U(-bound, bound)
            torch.testing.assert_close(spread, torch.full_like(spread, bound / 3**0.5), rtol=0.25, atol=0)


def test_dropout_acts_in_training_only():
    experts = MLPExperts(3, 8, 64, dropout=0.5)
    x = torch.randn(5, 8)
    assert not torch.equal(experts.dense(x), experts.dense(x))
    experts.eval()
    assert torch.equal(experts.dense(x), experts.dense(x))


def test_mistakes_are_named():
    with pytest.raises(ValueError, match=r"layer widths \[8, 0, 8\]"):
        MLPExperts(2, 8, 0)
    with pytest.raises(ValueError, match="needs num_experts"):
        ModuleExperts(lambda: nn.Linear(2, 2))
    with pytest.raises(ValueError, match="num_experts=3 but 2"):
        ModuleExperts([nn.Linear(2, 2), nn.Linear(2, 2)], 3)
