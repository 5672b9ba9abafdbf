"""DSelect-k, COMET, the permutation search and dense-to-sparse: the property that defines each."""

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from moezoo.zoo.core import (
    CometRouter,
    DenseToSparseRouter,
    DSelectKRouter,
    MLPExperts,
    MoE,
    PermutationLearner,
    StaticGate,
    losses,
)
from moezoo.zoo.core.routing.comet import leaf_shares
from moezoo.zoo.core.routing.permutation import best_assignment
from moezoo.zoo.core.routing.slots import smooth_step
from torch.autograd import gradcheck

KINDS = {
    "dselect": lambda **kw: DSelectKRouter(4, kw.pop("experts", 8), 2, **kw),
    "comet": lambda **kw: CometRouter(4, kw.pop("experts", 8), 2, **kw),
    "dense to sparse": lambda **kw: DenseToSparseRouter(4, kw.pop("experts", 8), 2, **kw),
}
SMOOTH = ["dselect", "comet"]


def build(name, seed=0, std=1.0, **kw):
    torch.manual_seed(seed)
    router = KINDS[name](**kw)
    for parameter in router.gate.parameters():
        torch.nn.init.normal_(parameter, std=std)
    return router


@pytest.mark.parametrize("name", KINDS)
@settings(max_examples=15, deadline=None)
@given(
    tokens=st.integers(0, 9),
    experts=st.integers(2, 9),
    masked=st.booleans(),
    off=st.booleans(),
    train=st.booleans(),
    seed=st.integers(0, 10**6),
)
def test_records_are_consistent(name, tokens, experts, masked, off, train, seed):
    router = build(name, seed, experts=experts).train(train)
    kw = {"token_mask": torch.rand(tokens) < 0.5} if masked else {}
    if off:
        kw["expert_mask"] = torch.arange(experts) != 1
    r = router(torch.randn(tokens, 4), **kw)
    assert r.scores.shape == r.logits.shape == (tokens, experts) and r.weights.shape == r.indices.shape
    assert ((r.indices >= -1) & (r.indices < experts)).all()
    assert (r.weights[r.indices < 0] == 0).all() and (r.weights >= 0).all()
    assert torch.isfinite(r.weights).all() and torch.isfinite(r.aux_loss)
    if r.dropless:
        assert (r.indices >= 0).all()
    if masked:
        assert (r.indices[~kw["token_mask"]] == -1).all()
    if off:
        assert (r.indices != 1).all()
    if not train:
        assert r.aux_loss == 0


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("train", [True, False])
def test_gradcheck(name, train):
    router = build(name, 3, experts=5).double().train(train)
    names, values = zip(*router.named_parameters(), strict=True)

    def run(x, *parameters):
        torch.manual_seed(5)  # the same Gumbel noise each time
        r = torch.func.functional_call(router, dict(zip(names, parameters, strict=True)), (x,))
        return r.weights, r.scores, r.aux_loss

    assert gradcheck(run, (torch.randn(6, 4, dtype=torch.float64, requires_grad=True), *values))


@pytest.mark.parametrize("name", SMOOTH)
def test_weights_sum_to_one_with_exact_zeros_and_every_backend_agrees(name):
    router = build(name, std=0.5)
    x = torch.randn(200, 4)
    r = router(x)
    torch.testing.assert_close(r.weights.sum(-1), torch.ones(200))
    idle = r.indices < 0
    assert idle.any() and (r.scores[idle] == 0).all() and (r.scores[~idle] > 0).all()
    experts = MLPExperts(8, 4, 6)
    torch.testing.assert_close(MoE(router, experts, backend="segment")(x), MoE(router, experts, backend="dense")(x))


@pytest.mark.parametrize("name", SMOOTH)
def test_a_decided_router_uses_k_experts_and_then_sparse_eval_is_exact(name):
    router = build(name, std=500.0, sparse_eval=True)
    x = torch.randn(300, 4)
    r = router(x)
    use = (r.indices >= 0).sum(-1)
    decided = use <= 2
    assert decided.float().mean() > 0.8
    sparse = router.eval()(x)
    assert sparse.top_k == 2 and (sparse.weights[sparse.indices < 0] == 0).all()
    torch.testing.assert_close(sparse.dense_weights()[decided], r.dense_weights()[decided])
    torch.testing.assert_close(sparse.weights.sum(-1), r.weights.sum(-1))


