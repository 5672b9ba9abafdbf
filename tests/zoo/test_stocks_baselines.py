"""MIGA's rivals: padding and symmetry, closed forms against scikit-learn, TRA without foresight, equal sizes."""

import copy
import math
import sys

import numpy as np
import pytest
import torch
from moezoo import create_model, list_recipes
from moezoo.datasets.stocks_panel import StockBatch
from moezoo.errors import UserError
from moezoo.recipes import metadata
from moezoo.zoo.base import ZooModel
from moezoo.zoo.baselines.stocks import (
    TRA,
    EncoderRanker,
    EnsembleRanker,
    FeatureRule,
    LightGBMRanker,
    RidgeRanker,
    StyleRule,
    SwitchRanker,
    centre,
    rank_target,
    standardise,
    transport_loss,
)
from moezoo.zoo.core.statistics import parameter_counts
from sklearn.linear_model import Ridge

SCHEMA = {
    "dataset": "made", "fingerprint": "0", "num_features": 5, "features": ["a", "b", "c", "d", "e"],
    "lookback": 6, "horizon": 2, "styles": ["size", "momentum"], "days_per_year": 252,
}  # fmt: skip


def make_batch(days=3, names=24, seed=0, first=0):
    rng = torch.Generator().manual_seed(seed)
    valid = torch.ones(days, names, dtype=torch.bool)
    valid[0, -4:] = False
    features = torch.randn(days, names, 6, 5, generator=rng) * valid[..., None, None]
    label = features[:, :, -1, 0] - 2 * features[:, :, -1, 1] + 0.1 * torch.randn(days, names, generator=rng)
    label[days - 1, 0] = math.nan
    return StockBatch(
        features, label.masked_fill(~valid, math.nan), valid, label, valid / names,
        torch.rand(days, names, 2, generator=rng), torch.zeros(days), torch.arange(first, first + days),
        torch.arange(names).expand(days, names).masked_fill(~valid, -1),
    )  # fmt: skip


def score(model, batch, **changes):
    from inspect import signature

    names = [n for n in signature(model.forward).parameters if n in StockBatch._fields]
    return model(**{n: getattr(batch, n) for n in names} | changes)


MODELS = {
    "twin": lambda: EncoderRanker(SCHEMA, hidden=8, head=12, cross_section=True),
    "linear head": lambda: EncoderRanker(SCHEMA, "rec", hidden=8),
    "switch": lambda: SwitchRanker(SCHEMA, hidden=8, experts=4, expert_hidden=8),
    "ensemble": lambda: EnsembleRanker(SCHEMA, 2, hidden=8, head=4),
    "tra": lambda: TRA(SCHEMA, hidden=8),
    "style": lambda: StyleRule(SCHEMA),
    "feature": lambda: FeatureRule(SCHEMA, "b"),
    "ridge": lambda: fitted(RidgeRanker(SCHEMA)),
    "ridge of windows": lambda: fitted(RidgeRanker(SCHEMA, window=True)),
}


def fitted(model):
    model.fit([make_batch(seed=s) for s in range(4)])
    return model


def padded(batch, extra=5):
    def pad(values):
        if values.ndim < 2:
            return values
        fill = -1 if values.dtype == torch.long else False if values.dtype == torch.bool else 7.0
        return torch.cat([values, torch.full((len(values), extra, *values.shape[2:]), fill, dtype=values.dtype)], 1)

    return StockBatch(*(pad(v) for v in batch))


