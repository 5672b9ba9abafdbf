"""Attacks: sanity of the spec's A5 on a trained network, the router's attacks, stable divergences, AutoAttack."""

import logging

import pytest
import torch
from moezoo.errors import UserError
from moezoo.tasks import robustness_autoattack
from moezoo.tasks.robustness_attacks import (
    Attacker,
    Ball,
    Health,
    ascend,
    attackable,
    check_ball,
    router_logits,
    survive,
)
from moezoo.tasks.robustness_losses import balanced_groups, cross_entropy, divergence, log_probability
from moezoo.tasks.robustness_metrics import Attacked, evaluate, expert_by_class, measure_cost
from moezoo.zoo.advmoe import AdvMoE
from moezoo.zoo.baselines.robustness import DenseCNN

SCHEMA = {"channels": 1, "image_size": 8, "num_classes": 10, "mean": [0.3], "std": [0.35]}
SMALL = {"backbone": "small_resnet", "widths": (16, 24), "blocks": (1, 1), "stem_stride": 1}
ROUTER = {"router_width": 4, "router_blocks": 1, "router_pool": 1}


@pytest.fixture(scope="module")
def digits():
    """sklearn's digits in [0, 1]: train, test."""
    from sklearn.datasets import load_digits

    loaded = load_digits()
    image = torch.tensor(loaded.images, dtype=torch.float32)[:, None] / 16
    label = torch.tensor(loaded.target, dtype=torch.int64)
    order = torch.randperm(len(label), generator=torch.Generator().manual_seed(0))
    return (image[order[:1400]], label[order[:1400]]), (image[order[1400:1600]], label[order[1400:1600]])


def train(model, image, label, epochs=5):
    """Plain training, of the router to the class modulo two as well: weak and quick."""
    torch.manual_seed(1)
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    for _ in range(epochs):
        for rows in torch.randperm(len(label)).split(64):
            output = model.train()(image[rows])
            loss = cross_entropy(output.logits, label[rows]).mean()
            for logits in output.router_logits.values():
                loss = loss + cross_entropy(logits, label[rows] % 2).mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return model.eval()


@pytest.fixture(scope="module")
def dense(digits):
    torch.manual_seed(0)
    return train(DenseCNN(SCHEMA, **SMALL), *digits[0])


@pytest.fixture(scope="module")
def mixture(digits):
    torch.manual_seed(0)
    return train(AdvMoE(SCHEMA, **SMALL | ROUTER), *digits[0])


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def accuracy(model, image, label, eps, steps=10, step_size=None, health=None):
    with attackable(model):
        attacker = Attacker(model, image, label, generator(), health)
        last = attacker.pgd(Ball(eps, steps, 2.5 * eps / steps if step_size is None else step_size))
        check_ball(image, last, eps)
        with torch.no_grad():
            return float((model(last).logits.argmax(-1) == label).float().mean()), last


def test_a4_divergence_is_finite_where_the_released_code_breaks():
    """Spec A4: logits 320 apart underflow as probabilities; both sides carry gradient."""
    for left, right in (([0.0, 320.0], [320.0, 0.0]), ([0.0, 320.0], [0.0, 320.0]), ([0.0, 1e4], [3.0, 1.0])):
        p, q = torch.tensor([left], requires_grad=True), torch.tensor([right], requires_grad=True)
        value = divergence(log_probability(p), log_probability(q)).sum()
        value.backward()
        assert value.isfinite() and p.grad.isfinite().all() and q.grad.isfinite().all()
    p = torch.tensor([[0.0, 320.0]], requires_grad=True)
    naive = torch.nn.functional.kl_div(torch.tensor([[0.5, 0.5]]).log(), p.softmax(-1), reduction="sum")
    naive.backward()
    assert not p.grad.isfinite().all(), "the trap is still there"


def test_divergence_is_kl_and_differentiable_on_both_sides():
    torch.manual_seed(0)
    p, q = torch.randn(5, 4, dtype=torch.float64), torch.randn(5, 4, dtype=torch.float64)
    expected = (p.softmax(-1) * (p.log_softmax(-1) - q.log_softmax(-1))).sum(-1)
    torch.testing.assert_close(divergence(log_probability(p), log_probability(q)), expected)
    both = (p.requires_grad_(), q.requires_grad_())
    assert torch.autograd.gradcheck(lambda a, b: divergence(log_probability(a), log_probability(b)), both)


def test_a5_gradients_are_finite_and_not_zero(dense, mixture, digits):
    image, label = digits[1]
    for model in (dense, mixture):
        health = Health()
        accuracy(model, image, label, 0.1, health=health)
        health.check(most_zero=0.01)
        assert health.zero_share() <= 0.01


