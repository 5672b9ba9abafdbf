"""The relations task on a few generated clips: losses in closed form, learning, results, tables, pictures; A10, A11."""

import math

import numpy as np
import polars as pl
import pytest
import pytorch_lightning as lightning
import torch
import torch.nn.functional as F
from moezoo.cli import main
from moezoo.datasets.relations import RelationsData
from moezoo.datasets.relations_formats import read_relations
from moezoo.errors import UserError
from moezoo.leaderboard.results import check_units
from moezoo.tasks.relations import RelationsTask, class_loss, expert_usage, predicate_loss
from moezoo.tasks.relations_eval import evaluate
from moezoo.zoo.baselines.relations import FrequencyPrior, RelationExpert
from moezoo.zoo.moevrd import MoEVRD


@pytest.fixture(scope="module")
def data():
    data = RelationsData(files={"train": 24, "valid": 3, "test": 6, "noise": 0.2, "domains": 2}, batch_size=16)
    for split in ("train", "valid", "test"):
        data.windows(split)
    return data


def make_trainer(**changes):
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "accelerator": "cpu"}
    return lightning.Trainer(**quiet | {"enable_checkpointing": False, "num_sanity_val_steps": 0} | changes)


def run_test(model, data, **changes):
    task = RelationsTask(model, schema=data.schema, **changes)
    make_trainer().test(task, datamodule=data, verbose=False)
    return task


def adam(parameters):
    return torch.optim.AdamW(parameters, lr=8e-3)


@pytest.fixture(scope="module")
def trained(data):
    torch.manual_seed(0)
    task = RelationsTask(MoEVRD(data.schema, hidden=16, experts=3), adam, schema=data.schema)
    trainer = make_trainer(max_epochs=12, check_val_every_n_epoch=12)
    trainer.fit(task, datamodule=data)
    task.seen = dict(trainer.callback_metrics)
    make_trainer().test(task, datamodule=data, verbose=False)
    return task


def test_losses_in_closed_form():
    torch.manual_seed(0)
    logits, label = torch.randn(9, 4, dtype=torch.float64, requires_grad=True), torch.randint(0, 4, (9,))
    torch.testing.assert_close(class_loss(logits.log_softmax(1), label, 0.0), F.cross_entropy(logits, label).float())
    p = logits.detach().softmax(1)
    wanted = sum((1 - p[i, label[i]]) ** 2 * -p[i, label[i]].log() for i in range(9)) / 9
    torch.testing.assert_close(class_loss(logits.log_softmax(1), label, 2.0), wanted.float())
    # The factor has no gradient.
    (slope,) = torch.autograd.grad(class_loss(logits.log_softmax(1), label, 2.0), logits)
    factor = (1 - p.gather(1, label[:, None])) ** 2
    torch.testing.assert_close(slope, factor * (p - F.one_hot(label, 4)) / 9, atol=1e-6, rtol=1e-4)
    odds, target = torch.randn(5, 3), (torch.rand(5, 3) < 0.5).float()
    torch.testing.assert_close(predicate_loss(odds, target, 0.0), F.binary_cross_entropy_with_logits(odds, target))
    q = torch.where(target > 0, odds.sigmoid(), 1 - odds.sigmoid())
    torch.testing.assert_close(predicate_loss(odds, target, 2.0), ((1 - q) ** 2 * -q.log()).mean())


def test_usage_is_counted_by_domain():
    gates = torch.tensor([[0.5, 0.5, 0.0], [0.9, 0.0, 0.1], [0.0, 0.5, 0.5]])
    domains, usage = expert_usage(gates, torch.tensor([3, 3, 1]))
    assert domains == [1, 3] and usage.tolist() == [[0, 1, 1], [1, 0.5, 0.5]]


def test_training_learns_and_validation_says_so(trained, data):
    untrained = run_test(MoEVRD(data.schema, hidden=16, experts=3), data).result.metrics
    assert trained.result.metrics["map"] > untrained["map"] + 0.1
    assert trained.result.metrics["object_accuracy"] > 0.5
    assert float(trained.seen["val/map"]) > 0.05 and {"train/subject", "val/object_accuracy"} <= trained.seen.keys()


