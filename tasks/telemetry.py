"""Who goes where, over the whole run: expert statistics of every routing record, logged and drawn."""

from pathlib import Path
from typing import Any

import pytorch_lightning as lightning
import torch
from pytorch_lightning.callbacks import Callback
from torch import Tensor

from ..zoo.core import Routing
from ..zoo.core.statistics import routing_statistics

EVERY_N_STEPS = 10  # one statistic of one batch is noise, and more would cost time
MAX_COLUMNS = 400  # of the picture; beyond it every second one is dropped


class RoutingMonitor(Callback):
    """Logs `moe/<layer>/<statistic>` once an epoch and draws the share of weight each expert gets over training.

    Records come from `BaseTask.record`, so any model that returns `routing` is watched without knowing it.
    Measured in training: evaluation with one token a step would look like collapse. Values stay on the device
    until the epoch ends.
    """

    def __init__(self) -> None:
        self._seen: dict[str, list[dict[str, Tensor]]] = {}
        self.shares: dict[str, list[list[float]]] = {}

    def on_train_batch_end(self, trainer: lightning.Trainer, task: Any, *_: Any) -> None:
        if trainer.global_step % EVERY_N_STEPS == 0:
            for name, record in task.routing.items():
                self._seen.setdefault(name, []).append(routing_statistics(record) | {"share": _share(record)})

    def on_train_epoch_end(self, trainer: lightning.Trainer, task: lightning.LightningModule) -> None:
        for name, seen in self._seen.items():
            columns = {key: torch.stack([values[key].float() for values in seen]) for key in seen[0]}
            shares = columns.pop("share")
            if trainer.world_size > 1:
                shares = trainer.strategy.reduce(shares, reduce_op="mean")
            kept = self.shares.setdefault(name, [])
            kept += shares.tolist()
            while len(kept) > MAX_COLUMNS:
                del kept[1::2]
            scalars = {f"moe/{name}/{key}": values.mean() for key, values in columns.items() if values.ndim == 1}
            task.log_dict(scalars, sync_dist=trainer.world_size > 1)
        self._seen = {}

    def state_dict(self) -> dict[str, Any]:
        return {"shares": self.shares}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.shares = state_dict["shares"]

    def draw(self, folder: Path) -> list[Path]:
        """Draw `routing_<layer>.png`, experts x training, for every layer seen; returns the files."""
        return [draw_shares(name, shares, folder) for name, shares in self.shares.items()]


def draw_shares(name: str, shares: list[list[float]], folder: Path) -> Path:
    """A heat map of expert shares from the first training step to the last."""
    from matplotlib.figure import Figure

    experts = len(shares[0])
    figure = Figure(figsize=(6.4, min(1.6 + 0.3 * experts, 8.0)), layout="constrained")
    axes = figure.subplots()
    image = axes.imshow(
        torch.tensor(shares).T.numpy(), vmin=0, cmap="viridis", aspect="auto", extent=(0, 100, experts - 0.5, -0.5)
    )
    axes.set_yticks(range(0, experts, 1 + experts // 24))
    axes.set(xlabel="training done, %", ylabel="expert", title=f"{name}: share of routed weight")
    figure.colorbar(image, ax=axes)
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"routing_{name.replace('.', '_')}.png"
    figure.savefig(path, dpi=150)
    return path


def _share(record: Routing) -> Tensor:
    """Each expert's share of the absolute weight: un-normalised gates may be negative."""
    weight = record.dense_weights().abs().float().sum(0)
    return weight / weight.sum().clamp(min=1e-12)
