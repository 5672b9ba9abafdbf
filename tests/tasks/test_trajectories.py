"""The trajectories task on a small simulated freeway: losses in closed form, learning, tables, pictures."""

import math

import numpy as np
import polars as pl
import pytest
import pytorch_lightning as lightning
import torch
import torch.nn.functional as F
from moezoo.datasets.trajectories import TrajectoriesData
from moezoo.datasets.trajectories_windows import TrajectoryBatch
from moezoo.errors import UserError
from moezoo.leaderboard.results import check_units
from moezoo.tasks.trajectories import (
    TrajectoriesTask,
    gate_weights,
    intention_loss,
    regression_losses,
    uncertainty_loss,
)
from moezoo.tasks.trajectories_metrics import ade, distance
from moezoo.tasks.trajectories_plots import draw
from moezoo.zoo.baselines.trajectories import ConstantVelocity, LSTMPredictor
from moezoo.zoo.tmmoe import TASKS, TMMOE


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MOEZOO_CACHE", str(tmp_path_factory.mktemp("weave")))
        files = {"train": [0], "valid": [1], "test": [2], "seconds": 50.0}
        data = TrajectoriesData(source="numpy_weave", files=files, batch_size=64)
        data.setup("fit")
    return data


def make_trainer(**changes):
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "accelerator": "cpu"}
    return lightning.Trainer(**quiet | {"enable_checkpointing": False, "num_sanity_val_steps": 0} | changes)


def small(schema, **changes):
    return TMMOE(schema, **{"channels": 12, "expert_dim": 12, "tower": 16, "experts": 3, "dropout": 0.0} | changes)


def run_test(model, data, **changes):
    task = TrajectoriesTask(model, schema=data.schema, **changes)
    make_trainer().test(task, datamodule=data, verbose=False)
    return task


def test_uncertainty_loss_in_closed_form():
    losses = torch.tensor([0.8, 1.4, 0.3], dtype=torch.float64)
    zero = torch.zeros(3, dtype=torch.float64)
    assert float(uncertainty_loss(losses, zero)) == pytest.approx(0.5 * 0.8 + 0.5 * 1.4 + 0.3)
    s = torch.tensor([-0.7, 0.4, 1.1], dtype=torch.float64, requires_grad=True)
    value = uncertainty_loss(losses, s)
    expected = 0.5 * math.exp(0.7) * 0.8 - 0.35 + 0.5 * math.exp(-0.4) * 1.4 + 0.2 + math.exp(-1.1) * 0.3 + 0.55
    assert value.item() == pytest.approx(expected)
    assert torch.autograd.gradcheck(uncertainty_loss, (losses.requires_grad_(), s))
    # Least where sigma² is the loss (regression) and twice the loss (cross-entropy).
    best = torch.log(losses.detach() * torch.tensor([1.0, 1.0, 2.0])).requires_grad_()
    (slope,) = torch.autograd.grad(uncertainty_loss(losses, best), best)
    torch.testing.assert_close(slope, torch.zeros(3, dtype=torch.float64))
    assert uncertainty_loss(losses.detach() * 1e-3, best.detach() - 6.9) < 0, "the sum says nothing of quality"


@pytest.mark.parametrize("kind", ["mse", "huber"])
def test_regression_losses_see_known_steps_alone(kind):
    torch.manual_seed(0)
    position, future = torch.randn(7, 4, 2, dtype=torch.float64) * 3, torch.randn(7, 4, 2, dtype=torch.float64)
    future[0, 2:] = math.nan
    future[3] = math.nan
    got = regression_losses(position, future, kind)
    for axis, scale in enumerate((2.0, 1.0)):
        errors = ((position - future)[..., axis] / scale).numpy()
        errors = errors[~np.isnan(errors)]
        each = errors**2 if kind == "mse" else np.where(abs(errors) < 1, errors**2, 2 * abs(errors) - 1)
        assert float(got[axis]) == pytest.approx(each.mean())
    position.requires_grad_()
    regression_losses(position, future, kind).sum().backward()
    assert position.grad.isfinite().all() and (position.grad[3] == 0).all() and (position.grad[0, 2:] == 0).all()
    assert regression_losses(position, torch.full_like(future, math.nan), kind).tolist() == [0.0, 0.0]


