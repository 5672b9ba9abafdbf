"""What TMMOE must beat: rules of motion, the field's LSTMs, the TCN alone per task, MMoE without it, a dense twin.

Every class takes the data's `schema` and names in `forward` the fields of the batch it needs. The learned ones share
TMMOE's towers, so that what differs is how the three tasks share.
"""

from collections.abc import Iterable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from ...errors import UserError
from ..base import ZooModel
from ..core import DenseRouter, LinearGate, MultiGateMoE
from ..tmmoe import (
    INTENTIONS,
    TASKS,
    TCN,
    TMMOE,
    ExpertKind,
    Reading,
    Towers,
    TrajectoryOutput,
    make_experts,
    step_seconds,
)


class DenseTwin(TMMOE):
    """TMMOE with one wide expert in place of E small ones and their gates; `expert_dim` sets its size.

    Args:
        others: as for `TMMOE`.
    """

    def __init__(
        self,
        schema: Mapping[str, Any],
        channels: int = 32,
        kernel: int = 3,
        layers: int = 4,
        expert: ExpertKind = "lstm",
        expert_dim: int = 67,
        expert_stride: int = 4,
        experts_read: Reading = "tcn",
        tower: int = 64,
        dropout: float = 0.1,
    ) -> None:
        super().__init__(
            schema,
            channels,
            kernel,
            layers,
            expert,
            1,
            expert_dim,
            expert_stride,
            experts_read,
            "shared_bottom",
            tower=tower,
            dropout=dropout,
        )


class LSTMPredictor(ZooModel):
    """One LSTM over the history and the three towers: the plain model of the field.

    Args:
        schema: the data's sizes.
        hidden: width of the LSTM.
        layers: stacked LSTM layers.
        tower: hidden width of a task's head.
        dropout: before the towers.
    """

    def __init__(
        self, schema: Mapping[str, Any], hidden: int = 64, layers: int = 1, tower: int = 64, dropout: float = 0.1
    ) -> None:
        super().__init__()
        self.lstm = nn.LSTM(int(schema["num_features"]), hidden, layers, batch_first=True)
        self.towers = Towers(hidden, tower, schema, dropout)

    def forward(
        self, history: Float[Tensor, "batch time features"], velocity: Float[Tensor, "batch 2"]
    ) -> TrajectoryOutput:
        state = self.lstm(history)[0][:, -1]
        output: TrajectoryOutput = self.towers(state.expand(len(TASKS), *state.shape), velocity, {})
        return output


class ManoeuvreLSTM(ZooModel):
    """Encoder-decoder LSTM conditioned on the manoeuvre, as in CS-LSTM (Deo & Trivedi 2018) without social pooling.

    The encoder's state classifies the manoeuvre; the decoder LSTM is given state and manoeuvre probabilities at each
    step of the horizon and says how the vehicle deviates from constant velocity. Surrounding vehicles come as features
    of the history instead of a pooled grid.

    Args:
        schema: the data's sizes.
        hidden: width of the encoder.
        decoder: width of the decoder.
        dropout: on the encoder's state.
    """

    scale: Tensor
    seconds: Tensor

    def __init__(self, schema: Mapping[str, Any], hidden: int = 64, decoder: int = 64, dropout: float = 0.1) -> None:
        super().__init__()
        self.encoder = nn.LSTM(int(schema["num_features"]), hidden, batch_first=True)
        self.manoeuvre = nn.Linear(hidden, len(INTENTIONS))
        self.decoder = nn.LSTM(hidden + len(INTENTIONS), decoder, batch_first=True)
        self.head = nn.Linear(decoder, 2)
        self.dropout = nn.Dropout(dropout)
        self.register_buffer("seconds", step_seconds(schema), persistent=False)
        self.register_buffer("scale", torch.tensor([2.0, 1.0]), persistent=False)

    def forward(
        self, history: Float[Tensor, "batch time features"], velocity: Float[Tensor, "batch 2"]
    ) -> TrajectoryOutput:
        state = self.dropout(self.encoder(history)[0][:, -1])
        logits = self.manoeuvre(state)
        given = torch.cat([state, logits.softmax(-1)], -1)[:, None].expand(-1, len(self.seconds), -1)
        deviation = self.head(self.decoder(given)[0]) * self.scale
        onward = F.pad(velocity[:, :1, None] * self.seconds, (0, 0, 0, 1)).mT
        return TrajectoryOutput(onward + deviation, logits, {})


class SingleTaskTCN(ZooModel):
    """A TCN and a tower of its own for every task: nothing is shared.

    Args:
        schema: the data's sizes.
        channels: of each TCN.
        kernel: of its convolutions.
        layers: its blocks.
        tower: hidden width of the heads.
        dropout: in the TCNs and before the towers.
    """

    def __init__(
        self,
        schema: Mapping[str, Any],
        channels: int = 32,
        kernel: int = 3,
        layers: int = 4,
        tower: int = 64,
        dropout: float = 0.1,
    ) -> None:
        super().__init__()
        self.encoders = nn.ModuleList(
            TCN(int(schema["num_features"]), channels, kernel, layers, dropout) for _ in TASKS
        )
        self.towers = Towers(channels, tower, schema, dropout)

    def forward(
        self, history: Float[Tensor, "batch time features"], velocity: Float[Tensor, "batch 2"]
    ) -> TrajectoryOutput:
        states = torch.stack([encoder.summary(history) for encoder in self.encoders])  # type: ignore[operator]
        output: TrajectoryOutput = self.towers(states, velocity, {})
        return output


