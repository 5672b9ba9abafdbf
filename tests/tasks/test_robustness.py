"""The robustness task on a toy of bright squares: recipes by arguments, resume, tables, pictures, mistakes."""

from pathlib import Path

import polars as pl
import pytest
import pytorch_lightning as lightning
import torch
from moezoo import create_model, list_recipes
from moezoo.cli import main
from moezoo.datasets.batches import IndexBatches
from moezoo.datasets.robustness import ImageBatch, ImageBatches
from moezoo.datasets.robustness_images import Images
from moezoo.errors import UserError
from moezoo.leaderboard.results import check_units
from moezoo.recipes import metadata, read, resolve
from moezoo.tasks.robustness import RobustnessTask
from moezoo.zoo.advmoe import AdvMoE
from moezoo.zoo.baselines.robustness import DenseCNN
from moezoo.zoo.core import Routed
from moezoo.zoo.core.statistics import parameter_counts
from torch.utils.data import DataLoader

SCHEMA = {
    "dataset": "squares", "fingerprint": "0" * 64, "channels": 1, "image_size": 8, "num_classes": 4,
    "class_names": ["nw", "ne", "sw", "se"], "mean": [0.2], "std": [0.25],
}  # fmt: skip
SMALL = {"backbone": "small_resnet", "widths": (8, 12), "blocks": (1, 1), "stem_stride": 1}
ROUTER = {"router_width": 4, "router_blocks": 1, "router_pool": 1}
QUICK = {"eps": 0.1, "test_steps": 3, "route_steps": 2, "val_steps": 2, "autoattack": 0, "curve_images": 8}


class Squares(lightning.LightningDataModule):
    """A bright square in one of four corners, whose corner is the class."""

    def __init__(self, train=320):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.parts = {}
        for name, count in (("train", train), ("valid", 32), ("test", 64)):
            label = torch.arange(count) % 4
            image = torch.rand(count, 1, 8, 8, generator=generator) * 0.2
            image[(label == 0) | (label == 3)] += 0.1  # these two look alike
            for i, corner in enumerate(label.tolist()):
                row, column = 4 * (corner // 2), 4 * (corner % 2)
                image[i, 0, row : row + 3, column : column + 3] += 0.6
            self.parts[name] = Images((image * 255).round().to(torch.uint8), label)

    def loader(self, split, size=32, shuffle=False):
        data = ImageBatches(self.parts[split])
        return DataLoader(data, sampler=IndexBatches(len(data), size, shuffle=shuffle), batch_size=None)

    def train_dataloader(self):
        return self.loader("train", shuffle=True)

    def val_dataloader(self):
        return self.loader("valid")

    def test_dataloader(self):
        return self.loader("test", 64)

    def predict_dataloader(self):
        return self.loader("test", 64)


@pytest.fixture(scope="module")
def data():
    return Squares()


def make_trainer(**changes):
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "accelerator": "cpu"}
    return lightning.Trainer(**quiet | {"enable_checkpointing": False, "num_sanity_val_steps": 0} | changes)


def sgd(parameters):
    return torch.optim.SGD(parameters, 0.1, momentum=0.9)


def cosine(optimizer):
    return torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 3)


def mixture(**changes):
    return AdvMoE(SCHEMA, **SMALL | ROUTER | changes)


def make_task(model=None, **changes):
    model = mixture() if model is None else model
    return RobustnessTask(
        model, sgd, cosine, **QUICK | {"router_lr": 0.05, "router_clip": None, "schema": SCHEMA} | changes
    )


@pytest.fixture(scope="module")
def trained(data):
    """AdvMoE trained for three epochs, tested; the trainer beside it."""
    torch.manual_seed(0)
    task = make_task()
    trainer = make_trainer(max_epochs=3)
    trainer.fit(task, datamodule=data)
    logged = {name: float(value) for name, value in trainer.callback_metrics.items()}
    trainer.test(task, datamodule=data, verbose=False)
    return task, logged


def test_advmoe_learns_to_classify_and_to_route(trained):
    task, logged = trained
    metrics = task.result.metrics
    assert metrics["sa"] > 0.9 and metrics["ra_pgd3"] > 0.7
    assert logged["val/router_acc"] > 0.9 and logged["val/ra"] > 0.7
    assert {"sa", "ra_pgd3", "ra_route", "route_flip", "expert_share_min", "expert_share_max", "gmacs", "gmacs_router",
            "ms_per_image"} == set(metrics)  # fmt: skip
    assert metrics["ra_route"] <= metrics["ra_pgd3"] <= metrics["sa"]
    assert metrics["expert_share_min"] + metrics["expert_share_max"] == pytest.approx(1)
    assert 0 < metrics["gmacs_router"] < metrics["gmacs"]
    check_units(task.result.units)
    assert task.result.units["ra_route"].mean() == pytest.approx(metrics["ra_route"])
    assert task.result.info["route_flip"].goal == "min" and task.result.info["ra_route"].n == 64
    assert task.curve[0.0] > 0.7 and task.curve[1.0] <= 0.5