@pytest.mark.parametrize("name", MODELS)
def test_padding_and_order_of_names_do_not_matter(name):
    torch.manual_seed(0)
    model, batch = MODELS[name]().eval(), make_batch()
    once = score(model, batch).score
    assert (once[~batch.valid] == 0).all() and once[batch.valid].std() > 1e-3
    wider = score(copy.deepcopy(model), padded(batch)).score
    torch.testing.assert_close(wider[:, :24], once, atol=1e-5, rtol=1e-5)
    order = torch.randperm(24)
    moved = StockBatch(*(v[:, order] if v.ndim > 1 else v for v in batch))
    torch.testing.assert_close(score(copy.deepcopy(model), moved).score, once[:, order], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", ["twin", "linear head", "switch", "ensemble", "tra"])
def test_every_parameter_gets_gradient(name):
    torch.manual_seed(0)
    model = MODELS[name]()
    for first in (0, 10, 14):  # TRA's router hears nothing before it has a past
        output = score(model, make_batch(first=first, days=6))
    (output.score.square().sum() + sum(r.aux_loss for r in output.routing.values())).backward()
    quiet = [n for n, p in model.named_parameters() if p.grad is None or p.grad.abs().sum() == 0]
    # An idle Switch expert has none; a bias on all keys leaves a softmax as it is.
    assert all("bias" in n for n in quiet), quiet


def test_ridge_equals_scikit_learn():
    batches = [make_batch(seed=s) for s in range(4)]
    model = RidgeRanker(SCHEMA, penalty=0.01)
    model.fit(batches)
    rows, targets = [], []
    for b in batches:
        known = b.valid & ~b.label.isnan()
        rows.append(centre(b.features[:, :, -1], known[..., None])[known])
        targets.append(rank_target(b.label, known)[known])
    x, y = torch.cat(rows).double().numpy(), torch.cat(targets).double().numpy()
    expected = Ridge(alpha=0.01 * len(x), fit_intercept=False).fit(x, y).coef_
    np.testing.assert_allclose(model.weight, expected, atol=1e-5)
    assert model.weight[0] > 0.2 and model.weight[1] < -0.4


def test_rank_targets_are_centred_ranks_of_unit_variance():
    batch = make_batch(names=200)
    known = batch.valid & ~batch.label.isnan()
    y = rank_target(batch.label, known)
    assert y.sum(1).abs().max() < 1e-2 and (y[~known] == 0).all()
    assert y[known].var() == pytest.approx(1, abs=0.02)
    assert (y[1].argsort() == batch.label[1].argsort()).all()
    z = standardise(batch.label.nan_to_num(), known)
    torch.testing.assert_close(z.square().sum(1) / known.sum(1), torch.ones(3))


def test_lightgbm_learns_saves_and_loads(tmp_path):
    model = LightGBMRanker(SCHEMA, rounds=30, min_leaf=5)
    with pytest.raises(UserError, match="fit"):
        score(model, make_batch())
    fitted(model)
    batch = make_batch(seed=9)
    got = score(model, batch).score
    known = batch.valid & ~batch.label.isnan()
    assert torch.corrcoef(torch.stack([got[known], batch.label[known]]))[0, 1] > 0.7
    model.save_pretrained(tmp_path / "w")
    again = ZooModel.from_pretrained(tmp_path / "w")
    assert torch.equal(score(again, batch).score, got)
    again.load_state_dict(fitted(LightGBMRanker(SCHEMA, rounds=3, min_leaf=5)).state_dict())
    assert not torch.equal(score(again, batch).score, got), "old trees must not outlive their state"


def test_without_lightgbm_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "lightgbm", None)
    with pytest.raises(UserError, match=r"moezoo\[stocks\]"):
        fitted(LightGBMRanker(SCHEMA))


def tra_with_past(labels):
    torch.manual_seed(0)
    model = TRA(SCHEMA, hidden=8, history=4).eval()
    outputs = []
    for day, label in enumerate(labels):
        batch = make_batch(days=1, first=day, seed=day)
        batch = batch._replace(label=torch.where(batch.valid, label, math.nan))
        outputs.append(score(model, batch).routing["predictors"].scores)
    return torch.stack(outputs)


def test_tra_reads_an_error_once_its_label_has_ended_and_not_before():
    """horizon 2: the label of day 3 is known at the close of day 6, so scores up to day 5 must be bit-equal."""
    labels = list(torch.randn(9, 24, generator=torch.Generator().manual_seed(1)))
    before = tra_with_past(labels)
    labels[3] = labels[3].flip(0)
    after = tra_with_past(labels)
    assert torch.equal(before[:6], after[:6])
    assert not torch.equal(before[6], after[6])


def test_tra_forgets_on_reset_and_keeps_no_memory_in_its_weights():
    torch.manual_seed(0)
    model = TRA(SCHEMA, hidden=8).eval()
    fresh = score(model, make_batch(first=3)).routing["predictors"].scores
    score(model, make_batch(first=0))
    assert not torch.equal(score(model, make_batch(first=3)).routing["predictors"].scores, fresh)
    assert "memory" not in model.state_dict()
    model.reset()
    assert torch.equal(score(model, make_batch(first=3)).routing["predictors"].scores, fresh)


