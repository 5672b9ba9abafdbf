"""The rewards task on a few synthetic preferences: losses in closed form, phases, resuming, tables, pictures."""

import math

import polars as pl
import pytest
import pytorch_lightning as lightning
import torch
from moezoo.datasets.rewards import RewardsData
from moezoo.errors import UserError
from moezoo.leaderboard.results import check_units
from moezoo.tasks.rewards import RewardsTask, preference_loss, router_loss
from moezoo.zoo.baselines.rewards import SingleRM
from moezoo.zoo.baselines.rewards_linear import LengthRule, LinearRM
from moezoo.zoo.dmoerm import DMoERM
from pytorch_lightning.callbacks import ModelCheckpoint

FILES = {"pairs_per_task": 60, "capability_pairs": 12, "eval_pairs": 12, "pools_per_task": 2, "candidates": 8}
SMALL = {"width": 16, "heads": 2, "hidden": 16}
EPOCHS = [2, 2, 1]


def make_data(**changes):
    data = RewardsData(**{"files": FILES, "batch_size": 32} | changes)
    data.setup("fit")
    return data


@pytest.fixture(scope="module")
def data():
    return make_data()


def make_task(schema, model=None, **changes):
    torch.manual_seed(0)
    model = model or DMoERM(schema, backbone_options=SMALL, rank=2)
    given = {"epochs": EPOCHS, "rates": [4e-3, 4e-3, 4e-3]} if model.phases == 3 else {}
    return RewardsTask(model, lambda p: torch.optim.AdamW(p, 4e-3), schema=schema, **given | changes)


def make_trainer(folder=None, **changes):
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "accelerator": "cpu"}
    quiet |= {"num_sanity_val_steps": 0, "reload_dataloaders_every_n_epochs": 1, "max_epochs": sum(EPOCHS)}
    best = ModelCheckpoint(folder, "best", monitor="val/progress", mode="max", save_last=True)
    keep = [] if folder is None else [best]
    callbacks = [*keep, *changes.pop("callbacks", [])]
    return lightning.Trainer(**quiet | {"enable_checkpointing": bool(keep), "callbacks": callbacks} | changes)


def state(task):
    return {name: value.clone() for name, value in task.model.state_dict().items()}


def moved(before, after):
    return {name for name, value in before.items() if not torch.equal(value, after[name])}


def train_loss(task, data):
    loader = data.train_dataloader()
    with torch.no_grad():
        return sum(float(preference_loss(task.eval()(batch).scores)) for batch in loader) / len(loader)


class Watch(lightning.Callback):
    """The model at the end of every epoch, the phase, and the pairs each epoch has trained on."""

    def __init__(self):
        self.states, self.phases, self.pairs = [], [], []

    def on_train_epoch_start(self, trainer, task):
        self.pairs.append(0)

    def on_train_batch_end(self, trainer, task, outputs, batch, batch_idx):
        self.pairs[-1] += len(batch.task)
        kind = (batch.capability >= 0).unique().tolist()
        assert kind == [task.phase == 2], "capability pairs in phase 2, human ones in the others"

    def on_train_epoch_end(self, trainer, task):
        self.states.append(state(task))
        self.phases.append(task.phase)


def test_preference_loss_in_closed_form():
    torch.manual_seed(0)
    scores = torch.randn(10, 3, dtype=torch.float64).float().requires_grad_()
    margin = torch.rand(5)
    want = 0.0
    for i in range(5):
        for s in range(3):
            gap = float(scores[2 * i, s] - scores[2 * i + 1, s] - margin[i])
            want += math.log1p(math.exp(-gap)) / 15
    assert float(preference_loss(scores, margin)) == pytest.approx(want, rel=1e-5)
    centred = preference_loss(scores, margin, 0.01) - preference_loss(scores, margin)
    assert float(centred) == pytest.approx(0.01 * float((scores[0::2] + scores[1::2]).square().mean()), rel=1e-3)
    far = torch.tensor([[-200.0], [200.0]], requires_grad=True)
    preference_loss(far).backward()
    assert far.grad.flatten().tolist() == [-1.0, 1.0], "no overflow where the sigmoid underflows"


