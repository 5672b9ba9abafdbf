"""The ranking task: the fact sheet's rule rows, losses, probabilities, sparse tables, telemetry, pictures."""

import numpy as np
import pytest
import pytorch_lightning as lightning
import torch
import torch.nn.functional as F
from moezoo import create_model, list_recipes
from moezoo.datasets.ranking import RankingData
from moezoo.recipes import metadata, read
from moezoo.tasks.ranking import RankingTask, Scored, evaluate, ranking_loss
from moezoo.tasks.telemetry import RoutingMonitor
from moezoo.zoo.awmoe import AWMoE
from moezoo.zoo.baselines.ranking import CountRule, LinearScorer, MMoERanker, SessionGatedMoE, TowerRanker
from moezoo.zoo.core.statistics import parameter_counts

# Fact sheet, section 2.3: session AUC and NDCG on the test sessions, session AUC on tail-1 and tail-2.
RULE_ROWS = {
    "popularity": (0.6160, 0.5550, 0.5939, 0.5876),
    "repeat": (0.7511, 0.6735, 0.6069, 0.5000),
    "repeat_popularity": (0.7703, 0.7149, 0.6655, 0.5876),
}


@pytest.fixture(scope="module")
def shipped():
    data = RankingData(cross_features=False)
    data.setup("test")
    return data


def run_test(model, data):
    task = RankingTask(model, schema=data.schema)
    trainer = lightning.Trainer(logger=False, enable_progress_bar=False, enable_model_summary=False, accelerator="cpu")
    trainer.test(task, datamodule=data, verbose=False)
    return task


@pytest.mark.parametrize("rule", RULE_ROWS)
def test_the_rules_reproduce_the_fact_sheet(shipped, rule):
    metrics = run_test(CountRule(rule), shipped).result.metrics
    got = [metrics[name] for name in ("session_auc", "ndcg", "session_auc_tail1", "session_auc_tail2")]
    assert got == pytest.approx(RULE_ROWS[rule], abs=5.1e-5)
    assert "logloss" not in metrics, "counts are no probabilities"


def test_chance_is_chance_and_inverse_popularity_mirrors_popularity(shipped):
    torch.manual_seed(0)
    assert run_test(CountRule("random"), shipped).result.metrics["session_auc"] == pytest.approx(0.5, abs=0.01)
    inverse = run_test(CountRule("inverse_popularity"), shipped).result.metrics["session_auc"]
    assert inverse == pytest.approx(1 - RULE_ROWS["popularity"][0], abs=5.1e-5)


def test_units_average_to_the_metrics(shipped):
    result = run_test(CountRule("repeat"), shipped).result
    assert result.units["session_auc"].mean() == pytest.approx(result.metrics["session_auc"])
    tail = result.units.filter("tail1")
    assert tail["session_auc"].mean() == pytest.approx(result.metrics["session_auc_tail1"])
    assert result.info["session_auc_tail1"].n == len(tail) == 1005


def make_scored(scores, labels, mask):
    rows = len(scores)
    zeros = torch.zeros(rows, dtype=torch.long)
    return Scored(
        scores, labels, mask, torch.arange(rows), torch.arange(rows), torch.zeros(rows, 0, dtype=torch.bool),
        zeros, zeros, torch.zeros(rows, 0),
    )  # fmt: skip