def test_intention_loss_equals_torchs_and_leaves_the_unknown_out():
    torch.manual_seed(0)
    logits, label = torch.randn(50, 3), torch.randint(-1, 3, (50,))
    weights = torch.tensor([1.0, 3.0, 2.0])
    expected = F.cross_entropy(logits, label, weights, ignore_index=-1)
    torch.testing.assert_close(intention_loss(logits, label, weights), expected)
    p = logits.softmax(-1)
    focal = total = 0.0
    for i in range(50):
        if label[i] >= 0:
            w, q = float(weights[label[i]]), float(p[i, label[i]])
            focal, total = focal - w * (1 - q) ** 2 * math.log(q), total + w
    assert float(intention_loss(logits, label, weights, 2.0)) == pytest.approx(focal / total, rel=1e-5)
    assert float(intention_loss(logits, torch.full((50,), -1), weights)) == 0.0


def test_rules_run_through_the_task(data):
    model = ConstantVelocity(data.schema)
    model.fit(data.train_dataloader())
    task = run_test(model, data)
    windows = task.tested
    seconds = torch.arange(1, data.schema["horizon"] + 1) / data.schema["frame_rate"]
    onward = seconds[:, None] * windows.velocity[:, None]
    assert task.result.metrics["ade"] == pytest.approx(float(ade(distance(onward, windows.future)).nanmean()), rel=1e-5)
    check_units(task.result.units)
    assert len(windows.track) == len(data.rows["test"])
    assert {"rmse_1s", "rmse_3s", "rmse_lat_2s", "mae_lon", "macro_f1", "lead_time"} <= set(task.result.metrics)


def test_training_learns_the_tasks_and_their_variances(data):
    torch.manual_seed(0)
    rule = run_test(ConstantVelocity(data.schema, lateral=False), data).result.metrics
    task = TrajectoriesTask(
        small(data.schema, expert="mlp"),
        lambda p: torch.optim.AdamW(p, 4e-3),
        lambda optimizer: torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 12),
        freeze_epochs=2,
        regression="huber",
        schema=data.schema,
    )
    seen = []

    class Watch(lightning.Callback):
        def on_train_epoch_end(self, trainer, module):
            seen.append(module.log_variance.detach().clone())

    trainer = make_trainer(max_epochs=12, check_val_every_n_epoch=6, callbacks=[Watch()])
    trainer.fit(task, datamodule=data)
    logged = dict(trainer.callback_metrics)
    assert float(logged["val/ade"]) > 0 and "val/macro_f1" in logged and float(logged["weight/lateral"]) > 1
    trainer.test(task, datamodule=data, verbose=False)
    metrics = task.result.metrics
    assert metrics["rmse_lat"] < 0.9 * rule["rmse_lat"] and metrics["auprc"] > 0.45
    assert (seen[1] == 0).all() and (seen[-1] != 0).all(), "frozen for two epochs, then learned"
    gates = task.tested.gates
    torch.testing.assert_close(gates.sum(-1), torch.ones_like(gates[..., 0]))
    assert all((gates[:, i] - gates[:, j]).abs().max() > 1e-3 for i, j in ((0, 1), (0, 2), (1, 2)))


def test_log_variances_are_bounded_and_never_decayed(data):
    task = TrajectoriesTask(small(data.schema), lambda p: torch.optim.AdamW(p, 1e-3, weight_decay=0.5))
    groups = task.configure_optimizers()["optimizer"].param_groups
    assert [g["weight_decay"] for g in groups] == [0.5, 0.0]
    assert groups[1]["params"][0] is task.log_variance and len(groups[0]["params"]) == len(
        list(task.model.parameters())
    )
    assert (
        len(TrajectoriesTask(small(data.schema), weighting="equal").configure_optimizers()["optimizer"].param_groups)
        == 1
    )
    with torch.no_grad():
        task.log_variance.copy_(torch.tensor([-9.0, 9.0, 1.0]))
    make_trainer(max_epochs=1, limit_train_batches=1, limit_val_batches=0).fit(task, datamodule=data)
    assert task.log_variance.abs().max() <= 6.0 + 1e-2