class MMoE(ZooModel):
    """MMoE without the TCN (Ma et al., KDD 2018): experts and gates read the history as it is.

    Recurrent and convolutional experts read the frames, `mlp` ones the flattened window, as the gates do.

    Args:
        schema: the data's sizes.
        expert: kind of the experts, see `TMMOE`.
        experts: how many.
        expert_dim: their width.
        tower: hidden width of a task's head.
        temperature: of the gates.
        dropout: before the towers.
    """

    def __init__(
        self,
        schema: Mapping[str, Any],
        expert: ExpertKind = "lstm",
        experts: int = 4,
        expert_dim: int = 32,
        tower: int = 64,
        temperature: float = 1.0,
        dropout: float = 0.1,
    ) -> None:
        super().__init__()
        features, frames = int(schema["num_features"]), int(schema["history"])
        self.expert = expert
        inputs = frames * features if expert == "mlp" else features
        pool = make_experts(expert, experts, inputs, expert_dim, frames)
        gates = [LinearGate(frames * features, experts, bias=True, std=0.0) for _ in TASKS]
        routers = [DenseRouter(frames * features, experts, temperature, gate=gate) for gate in gates]
        self.mixture = MultiGateMoE(routers, pool)
        self.towers = Towers(expert_dim, tower, schema, dropout)

    def forward(
        self, history: Float[Tensor, "batch time features"], velocity: Float[Tensor, "batch 2"]
    ) -> TrajectoryOutput:
        window = history.flatten(1)
        read = {"mlp": window, "tcn": history.mT}.get(self.expert, history)
        mixed, records = self.mixture(read, window)
        output: TrajectoryOutput = self.towers(mixed, velocity, dict(zip(TASKS, records, strict=True)))
        return output


class ConstantVelocity(ZooModel):
    """On it goes at the current velocity; a lane change is intended where the lateral offset soon passes a threshold.

    The rule looks at `offset weight * lateral + look_ahead * v_y`, the lateral place in the lane in `look_ahead`
    seconds: beyond +`threshold` the vehicle goes left, below -`threshold` right. `fit` chooses the threshold, and the
    look-ahead if `use_offset`, with the best macro-F1 on the train windows. Without `use_offset` the rule is the
    usual threshold on lateral velocity alone.

    Args:
        schema: the data's sizes.
        use_offset: let the rule see the offset from the lane's centre too.
        lateral: False predicts that the vehicle keeps its lateral position.
    """

    rule: Tensor
    seconds: Tensor

    def __init__(self, schema: Mapping[str, Any], use_offset: bool = False, lateral: bool = True) -> None:
        super().__init__()
        self.use_offset, self.lateral_motion = use_offset, lateral
        self.register_buffer("rule", torch.tensor([1.0, 0.5]))  # look-ahead (s), threshold (m)
        self.register_buffer("seconds", step_seconds(schema), persistent=False)

    def fit(self, loader: Iterable[Any]) -> None:
        """Choose look-ahead and threshold on a grid."""
        place, speed, label = [], [], []
        for batch in loader:
            known = batch.intention >= 0
            place.append(batch.lateral[known].cpu())
            speed.append(batch.velocity[known, 1].cpu())
            label.append(batch.intention[known].cpu())
        if not label or not sum(map(len, label)):
            raise UserError("ConstantVelocity: no train window has a known intention")
        seconds = [0.0, 0.25, 0.5, 1.0, 1.5, 2.0, 3.0] if self.use_offset else [1.0]
        thresholds = torch.arange(0.05, 3.0, 0.05)
        best = -1.0
        for look_ahead in seconds:
            ahead = self._ahead(torch.cat(place), torch.cat(speed), look_ahead)
            scores = macro_f1(torch.stack([_classes(ahead, t) for t in thresholds]), torch.cat(label))
            if float(scores.max()) > best:
                best = float(scores.max())
                self.rule.copy_(torch.stack([torch.tensor(look_ahead), thresholds[scores.argmax()]]))

    def forward(self, velocity: Float[Tensor, "batch 2"], lateral: Float[Tensor, "batch"]) -> TrajectoryOutput:
        steps = self.seconds[:, None] * velocity[:, None]
        if not self.lateral_motion:
            steps = steps * steps.new_tensor([1.0, 0.0])
        ahead = self._ahead(lateral, velocity[:, 1], self.rule[0])
        beyond = (torch.stack([ahead, -ahead], -1) - self.rule[1]) * 4
        return TrajectoryOutput(steps, F.pad(beyond, (1, 0)), {})

    def _ahead(self, place: Tensor, speed: Tensor, look_ahead: Tensor | float) -> Tensor:
        return speed * look_ahead + (place.nan_to_num(nan=0.0) if self.use_offset else 0.0)


def macro_f1(predicted: Int[Tensor, "rules batch"], label: Int[Tensor, "batch"]) -> Float[Tensor, " rules"]:
    """Mean F1 over the three intentions; a class that never occurs and is never predicted counts 0."""
    classes = torch.arange(len(INTENTIONS))[:, None]
    truth = label == classes
    said = predicted[:, None] == classes
    hits = (said & truth).sum(-1)
    return (2 * hits / (said.sum(-1) + truth.sum(-1)).clamp(min=1)).mean(-1)


def _classes(ahead: Tensor, threshold: Tensor) -> Tensor:
    return (ahead > threshold).long() + 2 * (ahead < -threshold).long()
