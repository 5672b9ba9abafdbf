"""Gates, groups, capacity, extra experts and loss-free balancing: each equals its plain reference."""

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from moezoo.zoo.core import (
    DenseRouter,
    LinearGate,
    NoisyTopKRouter,
    SwitchRouter,
    TaskGate,
    TopKRouter,
    losses,
    update_router_bias,
)
from moezoo.zoo.core.routing import Capacity, limit_capacity
from moezoo.zoo.core.routing.router import _best_by_max, choose
from torch.autograd import gradcheck


def spread(router):
    """Logits far apart, so that a finite difference moves no choice."""
    for name, parameter in router.named_parameters():
        torch.nn.init.normal_(parameter, std=3.0 if name.endswith("weight") else 0.5)
    return router


# --- gates


def test_a_task_gate_is_the_linear_gate_of_each_tokens_task():
    gate = TaskGate(6, 4, num_tasks=3)
    x, task = torch.randn(20, 6), torch.randint(3, (20,))
    want = torch.stack([gate.weight[t] @ v for v, t in zip(x, task, strict=True)])
    torch.testing.assert_close(gate(x, task), want)
    with pytest.raises(ValueError, match=r"needs task_id.*\[20\]"):
        gate(x)


@pytest.mark.parametrize("kind", [TopKRouter, NoisyTopKRouter])
def test_routers_take_any_gate_and_a_tasks_gate_learns_from_its_tokens_alone(kind):
    router = kind(6, 4, 2, gate=TaskGate(6, 4, num_tasks=3, std=1.0)).eval()
    task = torch.tensor([0, 2, 2, 0])
    router(torch.randn(4, 6), task_id=task).weights[:, 0].sum().backward()
    moved = router.weight.grad.abs().sum((1, 2)) > 0
    assert moved.tolist() == [True, False, True]
    with pytest.raises(ValueError, match="3 logits, but the router has 4"):
        kind(6, 4, 2, gate=LinearGate(6, 3))


def test_a_gates_bias_moves_every_logit():
    gate = LinearGate(6, 4, bias=True)
    torch.nn.init.normal_(gate.bias)
    x = torch.randn(5, 6)
    torch.testing.assert_close(gate(x), x @ gate.weight.T + gate.bias)
    router = DenseRouter(6, 4, temperature=0.5, activation=torch.tanh, bias=True)
    torch.nn.init.normal_(router.bias)
    want = (torch.tanh(x @ router.weight.T) / 0.5 + router.bias).softmax(-1)
    torch.testing.assert_close(router(x).weights, want)


# --- choice


@settings(max_examples=20, deadline=None)
@given(tokens=st.integers(0, 30), experts=st.integers(1, 20), data=st.data())
def test_passes_of_max_choose_what_topk_chooses(tokens, experts, data):
    k = data.draw(st.integers(1, experts))
    scores = torch.randn(tokens, experts)
    before = scores.clone()
    assert torch.equal(_best_by_max(scores, k), scores.topk(k).indices)
    assert torch.equal(scores, before)


@pytest.mark.parametrize("tokens, experts, k", [(300, 16, 2), (300, 64, 4), (300, 8, 2), (20, 16, 2), (128, 8, 1)])
def test_choose_is_topk_at_every_size(tokens, experts, k):
    scores = torch.randn(tokens, experts)
    assert torch.equal(choose(scores, k), scores.topk(k).indices)


