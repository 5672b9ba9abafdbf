"""Metrics of reward models against closed forms, brute force and hand-made cases (fact sheet, check 2)."""

import math
from itertools import combinations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from moezoo.tasks.rewards_bon import best_of_n, kl_of_best, overoptimisation, pool_matrix, sizes_up_to
from moezoo.tasks.rewards_metrics import judge_report, length_bias, pair_accuracy, pair_scores, router_report


def test_perfect_opposite_and_constant_scorers():
    quality = torch.arange(12.0).reshape(6, 2).flip(1)  # the chosen one is better
    for scorer, expected in ((quality, 1.0), (-quality, 0.0), (torch.zeros(6, 2), 0.5)):
        got = pair_accuracy(*scorer.unbind(1), torch.tensor([0, 0, 0, 1, 1, -1]), ["a", "b"])
        assert got.micro == got.macro == expected and got.n == 6
        assert got.micro_se == pytest.approx(math.sqrt(expected * (1 - expected) / 6))
        assert {name: part.n for name, part in got.by_task.items()} == {"a": 3, "b": 2}


def test_macro_weighs_tasks_alike_and_unknown_tasks_count_in_micro():
    chosen = torch.tensor([1.0, 1.0, 1.0, 0.0, 1.0])
    got = pair_accuracy(chosen, torch.full((5,), 0.5), torch.tensor([0, 0, 0, 1, -1]))
    assert (got.micro, got.macro) == (0.8, 0.5)
    assert got.by_task["0"].value == 1.0 and got.by_task["1"].value == 0.0
    alone = pair_accuracy(chosen, torch.full((5,), 0.5))
    assert alone.macro == alone.micro == 0.8 and not alone.by_task
    assert math.isnan(pair_accuracy(torch.zeros(0), torch.zeros(0)).micro)


def test_nan_rewards_are_seen():
    scores = pair_scores(torch.tensor([math.nan, 1.0]), torch.tensor([0.0, 1.0]))
    assert scores[0].isnan() and scores[1] == 0.5


def test_router_report_equals_sklearn():
    metrics = pytest.importorskip("sklearn.metrics")
    torch.manual_seed(0)
    task = torch.randint(-1, 4, (200,))
    logits = torch.randn(200, 5) + 2 * torch.nn.functional.one_hot(task.clamp(min=0), 5)
    got, known = router_report(logits, task), task >= 0
    truth, said = task[known].numpy(), logits[known].argmax(-1).numpy()
    assert got.accuracy == pytest.approx(metrics.accuracy_score(truth, said))
    assert got.macro_f1 == pytest.approx(metrics.f1_score(truth, said, average="macro"))
    assert got.confusion.tolist() == metrics.confusion_matrix(truth, said, labels=range(5)).tolist()
    assert got.n == int(known.sum())
    assert math.isnan(router_report(logits, torch.full((200,), -1)).accuracy)


def test_length_bias_of_rules():
    length = torch.tensor([[10, 5], [10, 5], [3, 9], [4, 4]])
    long = length_bias(*length.double().log1p().unbind(1), length)
    assert long.length_accuracy == (1 + 1 + 0 + 0.5) / 4
    assert (long.accuracy_longer, long.accuracy_shorter) == (1.0, 0.0)
    assert long.prefers_longer == (1 + 1 + 1 + 0.5) / 4 and long.correlation == pytest.approx(1.0)
    short = length_bias(*(-length.double().log1p()).unbind(1), length)
    assert short.correlation == pytest.approx(-1.0) and short.prefers_longer == 0.125
    same = torch.full((4, 2), 7)
    flat = length_bias(torch.ones(4), torch.zeros(4), same)
    assert flat.length_accuracy == 0.5 and math.isnan(flat.correlation) and math.isnan(flat.accuracy_longer)


def test_judge_report_counts_only_steady_answers():
    forward, swapped = torch.tensor([0, 0, 1, 2, -1]), torch.tensor([0, 1, 1, 2, -1])
    got = judge_report(forward, swapped, torch.tensor([0, 0, 0, 2, 0]))
    assert (got.consistency, got.agreement) == (0.6, 0.4)


def test_kl_of_best():
    assert kl_of_best(1) == 0.0
    assert kl_of_best(4) == pytest.approx(0.636, abs=5e-4) and kl_of_best(32) == pytest.approx(2.497, abs=5e-4)
    assert sizes_up_to(1) == [1] and sizes_up_to(6) == [1, 2, 4, 6] and sizes_up_to(8) == [1, 2, 4, 8]