@pytest.mark.parametrize("expert", [pytest.param("lstm", marks=pytest.mark.slow), "mlp"])
def test_64_windows_can_be_learned_by_heart(data, expert):
    """The fact sheet's check 6: ADE below 0.05 m and every intention right."""
    torch.manual_seed(0)
    rows = data.rows["train"]
    labels = data.tracks.intention[rows]
    chosen = torch.cat([rows[labels == c][:22] for c in range(3)])
    chosen = torch.cat([chosen, rows[labels == 0][22:]])[:64]
    batch = data.tracks.batch(chosen, data.schema["history"], data.schema["horizon"])
    model = TMMOE(data.schema, channels=24, expert=expert, dropout=0.0)
    optimizer = torch.optim.Adam(model.parameters(), 5e-3)
    steps = 400
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in range(steps):
        output = model(batch.history, batch.velocity)
        losses = regression_losses(output.position, batch.future)
        loss = 100 * losses.sum() + intention_loss(output.intention, batch.intention, torch.ones(3))
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 20.0)
        optimizer.step()
        schedule.step()
    output = model.eval()(batch.history, batch.velocity)
    assert float(ade(distance(output.position, batch.future)).mean()) < 0.05
    assert (output.intention.argmax(-1) == batch.intention).all()


def test_predictions_are_a_table_a_planner_can_read(data):
    torch.manual_seed(0)
    task = TrajectoriesTask(small(data.schema), schema=data.schema)
    tables = make_trainer().predict(task, datamodule=data)
    table = pl.concat(tables)
    horizon = data.schema["horizon"]
    assert len(table) == len(data.rows["test"])
    steps = [f"{axis}_{k}" for axis in "xy" for k in range(1, horizon + 1)]
    gates = [f"gate_{task}_{e}" for task in TASKS for e in range(3)]
    assert table.columns == ["track", "frame", "time", "keep", "left", "right", *steps, *gates]
    assert table.select(pl.sum_horizontal("keep", "left", "right")).to_series().to_numpy() == pytest.approx(1, abs=1e-5)
    batch = next(iter(data.predict_dataloader()))
    position = task.model.eval()(batch.history, batch.velocity).position
    got = torch.stack([table[: len(position)][name].to_torch() for name in steps], 1)
    torch.testing.assert_close(got, torch.cat([position[..., 0], position[..., 1]], 1).detach())
    decoded = data.decode(table)
    assert len(decoded) == len(table) and {"vehicle", "x", "y", "x_1", "left"} <= set(decoded.columns)


def test_models_without_gates_have_none_in_table_and_pictures(data, tmp_path):
    task = run_test(LSTMPredictor(data.schema, hidden=8), data)
    assert task.tested.gates.shape == (len(data.rows["test"]), 3, 0)
    assert gate_weights({}, 4).shape == (4, 3, 0)
    assert [p.name for p in task.draw(tmp_path)] == ["tracks.png", "rmse_by_horizon.png"]
    table = pl.concat(make_trainer().predict(task, datamodule=data))
    assert not [c for c in table.columns if c.startswith("gate")]


def test_pictures_are_drawn_whatever_is_missing(data, tmp_path):
    task = run_test(small(data.schema), data)
    paths = task.draw(tmp_path)
    assert [p.name for p in paths] == ["tracks.png", "rmse_by_horizon.png", "gates_by_manoeuvre.png"]
    assert all(p.read_bytes()[:4] == b"\x89PNG" for p in paths)
    bare = task.tested._replace(
        intention=torch.full_like(task.tested.intention, -1), lateral=torch.full_like(task.tested.lateral, math.nan)
    )
    assert len(draw(bare, {"frame_rate": 10.0, "lane_width": None}, tmp_path / "bare")) == 2


def test_mistakes_are_named(data):
    with pytest.raises(UserError, match="expected three positive numbers"):
        TrajectoriesTask(small(data.schema), class_weights=[1.0, 2.0])
    with pytest.raises(UserError, match="focal=-1"):
        TrajectoriesTask(small(data.schema), focal=-1.0)
    assert TrajectoryBatch._fields[0] == "history", "flops are counted per window of the first field"
