"""Who goes where, over the whole run: expert statistics of every routing record, logged and drawn."""

from pathlib import Path
from typing import Any

import pytorch_lightning as lightning
import torch
from pytorch_lightning.callbacks import Callback
from torch import Tensor

from ..zoo.core import Routing
from ..zoo.core.statistics import routing_statistics

# One statistic of a batch is noise and costs a device read; these many train steps are averaged for each value.
EVERY_N_STEPS = 10


class RoutingMonitor(Callback):
    """Logs `moe/<layer>/<statistic>` once an epoch and draws the share of weight each expert gets, epoch by epoch.

    Records come from `BaseTask.record`, so any model that returns `routing` is watched without knowing it.
    Measured in training: evaluation with one token a step would look like collapse.
    """

    def __init__(self) -> None:
        self._sums: dict[str, dict[str, Tensor]] = {}
        self._counts: dict[str, int] = {}
        self.shares: dict[str, list[list[float]]] = {}

    def on_train_batch_end(self, trainer: lightning.Trainer, task: Any, *_: Any) -> None:
        if trainer.global_step % EVERY_N_STEPS:
            return
        for name, record in task.routing.items():
            values = routing_statistics(record) | {"share": _share(record)}
            sums = self._sums.setdefault(name, {})
            for key, value in values.items():
                sums[key] = sums.get(key, 0) + value.detach().float()
            self._counts[name] = self._counts.get(name, 0) + 1

    def on_train_epoch_end(self, trainer: lightning.Trainer, task: lightning.LightningModule) -> None:
        for name, sums in self._sums.items():
            means = {key: value / self._counts[name] for key, value in sums.items()}
            share = means.pop("share")
            if trainer.world_size > 1:
                share = trainer.strategy.reduce(share, reduce_op="mean")
            self.shares.setdefault(name, []).append(share.tolist())
            scalars = {f"moe/{name}/{key}": value for key, value in means.items() if value.ndim == 0}
            task.log_dict(scalars, sync_dist=trainer.world_size > 1)
        self._sums, self._counts = {}, {}

    def state_dict(self) -> dict[str, Any]:
        return {"shares": self.shares}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.shares = state_dict["shares"]

    def draw(self, folder: Path) -> list[Path]:
        """Draw `routing_<layer>.png`, experts x epochs, for every layer seen; returns the files."""
        return [draw_shares(name, shares, folder) for name, shares in self.shares.items()]


def draw_shares(name: str, shares: list[list[float]], folder: Path) -> Path:
    """A heat map of expert shares over epochs."""
    from matplotlib.figure import Figure

    experts, epochs = len(shares[0]), len(shares)
    figure = Figure(figsize=(2.6 + 0.55 * epochs, 1.6 + 0.32 * experts), layout="constrained")
    axes = figure.subplots()
    image = axes.imshow(torch.tensor(shares).T.numpy(), vmin=0, cmap="viridis", aspect="auto")
    axes.set_xticks(range(epochs), [str(e + 1) for e in range(epochs)])
    axes.set_yticks(range(experts), [str(e) for e in range(experts)])
    axes.set(xlabel="epoch", ylabel="expert", title=f"{name}: share of routed weight")
    figure.colorbar(image, ax=axes)
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"routing_{name.replace('.', '_')}.png"
    figure.savefig(path, dpi=150)
    return path


def _share(record: Routing) -> Tensor:
    """Each expert's share of the absolute weight: un-normalised gates may be negative."""
    weight = record.dense_weights().abs().float().sum(0)
    return weight / weight.sum().clamp(min=1e-12)