def brute_force(proxy, gold, n):
    """Mean over all n-subsets; a tie at the top is broken evenly."""
    total, subsets = 0.0, list(combinations(range(len(proxy)), n))
    for subset in subsets:
        best = max(proxy[i] for i in subset)
        top = [gold[i] for i in subset if proxy[i] == best]
        total += sum(top) / len(top)
    return total / len(subsets)


@given(st.integers(0, 10_000), st.integers(1, 8), st.booleans())
def test_best_of_n_equals_brute_force(seed, candidates, ties):
    draw = torch.Generator().manual_seed(seed)
    gold = torch.randn(3, candidates, generator=draw, dtype=torch.double)
    proxy = (
        torch.randint(0, 3, gold.shape, generator=draw).double() if ties else torch.randn(gold.shape, generator=draw)
    )
    got = best_of_n(proxy.double(), gold, range(1, candidates + 1))
    for k, n in enumerate(got.n.tolist()):
        expected = sum(brute_force(p, g, n) for p, g in zip(proxy.tolist(), gold.tolist(), strict=True)) / 3
        assert float(got.gold[k]) == pytest.approx(expected, abs=1e-9)
    torch.testing.assert_close(got.gold[0], gold.mean())
    torch.testing.assert_close(got.gold[-1] if not ties else got.proxy[-1], (
        gold.gather(1, proxy.argmax(1, keepdim=True)).mean() if not ties else proxy.max(1).values.mean()
    ))  # fmt: skip


def test_best_of_n_of_ragged_pools_and_large_ones():
    proxy = torch.tensor([[1.0, 3.0, 2.0, math.nan], [4.0, 1.0, 3.0, 2.0]])
    gold = torch.tensor([[0.1, 0.2, 0.9, math.nan], [1.0, 0.0, 0.5, 0.5]])
    got = best_of_n(proxy, gold)
    assert got.n.tolist() == [1, 2, 3]
    expected = [(brute_force([1, 3, 2], [0.1, 0.2, 0.9], n) + brute_force([4, 1, 3, 2], [1, 0, 0.5, 0.5], n)) / 2
                for n in (1, 2, 3)]  # fmt: skip
    torch.testing.assert_close(got.gold, torch.tensor(expected, dtype=torch.double), atol=1e-6, rtol=0)
    assert best_of_n(proxy, gold, [4]).gold.tolist() == pytest.approx([1.0])  # only one pool is as large
    many = torch.randn(2, 12_500, dtype=torch.double, generator=torch.Generator().manual_seed(0))
    curve = best_of_n(many, many, [1, 4, 12_500])
    assert curve.gold[0] == pytest.approx(float(many.mean())) and float(curve.gold[1]) == pytest.approx(1.03, abs=0.02)
    torch.testing.assert_close(curve.gold[2], many.max(1).values.mean())
    with pytest.raises(ValueError, match="between 1 and 4"):
        best_of_n(proxy, gold, [5])
    with pytest.raises(ValueError, match="every pool needs"):
        best_of_n(torch.full((1, 2), math.nan), torch.ones(1, 2))


def test_overoptimisation_is_the_fall_from_the_peak():
    got = overoptimisation(torch.tensor([1, 2, 4, 8]), torch.tensor([0.1, 0.6, 0.5, 0.4]))
    assert got.score == pytest.approx(0.2) and got.peak == 2
    assert overoptimisation(torch.tensor([1, 2, 4]), torch.tensor([0.0, 0.1, 0.2])) == (0.0, 4)


def test_pool_matrix_gathers_candidates_of_interleaved_rows():
    reward = torch.tensor([[1.0, 2.0], [9.0, 9.0], [3.0, 4.0], [5.0, 5.0]])
    gold = torch.tensor([[10.0, 20.0], [math.nan, math.nan], [30.0, 40.0], [50.0, math.nan]])
    proxy, truth = pool_matrix(reward, gold, torch.tensor([7, -1, 2, 7]))
    assert proxy.shape == (2, 3)
    assert proxy[0, :2].tolist() == [3.0, 4.0] and proxy[0, 2].isnan()
    assert proxy[1].tolist() == [1.0, 2.0, 5.0] and truth[1].tolist() == [10.0, 20.0, 50.0]
    none = pool_matrix(reward, gold, torch.full((4,), -1))
    assert none[0].shape == (0, 0)