def test_the_smooth_step_is_the_papers_cubic():
    t = torch.linspace(-1, 1, 201, dtype=torch.float64, requires_grad=True)
    got = smooth_step(t, 0.8)
    g = 0.8
    cubic = -2 * t**3 / g**3 + 3 * t / (2 * g) + 0.5
    want = torch.where(t <= -g / 2, 0.0, torch.where(t >= g / 2, 1.0, cubic))
    torch.testing.assert_close(got, want)
    (slope,) = torch.autograd.grad(got.sum(), t)
    assert (slope[(t.abs() > g / 2)] == 0).all() and slope[100].item() == pytest.approx(1.5 / g)


def test_dselect_is_the_product_over_binary_codes():
    router = build("dselect", std=0.3, experts=6).double()
    x = torch.randn(7, 4, dtype=torch.float64)
    numbers = router.gate(x)
    bits, mixture = smooth_step(numbers[:, :6].view(7, 2, 3), 1.0), numbers[:, 6:].softmax(-1)
    want = torch.zeros(7, 6, dtype=torch.float64)
    for i, e in itertools.product(range(2), range(6)):
        share = mixture[:, i]
        for j in range(3):
            share = share * (bits[:, i, j] if e >> j & 1 else 1 - bits[:, i, j])
        want[:, e] += share
    torch.testing.assert_close(router(x).scores, want)
    assert (want.sum(-1) < 1).any()  # numbers 6 and 7 name nobody


def test_dselects_loss_drives_mass_off_the_numbers_that_name_nobody():
    router = DSelectKRouter(4, 5, 2, entropy_coef=0.0, code_coef=1.0)
    x, optimiser = torch.randn(64, 4), torch.optim.Adam(router.parameters(), 0.05)
    before = router(x).weights.sum(-1).min()
    for _ in range(200):
        optimiser.zero_grad()
        router(x).aux_loss.backward()
        optimiser.step()
    assert before < 0.7 and router(x).weights.sum(-1).min() > 0.99


def test_entropy_makes_selectors_decide():
    for name in SMOOTH:
        router = build(name, std=0.03, entropy_coef=1.0)
        x, optimiser = torch.randn(64, 4), torch.optim.Adam(router.parameters(), 0.05)
        assert (router(x).indices >= 0).all()
        for _ in range(300):
            optimiser.zero_grad()
            router(x).aux_loss.backward()
            optimiser.step()
        assert ((router(x).indices >= 0).sum(-1) <= 2).float().mean() > 0.85, name


def test_a_static_selection_is_one_for_all_tokens_of_a_task():
    torch.manual_seed(0)
    router = DSelectKRouter(4, 8, 2, gate=StaticGate(8, num_tasks=3, std=0.2))
    task = torch.tensor([0, 2, 0, 1, 2])
    weights = router(torch.randn(5, 4), task_id=task).weights
    assert torch.equal(weights[0], weights[2]) and torch.equal(weights[1], weights[4])
    assert not torch.allclose(weights[0], weights[1])
    alone = StaticGate(8)
    assert torch.equal(alone(torch.randn(3, 4)), alone.weight.expand(3, 8))
    with pytest.raises(ValueError, match=r"StaticGate needs task_id.*\[5\]"):
        router(torch.randn(5, 4))
    with pytest.raises(ValueError, match="= 8 are needed"):
        DSelectKRouter(4, 8, 2, gate=StaticGate(3))


@pytest.mark.parametrize("leaves", [1, 2, 3, 5, 8, 11])
def test_a_tree_of_any_size_hands_all_it_gets_to_its_leaves(leaves):
    right = torch.rand(4, leaves - 1, dtype=torch.float64)
    got = leaf_shares(right)
    for leaf in range(leaves):
        node, want = leaf + leaves - 1, torch.ones(4, dtype=torch.float64)
        while node:
            parent = (node - 1) // 2
            want = want * (right[:, parent] if node == 2 * parent + 2 else 1 - right[:, parent])
            node = parent
        torch.testing.assert_close(got[:, leaf], want)
    torch.testing.assert_close(got.sum(-1), torch.ones(4, dtype=torch.float64))