def test_predictions_are_a_table_of_classes_and_experts(trained, data):
    task, _ = trained
    table = pl.concat(make_trainer().predict(task, datamodule=data))
    assert table.columns == ["index", "label", "prediction", "probability", "expert", "expert_probability"]
    assert table["index"].to_list() == list(range(64))
    assert (table["label"] == table["prediction"]).mean() == pytest.approx(task.result.metrics["sa"])
    share = (table["expert"] == 0).mean()
    assert min(share, 1 - share) == pytest.approx(task.result.metrics["expert_share_min"])


def test_pictures(trained, tmp_path):
    task, _ = trained
    paths = task.draw(tmp_path)
    assert [p.name for p in paths] == ["attack_examples.png", "accuracy_by_eps.png", "expert_by_class.png"]
    assert all(p.read_bytes()[:4] == b"\x89PNG" for p in paths)


def steps(task, data, count=1):
    """Weights before and after some training steps, by the part that holds them."""
    before = {name: value.clone() for name, value in task.model.named_parameters()}
    make_trainer(max_epochs=1, limit_train_batches=count, limit_val_batches=0).fit(task, datamodule=data)
    moved = {name for name, value in task.model.named_parameters() if not torch.equal(value, before[name])}
    routers = {name for name in before if "router" in name}
    return moved, routers, set(before) - routers


def test_the_recipes_train_what_they_should(data):
    torch.manual_seed(0)
    moved, routers, others = steps(make_task(), data)
    assert moved == routers | others, "AdvMoE: both in turn"
    moved, routers, others = steps(make_task(router_target="none", router_beta=0.0), data)
    assert moved == others, "nothing to learn for the router"
    moved, routers, others = steps(make_task(alternate=False), data)
    assert moved == others, "AT(MoE): the argmax passes no gradient"
    moved, routers, others = steps(make_task(mixture(ste=True), alternate=False), data)
    assert moved == routers | others, "AT(MoE) with the straight-through gradient"
    dense = make_task(DenseCNN(SCHEMA, **SMALL))
    assert steps(dense, data)[0] == set(dict(dense.model.named_parameters())) and not dense.alternate


def test_the_experts_turn_leaves_the_router_alone_and_the_other_way_round(data):
    torch.manual_seed(0)
    task = make_task()
    seen = []

    class Watch(lightning.Callback):
        def on_before_optimizer_step(self, trainer, module, optimizer):
            held = {id(p) for group in optimizer.param_groups for p in group["params"]}
            with_grad = {n for n, p in module.model.named_parameters() if p.grad is not None and p.grad.abs().sum() > 0}
            own = {n for n, p in module.model.named_parameters() if id(p) in held}
            seen.append((own, with_grad & own, {n for n, p in module.model.named_parameters() if not p.requires_grad}))

    statistics = {n: b.clone() for n, b in task.model.named_buffers() if "num_batches" in n}
    make_trainer(max_epochs=1, limit_train_batches=1, limit_val_batches=0, callbacks=[Watch()]).fit(
        task, datamodule=data
    )
    (experts, moved_experts, frozen), (routers, moved_routers, frozen_then) = seen
    assert experts == moved_experts and routers == moved_routers
    assert frozen == routers and frozen_then == experts
    assert all(p.requires_grad for p in task.model.parameters())
    for name, before in statistics.items():  # attacks run in eval mode: clean and adversarial images count, once each
        assert int(task.model.get_buffer(name) - before) == 2, name


@pytest.mark.parametrize("scope", ["stage", "layer"])
def test_routers_inside_the_network_train_and_are_attacked(data, scope):
    torch.manual_seed(0)
    task = make_task(mixture(router_scope=scope))
    moved, routers, others = steps(task, data, 2)
    assert moved == routers | others
    make_trainer().test(task, datamodule=data, verbose=False)
    assert task.tested.expert.shape == (64, sum(isinstance(part, Routed) for part in task.model.modules()))
    assert task.result.metrics["gmacs_router"] > 0


def test_classes_that_look_alike_share_an_expert(data):
    torch.manual_seed(0)
    task = make_task(router_target="cluster")
    assert task.expert_of_class.tolist() == [-1] * 4
    make_trainer(max_epochs=1, limit_train_batches=1, limit_val_batches=0).fit(task, datamodule=data)
    group = task.expert_of_class
    assert group[0] == group[3] != group[1] == group[2]


def test_a_resumed_run_goes_on_exactly(data, tmp_path):
    """Spec A8: as many epochs in two sittings give the same weights, to the bit."""

    def run(epochs, resume=None):
        torch.manual_seed(0)
        task = make_task(schedule="step", clip=1.0)
        trainer = make_trainer(max_epochs=epochs, limit_train_batches=2, check_val_every_n_epoch=9)
        trainer.fit(task, datamodule=data, ckpt_path=resume, weights_only=True if resume else None)
        return task, trainer

    whole, _ = run(2)
    _, trainer = run(1)
    trainer.save_checkpoint(tmp_path / "half.ckpt")
    resumed, _ = run(2, tmp_path / "half.ckpt")
    for (name, value), other in zip(whole.state_dict().items(), resumed.state_dict().values(), strict=True):
        assert torch.equal(value, other), name