def test_router_loss_leaves_unknown_tasks_out():
    torch.manual_seed(0)
    logits, task = torch.randn(9, 4), torch.tensor([0, 3, -1, 2, -1, 1, 0, 0, 3])
    want = torch.nn.functional.cross_entropy(logits, task, ignore_index=-1)
    torch.testing.assert_close(router_loss(logits, task), want)
    assert float(router_loss(logits, torch.full((9,), -1))) == 0.0


def test_each_phase_moves_its_own_parameters_on_its_own_pairs(data, tmp_path):
    """The fact sheet's check 3: experts and their heads in phase 2, the MLP alone in phase 3."""
    task, watch = make_task(data.schema), Watch()
    begin = state(task)
    make_trainer(tmp_path, callbacks=[watch]).fit(task, datamodule=data)
    assert watch.phases == [1, 1, 2, 2, 3]
    base, experts = moved(begin, watch.states[1]), moved(watch.states[2], watch.states[3])
    assert any(name.startswith("backbone") for name in base) and any(name.startswith("outer") for name in base)
    assert not any(".experts." in name or name.startswith(("aggregator", "capability_head")) for name in base)
    assert experts and all(".experts." in name or name.startswith("capability_head") for name in experts)
    heads = task.model.capability_head.weight.shape[0]
    assert (
        sum(
            not torch.equal(watch.states[2]["capability_head.weight"][k], watch.states[3]["capability_head.weight"][k])
            for k in range(heads)
        )
        > heads // 2
    )
    # The best epoch of phase 2 may be its first: phase 3 starts from one of them.
    starts = [moved(watch.states[epoch], watch.states[4]) for epoch in (2, 3)]
    assert any(names and all(name.startswith("aggregator") for name in names) for names in starts)


def test_the_best_of_a_phase_begins_the_next(data, tmp_path):
    """A phase whose later epochs ruin the model hands on its first one."""

    class Ruin(lightning.Callback):
        def on_train_batch_start(self, trainer, task, batch, batch_idx):
            if trainer.current_epoch == 1:
                with torch.no_grad():
                    task.model.base_head.weight.mul_(-5.0)
                    task.model.backbone.embed.weight.mul_(-1.0)

    task, watch = make_task(data.schema), Watch()
    make_trainer(tmp_path, callbacks=[Ruin(), watch]).fit(task, datamodule=data)
    first, after = watch.states[0], watch.states[2]
    names = [name for name in first if ".experts." not in name and not name.startswith(("aggregator", "capability"))]
    assert all(torch.equal(first[name], after[name]) for name in names)


@pytest.mark.parametrize("killed_after", [pytest.param(1, marks=pytest.mark.slow), 2])
def test_a_killed_run_goes_on_as_if_nothing_had_happened(data, tmp_path, killed_after):
    """Killed within phase 1, and between phases 1 and 2."""
    whole = make_task(data.schema)
    torch.manual_seed(7)
    make_trainer(tmp_path / "whole").fit(whole, datamodule=make_data())

    class Kill(lightning.Callback):
        def on_train_epoch_start(self, trainer, task):
            if trainer.current_epoch == killed_after:
                raise KeyboardInterrupt

    broken = make_task(data.schema)
    torch.manual_seed(7)
    with pytest.raises((KeyboardInterrupt, SystemExit)):
        make_trainer(tmp_path / "broken", callbacks=[Kill()]).fit(broken, datamodule=make_data())
    resumed = make_task(data.schema)
    torch.manual_seed(7)
    last = str(tmp_path / "broken" / "last.ckpt")
    make_trainer(tmp_path / "broken").fit(resumed, datamodule=make_data(), ckpt_path=last, weights_only=True)
    want, got = state(whole), state(resumed)
    for name in want:
        torch.testing.assert_close(got[name], want[name], rtol=0, atol=0, msg=name)