def test_result_has_the_leaderboards_metrics_and_units(trained, data):
    result = trained.result
    wanted = {"map", "recall_at_50", "recall_at_100", "precision_at_1", "precision_at_5", "precision_at_10"}
    assert wanted | {"predicate_map", "object_accuracy", "usage_std_over_domains"} <= result.metrics.keys()
    assert result.metrics.keys() == result.info.keys()
    check_units(result.units)
    assert result.units["map"].mean() == pytest.approx(result.metrics["map"])
    again = evaluate(data.truth("test"), trained.tested.predictions)
    assert again.metrics["map"] == result.metrics["map"]
    assert trained.tested.usage.shape == (2, 3) and (trained.tested.usage.sum(1) - 2).abs().max() < 1e-6


def test_batches_of_any_size_score_the_same(trained, data):
    small = RelationsData(files=data.files, eval_batch_size=3)
    task = run_test(trained.model, small)
    assert task.result.metrics == pytest.approx(trained.result.metrics)


def test_the_model_is_shown_no_label_in_a_test(trained, data):
    batch = next(iter(data.test_dataloader()))
    blind = batch._replace(
        subject_class=batch.subject_class * 0, object_class=batch.object_class * 0, predicate=batch.predicate * 0
    )
    trained.eval()
    for a, b in zip(trained(batch)[:3], trained(blind)[:3], strict=True):
        assert torch.equal(a, b)
    assert len(data.windows("test").first) == sum(len(some) for s in data.scenes("test") for some in s.windows)


def test_predictions_are_a_table_from_which_relations_follow(trained, data, tmp_path, capsys):
    parts = make_trainer().predict(trained, datamodule=data)
    table = data.decode(pl.concat(parts))
    assert set(table["video"]) <= {clip.name for clip in data.clips("test")}
    assert (table["end"] - table["begin"] == 30).all() and table["score"].is_between(0, 1).all()
    assert set(table["predicate"]) <= set(data.schema["predicates"])
    gates = table.select(pl.sum_horizontal("gate_0", "gate_1", "gate_2"))
    np.testing.assert_allclose(gates.to_numpy(), 1, atol=1e-5)
    table.write_parquet(tmp_path / "p.parquet")
    assert main(["relations", "associate", str(tmp_path / "p.parquet"), str(tmp_path / "p.json")]) == 0
    scores = evaluate(data.truth("test"), read_relations(tmp_path / "p.json"))
    assert scores.metrics["map"] == pytest.approx(trained.result.metrics["map"], abs=1e-9)
    table.drop("subject_boxes").write_parquet(tmp_path / "q.parquet")
    for words, message in (
        (["q.parquet", "q.json"], "q.parquet: no column 'subject_boxes'"),
        (["none.parquet", "q.json"], "not readable as Parquet"),
        (["p.parquet", "none/q.json"], "no folder"),
    ):
        assert main(["relations", "associate", *(str(tmp_path / word) for word in words)]) == 2
        assert message in capsys.readouterr().err
    assert not (tmp_path / "q.json").exists()


def test_generated_annotations_are_written_in_the_fields_form(data, tmp_path, capsys):
    folder = tmp_path / "shapes"
    words = ["relations", "shapes", str(folder), "--train", "3", "--valid", "1", "--test", "2"]
    assert main(words) == 0
    files = {name: str(folder / name) for name in ("train", "valid", "test")}
    files |= {name: str(folder / f"{name}.txt") for name in ("objects", "predicates")}
    own = RelationsData("vidvrd", files, features="geom")
    assert [len(own.clips(split)) for split in ("train", "valid", "test")] == [3, 1, 2]
    assert own.schema["objects"] == data.schema["objects"]
    assert [c.triplets for c in own.clips("test")] == [c.triplets for c in data.clips("test")[:2]]
    assert main(words) == 2 and "give a new folder" in capsys.readouterr().err