def test_a5_eps_is_honoured_and_used(dense, digits):
    image, label = digits[1]
    for eps in (0.03, 0.1, 0.3):
        _, last = accuracy(dense, image, label, eps)
        assert float((last - image).abs().max()) == pytest.approx(eps, abs=1e-6)
        assert last.min() >= 0 and last.max() <= 1


def test_a5_no_room_gives_the_clean_accuracy_and_all_room_breaks_the_model(dense, mixture, digits):
    image, label = digits[1]
    for model in (dense, mixture):
        clean = float((model(image).logits.argmax(-1) == label).float().mean())
        assert clean > 0.8
        assert accuracy(model, image, label, 0.0)[0] == clean
        assert accuracy(model, image, label, 1.0)[0] < 0.05


def test_a5_more_steps_never_help_the_model(dense, mixture, digits):
    image, label = digits[1]
    for model in (dense, mixture):
        few, many = (accuracy(model, image, label, 0.1, n, 0.025)[0] for n in (8, 24))
        assert many <= few + 0.01


def test_attacks_leave_the_model_as_it_was(mixture, digits):
    image, label = digits[1]
    model = mixture.train()
    model.network.router.eval()
    model.network.weighted = True
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with torch.inference_mode():  # as in Lightning's evaluation loops
        accuracy(model, image, label, 0.1, 2)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert model.training and not model.network.router.training and model.network.weighted
    model.network.weighted = False
    model.eval()


def test_route_aware_attacks_are_the_worst_case_and_stay_in_the_ball(mixture, digits):
    image, label = digits[1]
    ball = Ball(0.05, 8, 0.015)
    with attackable(mixture):
        attacker = Attacker(mixture, image, label, generator())
        outcome = survive(attacker, ball)
        found = mixture(outcome.adversarial)
        assert torch.equal(found.logits.argmax(-1) == label, outcome.robust), "what was found does fool the model"
        assert float((outcome.adversarial - image).abs().max()) <= 0.05 + 1e-6
        plain = Attacker(mixture, image, label, generator())
        plain.pgd(ball)
        assert outcome.robust.sum() < (~plain.fooled).sum(), "knowing the router makes a difference here"
        x, flipped = Attacker(mixture, image, label, generator()).reroute(ball)
        now = router_logits(mixture, x)["router"].argmax(-1)
        assert flipped[now != attacker.route["router"]].all() and 0 < flipped.sum() < len(flipped)


@pytest.mark.parametrize("name", ["joint", "soft_mixture", "per_path"])
@pytest.mark.parametrize("scope", ["global", "stage", "layer"])
def test_each_attack_finds_true_adversaries(digits, name, scope):
    """Forced pathways count only where the routers would have gone there."""
    torch.manual_seed(0)
    image = digits[0][0]
    model = AdvMoE(SCHEMA, **SMALL | ROUTER, router_scope=scope)
    for part in model.modules():  # opinions that differ from image to image
        if isinstance(part, torch.nn.Linear):
            torch.nn.init.normal_(part.weight, 0.0, 5.0)
    with torch.no_grad():
        for _ in range(3):
            model.train()(image[:200])
    model.eval()
    said = model(image[200:260]).logits.argmax(-1)
    with attackable(model):
        attacker = Attacker(model, image[200:260], said, generator())
        assert not attacker.fooled.any()
        getattr(attacker, name)(Ball(0.2, 3, 0.1))
        assert attacker.fooled.any()
        now = model(attacker.adversarial).logits.argmax(-1)
        assert torch.equal(now != said, attacker.fooled)


def test_a_dense_network_gets_as_many_tries(dense, digits):
    image, label = digits[1]
    with attackable(dense):
        outcome = survive(Attacker(dense, image, label, generator()), Ball(0.1, 5, 0.05))
        once = Attacker(dense, image, label, generator())
        once.pgd(Ball(0.1, 5, 0.05))
    assert outcome.robust.sum() <= (~once.fooled).sum() and not outcome.flipped.any()


def test_ascend_raises_a_convex_objective_to_the_corner():
    image = torch.full((2, 1, 2, 2), 0.5)
    target = torch.tensor([1.0, 0.0]).view(2, 1, 1, 1)
    x = ascend(lambda x: -(x - target).square().flatten(1).sum(1), image, Ball(0.2, 10, 0.05), image)
    torch.testing.assert_close(x, torch.tensor([0.7, 0.3]).view(2, 1, 1, 1).expand_as(x))
    with pytest.raises(RuntimeError, match="left its ball"):
        check_ball(image, image + 0.3, 0.2)


def test_health_tells_nan_from_zero():
    health = Health()
    health.note(torch.zeros(4, 1, 2, 2), first=True)
    assert health.zero_share() == 1.0
    health.check()
    with pytest.raises(UserError, match="no gradient at all"):
        health.check(most_zero=0.5)
    health.note(torch.full((4, 1, 2, 2), torch.nan), first=False)
    with pytest.raises(UserError, match="4 gradients that are NaN"):
        health.check()