def test_test_gives_the_leaderboards_metrics_and_pictures(data, tmp_path):
    task = make_task(data.schema)
    make_trainer().test(task, datamodule=data, verbose=False)
    metrics = task.result.metrics
    routed = {"pair_accuracy_oracle", "router_accuracy", "router_macro_f1"}
    assert routed | {"pair_accuracy", "pair_accuracy_macro"} <= set(metrics)
    assert {"bon_gold_4", "bon_gold_8", "overoptimisation", "bon_peak", "length_accuracy"} <= set(metrics)
    assert set(task.result.info) == set(metrics)
    check_units(task.result.units)
    pairs = task.tested.rows(task.tested.pool < 0)
    assert len(task.result.units) == len(pairs.task) == int(task.result.info["pair_accuracy"].n)
    want = (pairs.reward[:, 0] > pairs.reward[:, 1]).double().mean()
    assert metrics["pair_accuracy"] == pytest.approx(float(want))
    paths = task.draw(tmp_path)
    assert [path.name for path in paths] == ["accuracy.png", "router.png", "best_of_n.png", "length.png"]
    assert all(path.read_bytes()[:4] == b"\x89PNG" for path in paths)


def test_predictions_are_a_table_with_every_capability(data):
    task = make_task(data.schema)
    table = pl.concat(make_trainer().predict(task, datamodule=data))
    names = {name for own in data.schema["tasks"] for name in own["capabilities"]}
    sides = [f"{name}_{side}" for name in names for side in ("chosen", "rejected")]
    assert {"index", "task", "task_probability", "reward_chosen", "reward_rejected", *sides} == set(table.columns)
    chat = table.filter(task="chat")
    if len(chat):
        assert chat["proactivity_chosen"].null_count() == 0 and chat["character_chosen"].null_count() == len(chat)
    decoded = data.decode(table)
    assert len(decoded) == len(table) and {"id", "group_id", "labelled_task", "reward_chosen"} <= set(decoded.columns)


def test_rules_run_through_the_task(data):
    rule = make_task(data.schema, LengthRule(data.schema))
    make_trainer().test(rule, datamodule=data, verbose=False)
    metrics = rule.result.metrics
    assert metrics["pair_accuracy"] == pytest.approx(metrics["length_accuracy"])
    assert metrics["prefers_longer"] > 0.9
    assert "router_accuracy" not in metrics
    linear = LinearRM(data.schema, route="predicted")
    data.set_phase(0)
    linear.fit(data.train_dataloader())
    fitted = make_task(data.schema, linear)
    make_trainer().test(fitted, datamodule=data, verbose=False)
    assert fitted.result.metrics["router_accuracy"] > 0.6 and fitted.result.metrics["pair_accuracy"] > 0.55


def test_one_phase_learns_and_its_rate_falls(data):
    rates = []

    class Rates(lightning.Callback):
        def on_train_batch_end(self, trainer, task, *_):
            rates.append(task.optimizers().param_groups[0]["lr"])

    data.set_phase(0)
    task = make_task(data.schema, SingleRM(data.schema, backbone_options=SMALL))
    first = train_loss(task, data)
    make_trainer(max_epochs=6, callbacks=[Rates()]).fit(task, datamodule=data)
    assert rates[0] == pytest.approx(4e-3) and rates[-1] < 2e-4 and rates == sorted(rates, reverse=True)
    assert train_loss(task, data) < first - 0.02


def test_mistakes_are_named(data):
    with pytest.raises(UserError, match="epochs is empty: DMoERM has 3 phases"):
        make_task(data.schema, epochs=())
    with pytest.raises(UserError, match=r"model.rates=\[0.1\]: expected a positive number for each of 3 phases"):
        make_task(data.schema, rates=[0.1])
    with pytest.raises(UserError, match="margin=-1"):
        make_task(data.schema, margin=-1.0)
    with pytest.raises(UserError, match=r"trainer\.max_epochs=3: expected 5, the sum of"):
        make_trainer(max_epochs=3).fit(make_task(data.schema), datamodule=data)
    with pytest.raises(UserError, match="reload_dataloaders_every_n_epochs: expected 1"):
        make_trainer(reload_dataloaders_every_n_epochs=0).fit(make_task(data.schema), datamodule=data)
