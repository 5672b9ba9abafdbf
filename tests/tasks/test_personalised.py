"""Personalised task: losses and scores equal plain loops; the two kinds of epochs train what they should."""

import polars as pl
import pytest
import pytorch_lightning as lightning
import torch
from moezoo.datasets.personalised import PersonalBatch, PersonalisedData
from moezoo.errors import UserError
from moezoo.recipes import create_model
from moezoo.settings import real_data_dir
from moezoo.tasks.personalised import Answers, PersonalisedTask, evaluate, mixture_loss, scores
from moezoo.zoo.baselines.personalised import FineTuned, LocalExperts, OneForAll
from moezoo.zoo.core.statistics import parameter_counts
from moezoo.zoo.personalised import Personalised

TINY = {"widths": (3, 4), "hidden": (12, 10)}


@pytest.fixture(scope="module")
def data():
    data = PersonalisedData(files={"users": 2, "images": 40}, generic_epochs=1, repeats=1, user_batch_size=64)
    data.setup("fit")
    return data


def trained(model, data, epochs=2, **arguments):
    lightning.seed_everything(0, verbose=False)
    task = PersonalisedTask(model, lambda p: torch.optim.Adam(p, 0.01), schema=data.schema, **arguments)
    trainer = lightning.Trainer(
        max_epochs=epochs,
        limit_train_batches=4,
        limit_val_batches=1,
        num_sanity_val_steps=0,
        reload_dataloaders_every_n_epochs=1,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(task, datamodule=data)
    return task, trainer


def state(model):
    return {name: value.clone() for name, value in model.state_dict().items()}


def test_the_mixtures_likelihood_is_a_plain_sum():
    generator = torch.Generator().manual_seed(0)
    generic, local = (torch.randn(9, 4, generator=generator) for _ in range(2))
    gate, label = torch.randn(9, 2, generator=generator), torch.arange(9) % 4
    weights = gate.softmax(-1)
    p = weights[:, :1] * generic.softmax(-1) + weights[:, 1:] * local.softmax(-1)
    expected = -sum(p[i, label[i]].log() for i in range(9)) / 9
    torch.testing.assert_close(mixture_loss(generic, local, gate, label), expected)
    far = mixture_loss(1000 * generic, 1000 * local, 1000 * gate, label)
    assert far.isfinite()


def test_scores_count_every_user_alike():
    answers = Answers(
        place=torch.arange(9),
        user=torch.tensor([0, 0, 0, 0, 1, 0, 1, 0, 1]),
        own=torch.tensor([1, 1, 1, 1, 1, 0, 0, 0, 0]),
        right=torch.tensor([1, 1, 1, 0, 1, 1, 0, 1, 0]),
        generic_right=torch.tensor([1, 0, 0, 0, 1, 1, 1, 1, 0]),
        local=torch.tensor([0, 1, 1, 1, 1, 0, 1, 0, 0]),
    )
    assert scores(answers) == pytest.approx(
        {
            "user_accuracy": (0.75 + 1.0) / 2,
            "generic_accuracy": 0.5,
            "user_gain": (0.5 + 0.0) / 2,
            "generic_loss": 0.25,
            "local_share_user": (0.75 + 1.0) / 2,
            "local_share_generic": 0.25,
        }
    )
    result = evaluate(answers, 0.07)
    assert result.metrics["overhead"] == 0.07 and result.info["generic_loss"].goal == "min"
    assert (result.info["user_accuracy"].n, result.info["generic_accuracy"].n) == (5, 4)
    assert result.units["unit"].to_list() == [0, 1] and result.units["user_gain"].to_list() == [0.5, 0.0]
    assert set(result.info) == set(result.metrics)


@pytest.mark.parametrize("build", [Personalised, LocalExperts, FineTuned])
def test_users_learn_while_the_generic_expert_stays(data, build):
    """Adam moves whatever has a gradient, be it zero: what must stay must have none."""
    torch.manual_seed(0)
    model = build(data.schema, **TINY)
    before = state(model)
    trained(model, data, epochs=1)
    between = state(model)
    own = [name for name in before if not name.startswith("generic")]
    assert all(torch.equal(before[name], between[name]) for name in own)
    assert any(not torch.equal(before[name], between[name]) for name in before if name.startswith("generic"))
    model = build(data.schema, **TINY)
    model.load_state_dict(before)
    trained(model, data, epochs=2)
    after = state(model)
    assert all(torch.equal(between[name], after[name]) for name in before if name.startswith("generic"))
    assert any(not torch.equal(between[name], after[name]) for name in own)


def test_local_experts_that_learn_from_their_own_images_alone(data):
    """The public's images teach the gate, and leave the local expert as it is."""
    torch.manual_seed(0)
    model = Personalised(data.schema, **TINY).train()
    task = PersonalisedTask(model, learning="own")
    task.log = lambda *_, **__: None
    image, label = torch.rand(6, 1, 28, 28), torch.arange(6)
    user, nobody = torch.arange(6) % 4, torch.zeros(6, dtype=torch.bool)
    task.training_step(PersonalBatch(image, label, user, nobody, label), 0).backward()
    assert not any(p.grad.any() for p in model.correction.parameters())
    model.zero_grad()
    task.training_step(PersonalBatch(image, label, user, ~nobody, label), 0).backward()
    assert all(p.grad.any() for p in model.correction.parameters())
    with torch.no_grad():  # now the two experts differ, and the gate has something to learn
        for parameter in model.correction.parameters():
            parameter.normal_()
    model.zero_grad()
    task.training_step(PersonalBatch(image, label, user, nobody, label), 0).backward()
    assert all(p.grad.any() for p in model.router.parameters())


@pytest.mark.parametrize("build", [Personalised, LocalExperts, FineTuned, OneForAll])
def test_every_rival_is_tested_and_predicts(data, build, tmp_path):
    torch.manual_seed(0)
    task, trainer = trained(build(data.schema, **TINY), data)
    trainer.test(task, datamodule=data, verbose=False)
    metrics = task.result.metrics
    assert 0 <= metrics["user_accuracy"] <= 1 and metrics["overhead"] == task.model.overhead()
    assert task.result.units["unit"].to_list() == [2, 3]
    table = data.decode(pl.concat(trainer.predict(task, datamodule=data)))
    own = table.filter("own")
    assert len(own) == 80 and set(own["user"]) == {"style 2", "style 3"}
    right = own.group_by("user").agg((pl.col("label") == pl.col("prediction")).mean())["label"].mean()
    assert right == pytest.approx(metrics["user_accuracy"])
    pictures = task.draw(tmp_path)
    assert [path.name for path in pictures] == ["users.png"] and all(path.stat().st_size > 5000 for path in pictures)


def test_loaders_that_are_not_reloaded_are_refused(data):
    task = PersonalisedTask(Personalised(data.schema, **TINY))
    trainer = lightning.Trainer(max_epochs=1, accelerator="cpu", logger=False, enable_checkpointing=False)
    with pytest.raises(UserError, match=r"trainer.reload_dataloaders_every_n_epochs: expected 1"):
        trainer.fit(task, datamodule=data)
    with pytest.raises(UserError, match=r"user_lr=0.0: expected more than 0"):
        PersonalisedTask(Personalised(data.schema, **TINY), user_lr=0.0)


@pytest.mark.real
@pytest.mark.slow
def test_real_students_gain_more_than_the_sheets_prototype():
    """Sheet, section 10: generic expert 98.0 % on employees, 73.7 % on the ten students; GE+LE+GN 80.9 %."""
    folder = real_data_dir()
    if folder is None or not (folder / "advmoe" / "mnist_writer_ids.parquet").exists():
        pytest.skip("MOEZOO_REAL_DATA has no advmoe/mnist_writer_ids.parquet")
    data = PersonalisedData("mnist_writers", {"path": str(folder / "advmoe")}, generic_epochs=2)
    lightning.seed_everything(0, verbose=False)
    task = PersonalisedTask(
        Personalised(data.schema), lambda p: torch.optim.Adam(p, 0.002), user_lr=0.001, schema=data.schema
    )
    trainer = lightning.Trainer(
        max_epochs=5,
        reload_dataloaders_every_n_epochs=1,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(task, datamodule=data)
    trainer.test(task, datamodule=data, verbose=False)
    metrics = task.result.metrics
    generic = metrics["generic_accuracy"] + metrics["generic_loss"]
    assert generic > 0.97 and 0.68 < metrics["user_accuracy"] - metrics["user_gain"] < 0.80
    assert metrics["user_accuracy"] > 0.86 and metrics["generic_loss"] < 0.009 and metrics["overhead"] < 0.08


def test_twins_have_the_mixtures_active_and_total_size(data):
    counts = {}
    for name in ("ge_le_gn", "ge_le_gn_dense", "ge_le_gn_dense_total"):
        schema = data.schema | {"users": [str(k) for k in range(20)]}
        counts[name] = parameter_counts(create_model(f"personalised/{name}", schema=schema))
    assert counts["ge_le_gn_dense"]["total"] == pytest.approx(counts["ge_le_gn"]["active"], rel=0.02)
    assert counts["ge_le_gn_dense_total"]["total"] == pytest.approx(counts["ge_le_gn"]["total"], rel=0.02)