def test_tra_trains_on_after_lightning_validated_it():
    """Lightning validates in inference mode, where the memory may be made."""
    model = TRA(SCHEMA, hidden=8)
    with torch.inference_mode():
        score(model.eval(), make_batch(first=3))
    output = score(model.train(), make_batch(first=3))
    (output.score.sum() + output.routing["predictors"].aux_loss).backward()


def test_tra_takes_one_predictor_and_scores_without_a_label():
    torch.manual_seed(0)
    model, batch = TRA(SCHEMA, hidden=8), make_batch()
    for training in (True, False):
        output = score(model.train(training), batch)
        record = output.routing["predictors"]
        torch.testing.assert_close(record.weights[batch.valid.flatten()], torch.ones(int(batch.valid.sum()), 1))
        assert (record.indices[~batch.valid.flatten()] == -1).all()
        assert (record.aux_loss > 0) == training
    unlabelled = score(model, batch, label=batch.label * math.nan).score
    assert torch.equal(unlabelled, score(model, batch, label=None).score)


def test_the_transport_plan_shares_out_the_samples():
    """One predictor best everywhere: the plan still gives each a third, so a router that uses one alone is dear."""
    error = torch.rand(2, 60, 3) * torch.tensor([0.1, 1.0, 1.0])
    known = torch.ones(2, 60, dtype=torch.bool)
    one = torch.zeros(2, 60, 3)
    one[..., 0] = 8
    assert transport_loss(one, error, known) > 2 * transport_loss(torch.zeros(2, 60, 3), error, known)
    assert transport_loss(torch.zeros(2, 60, 3), error, known).item() == pytest.approx(math.log(3), abs=1e-4)
    padding = known.clone()
    padding[1] = False
    alone = transport_loss(one[:1], error[:1], known[:1])
    torch.testing.assert_close(transport_loss(one, error, padding), alone)


def test_the_ensemble_is_the_mean_of_its_standardised_members():
    torch.manual_seed(0)
    model, batch = EnsembleRanker(SCHEMA, 3, hidden=8), make_batch()
    output = score(model, batch)
    each = [member(batch.features, batch.valid).score for member in model.members]
    torch.testing.assert_close(output.members, torch.stack(each, -1))
    torch.testing.assert_close(output.score, sum(standardise(e, batch.valid) for e in each) / 3)


def test_rules_by_hand():
    batch = make_batch()
    torch.testing.assert_close(score(StyleRule(SCHEMA, "size", -1), batch).score, -batch.style[..., 0] * batch.valid)
    torch.testing.assert_close(score(FeatureRule(SCHEMA, "c"), batch).score, -batch.features[:, :, -1, 2])


@pytest.mark.parametrize(
    ("build", "says"),
    [
        (lambda: StyleRule(SCHEMA, "value"), "size, momentum"),
        (lambda: StyleRule(SCHEMA, sign=2), "sign=2"),
        (lambda: FeatureRule(SCHEMA, "z"), "a, b, c, d, e"),
        (lambda: FeatureRule(SCHEMA, 5), "5 features"),
    ],
)
def test_mistakes_are_one_line(build, says):
    with pytest.raises(UserError, match=says):
        build()


TWINS = [name for name in list_recipes("stocks/*") if metadata(name).twin_of]


@pytest.mark.parametrize("name", TWINS)
def test_twins_have_the_active_parameters_of_what_they_are_twins_of(name):
    sizes = {"num_features": 29, "lookback": 8} if "planted" not in name else {"num_features": 4, "lookback": 1}
    schema = SCHEMA | sizes | {"styles": ["size", "volatility", "momentum"]}
    twin, moe = (parameter_counts(create_model(n, schema=schema))["active"] for n in (name, metadata(name).twin_of))
    assert abs(twin / moe - 1) < 0.02


def test_the_main_recipe_has_a_twin():
    assert {"stocks/miga", "stocks/miga_planted"} <= {metadata(name).twin_of for name in TWINS}