def test_pictures_are_drawn(trained, tmp_path):
    names = {path.name for path in trained.draw(tmp_path)}
    assert names == {"relations_over_time.png", "predicate_ap.png", "experts_by_domain.png"}
    assert all((tmp_path / name).stat().st_size > 10_000 for name in names)


def test_rules_run_through_the_task(data):
    prior = FrequencyPrior(data.schema)
    prior.fit(data.train_dataloader())
    task = run_test(prior, data)
    assert 0 < task.result.metrics["precision_at_10"] <= 1 and "usage_std_over_domains" not in task.result.metrics


def test_preferences_have_their_own_weight_decay(data):
    task = RelationsTask(RelationExpert(data.schema), adam, preference_decay=0.3, schema=data.schema)
    groups = task.configure_optimizers()["optimizer"].param_groups
    assert [group["weight_decay"] for group in groups] == [0.01, 0.3] and len(groups[1]["params"]) == 3
    assert sum(len(group["params"]) for group in groups) == len(list(task.model.parameters()))


def test_the_ngram_counts_before_training(data):
    task = RelationsTask(RelationExpert(data.schema, 8, frequencies=True), adam, schema=data.schema)
    make_trainer(max_epochs=1, limit_train_batches=1, limit_val_batches=0).fit(task, datamodule=data)
    so2p = task.model.preferences.so2p
    torch.testing.assert_close(so2p.sum(1), torch.ones(81))
    assert so2p.std() > 0


def test_wrong_arguments_get_one_line(data):
    for arguments, message in (
        ({"class_threshold": 1.0}, "class_threshold"),
        ({"link": -0.1}, "link"),
        ({"focal": -1.0}, "focal"),
    ):
        with pytest.raises(UserError, match=message):
            RelationsTask(RelationExpert(data.schema), **arguments)


def learned(model, data, seed, epochs=30):
    """The recipes' training, without checkpoints."""
    lightning.seed_everything(seed)

    def schedule(optimizer):
        return torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs)

    task = RelationsTask(
        model(data.schema), lambda p: torch.optim.AdamW(p, lr=8e-3, weight_decay=1e-4), schedule, schema=data.schema
    )
    trainer = make_trainer(max_epochs=epochs, check_val_every_n_epoch=epochs)
    trainer.fit(task, datamodule=data)
    make_trainer().test(task, datamodule=data, verbose=False)
    return task


@pytest.fixture(scope="module")
def default_data():
    return RelationsData()


@pytest.mark.slow
def test_a10_iterative_beats_independent(default_data):
    rows = {
        kind: [learned(lambda s, k=kind: RelationExpert(s, 48, preference=k), default_data, seed) for seed in (0, 1, 2)]
        for kind in ("iterative", "none")
    }
    maps = {kind: np.mean([task.result.metrics["map"] for task in tasks]) for kind, tasks in rows.items()}
    assert maps["iterative"] >= 0.52
    assert maps["iterative"] >= maps["none"] + 0.08, maps


@pytest.mark.slow
def test_a11_the_mixture_beats_one_expert_of_its_width(default_data):
    mixtures = [learned(lambda s: MoEVRD(s, 16, 4, 2), default_data, seed) for seed in (0, 1, 2)]
    experts = [learned(lambda s: RelationExpert(s, 16), default_data, seed) for seed in (0, 1, 2)]
    mean = {
        name: [np.mean([task.result.metrics[name] for task in tasks]) for tasks in (mixtures, experts)]
        for name in ("map", "recall_at_50")
    }
    assert mean["map"][0] >= mean["map"][1] + 0.08, mean
    assert mean["recall_at_50"][0] >= 0.52
    for task in mixtures:
        overall = task.tested.usage.mean(0)
        assert ((overall > 0.3) & (overall < 0.7)).all(), overall
        assert task.result.metrics["usage_std_over_domains"] >= 0.1
    assert math.isfinite(mean["map"][1])
