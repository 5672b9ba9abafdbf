"""Spec A6: what the recipes reach on scikit-learn's digits, seed 0; and A4's fifty steps."""

import math

import pytest
import pytorch_lightning as lightning
import torch
from moezoo.datasets.batches import IndexBatches
from moezoo.datasets.robustness import ImageBatches
from moezoo.datasets.robustness_images import Images
from moezoo.tasks.robustness import RobustnessTask
from moezoo.zoo.advmoe import AdvMoE
from moezoo.zoo.baselines.robustness import DenseCNN
from torch.utils.data import DataLoader

EPOCHS = 15
SMALL = {"backbone": "small_resnet", "stem_stride": 1}  # widths 32 and 64
ROUTER = {"router_width": 8, "router_blocks": 1, "router_pool": 1}


class Digits(lightning.LightningDataModule):
    """1,400 train and 397 test images of 8x8 pixels; the last 100 of train validate too, nothing is chosen by them."""

    def __init__(self):
        super().__init__()
        from sklearn.datasets import load_digits

        loaded = load_digits()
        image = (torch.tensor(loaded.images) / 16 * 255).round().to(torch.uint8)[:, None]
        label = torch.tensor(loaded.target).long()
        order = torch.randperm(len(label), generator=torch.Generator().manual_seed(0))
        cuts = {"train": order[:1400], "valid": order[1300:1400], "test": order[1400:]}
        self.parts = {name: Images(image[rows], label[rows]) for name, rows in cuts.items()}
        pixels = self.parts["train"].image.float() / 255
        self.schema = {
            "channels": 1, "image_size": 8, "num_classes": 10, "mean": [float(pixels.mean())],
            "std": [float(pixels.std())],
        }  # fmt: skip

    def loader(self, split, size=500, shuffle=False):
        data = ImageBatches(self.parts[split])
        return DataLoader(data, sampler=IndexBatches(len(data), size, shuffle=shuffle), batch_size=None)

    def train_dataloader(self):
        return self.loader("train", 64, shuffle=True)

    def val_dataloader(self):
        return self.loader("valid")

    def test_dataloader(self):
        return self.loader("test")


def run(data, model, epochs=EPOCHS, steps=None, **changes):
    """Train and test; metrics of the test and what validation logged last."""
    task = RobustnessTask(
        model,
        lambda parameters: torch.optim.SGD(parameters, 0.1, momentum=0.9, weight_decay=5e-4),
        lambda optimizer: torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs),
        **{"eps": 0.1, "train_step_size": 0.06, "test_steps": 20, "autoattack": 0, "schema": data.schema} | changes,
    )
    trainer = lightning.Trainer(
        max_epochs=epochs,
        limit_train_batches=steps,
        check_val_every_n_epoch=epochs,
        accelerator="cpu",
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
        num_sanity_val_steps=0,
    )
    trainer.fit(task, datamodule=data)
    logged = {name: float(value) for name, value in trainer.callback_metrics.items()}
    trainer.test(task, datamodule=data, verbose=False)
    return task.result.metrics, logged, task


@pytest.fixture(scope="module")
def data():
    return Digits()


@pytest.mark.slow
def test_a4_fifty_steps_are_finite(data):
    torch.manual_seed(0)
    model = AdvMoE(data.schema, **SMALL | ROUTER)
    with torch.no_grad():  # a router as sure as the one that broke the released code
        model.network.router.gate.head.weight.mul_(400)
    _, logged, task = run(data, model, epochs=3, steps=17, curve_images=0, attack_images=20)
    assert all(math.isfinite(value) for value in logged.values())
    assert all(parameter.isfinite().all() for parameter in task.model.parameters())


@pytest.mark.slow
def test_a6_digits(data):
    """AdvMoE is accurate, robust and balanced; its router withstands what AT(MoE)'s does not."""
    torch.manual_seed(0)
    metrics, _, task = run(data, AdvMoE(data.schema, **SMALL | ROUTER), clip=1.0)
    torch.manual_seed(0)
    joint, _, _ = run(data, AdvMoE(data.schema, **SMALL | ROUTER), alternate=False, clip=1.0)
    torch.manual_seed(0)
    narrow, _, _ = run(data, DenseCNN(data.schema, ratio=0.5, **SMALL))
    router_accuracy = (task.tested.expert[:, 0] == task.tested.label % 2).double().mean()
    print(metrics, router_accuracy, joint, narrow)
    assert metrics["sa"] >= 0.96 and metrics["ra_pgd20"] >= 0.86 and narrow["sa"] >= 0.96
    assert router_accuracy >= 0.95
    assert metrics["expert_share_min"] >= 0.4 and metrics["expert_share_max"] <= 0.6
    assert metrics["ra_route"] >= joint["ra_route"] + 0.05
