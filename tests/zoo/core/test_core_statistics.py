"""Losses and statistics at the points where their values are known."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from moezoo.zoo.core import (
    DenseRouter,
    ExpertChoiceRouter,
    FixedRouter,
    MLPExperts,
    MoE,
    Routing,
    TopKRouter,
    losses,
    statistics,
)
from sklearn.metrics import normalized_mutual_info_score
from torch import nn
from torch.autograd import gradcheck


def routing_of(indices, experts):
    indices = torch.tensor(indices)
    return FixedRouter(experts, indices.shape[1])(torch.zeros(len(indices), 1), task_id=indices)


BALANCED = routing_of([[0, 1], [2, 3], [1, 0], [3, 2]], 4)
COLLAPSED = routing_of([[0], [0], [0], [0]], 4)


@pytest.mark.parametrize("k", [1, 2, 3, 6])
def test_switch_loss_is_one_at_balance_for_every_k(k):
    indices = torch.stack([(torch.arange(12) + j) % 6 for j in range(k)], dim=1)
    loss = losses.switch_balance_loss(torch.full((12, 6), 1 / 6), indices)
    assert loss.item() == pytest.approx(1)
    certain = torch.eye(6)[torch.zeros(12, dtype=torch.int64)]
    assert losses.switch_balance_loss(certain, torch.zeros(12, 1, dtype=torch.int64)).item() == pytest.approx(6)
    both = [losses.switch_balance_loss(torch.rand(12, 6, generator=torch.Generator().manual_seed(0)), indices,
            dropless=d) for d in (True, False)]  # fmt: skip
    torch.testing.assert_close(*both)


def test_cv_squared_and_z_loss_by_hand():
    assert losses.cv_squared(torch.tensor([1.0, 3.0])).item() == pytest.approx(0.25)
    assert losses.cv_squared(torch.tensor([5.0])).item() == 0
    assert losses.importance_loss(torch.tensor([[1.0, 0.0], [0.0, 3.0]])).item() == pytest.approx(0.25)
    assert losses.z_loss(torch.zeros(3, 4)).item() == pytest.approx(math.log(4) ** 2)
    mask = torch.tensor([True, False, False])
    assert losses.z_loss(torch.arange(12.0).view(3, 4), mask).item() == pytest.approx(
        torch.arange(4.0).logsumexp(0).item() ** 2
    )
    assert losses.slot_counts(torch.tensor([[0, -1], [2, 2]]), 3).tolist() == [1, 0, 2]


def test_balance_and_collapse():
    s = statistics.routing_statistics(BALANCED)
    assert s["max_violation"] == s["min_violation"] == s["load_cv2"] == s["dead_experts"] == s["drop_rate"] == 0
    assert s["load_entropy"].item() == pytest.approx(1)
    s = statistics.routing_statistics(COLLAPSED)
    assert s["max_violation"] == 3 and s["min_violation"] == 1 and s["dead_experts"] == 3
    assert s["load_cv2"].item() == pytest.approx(3) and s["load_entropy"] == 0 and s["token_entropy"] == 0
    assert s["confidence"] == 1
    assert statistics.expert_load(COLLAPSED).tolist() == [1, 0, 0, 0]


def test_load_of_a_dense_gate_is_its_weight():
    router = DenseRouter(4, 3)
    r = router(torch.randn(50, 4))
    torch.testing.assert_close(statistics.expert_load(r), r.weights.mean(0).detach())


def test_padding_does_not_count():
    router = TopKRouter(8, 4, 2).eval()
    torch.nn.init.normal_(router.weight)
    x, mask = torch.randn(40, 8), torch.rand(40) < 0.5
    masked = statistics.routing_statistics(router(x, token_mask=mask))
    alone = statistics.routing_statistics(router(x[mask]))
    for name in masked.keys() - {"drop_rate"}:  # a rate of all slots
        torch.testing.assert_close(masked[name], alone[name])
    assert masked["drop_rate"].item() == pytest.approx((~mask).float().mean().item())


@pytest.mark.parametrize("experts", [1, 4])
@pytest.mark.parametrize("tokens", [0, 1])
def test_degenerate_batches_give_numbers(experts, tokens):
    r = TopKRouter(3, experts, 1, norm_topk_prob=False)(torch.randn(tokens, 3))
    assert all(torch.isfinite(v) for v in statistics.routing_statistics(r).values())
    assert statistics.label_expert_nmi(r, torch.zeros(tokens, dtype=torch.int64)) == 0


@given(pairs=st.lists(st.tuples(st.integers(-2, 3), st.integers(0, 4)), min_size=2, max_size=40))
def test_nmi_equals_scikit_learn(pairs):
    labels, experts = zip(*pairs, strict=True)
    if len(set(labels)) == 1 or len(set(experts)) == 1:
        return
    got = statistics.label_expert_nmi(routing_of([[e] for e in experts], 5), torch.tensor(labels))
    assert got.item() == pytest.approx(normalized_mutual_info_score(labels, experts), abs=1e-5)


def test_nmi_reads_the_slot_with_the_largest_weight():
    r = routing_of([[0, 1], [1, 0]], 2)
    r = Routing(torch.tensor([[0.1, 0.9], [0.2, 0.8]]), r.indices, r.scores, r.logits, r.aux_loss)
    assert statistics.label_expert_nmi(r, torch.tensor([7, 3])).item() == pytest.approx(1)


def test_parameter_counts_of_a_sparse_layer():
    moe = MoE(TopKRouter(8, 4, 2), MLPExperts(4, 8, 16), shared=nn.Linear(8, 8))
    expert = 8 * 16 + 16 + 16 * 8 + 8
    rest = 4 * 8 + 8 * 8 + 8
    assert statistics.parameter_counts(moe) == {"total": 4 * expert + rest, "active": 2 * expert + rest}
    twice = nn.ModuleList([moe, moe, nn.Linear(3, 3)])
    assert statistics.parameter_counts(twice) == {"total": 4 * expert + rest + 12, "active": 2 * expert + rest + 12}


EXTRAS = Routing(  # experts 0, 1; extra 2, 3; the last token dropped
    weights=torch.tensor([[0.7, 0.3], [0.5, 0.5], [1.0, 0.0], [0.0, 0.0], [0.0, 0.0]]),
    indices=torch.tensor([[0, 1], [0, 2], [1, 3], [2, 3], [-1, -1]]),
    scores=torch.full((5, 4), 0.25),
    logits=torch.zeros(5, 4),
    aux_loss=torch.zeros(()),
    num_extra=2,
)


def test_statistics_of_a_record_with_extra_experts_and_drops_by_hand():
    s = statistics.routing_statistics(EXTRAS)
    assert statistics.expert_load(EXTRAS).tolist() == [0.5, 0.5]
    assert s["max_violation"] == 0 and s["dead_experts"] == 0 and s["token_entropy"] == 1
    assert s["drop_rate"].item() == pytest.approx(2 / 10)
    assert s["extra_share"].item() == pytest.approx(4 / 10)
    assert s["zero_weight_rate"].item() == pytest.approx(3 / 8)
    assert s["true_experts_per_token"].item() == pytest.approx(4 / 4)
    torch.testing.assert_close(statistics.co_activation(EXTRAS), torch.tensor([[0.5, 0.25], [0.25, 0.5]]))
    assert statistics.label_expert_nmi(EXTRAS, torch.tensor([0, 0, 1, 2, 3])).item() == pytest.approx(1)


def test_co_activation_and_switch_rate():
    pairs = statistics.co_activation(BALANCED)
    assert pairs.tolist() == [[0.5, 0.5, 0, 0], [0.5, 0.5, 0, 0], [0, 0, 0.5, 0.5], [0, 0, 0.5, 0.5]]
    assert statistics.switch_rate(BALANCED, BALANCED) == 0
    moved = routing_of([[1, 0], [2, 0], [1, 0], [-1, -1]], 4)
    assert statistics.switch_rate(BALANCED, moved).item() == pytest.approx(1 / 6)
    assert statistics.switch_rate(moved, BALANCED).item() == pytest.approx(3 / 8)


def test_similarity_of_expert_outputs():
    one = torch.randn(50, 1, 6)
    outputs = torch.cat([one, 3 * one, -one, torch.zeros_like(one)], dim=1)
    got = statistics.expert_similarity(outputs)
    want = torch.tensor([[1.0, 1, -1, 0], [1, 1, -1, 0], [-1, -1, 1, 0], [0, 0, 0, 0]])
    torch.testing.assert_close(got, want)


def test_entropy_terms_at_known_points():
    even, sure = torch.full((6, 4), 0.25), torch.eye(4)
    assert losses.batch_entropy(even).item() == losses.token_entropy(even).item() == pytest.approx(1)
    assert losses.batch_entropy(sure).item() == pytest.approx(1) and losses.token_entropy(sure) == 0
    assert losses.batch_entropy(sure[:1]) == 0
    mask = torch.tensor([True, False, False, False])
    assert losses.batch_entropy(sure, mask) == 0
    assert losses.token_entropy(torch.ones(3, 1)) == losses.batch_entropy(torch.ones(3, 1)) == 0


LOSSES = {  # of scores alone; indices are fixed
    "switch": lambda s: losses.switch_balance_loss(s, INDICES),
    "switch, dropless": lambda s: losses.switch_balance_loss(s, INDICES, dropless=True, coef=0.3),
    "sequence": lambda s: losses.sequence_balance_loss(s, INDICES, torch.tensor([1, 0, 1, 1, 4])),
    "null": lambda s: losses.null_balance_loss(s, INDICES, 2),
    "importance": losses.importance_loss,
    "z": losses.z_loss,
    "batch entropy": losses.batch_entropy,
    "token entropy": losses.token_entropy,
}
INDICES = torch.tensor([[0, 1], [2, 1], [1, 3], [2, 0], [1, 0]])


@pytest.mark.parametrize("name", LOSSES)
def test_every_loss_teaches_the_scores(name):
    scores = torch.rand(5, 4, dtype=torch.float64).softmax(-1).requires_grad_()
    assert gradcheck(LOSSES[name], (scores,))
    (gradient,) = torch.autograd.grad(LOSSES[name](scores), scores)
    assert gradient.abs().max() > 0


@pytest.mark.parametrize("loss", [losses.z_loss, losses.batch_entropy, losses.token_entropy])
def test_padding_gets_no_gradient(loss):
    scores = torch.rand(5, 4).softmax(-1).requires_grad_()
    mask = torch.tensor([True, False, True, True, False])
    (gradient,) = torch.autograd.grad(loss(scores, mask), scores)
    assert (gradient[~mask] == 0).all() and (gradient[mask].abs().sum(-1) > 0).all()
    torch.testing.assert_close(loss(scores, mask), loss(scores[mask]))


def test_balance_counts_carry_no_gradient_and_certain_tokens_no_nan():
    sure = torch.eye(4).requires_grad_()
    for entropy in (losses.batch_entropy, losses.token_entropy):
        (gradient,) = torch.autograd.grad(entropy(sure), sure)
        assert torch.isfinite(gradient).all()
    assert not losses.slot_counts(INDICES, 4).requires_grad


def test_expert_choice_counts_its_average_number_of_experts_as_active():
    moe = MoE(ExpertChoiceRouter(8, 4, capacity=1.0), MLPExperts(4, 8, 16))
    counts = statistics.parameter_counts(moe)
    assert counts["active"] - 4 * 8 == (counts["total"] - 4 * 8) // 4