def test_point_wise_data_has_group_metrics_and_no_session_auc():
    scores = torch.randn(20, 1).double()
    labels = torch.randint(0, 2, (20, 1)).float()
    scored = make_scored(scores, labels, torch.ones(20, 1, dtype=torch.bool))._replace(user=torch.arange(20) // 5)
    metrics = evaluate(scored).metrics
    assert "session_auc" not in metrics and {"gauc", "auc", "logloss"} <= set(metrics)


@pytest.mark.parametrize("kind", ["pointwise", "listwise", "pairwise"])
def test_losses_equal_their_definitions_and_ignore_padding(kind):
    torch.manual_seed(0)
    scores = torch.randn(5, 6, dtype=torch.double, requires_grad=True)
    labels = torch.zeros(5, 6)
    labels[:, 0] = labels[1, 2] = 1
    mask = torch.arange(6) < torch.tensor([6, 5, 4, 3, 2])[:, None]
    expected = []
    for s, y, m in zip(scores, labels, mask, strict=True):
        s, y = s[m], y[m]
        if kind == "pointwise":
            expected += list(F.binary_cross_entropy_with_logits(s, y.double(), reduction="none"))
        elif kind == "listwise":
            expected.append(F.cross_entropy(s[None], (y / y.sum()).double()[None]))
        else:
            expected.append(F.softplus(s[y == 0][:, None] - s[y > 0]).mean())
    loss = ranking_loss(scores, labels, mask, kind)
    torch.testing.assert_close(loss, torch.stack(expected).mean())
    loss.backward()
    assert scores.grad.isfinite().all() and (scores.grad[~mask] == 0).all()


def test_listwise_scores_become_log_odds_of_the_session_share():
    task = RankingTask(CountRule(), loss="listwise")
    task.probabilistic = True
    raw = torch.tensor([[2.0, 1.0, -1.0], [5.0, 0.0, 9.0]])
    mask = torch.tensor([[True, True, True], [True, True, False]])
    logits = task.logits(type("Output", (), {"scores": raw}), mask)
    probability = logits.sigmoid()
    torch.testing.assert_close(probability[0], raw[0].double().softmax(-1))
    torch.testing.assert_close(probability[1, :2], raw[1, :2].double().softmax(-1))


@pytest.fixture(scope="module")
def small():
    data = RankingData(cross_attributes=["brand"], history_length=8, batch_size=64, epoch_sessions=640)
    data.setup("fit")
    return data


MODELS = {
    "awmoe": lambda s: AWMoE(s, hidden=8),
    "din": lambda s: TowerRanker(s, hidden=8),
    "dnn": lambda s: TowerRanker(s, pooling="mean", hidden=8),
    "pooled": lambda s: SessionGatedMoE(s, hidden=8),
    "category": lambda s: SessionGatedMoE(s, "category", hidden=8, parent="department"),
    "mmoe": lambda s: MMoERanker(s, hidden=8),
}


@pytest.mark.parametrize("name", MODELS)
def test_every_model_learns_from_a_few_batches(small, name):
    torch.manual_seed(0)
    task = RankingTask(MODELS[name](small.schema), schema=small.schema)
    optimizer = torch.optim.Adam(task.parameters(), 3e-3)
    losses = []
    for _ in range(2):
        for batch in small.train_dataloader():
            output = task(batch)
            loss = ranking_loss(output.scores, batch.labels, batch.candidate_mask, "listwise") + task.record(
                output.routing
            )
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(float(loss.detach()))
    untouched = [n for n, p in task.named_parameters() if p.grad is None]
    assert not untouched
    assert np.mean(losses[-5:]) < np.mean(losses[:3]) - 0.1


def test_the_linear_scorer_is_at_the_optimum_and_above_the_best_rule():
    torch.manual_seed(0)
    data = RankingData(epoch_sessions=6000)
    data.setup("fit")
    model = LinearScorer(data.schema)
    loader = list(data.train_dataloader())
    model.fit(loader)
    weight = model.weight.double().requires_grad_()
    dense, labels, mask = (
        torch.cat([F.pad(v, (0, 0) * (v.ndim - 2) + (0, 10 - v.shape[1])) for v in values])
        for values in zip(*((b.dense, b.labels, b.candidate_mask) for b in loader), strict=True)
    )
    loss = ranking_loss(dense.double() @ weight, labels, mask, "listwise") + model.l2 * weight.square().sum()
    (gradient,) = torch.autograd.grad(loss, weight)
    assert gradient.abs().max() < 1e-4
    assert run_test(model, data).result.metrics["session_auc"] > 0.785


def test_sparse_tables_train_as_dense_ones_do(small):
    """SGD has no state, so one step with sparse gradients must equal one with dense gradients."""

    def trained(sparse):
        torch.manual_seed(0)
        model = AWMoE(small.schema, hidden=8, sparse=sparse, contrastive_weight=0.0)
        task = RankingTask(
            model,
            optimizer=lambda p: torch.optim.SGD(p, 0.1),
            sparse_optimizer=lambda p: torch.optim.SGD(p, 0.1),
            schema=small.schema,
        )
        trainer = lightning.Trainer(
            max_steps=1, logger=False, enable_progress_bar=False, enable_model_summary=False,
            enable_checkpointing=False, accelerator="cpu", limit_val_batches=0,
        )  # fmt: skip
        torch.manual_seed(1)
        trainer.fit(task, datamodule=small)
        return model

    dense, sparse = trained(False), trained(True)
    assert sparse.embeddings.table.weight.grad.is_sparse
    for a, b in zip(dense.parameters(), sparse.parameters(), strict=True):
        torch.testing.assert_close(a, b, atol=2e-5, rtol=1e-4)


def test_telemetry_logs_and_draws_who_goes_where(small, tmp_path):
    task, monitor = RankingTask(AWMoE(small.schema, hidden=8), schema=small.schema), RoutingMonitor()
    trainer = lightning.Trainer(
        max_epochs=2, limit_val_batches=1, logger=False, enable_progress_bar=False, enable_model_summary=False,
        enable_checkpointing=False, callbacks=[monitor], accelerator="cpu",
    )  # fmt: skip
    trainer.fit(task, datamodule=small)
    assert {f"moe/gate/{n}" for n in ("load_entropy", "token_entropy", "max_violation")} <= set(
        trainer.callback_metrics
    )
    shares = torch.tensor(monitor.shares["gate"])
    assert shares.shape == (2, 4)  # steps 10 and 20
    torch.testing.assert_close(shares.sum(1), torch.ones(2))
    (picture,) = monitor.draw(tmp_path)
    assert picture.read_bytes().startswith(b"\x89PNG")
    again = RoutingMonitor()
    again.load_state_dict(monitor.state_dict())
    assert again.shares == monitor.shares


@pytest.mark.parametrize("twin", [r for r in list_recipes("ranking/*") if metadata(r).twin_of])
def test_a_dense_twin_has_the_parameters_of_its_moe(twin):
    moe, dense = create_model(metadata(twin).twin_of), create_model(twin)
    ours, theirs = parameter_counts(moe), parameter_counts(dense)
    assert theirs["active"] == pytest.approx(ours["active"], rel=0.02)
    # Embeddings are the same on both sides and must not hide a difference in what computes.
    tables = moe.embeddings.table.weight.numel()
    assert theirs["total"] - tables == pytest.approx(ours["total"] - tables, rel=0.02)
    same = ("seed_everything", "trainer", "data")
    assert {k: read(twin)[k] for k in same} == {k: read(metadata(twin).twin_of)[k] for k in same}


@pytest.mark.parametrize("recipe", list_recipes("ranking/*"))
def test_every_recipe_builds(recipe):
    info = metadata(recipe)
    model = create_model(recipe)
    assert info.kind == "rule" or sum(t.numel() for t in model.state_dict().values()) > 0
