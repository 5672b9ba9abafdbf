"""Properties of each router."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from moezoo.zoo.core import DenseRouter, FixedRouter, NoisyTopKRouter, TopKRouter
from torch.autograd import gradcheck

sizes = st.tuples(st.integers(1, 6), st.integers(1, 20)).flatmap(
    lambda et: st.tuples(st.just(et[0]), st.integers(1, et[0]), st.integers(0, 12), st.just(et[1]))
)


def build(kind, dim, experts, k):
    if kind == "dense":
        return DenseRouter(dim, experts)
    if kind == "noisy":
        return NoisyTopKRouter(dim, experts, k if experts == 1 else max(k, 2))
    return TopKRouter(dim, experts, k, score_func=kind, norm_topk_prob=k > 1)


@pytest.mark.parametrize("kind", ["dense", "noisy", "softmax", "sigmoid"])
@settings(max_examples=30, deadline=None)
@given(size=sizes, training=st.booleans())
def test_record_is_consistent(kind, size, training):
    experts, k, tokens, dim = size
    router = build(kind, dim, experts, k).train(training)
    torch.nn.init.normal_(router.weight)
    r = router(torch.randn(tokens, dim))
    assert r.indices.shape == r.weights.shape == (tokens, router.top_k)
    assert r.dropless and ((r.indices >= 0) & (r.indices < experts)).all()
    assert all(len(set(row)) == router.top_k for row in r.indices.tolist())
    assert torch.isfinite(r.aux_loss) and torch.isfinite(r.weights).all()
    chosen = r.scores.gather(1, r.indices)
    torch.testing.assert_close(chosen.sort(descending=True).values, r.scores.topk(router.top_k).values)
    if kind != "sigmoid" or router.norm_topk_prob:
        sums = r.weights.sum(-1)
        expected = torch.ones(tokens) if router.top_k > 1 or experts == 1 else chosen[:, 0]
        torch.testing.assert_close(sums, expected)


def test_renormalised_softmax_equals_normalising_the_chosen_probabilities():
    r = TopKRouter(8, 5, 3, routed_scaling_factor=2.0)(torch.randn(20, 8) * 50)
    chosen = r.logits.softmax(-1).gather(1, r.indices)
    torch.testing.assert_close(r.weights, 2 * chosen / chosen.sum(-1, keepdim=True))


@pytest.mark.parametrize("gate_norm", ["softmax", "sigmoid", "none"])
def test_dense_gate_is_what_it_says(gate_norm):
    router = DenseRouter(6, 3, temperature=2.0, gate_norm=gate_norm, activation=torch.tanh)
    x = torch.randn(7, 6)
    logits = torch.tanh(x @ router.weight.T) / 2
    want = {"softmax": logits.softmax(-1), "sigmoid": logits.sigmoid(), "none": logits}[gate_norm]
    torch.testing.assert_close(router(x).dense_weights(), want)


@pytest.mark.parametrize("kind", ["dense", "softmax", "sigmoid", "noisy"])
def test_gradcheck(kind):
    torch.manual_seed(3)
    router = build(kind, 3, 4, 2).double()
    for weight in router.parameters():
        torch.nn.init.normal_(weight)
    router.z_coef = 0.1

    def run(x, *weights):
        torch.manual_seed(5)  # the same noise in every evaluation
        r = torch.func.functional_call(router, dict(zip(names, weights, strict=True)), (x,))
        return r.weights, r.scores, r.logits, r.aux_loss

    names = [name for name, _ in router.named_parameters()]
    x = torch.randn(5, 3, dtype=torch.float64, requires_grad=True)
    assert gradcheck(run, (x, *router.parameters()))


def test_renormalised_top1_is_refused_unless_there_is_one_expert():
    with pytest.raises(ValueError, match="norm_topk_prob=False"):
        TopKRouter(8, 4, 1)
    with pytest.raises(ValueError, match="top_k >= 2"):
        NoisyTopKRouter(8, 4, 1)
    TopKRouter(8, 1, 1)
    with pytest.raises(ValueError, match="top_k=5"):
        TopKRouter(8, 4, 5)


def test_balance_gradient_flows_through_the_scores_only():
    router = TopKRouter(8, 4, 2, aux_coef=0.5)
    r = router(torch.randn(16, 8))
    (from_aux,) = torch.autograd.grad(r.aux_loss, r.scores)
    counts = torch.bincount(r.indices.flatten(), minlength=4) / 32
    torch.testing.assert_close(from_aux, (0.5 * 4 / 16 * counts).expand(16, 4))


def test_losses_are_for_training():
    for router in (TopKRouter(8, 4, 2, z_coef=1.0), NoisyTopKRouter(8, 4, 2)):
        torch.nn.init.normal_(router.weight)
        x = torch.randn(16, 8)
        assert router(x).aux_loss > 0
        assert router.eval()(x).aux_loss == 0
    assert TopKRouter(8, 4, 2, balance="none")(x).aux_loss == 0


def test_jitter_leaves_the_callers_tensor_alone():
    router = TopKRouter(8, 4, 2, jitter=0.5)
    x = torch.randn(16, 8)
    before = x.clone()
    noisy = router(x).logits
    assert torch.equal(x, before) and not torch.equal(noisy, router(x).logits)
    assert torch.equal(router.eval()(x).logits, x @ router.weight.T)


def test_noisy_load_counts_k_experts_per_token():
    torch.manual_seed(0)
    router = NoisyTopKRouter(16, 8, 2)
    torch.nn.init.normal_(router.weight, std=0.3)
    x = torch.randn(4000, 16)
    seen = []
    router._load = lambda *a: seen.append(NoisyTopKRouter._load(router, *a)) or seen[-1]
    counts = torch.bincount(router(x).indices.flatten(), minlength=8)
    load = seen[0]
    assert load.sum().item() == pytest.approx(2 * 4000, rel=0.02)
    torch.testing.assert_close(load, counts.float(), rtol=0.1, atol=40)  # the estimate is of these counts


@pytest.mark.parametrize("kind", ["dense", "noisy", "softmax", "sigmoid"])
def test_expert_mask_switches_off(kind):
    torch.manual_seed(0)
    router = build(kind, 8, 4, 2)
    x = torch.randn(32, 8)
    on = torch.tensor([True, False, True, False])
    for mask in (on, torch.tensor([0, -1, 0, -1], dtype=torch.int8)):
        r = router(x, expert_mask=mask)
        assert (r.dense_weights()[:, ~on] == 0).all() and (r.dense_weights()[:, on] != 0).all()
        assert torch.isfinite(r.aux_loss)
    r = router(x, expert_mask=torch.tensor([False, False, True, False]))
    assert (r.dense_weights()[:, [0, 1, 3]] == 0).all() and torch.isfinite(r.aux_loss)
    r.weights.sum().backward()
    assert torch.isfinite(router.weight.grad).all()


@pytest.mark.parametrize("kind", ["noisy", "softmax", "sigmoid"])
def test_expert_mask_forces_on(kind):
    router = build(kind, 8, 6, 2)
    torch.nn.init.normal_(router.weight)
    r = router(torch.randn(32, 8), expert_mask=torch.tensor([0, 0, 0, 1, 0, 0], dtype=torch.int8))
    assert (r.indices == 3).any(-1).all()


def test_fixed_router_follows_orders():
    router = FixedRouter(3)
    r = router(torch.randn(4, 8), task_id=torch.tensor([2, 0, 7, -5]))
    assert r.indices.flatten().tolist() == [2, 0, -1, -1]
    assert r.weights.flatten().tolist() == [1, 1, 0, 0]
    two = FixedRouter(3, 2)(torch.randn(2, 8), task_id=torch.tensor([[0, 1], [2, 0]]))
    assert two.indices.tolist() == [[0, 1], [2, 0]]
    off = router(torch.randn(2, 8), task_id=torch.tensor([1, 2]), expert_mask=torch.tensor([True, False, True]))
    assert off.indices.flatten().tolist() == [-1, 2]
    with pytest.raises(ValueError, match="needs task_id"):
        router(torch.randn(4, 8))
    with pytest.raises(ValueError, match=r"need \[4\]"):
        router(torch.randn(4, 8), task_id=torch.zeros(4, 2, dtype=torch.int64))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_gating_precision_follows_the_input_but_never_below_float32(dtype):
    r = TopKRouter(8, 4, 2).to(dtype)(torch.randn(3, 8, dtype=dtype))
    assert r.weights.dtype == r.scores.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
