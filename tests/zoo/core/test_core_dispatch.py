"""Plan, dispatch, combine and the grouped linear layer against their definitions."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from moezoo.zoo.core import combine, dispatch, grouped_linear, make_plan, select_backend
from torch.autograd import gradcheck


@st.composite
def routes(draw):
    experts, k, tokens = draw(st.integers(1, 300)), draw(st.integers(1, 5)), draw(st.integers(0, 12))
    few = draw(st.integers(1, experts))  # skew: the first few experts only, and slots that go nowhere
    ids = st.integers(-1 - draw(st.integers(0, 1)), few)
    rows = draw(st.lists(st.lists(ids, min_size=k, max_size=k), min_size=tokens, max_size=tokens))
    return experts, torch.tensor(rows, dtype=torch.int64).view(tokens, k)


@settings(max_examples=80, deadline=None)
@given(route=routes())
def test_plan_is_a_stable_sort_with_dropped_slots_last(route):
    experts, indices = route
    plan = make_plan(indices, experts)
    flat = [i if 0 <= i < experts else experts for i in indices.flatten().tolist()]
    order = sorted(range(len(flat)), key=lambda pair: flat[pair])  # Python's sort is stable
    assert plan.slot.tolist() == order
    assert plan.token.tolist() == [pair // indices.shape[1] for pair in order]
    assert [order[row] for row in plan.row.flatten().tolist()] == list(range(len(flat)))
    assert plan.counts.tolist() == [flat.count(e) for e in range(experts)]
    assert plan.offsets.dtype == torch.int32 and plan.offsets[-1] == sum(i < experts for i in flat)
    if (indices >= 0).all() and (indices < experts).all():
        assert make_plan(indices, experts, dropless=True).slot.tolist() == order


@settings(max_examples=40, deadline=None)
@given(route=routes(), trailing=st.sampled_from([(), (3,), (2, 2)]))
def test_dispatch_then_combine_is_a_weighted_copy(route, trailing):
    experts, indices = route
    plan = make_plan(indices, experts)
    x = torch.randn(indices.shape[0], *trailing, dtype=torch.float64)
    weights = torch.randn(indices.shape, dtype=torch.float64)
    want = x * weights.sum(1).view(-1, *[1] * len(trailing))
    torch.testing.assert_close(combine(dispatch(x, plan), weights, plan), want)


@pytest.mark.parametrize("k", [1, 2, 3])
@pytest.mark.parametrize("trailing", [(), (3,), (2, 2)])
def test_gradcheck_of_dispatch_and_combine(k, trailing):
    torch.manual_seed(0)
    plan = make_plan(torch.rand(4, 3).topk(k).indices, 3)
    x = torch.randn(4, *trailing, dtype=torch.float64, requires_grad=True)
    y = torch.randn(4 * k, *trailing, dtype=torch.float64, requires_grad=True)
    weights = torch.randn(4, k, dtype=torch.float64, requires_grad=True)
    assert gradcheck(lambda x: dispatch(x, plan), x)
    assert gradcheck(lambda y, w: combine(y, w, plan), (y, weights))


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("tail", [0, 3])
def test_gradcheck_of_the_segment_layer(bias, tail):
    torch.manual_seed(0)
    offsets = torch.tensor([2, 2, 6], dtype=torch.int32)  # the second expert has no rows
    x = torch.randn(6 + tail, 5, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(3, 3, 5, dtype=torch.float64, requires_grad=True)
    b = torch.randn(3, 3, dtype=torch.float64, requires_grad=True) if bias else None
    assert gradcheck(lambda x, w, b: grouped_linear(x, w, offsets, b), (x, weight, b))
    assert (grouped_linear(x, weight, offsets, b)[6:] == 0).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("tail", [0, 5])
def test_grouped_equals_segment_with_a_poisoned_tail(dtype, bias, tail):
    torch.manual_seed(0)
    offsets = torch.tensor([3, 3, 10, 11], dtype=torch.int32)
    x = torch.randn(11 + tail, 8)
    x[11:] = torch.inf  # nothing of the tail may leak, not even as 0 * inf
    x = x.to(dtype).requires_grad_()
    weight = torch.randn(4, 16, 8).to(dtype).requires_grad_()
    b = torch.randn(4, 16).to(dtype).requires_grad_() if bias else None
    inputs = [t for t in (x, weight, b) if t is not None]
    cotangent = torch.randn(11 + tail, 16).to(dtype)
    tolerance = dict(rtol=1e-4, atol=1e-5) if dtype == torch.float32 else dict(rtol=0.03, atol=0.03)
    results = []
    for backend in ("grouped", "segment"):
        y = grouped_linear(x, weight, offsets, b, backend=backend)
        assert (y[11:] == 0).all()
        results.append([y, *torch.autograd.grad(y, inputs, cotangent)])
    for grouped, segment in zip(*results, strict=True):
        torch.testing.assert_close(grouped, segment, **tolerance)


def choice(**kw):
    shape = dict(tokens=4096, top_k=2, num_experts=8, dims=[64, 128, 64], dtype=torch.float32)
    return select_backend(**{**shape, "device": torch.device("cpu"), **kw})


def test_backend_follows_the_shape(monkeypatch):
    assert choice(num_experts=64) == "grouped"
    assert choice() == "segment"  # groups so long that the loop costs nothing
    assert choice(dims=[15, 7, 15]) == choice(dtype=torch.float64) == "segment"
    assert choice(top_k=8) == "dense"
    assert choice(dtype=torch.bfloat16, num_experts=64, tokens=1024) == "padded"
    assert choice(override="padded") == "padded"
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    cuda = dict(device=torch.device("cuda"))
    assert choice(**cuda) == choice(**cuda, dtype=torch.bfloat16) == "dense"  # too small to be worth a sort
    assert choice(**cuda, dims=[4096, 4096], num_experts=64) == "triton"  # grouped_mm waits for the device in fp32
    assert choice(**cuda, dims=[4096, 4096], num_experts=64, dtype=torch.float64) == "padded"
    with torch.no_grad():
        assert choice(tokens=1) == "gather"
        assert choice(num_experts=64) == "grouped"