def test_comet_weighs_leaves_by_softmax_and_never_those_that_nothing_reaches():
    router = build("comet", std=0.6).double()
    x = torch.randn(50, 4, dtype=torch.float64)
    numbers = router.gate(x).view(50, 2, 15)
    reached = leaf_shares(smooth_step(numbers[..., :7], 1.0))
    want = (numbers[..., 7:] + reached.log()).flatten(1).softmax(-1).view(50, 2, 8).sum(1)
    torch.testing.assert_close(router(x).scores, want)
    with torch.no_grad():  # an unreached leaf whose logit would overflow
        router.gate.bias.zero_()
        router.gate.weight.zero_()
        router.gate.bias.view(2, 15)[:, 0], router.gate.bias.view(2, 15)[:, 7] = 1.0, 2000.0  # all go right
    r = router(x.requires_grad_())
    assert (r.weights[:, 0] == 0).all() and torch.isfinite(r.weights).all()
    (r.weights.square().sum() + r.aux_loss).backward()
    assert torch.isfinite(router.gate.weight.grad).all()


# --- permutation


@settings(max_examples=25, deadline=None)
@given(n=st.integers(1, 6), seed=st.integers(0, 10**6))
def test_the_assignment_is_the_best_of_all(n, seed):
    gain = torch.randn(n, n, generator=torch.Generator().manual_seed(seed))
    chosen = best_assignment(gain)
    value = gain[torch.arange(n), chosen].sum().item()
    best = max(sum(gain[i, j].item() for i, j in enumerate(order)) for order in itertools.permutations(range(n)))
    assert sorted(chosen.tolist()) == list(range(n)) and value == pytest.approx(best, abs=1e-5)


def test_the_assignment_agrees_with_scipy_at_the_size_of_a_layer():
    scipy = pytest.importorskip("scipy.optimize")
    gain = torch.rand(64, 64, generator=torch.Generator().manual_seed(0))
    assert best_assignment(gain).tolist() == scipy.linear_sum_assignment(gain.numpy(), maximize=True)[1].tolist()


def test_the_search_goes_from_doubly_stochastic_to_a_permutation_that_stays():
    torch.manual_seed(0)
    learner = PermutationLearner(6)
    soft = learner.matrix()
    torch.testing.assert_close(soft.sum(0), torch.ones(6))
    torch.testing.assert_close(soft.sum(1), torch.ones(6), atol=0.05, rtol=0)
    assert soft.max() < 0.9 and learner.iterations == 20
    learner.search(0.5)
    assert learner.iterations == round(math.sqrt(20 * 150)) and learner.temperature == pytest.approx(1e-5)
    learner.search(1.0)
    hard = learner.matrix()
    assert learner.frozen and not learner.logits.requires_grad
    assert torch.equal(hard.sum(0), torch.ones(6)) and torch.equal(hard.sum(1), torch.ones(6)) and hard.max() == 1
    mixed, penalty = learner(torch.rand(3, 6))
    assert penalty == 0 and mixed.shape == (3, 6)
    again = PermutationLearner(6)
    again.load_state_dict(learner.state_dict())
    assert again.frozen and torch.equal(again.matrix(), hard)


def test_the_search_finds_the_permutation_that_the_loss_wants():
    torch.manual_seed(0)
    wanted = torch.randperm(5)
    learner = PermutationLearner(5, temperature=(0.1, 0.01), iterations=(20, 40), noise=0.1)
    optimiser = torch.optim.Adam([learner.logits], 0.02)
    for step in range(100):
        learner.search(step / 100)
        weights = torch.eye(5)
        got, penalty = learner(weights)
        optimiser.zero_grad()
        ((got - torch.eye(5)[wanted]).square().sum() + penalty).backward()
        optimiser.step()
    learner.search(1.0)
    assert learner.matrix().argmax(1).tolist() == wanted.tolist()