@settings(max_examples=20, deadline=None)
@given(
    seed=st.integers(0, 10**6), groups=st.integers(1, 4), size=st.integers(1, 4), biased=st.booleans(), data=st.data()
)
def test_groups_limit_the_choice(seed, groups, size, biased, data):
    torch.manual_seed(seed)
    kept = data.draw(st.integers(1, groups))
    k = data.draw(st.integers(1, kept * size))
    router = TopKRouter(
        5, groups * size, k, score_func="sigmoid", norm_topk_prob=False,
        num_groups=groups, topk_groups=kept, balance="bias" if biased else "none",
    )  # fmt: skip
    spread(router).double()  # in float32 large logits would give equal sigmoids
    if biased:
        router.expert_bias.normal_()
    r = router(torch.randn(7, 5, dtype=torch.float64))
    choice = r.scores.detach() + (router.expert_bias if biased else 0)
    for row, indices in zip(choice, r.indices, strict=True):
        worth = [sum(sorted(g.tolist(), reverse=True)[: 2 if biased else 1]) for g in row.view(groups, size)]
        best = sorted(range(groups), key=lambda g: -worth[g])[:kept]
        allowed = [e for e in range(groups * size) if e // size in best]
        assert indices.tolist() == sorted(allowed, key=lambda e: -row[e].item())[:k]
    torch.testing.assert_close(r.weights, r.scores.gather(1, r.indices))


def test_groups_respect_the_expert_mask():
    router = spread(TopKRouter(5, 6, 2, num_groups=3, topk_groups=1))
    x = torch.randn(40, 5)
    r = router(x, expert_mask=torch.tensor([0, 0, 0, 0, 1, 0], dtype=torch.int8))
    assert ((r.indices // 2) == 2).all() and (r.indices[:, 0] == 4).all()
    r = router(x, expert_mask=torch.tensor([False, False, True, True, False, True]))
    assert not torch.isin(r.indices, torch.tensor([0, 1, 4])).any() and torch.isfinite(r.weights).all()


@pytest.mark.parametrize(
    "given, message",
    [
        ({"num_groups": 2}, "go together"),
        ({"num_groups": 4, "topk_groups": 1}, "must divide"),
        ({"num_groups": 3, "topk_groups": 1}, "reaches 2"),
        ({"num_groups": 2, "topk_groups": 3}, "between 1 and num_groups=2"),
        ({"num_groups": 2, "topk_groups": 1, "num_extra": 1}, "extra"),
        ({"capacity_factor": 0.0}, "capacity_factor=0.0"),
        ({"capacity_factor": 1.0, "min_capacity": 0}, "min_capacity=0"),
        ({"num_extra": -1}, "num_extra=-1"),
    ],
)
def test_mistakes_are_told(given, message):
    with pytest.raises(ValueError, match=message):
        TopKRouter(8, 6, 3, **given)


# --- capacity


def limit_by_loop(weights, indices, experts, capacity, priority):
    weights, indices = weights.clone(), indices.clone()
    order = range(len(indices))
    if priority == "prob":
        order = sorted(order, key=lambda t: -weights[t].max().item())
    room = [capacity] * experts
    for slot in range(indices.shape[1]):
        for t in order:
            e = int(indices[t, slot])
            if not 0 <= e < experts:
                continue
            if room[e] == 0:
                indices[t, slot], weights[t, slot] = -1, 0.0
            room[e] -= room[e] > 0
    return weights, indices


@settings(max_examples=30, deadline=None)
@given(
    tokens=st.integers(0, 25), experts=st.integers(1, 5), k=st.integers(1, 3), capacity=st.integers(1, 8),
    priority=st.sampled_from(["order", "prob"]), seed=st.integers(0, 10**6),
)  # fmt: skip
def test_capacity_equals_serving_slots_one_by_one(tokens, experts, k, capacity, priority, seed):
    torch.manual_seed(seed)
    indices = torch.randint(-1, experts + 2, (tokens, k))  # dropped and extra ones among them
    weights = torch.rand(tokens, k).masked_fill(indices < 0, 0.0)
    got = limit_capacity(weights, indices, experts, capacity, priority)
    want = limit_by_loop(weights, indices, experts, capacity, priority)
    assert torch.equal(got[1], want[1]) and torch.equal(got[0], want[0])


def test_capacity_with_more_experts_than_a_byte_counts():
    indices = torch.randint(300, (900, 2))
    got = limit_capacity(torch.rand(900, 2), indices, 300, 5)
    counts = torch.bincount(indices.flatten(), minlength=300).clamp_max(5)
    assert torch.equal(torch.bincount(got[1][got[1] >= 0], minlength=300), counts)


@pytest.mark.parametrize("k, priority", [(1, "order"), (2, "order"), (2, "prob")])
def test_a_router_with_capacity_drops_but_never_renormalises(k, priority):
    free = spread(TopKRouter(8, 4, k, norm_topk_prob=k > 1))
    tight = TopKRouter(8, 4, k, norm_topk_prob=k > 1, capacity_factor=0.5, min_capacity=2, priority=priority)
    tight.load_state_dict(free.state_dict())
    x = torch.randn(40, 8)
    a, b = free(x), tight(x)
    kept = b.indices >= 0
    assert torch.bincount(b.indices[kept], minlength=4).max() <= tight.capacity.of(40, 4, k) == 5 * k
    assert 0 < kept.sum() < kept.numel() and not b.dropless
    assert torch.equal(b.indices[kept], a.indices[kept])
    assert torch.equal(b.weights, a.weights * kept)
    assert torch.equal(a.aux_loss, b.aux_loss)  # the balance of what tokens want
    b.weights.sum().backward()
    assert free(x[:1]).indices.tolist() == tight(x[:1]).indices.tolist()


def test_capacity_by_hand():
    assert Capacity(1.25).of(100, 8, 2) == 32
    assert Capacity(1.0, minimum=4).of(3, 8, 1) == 4
    assert Capacity(1.0).of(0, 8, 1) == 1


def test_padding_takes_no_room():
    router = spread(SwitchRouter(8, 2, capacity_factor=1.0))
    x = torch.randn(1, 8).expand(8, 8)  # all want the same expert
    mask = torch.tensor([False] * 4 + [True] * 4)
    assert (router(x, token_mask=mask).indices[:, 0] >= 0).tolist() == mask.tolist()


# --- extra experts


def test_extra_experts_compete_for_the_slots():
    router = spread(TopKRouter(8, 4, 2, num_extra=3))
    r = router(torch.randn(200, 8))
    assert r.scores.shape == r.logits.shape == (200, 7)
    assert (r.num_experts, r.num_extra, router.num_experts, r.dropless) == (4, 3, 4, False)
    assert set(r.indices.flatten().tolist()) == set(range(7))
    assert torch.equal(r.indices, r.logits.topk(2).indices)
    every = r.dense_weights(extra=True)
    torch.testing.assert_close(every.sum(-1), torch.ones(200))
    assert torch.equal(every[:, :4], r.dense_weights())
    assert TopKRouter(8, 1, 2, num_extra=1).top_k == 2


# --- balance


def test_the_bias_moves_the_choice_and_never_the_weights():
    router = spread(TopKRouter(8, 4, 2, score_func="sigmoid", norm_topk_prob=False, balance="bias"))
    x = torch.randn(50, 8)
    router.expert_bias[:] = torch.tensor([-9.0, 0.0, 0.0, 9.0])
    r = router(x)
    assert (r.indices[:, 0] == 3).all() and (r.indices != 0).all()
    torch.testing.assert_close(r.weights, r.scores.gather(1, r.indices))
    assert r.aux_loss == 0 and not router.expert_bias.requires_grad


def test_the_bias_update_is_that_of_the_paper():
    router = TopKRouter(8, 4, 2, balance="bias", bias_update_rate=0.1)
    twin = torch.nn.Sequential(torch.nn.Linear(3, 3), router)
    total = sum(torch.bincount(router(torch.randn(30, 8)).indices.flatten(), minlength=4) for _ in range(3))
    router.eval()(torch.randn(30, 8))  # not counted
    assert torch.equal(router.expert_counts, total.float())
    step = torch.sign(total.float().mean() - total)
    update_router_bias(twin)
    torch.testing.assert_close(router.expert_bias, 0.1 * (step - step.mean()))
    assert router.expert_bias.sum().abs() < 1e-6 and (router.expert_counts == 0).all()
    before = router.expert_bias.clone()
    update_router_bias(twin)  # nothing seen, nothing learned
    assert torch.equal(router.expert_bias, before)


def test_bias_updates_balance_a_skewed_router():
    torch.manual_seed(0)
    gate = LinearGate(8, 8, bias=True, std=0.4)
    torch.nn.init.normal_(gate.bias)
    router = TopKRouter(8, 8, 2, score_func="sigmoid", balance="bias", bias_update_rate=0.01, gate=gate)
    x = torch.randn(500, 8)

    def violation():
        counts = torch.bincount(router(x).indices.flatten(), minlength=8)
        return (counts.max() / counts.float().mean() - 1).item()

    before = violation()
    for _ in range(150):
        router(x)
        update_router_bias(router)
    assert before > 0.7 and violation() < 0.1


def test_the_bias_is_saved_stays_fp32_and_padding_is_not_counted():
    router = TopKRouter(8, 4, 2, balance="bias")
    router.expert_bias[:] = torch.tensor([1.001, 2.001, 3.001, 4.001])
    assert "expert_bias" in router.state_dict() and "expert_counts" not in router.state_dict()
    kept = copy.deepcopy(router).to(torch.bfloat16)
    assert torch.equal(kept.expert_bias, router.expert_bias) and kept.weight.dtype == torch.bfloat16
    assert kept.expert_bias.dtype == kept.double().expert_bias.dtype == torch.float32
    assert router.to("meta").expert_bias.is_meta and not router.to_empty(device="cpu").expert_bias.is_meta
    kept(torch.randn(6, 8).double(), token_mask=torch.tensor([True] + [False] * 5))
    assert kept.expert_counts.sum() == 2


@settings(max_examples=30, deadline=None)
@given(tokens=st.integers(0, 20), sequences=st.integers(1, 4), masked=st.booleans(), seed=st.integers(0, 10**6))
def test_sequence_loss_is_the_mean_of_the_sequences_losses(tokens, sequences, masked, seed):
    torch.manual_seed(seed)
    scores, indices = torch.rand(tokens, 5).softmax(-1), torch.rand(tokens, 5).topk(2).indices
    sequence = torch.randint(min(sequences, max(tokens, 1)), (tokens,))
    mask = torch.rand(tokens) < 0.7 if masked else torch.ones(tokens, dtype=torch.bool)
    indices = indices.masked_fill(~mask[:, None], -1)
    each = [
        losses.switch_balance_loss(scores[own], indices[own])
        for own in ((sequence == s) & mask for s in range(sequences))
        if own.any()
    ]
    want = torch.stack(each).mean() if each else torch.zeros(())
    got = losses.sequence_balance_loss(scores, indices, sequence, mask if masked else None)
    torch.testing.assert_close(got, want)


def test_sequence_balance_needs_the_sequences():
    router = TopKRouter(8, 4, 2, balance="seq_aux", aux_coef=0.5)
    x, one = torch.randn(6, 8), torch.zeros(6, dtype=torch.int64)
    with pytest.raises(ValueError, match="sequence_id"):
        router(x)
    whole = router(x, sequence_id=one)
    torch.testing.assert_close(whole.aux_loss, 0.5 * losses.switch_balance_loss(whole.scores, whole.indices))
    assert router.eval()(x).aux_loss == 0


@pytest.mark.parametrize(
    "options",
    [
        {"num_groups": 2, "topk_groups": 1, "balance": "bias", "score_func": "sigmoid"},
        {"num_extra": 2, "z_coef": 0.1},
        {"capacity_factor": 0.5, "priority": "prob"},
        {"balance": "seq_aux", "score_func": "sigmoid"},
        {"gate": TaskGate(3, 4, 2)},
    ],
)
def test_gradcheck(options):
    torch.manual_seed(3)
    router = spread(TopKRouter(3, 4, 2, **options)).double()
    kw = {"task_id": torch.tensor([0, 1, 1, 0, 1])}
    if router.balance == "seq_aux":
        kw["sequence_id"] = torch.tensor([0, 0, 1, 1, 1])
    names = [name for name, _ in router.named_parameters()]

    def run(x, *weights):
        r = torch.func.functional_call(router, dict(zip(names, weights, strict=True)), (x,), kw)
        return r.weights, r.scores, r.logits, r.aux_loss

    assert gradcheck(run, (torch.randn(5, 3, dtype=torch.float64, requires_grad=True), *router.parameters()))


def test_what_is_changed_after_construction_counts():
    router = spread(TopKRouter(5, 4, 2))
    x = torch.randn(8, 5)
    before = router(x).aux_loss
    router.z_coef = 1.0
    torch.testing.assert_close(router(x).aux_loss, before + losses.z_loss(router(x).logits))
    router.gate = LinearGate(5, 4, bias=True)
    torch.testing.assert_close(router(x).logits, router.gate(x))