def test_balanced_groups_are_the_best_halves():
    """Against all 126 halves of ten classes."""
    from itertools import combinations

    for seed in range(4):
        means = torch.randn(10, 6, generator=generator(seed), dtype=torch.float64)
        distance = torch.cdist(means, means).square()

        def cost(group, distance=distance):
            return float((distance * (group[:, None] == group)).sum())

        halves = []
        for first in combinations(range(10), 5):
            group = torch.ones(10, dtype=torch.int64)
            group[list(first)] = 0
            halves.append(cost(group))
        assert cost(balanced_groups(means, 2)) <= sorted(halves)[6], "a local optimum, among the best few"
    assert balanced_groups(torch.randn(10, 3, generator=generator()), 3).bincount().tolist() == [4, 3, 3]
    assert balanced_groups(torch.randn(3, 2, generator=generator()), 1).tolist() == [0, 0, 0]


def test_metrics_in_closed_form():
    index = torch.tensor([0, 1, 2, 3, 3])  # the last one repeated by a distributed sampler
    right = torch.tensor([True, True, True, False, False])
    attacked = torch.tensor([True, True, False, True, True])
    pgd = torch.tensor([True, True, False, False, False])
    route = torch.tensor([True, False, False, False, False])
    flipped = torch.tensor([False, True, False, True, True])
    expert = torch.tensor([[0], [1], [1], [1], [1]])
    table = Attacked(index, torch.tensor([0, 1, 0, 1, 1]), right, attacked, pgd, route, flipped, expert)
    result = evaluate(table, 2, None, 50, {0: True, 1: False}, {"square": "text"})
    expected = {
        "sa": 0.75, "ra_pgd50": 2 / 3, "ra_route": 1 / 3, "route_flip": 2 / 3, "ra_aa": 0.5, "aa_flags": 1,
        "aa_flag_square": 1, "expert_share_min": 0.25, "expert_share_max": 0.75,
    }  # fmt: skip
    assert result.metrics == pytest.approx(expected)
    assert result.info["ra_route"].n == 3 and result.info["ra_aa"].n == 2 and result.info["sa"].n == 4
    assert result.units["ra_aa"].to_list() == [1.0, 0.0, None, None]
    assert result.units["ra_pgd50"].to_list() == [1.0, 1.0, None, 0.0]
    assert "route_flip" not in evaluate(table, 0).metrics
    share = expert_by_class(expert[:4, 0], table.label[:4], 2, 3)
    assert share.tolist() == [[0.5, 0.5], [0.0, 1.0], [0.0, 0.0]]


def test_cost_counts_the_router(mixture):
    cost = measure_cost(mixture, torch.rand(8, 1, 8, 8))
    assert 0 < cost.gmacs_router < cost.gmacs and cost.ms_per_image > 0 and cost.images == 8
    plain = DenseCNN(SCHEMA, ratio=0.5, **SMALL).eval()
    assert measure_cost(plain, torch.rand(8, 1, 8, 8)).gmacs_router == 0


def test_autoattack_is_at_least_as_strong_and_its_flags_are_caught(dense, digits, monkeypatch):
    pyautoattack = pytest.importorskip("pyautoattack")
    image, label = (part[:16] for part in digits[1])
    monkeypatch.setattr(pyautoattack.AutoAttack, "_set_version", _short)
    with attackable(dense):
        outcome = robustness_autoattack.auto_attack(dense, image, label, 0.08)
        check_ball(image, outcome.adversarial, 0.08)
        assert torch.equal(dense(outcome.adversarial).logits.argmax(-1) == label, outcome.robust)
        attacker = Attacker(dense, image, label, generator())
        attacker.pgd(Ball(0.08, 20, 0.01))
        assert outcome.robust.sum() <= (~attacker.fooled).sum()
        assert outcome.flags == {}
        with robustness_autoattack._warnings() as said:
            logging.getLogger("auto-attack").warning(
                "there are 3 points with zero gradient! See flags_doc.md for details."
            )
    assert said == ["there are 3 points with zero gradient!"]


def test_autoattack_says_what_to_install(dense, digits, monkeypatch):
    monkeypatch.setattr(robustness_autoattack, "available", lambda: False)
    with pytest.raises(UserError, match=r"moezoo\[robustness\]"):
        robustness_autoattack.auto_attack(dense, *(part[:2] for part in digits[1]), 0.1)


def _short(self, version="standard"):
    self.attacks_to_run = ["apgd-ce", "square"]
    self.apgd.n_restarts, self.apgd.n_iter, self.square.n_queries = 1, 20, 20