def test_saved_weights_predict_the_same(trained, tmp_path):
    """Spec A8."""
    task, _ = trained
    task.model.save_pretrained(tmp_path / "weights")
    again = AdvMoE.from_pretrained(tmp_path / "weights")
    image = torch.rand(9, 1, 8, 8)
    assert torch.equal(task.model.eval()(image).logits, again(image).logits)


def test_a_test_gives_the_same_numbers_twice(trained, data):
    task, _ = trained
    before = dict(task.result.metrics)
    make_trainer().test(task, datamodule=data, verbose=False)
    after = dict(task.result.metrics)
    del before["ms_per_image"], after["ms_per_image"]
    assert before == after


def test_a_broken_network_does_not_look_robust(data):
    """The sign of a NaN gradient is 0, so PGD would find nothing and the accuracy under attack would stay high."""
    task = make_task()
    with torch.no_grad():
        task.model.network.router.gate.head.weight.fill_(torch.nan)
    with pytest.raises(UserError, match="NaN or infinite"):
        make_trainer(max_epochs=1, limit_train_batches=2, limit_val_batches=0).fit(task, datamodule=data)
    constant = make_task(DenseCNN(SCHEMA, **SMALL))
    with torch.no_grad():
        constant.model.network.head.weight.zero_()
    with pytest.raises(UserError, match="have no gradient"):
        make_trainer().test(constant, datamodule=data, verbose=False)


def test_mistakes_are_named(data):
    with pytest.raises(UserError, match=r"expected eps in \[0, 1\] \(8/255 is 0.0314\)"):
        make_task(eps=8.0)
    with pytest.raises(UserError, match="train_steps=0"):
        make_task(train_steps=0)
    with pytest.raises(UserError, match="beta=-1"):
        make_task(beta=-1.0)
    assert ImageBatch._fields[0] == "image", "flops are counted per image of the first field"


@pytest.mark.parametrize("twin", [name for name in list_recipes("robustness/*") if metadata(name).twin_of])
def test_dense_twins_have_as_many_parameters(twin):
    """Active ones, or all where the recipe is called so; within 2 %."""
    schema = SCHEMA | {"image_size": 28, "num_classes": 10}
    ours, theirs = (parameter_counts(create_model(name, schema=schema)) for name in (metadata(twin).twin_of, twin))
    wanted = ours["total" if twin.endswith("_total") else "active"]
    assert theirs["total"] == pytest.approx(wanted, rel=0.02)


@pytest.mark.parametrize("recipe", list_recipes("robustness/*"))
def test_recipes_are_whole(recipe):
    """Each builds its model; all of one data share training, attacks and budget."""
    content = read(recipe)
    if not content["model"]["class_path"].endswith("RobustnessTask"):
        return
    schema = SCHEMA | {"image_size": 28, "num_classes": 10}
    if "resnet18" not in str(content["model"]):
        assert create_model(recipe, schema=schema)(torch.rand(2, 1, 28, 28)).logits.shape == (2, 10)
        mine = {key: content["model"]["init_args"].get(key) for key in ("eps", "attack_images", "optimizer")}
        ours = read("robustness/advmoe")
        assert mine == {key: ours["model"]["init_args"].get(key) for key in mine}
        assert content["data"] == ours["data"] and content["trainer"] == ours["trainer"]
    text = resolve(recipe).read_text().splitlines()
    assert [line[:6] for line in text[1:4]] == ["# Data", "# Sour", "# Expe"]


def test_fit_test_predict_from_the_command_line(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    short = ["--trainer.limit_train_batches=2", "--trainer.limit_val_batches=1", "--trainer.max_epochs=1"]
    short += ["--data.test_limit=24", "--data.eval_batch_size=12", "--model.attack_images=16", "--model.autoattack=0"]
    short += ["--model.route_steps=2", "--model.test_steps=2", "--model.curve_images=0", "--trainer.accelerator=cpu"]
    assert main(["fit", "--config", "robustness/advmoe", "--run_dir", "run", *short]) == 0
    left = {path.relative_to("run").as_posix() for path in Path("run").rglob("*") if path.is_file()}
    assert {"result.json", "units.parquet", "weights/model.safetensors", "pictures/attack_examples.png",
            "pictures/expert_by_class.png", "checkpoints/best.ckpt"} <= left  # fmt: skip
    assert main(["predict", "--config", "run/config.yaml", "--output", "p.csv"]) == 0
    table = pl.read_csv("p.csv")
    assert len(table) == 24 and "T-shirt" in table["label"].to_list()