def test_gradcheck_of_the_search():
    torch.manual_seed(0)
    learner = PermutationLearner(4, temperature=(0.5, 0.1), iterations=(5, 9)).double()

    def run(logits, weights):
        return torch.func.functional_call(learner, {"logits": logits}, (weights,))

    logits = torch.randn(4, 4, dtype=torch.float64, requires_grad=True)
    assert gradcheck(run, (logits, torch.rand(3, 4, dtype=torch.float64, requires_grad=True)))


@pytest.mark.parametrize("name", SMOOTH)
def test_a_router_relabels_its_experts(name):
    router = build(name, std=0.5)
    x = torch.randn(9, 4)
    plain = router(x).scores
    router.permutation = PermutationLearner(8)
    soft = router(x)
    assert soft.aux_loss > 0
    router.permutation.freeze()
    order = router.permutation.matrix().argmax(1)
    torch.testing.assert_close(router(x).scores[:, order], plain)


# --- dense to sparse


def test_dense_to_sparse_goes_from_all_experts_to_one():
    router = build("dense to sparse", std=0.3, temperature=5.0)
    x = torch.randn(500, 4)
    assert (router(x).indices >= 0).all()
    router.temperature = 0.01
    r = router(x)
    assert ((r.indices >= 0).sum(-1) <= 2).float().mean() > 0.98 and (r.weights.amax(-1) > 0.99).float().mean() > 0.9
    for temperature in (0.3, 2.0):
        router.temperature = temperature
        r = router(x)
        assert torch.equal(r.indices >= 0, r.scores > 1e-3)
        torch.testing.assert_close(r.weights, r.scores * (r.indices >= 0))


def test_its_samples_follow_the_softmax_of_the_logits():
    router = build("dense to sparse", std=0.5, temperature=0.1, experts=3)
    x = torch.randn(1, 4)
    share = torch.bincount(router(x.expand(20000, 4)).scores.argmax(-1), minlength=3) / 20000
    torch.testing.assert_close(share, router.gate(x).softmax(-1)[0], atol=0.02, rtol=0)


def test_outside_training_it_takes_the_best_without_noise():
    router = build("dense to sparse", temperature=0.5).eval()
    x = torch.randn(20, 4)
    r = router(x)
    assert r.dropless and r.top_k == 2
    best = router.gate(x).topk(2)
    assert torch.equal(r.indices, best.indices)
    torch.testing.assert_close(r.weights, (best.values / 0.5).softmax(-1))
    assert (DenseToSparseRouter(4, 8).eval()(x).weights == 1).all()


def test_its_loss_is_the_mean_number_of_experts_at_balance():
    gates = torch.eye(4).repeat(3, 1)
    torch.testing.assert_close(losses.density_balance_loss(gates, gates > 0), torch.ones(()))
    even, everyone = torch.full((12, 4), 0.25), torch.ones(12, 4, dtype=torch.bool)
    torch.testing.assert_close(losses.density_balance_loss(even, everyone), torch.full((), 4.0))
    mask = torch.arange(12) < 4
    torch.testing.assert_close(
        losses.density_balance_loss(gates, gates > 0, mask), losses.density_balance_loss(gates[:4], gates[:4] > 0)
    )


@pytest.mark.parametrize(
    "make, words",
    [
        (lambda: DSelectKRouter(4, 8, 2, gamma=0.0), "gamma=0.0"),
        (lambda: CometRouter(4, 8, 2, gamma=-1.0), "gamma=-1.0"),
        (lambda: CometRouter(4, 8, 2, gate=StaticGate(7)), r"k \(2E - 1\) = 30"),
        (lambda: DenseToSparseRouter(4, 8, temperature=0.0), "temperature=0.0"),
        (lambda: DenseToSparseRouter(4, 8, threshold=0.2), "threshold=0.2"),
        (lambda: PermutationLearner(4, temperature=(0.0, 1.0)), "must be positive"),
    ],
)
def test_mistakes_are_named(make, words):
    with pytest.raises(ValueError, match=words):
        make()
