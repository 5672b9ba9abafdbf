"""Ranking metrics against scikit-learn and plain definitions, ties included."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from moezoo.tasks.ranking_metrics import grouped_auc, log_loss, mid_ranks, session_metrics
from sklearn.metrics import log_loss as sklearn_log_loss
from sklearn.metrics import ndcg_score, roc_auc_score


@st.composite
def sessions(draw):
    rows, width = draw(st.integers(1, 6)), draw(st.integers(1, 8))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    scores = rng.integers(-3, 4, (rows, width)).astype(float)  # few values: many ties
    labels = rng.integers(0, 2, (rows, width)).astype(float)
    mask = np.arange(width) < rng.integers(1, width + 1, (rows, 1))
    return torch.tensor(scores), torch.tensor(labels), torch.tensor(mask)


@settings(deadline=None, max_examples=60)
@given(sessions())
def test_sessions_agree_with_scikit_learn(batch):
    scores, labels, mask = batch
    metrics = session_metrics(scores, labels, mask)
    for i in range(len(scores)):
        s, y = scores[i][mask[i]].numpy(), labels[i][mask[i]].numpy()
        if 0 < y.sum() < len(y):
            assert float(metrics.session_auc[i]) == pytest.approx(roc_auc_score(y, s), abs=1e-9)
        else:
            assert metrics.session_auc[i].isnan()
        if y.sum() == 0:
            assert metrics.ndcg[i].isnan() and metrics.mrr[i].isnan()
        elif len(y) > 1 and len(set(s)) == len(s):
            assert float(metrics.ndcg[i]) == pytest.approx(ndcg_score([y], [s]), abs=1e-9)
            assert float(metrics.ndcg_at_5[i]) == pytest.approx(ndcg_score([y], [s], k=5), abs=1e-9)
            best = min(int((s > s[j]).sum()) + 1 for j in np.flatnonzero(y))
            assert float(metrics.mrr[i]) == pytest.approx(1 / best)


@settings(deadline=None, max_examples=60)
@given(sessions(), st.randoms())
def test_the_order_of_candidates_is_worth_nothing(batch, random):
    scores, labels, mask = batch
    order = list(range(scores.shape[1]))
    random.shuffle(order)
    before = session_metrics(scores, labels, mask)
    after = session_metrics(scores[:, order], labels[:, order], mask[:, order])
    for name in ("session_auc", "ndcg", "ndcg_at_5", "mrr"):
        torch.testing.assert_close(getattr(before, name), getattr(after, name), equal_nan=True)


def test_a_tie_of_all_is_worth_a_coin_toss():
    flat = torch.zeros(1, 10)
    labels = torch.eye(10)[:1]
    metrics = session_metrics(flat, labels, torch.ones(1, 10, dtype=torch.bool))
    assert float(metrics.session_auc) == 0.5
    assert float(metrics.ndcg) == pytest.approx(1 / np.log2(1 + 5.5))
    assert (mid_ranks(flat, torch.ones(1, 10, dtype=torch.bool)) == 5.5).all()


def test_auc_at_5_looks_at_the_five_best_alone():
    scores = torch.arange(10, 0, -1.0)[None]
    labels = torch.tensor([[0, 1, 0, 0, 1, 1, 1, 1, 1, 1.0]])
    metrics = session_metrics(scores, labels, torch.ones(1, 10, dtype=torch.bool))
    assert float(metrics.auc_at_5) == pytest.approx(roc_auc_score([0, 1, 0, 0, 1], [5, 4, 3, 2, 1]))


@settings(deadline=None, max_examples=60)
@given(st.integers(1, 60), st.integers(1, 8), st.integers(0, 2**32 - 1))
def test_grouped_auc_agrees_with_scikit_learn_group_by_group(samples, groups, seed):
    rng = np.random.default_rng(seed)
    scores, labels = rng.integers(0, 5, samples) / 2, rng.integers(0, 2, samples).astype(float)
    group = rng.integers(0, groups, samples)
    result = grouped_auc(torch.tensor(scores), torch.tensor(labels), torch.tensor(group))
    weighted = []
    for auc, size, key in zip(result.auc, result.size, result.group, strict=True):
        own = group == int(key)
        assert int(size) == own.sum()
        if len(set(labels[own])) == 2:
            expected = roc_auc_score(labels[own], scores[own])
            assert float(auc) == pytest.approx(expected, abs=1e-9)
            weighted.append((expected, own.sum()))
        else:
            assert auc.isnan()
    if weighted:
        aucs, sizes = map(np.array, zip(*weighted, strict=True))
        assert result.weighted() == pytest.approx((aucs * sizes).sum() / sizes.sum(), abs=1e-9)
        assert result.mean() == pytest.approx(aucs.mean(), abs=1e-9)


def test_log_loss_agrees_with_scikit_learn():
    rng = np.random.default_rng(0)
    scores, labels = rng.normal(size=200), rng.integers(0, 2, 200).astype(float)
    expected = sklearn_log_loss(labels, 1 / (1 + np.exp(-scores)))
    assert log_loss(torch.tensor(scores), torch.tensor(labels)) == pytest.approx(expected, abs=1e-9)


def test_a_large_table_agrees_with_a_widely_used_ctr_library():
    """FuxiCTR's metrics on the same predictions; its metric module alone is needed, and only where it is installed."""
    fuxictr = pytest.importorskip("fuxictr.metrics", reason="pip install --no-deps fuxictr, to compare with it")
    rng = np.random.default_rng(0)
    groups, width = 900, 7
    scores, labels = rng.random((groups, width)), rng.integers(0, 2, (groups, width)).astype(float)
    labels[:, 0], labels[:, 1] = 1, 0
    group = np.repeat(np.arange(groups), width)
    names = ["gAUC", "avgAUC", "AUC", "logloss", "NDCG(k=5)"]
    theirs = fuxictr.evaluate_metrics(labels.ravel(), scores.ravel(), names, group_id=group)
    flat = torch.tensor(scores.ravel()), torch.tensor(labels.ravel())
    users, overall = grouped_auc(*flat, torch.tensor(group)), grouped_auc(*flat, torch.zeros(len(group)).long())
    sessions = session_metrics(torch.tensor(scores), torch.tensor(labels), torch.ones(groups, width, dtype=torch.bool))
    ours = {
        "gAUC": users.weighted(),
        "avgAUC": users.mean(),
        "AUC": overall.mean(),
        "logloss": log_loss(torch.logit(flat[0]), flat[1]),
        "NDCG(k=5)": float(sessions.ndcg_at_5.mean()),
    }
    assert ours == pytest.approx({name: theirs[name] for name in ours}, abs=1e-6)
