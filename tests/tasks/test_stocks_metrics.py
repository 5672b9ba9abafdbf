"""Metrics of a cross-section: torchmetrics and naive loops as oracles, Newey-West, the null, both ends."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from moezoo.datasets.stocks_panel import StockBatch
from moezoo.tasks.stocks import stock_loss
from moezoo.tasks.stocks_metrics import (
    NullModels,
    centred_ranks,
    daily_ic,
    day_correlation,
    day_ranks,
    defined_days,
    ends,
    information_ratio,
    newey_west_t,
)
from scipy import stats
from torchmetrics.functional import pearson_corrcoef, spearman_corrcoef


def make_days(days=6, names=40, seed=0, ties=False):
    rng = torch.Generator().manual_seed(seed)
    score, label = torch.randn(2, days, names, generator=rng)
    if ties:
        score, label = (score * 2).round(), (label * 2).round()
    mask = torch.arange(names) < torch.randint(25, names + 1, (days, 1), generator=rng)
    return score, label * 0.02, mask


def test_the_ic_loss_is_torchmetrics_pearson_with_the_sign_turned():
    score, label, mask = make_days()
    expected = -torch.stack([pearson_corrcoef(s[m], y[m]) for s, y, m in zip(score, label, mask, strict=True)]).mean()
    torch.testing.assert_close(stock_loss(score, label, mask, "ic"), expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("kind", ["ic", "rank_ic", "mse", "ic_mse"])
def test_a_masked_loss_is_the_loss_of_the_subset(kind):
    score, label, mask = make_days(days=1)
    subset = stock_loss(score[:, mask[0]], label[:, mask[0]], mask[:, mask[0]], kind)
    torch.testing.assert_close(stock_loss(score, label, mask, kind), subset, atol=1e-6, rtol=1e-5)
    hidden = label.masked_fill(~mask, torch.nan)
    torch.testing.assert_close(stock_loss(score, hidden, torch.ones_like(mask), kind), subset, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("kind", ["ic", "rank_ic", "mse", "ic_mse"])
def test_gradients_of_the_losses(kind):
    score, label, mask = make_days(days=2, names=30)
    score = score.double().requires_grad_()
    assert torch.autograd.gradcheck(lambda s: stock_loss(s, label.double(), mask, kind), score)
    (grad,) = torch.autograd.grad(stock_loss(score, label.double(), mask, kind), score)
    assert (grad[~mask] == 0).all() and (grad[mask] != 0).all()


@pytest.mark.parametrize("kind", ["ic", "rank_ic", "mse", "ic_mse"])
def test_days_with_few_names_or_equal_labels_are_skipped(kind):
    score, label, mask = make_days(days=5)
    expected = stock_loss(score[:3], label[:3], mask[:3], kind)
    label[3] = 0.01
    mask[4] = torch.arange(40) < 19
    score.requires_grad_()
    loss = stock_loss(score, label, mask, kind)
    torch.testing.assert_close(loss, expected)
    loss.backward()
    assert score.grad.isfinite().all() and (score.grad[3:] == 0).all()
    nothing = stock_loss(score, label, mask & False, kind)
    assert nothing == 0 and nothing.requires_grad


def test_equal_scores_give_no_nan_gradient():
    _, label, mask = make_days()
    score = torch.zeros_like(label, requires_grad=True)
    stock_loss(score, label, mask, "ic").backward()
    assert score.grad.isfinite().all()


def test_trimming_leaves_out_the_extremes_of_training_labels_alone():
    score, label, mask = make_days(days=1, names=40)
    mask[:] = True
    order = label[0].argsort()
    middle = order[1:39]
    trimmed = stock_loss(score, label, mask, "ic", trim=0.025)
    torch.testing.assert_close(trimmed, -pearson_corrcoef(score[0, middle], label[0, middle]))


def test_losses_do_not_depend_on_the_unit_of_returns_and_survive_half_precision():
    score, label, mask = make_days()
    for kind in ("ic", "rank_ic", "mse"):
        torch.testing.assert_close(stock_loss(score, label, mask, kind), stock_loss(score, label * 1e-4, mask, kind))
    assert stock_loss(score.bfloat16(), label, mask, "ic").dtype == torch.float32


@settings(deadline=None, max_examples=30)
@given(st.integers(0, 10_000), st.booleans())
def test_daily_ic_equals_torchmetrics_and_scipy(seed, ties):
    score, label, mask = make_days(seed=seed, ties=ties)
    ic, rank_ic = daily_ic(score, label, mask)
    for d in range(len(score)):
        s, y = score[d, mask[d]].double(), label[d, mask[d]].double()
        assert float(ic[d]) == pytest.approx(float(pearson_corrcoef(s, y)), abs=1e-9)
        assert float(rank_ic[d]) == pytest.approx(float(spearman_corrcoef(s, y)), abs=1e-6)
        assert float(rank_ic[d]) == pytest.approx(stats.spearmanr(s, y).statistic, abs=1e-9)
        np.testing.assert_allclose(day_ranks(score, mask)[d, mask[d]], stats.rankdata(s))


def test_undefined_days_are_nan_and_silent_models_count_zero():
    score, label, mask = make_days(days=4)
    mask[0] = torch.arange(40) < 19
    label[1] = 0.5
    score[2] = 1.0
    ic, rank_ic = daily_ic(score, label, mask)
    assert ic[:2].isnan().all() and rank_ic[:2].isnan().all() and ic[2] == rank_ic[2] == 0 and not ic[3].isnan()
    assert defined_days(label, mask).tolist() == [False, False, True, True]


def test_ranks_count_infinities_as_names():
    values = torch.tensor([[1.0, math.inf, math.inf, 0.0, 7.0]])
    mask = torch.tensor([[True, True, True, True, False]])
    assert day_ranks(values, mask).tolist() == [[2.0, 3.5, 3.5, 1.0, 0.0]]


def test_centred_ranks_have_no_mean_and_unit_variance():
    _, label, mask = make_days(names=400)
    ranks = centred_ranks(label, mask)
    torch.testing.assert_close(ranks.sum(1), torch.zeros(6), atol=1e-3, rtol=0)
    torch.testing.assert_close(ranks.square().sum(1) / mask.sum(1), torch.ones(6), atol=2e-3, rtol=0)


def naive_newey_west(x, lag):
    n, m = len(x), sum(x) / len(x)
    total = 0.0
    for i in range(n):
        for j in range(n):
            if abs(i - j) <= lag:
                total += (1 - abs(i - j) / (lag + 1)) * (x[i] - m) * (x[j] - m)
    return m / math.sqrt(total / n**2)


@pytest.mark.parametrize("lag", [0, 1, 4, 19])
def test_newey_west_equals_the_double_loop(lag):
    x = torch.randn(60, generator=torch.Generator().manual_seed(lag), dtype=torch.double).cumsum(0) * 0.1 + 0.3
    with_gap = torch.cat([x[:30], torch.tensor([math.nan]), x[30:]])
    assert newey_west_t(with_gap, lag) == pytest.approx(naive_newey_west(x.tolist(), lag), rel=1e-9)


def test_newey_west_knows_overlapping_labels_from_independent_ones():
    """Sums of five of the same shocks: the plain t rejects a true null far too often, Newey-West much less so."""
    rng = torch.Generator().manual_seed(0)
    shocks = torch.randn(300, 504, generator=rng, dtype=torch.double)
    overlapping = shocks.unfold(1, 5, 1).sum(-1)
    plain, honest = (np.array([newey_west_t(x, lag) for x in overlapping]) for lag in (0, 4))
    assert (abs(plain) > 2).mean() > 0.3
    assert (abs(honest) > 2).mean() < 0.15


def test_information_ratio_uses_ddof_one():
    x = torch.tensor([0.1, 0.3, math.nan, 0.2])
    assert information_ratio(x) == pytest.approx(0.2 / 0.1)
    assert math.isnan(information_ratio(torch.tensor([1.0])))


def test_both_ends_by_hand():
    score = torch.arange(25.0)[None]
    label = torch.full((1, 25), 0.0)
    label[0, 20:] = torch.tensor([0.1, 0.1, 0.1, 0.1, -0.9])  # best fifth: 4 of 5 above the mean of -0.02
    label[0, :5] = torch.tensor([-0.1, -0.1, 0.2, 0.2, -0.2])  # worst fifth: 3 of 5 below
    long, short, spread = ends(score, label, torch.ones(1, 25, dtype=torch.bool))
    assert float(long) == pytest.approx(0.8) and float(short) == pytest.approx(0.6)
    assert float(spread) == pytest.approx((-0.1 - 0.0) / 2)


def market(days, names=60, features=6, seed=0, noise_only=True):
    """Persistent exposures to factors whose returns have no mean: what a lucky model lives on."""
    rng = torch.Generator().manual_seed(seed)
    exposure = torch.randn(names, features, generator=rng)
    batches = []
    for start in range(0, days, 10):
        x = exposure + 0.1 * torch.randn(10, names, features, generator=rng)
        factor = 0.0 if not noise_only else torch.randn(10, 1, features, generator=rng)
        label = (x * factor).sum(-1) + torch.randn(10, names, generator=rng)
        nan = torch.full((10, names), math.nan)
        batches.append(
            StockBatch(
                x[:, :, None],
                label,
                torch.ones(10, names, dtype=torch.bool),
                nan,
                nan,
                nan[..., None],
                nan[:, 0],
                torch.arange(start, start + 10),
                torch.arange(names).expand(10, names),
            )
        )
    return batches


def null_of(train, test, models=30):
    null = NullModels.fit(train, 60, models, torch.Generator().manual_seed(0))
    for batch in test:
        null.update(batch.features, batch.label, batch.valid)
    return null


def mean_rank_ic(score, test):
    label, mask = (torch.cat([getattr(b, name) for b in test]) for name in ("label", "valid"))
    return float(daily_ic(score, label, mask)[1].mean())


def test_the_null_is_as_wide_as_luck_with_persistent_factors():
    """Scores without skill that lean on features stay within 3 of the null; an iid error would call them news."""
    outside_iid, z = 0, []
    for seed in range(12):
        batches = market(300, seed=seed)
        train, test = batches[:20], batches[20:]
        _, spread = null_of(train, test).spread()
        weight = torch.randn(6, generator=torch.Generator().manual_seed(100 + seed))
        mean = mean_rank_ic(torch.cat([b.features[:, :, 0] @ weight for b in test]), test)
        z.append(mean / spread)
        outside_iid += abs(mean) > 3 / (60 * 100) ** 0.5
    assert max(map(abs, z)) < 3
    assert outside_iid >= 3, "this market would not fool anybody"


@pytest.mark.parametrize("seed", range(5))
def test_pure_noise_is_within_three(seed):
    batches = market(200, seed=seed)
    _, spread = null_of(batches[:10], batches[10:]).spread()
    score = torch.randn(100, 60, generator=torch.Generator().manual_seed(seed))
    assert abs(mean_rank_ic(score, batches[10:]) / spread) < 3


def test_the_null_finds_skill():
    batches = market(200)
    true = torch.cat([b.label for b in batches[10:]])
    score = true + 5 * torch.randn(true.shape, generator=torch.Generator().manual_seed(1))
    assert mean_rank_ic(score, batches[10:]) / null_of(batches[:10], batches[10:]).spread()[1] > 3


def test_the_null_equals_ridge_on_shuffled_names():
    """One shuffle for all days, computed name by name."""
    batches = market(20)
    got = NullModels.fit(batches, 60, 2, torch.Generator().manual_seed(3)).weight
    rng = torch.Generator().manual_seed(3)
    shuffle = torch.stack([torch.randperm(60, generator=rng) for _ in range(2)])[0]
    x = torch.cat([b.features[:, :, 0] for b in batches])
    x = (x - x.mean(1, keepdim=True)).double().flatten(0, 1)
    y = torch.cat([centred_ranks(b.label, b.valid)[:, shuffle] for b in batches]).double().flatten()
    expected = torch.linalg.solve(x.T @ x + 1e-3 * len(x) * torch.eye(6, dtype=torch.double), x.T @ y)
    torch.testing.assert_close(got[:, 0].double(), expected, atol=1e-5, rtol=1e-4)


def test_correlation_stays_within_one_for_extreme_scores():
    score, label, mask = make_days()
    assert (day_correlation(score * 1e8, label * 1e-6, mask).abs() <= 1 + 1e-5).all()
    torch.testing.assert_close(day_correlation(label * 1e8, label, mask), torch.ones(6))
