"""TMMOE: where a vehicle drives and what it intends, by one mixture of temporal experts and a gate per task.

Yuan et al., arXiv 2308.00533 (IEEE T-IV 9(1), 2024). Letters: T frames of history, F features, C channels of the TCN,
E experts of width D, H steps of horizon.

Source: the paper's abstract; the body could not be obtained, so sizes follow this project's fact sheet (§1.3), which
marks what is known and what is decided here.
"""

from collections.abc import Mapping
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn.utils.parametrizations import weight_norm

from ..errors import UserError
from .base import ZooModel
from .core import (
    ConvExperts,
    DenseRouter,
    Experts,
    Gate,
    LinearGate,
    MLPExperts,
    MultiGateMoE,
    RecurrentExperts,
    Routing,
)
from .core.losses import batch_entropy, token_entropy

ExpertKind = Literal["lstm", "gru", "tcn", "mlp"]
Variant = Literal["mmoe", "ple", "shared_bottom"]
Reading = Literal["tcn", "both", "history"]
TASKS = ("longitudinal", "lateral", "intention")
INTENTIONS = ("keep", "left", "right")


class TrajectoryOutput(NamedTuple):
    """Displacements from the current position in metres (x along travel, y to the left), intention logits, and who
    decided: one routing record per task, of which a token is a window."""

    position: Float[Tensor, "batch horizon 2"]
    intention: Float[Tensor, "batch 3"]
    routing: dict[str, Routing]


class TMMOE(ZooModel):
    """A causal TCN shared by all tasks, temporal experts that each task mixes with its own gate, a tower per task.

    Args:
        schema: the data's sizes: `num_features`, `history`, `horizon`, `frame_rate`.
        channels: C.
        kernel: of the TCN's convolutions.
        layers: blocks of the TCN, of dilation 1, 2, 4, ...
        expert: one expert is an `lstm` or a `gru` over the TCN's outputs, a `tcn` (one more causal convolution), or
            an `mlp` on the TCN's last output.
        experts: E; for `ple` those that all tasks share.
        expert_dim: D.
        expert_stride: experts read every so many frames of the TCN's outputs, each of which has seen those between.
        experts_read: the experts' input: the TCN's outputs (`tcn`, the paper's), the history's frames beside them
            (`both`: the TCN's ReLUs blur what is measured), or those frames alone (`history`: the TCN is the gates').
        variant: `mmoe` (a gate per task over all experts), `ple` (Tang et al. 2020: each task has
            `task_experts` of its own besides), `shared_bottom` (one expert, no gate).
        task_experts: experts of each task alone, for `ple`.
        tower: hidden width of a task's head.
        temperature: of the gates; above 1 they are softer.
        entropy_coef: reward for a gate that spreads each window over the experts.
        balance_coef: reward for experts that are used alike over the batch.
        dropout: in the TCN and before the towers.

    Raises:
        UserError: the TCN does not see the whole history, or `expert_stride` is no power of two up to 2^(layers - 1).
    """

    def __init__(
        self,
        schema: Mapping[str, Any],
        channels: int = 32,
        kernel: int = 3,
        layers: int = 4,
        expert: ExpertKind = "lstm",
        experts: int = 4,
        expert_dim: int = 32,
        expert_stride: int = 4,
        experts_read: Reading = "tcn",
        variant: Variant = "mmoe",
        task_experts: int = 1,
        tower: int = 64,
        temperature: float = 1.0,
        entropy_coef: float = 0.0,
        balance_coef: float = 0.0,
        dropout: float = 0.1,
    ) -> None:
        super().__init__()
        if experts < 1 or (variant == "ple" and task_experts < 1):
            raise UserError(f"experts={experts}, task_experts={task_experts}: expected at least 1 of each")
        history = int(schema["history"])
        blind = variant == "shared_bottom" and experts_read == "history"  # nobody would read the TCN
        self.tcn = None if blind else TCN(int(schema["num_features"]), channels, kernel, layers, dropout)
        if self.tcn is not None and self.tcn.receptive_field < history:
            raise UserError(
                f"kernel={kernel}, layers={layers}: the TCN sees {self.tcn.receptive_field} frames of a history of "
                f"{history}; give more layers or a larger kernel"
            )
        if expert_stride not in (strides := [2**level for level in range(layers)]):
            raise UserError(f"expert_stride={expert_stride}: with {layers} layers expected one of {strides}")
        self.variant, self.expert, self.kernel, self.experts_read = variant, expert, kernel, experts_read
        self.expert_stride = strides[-1] if expert == "mlp" else expert_stride
        self.entropy_coef, self.balance_coef = entropy_coef, balance_coef
        own = task_experts if variant == "ple" else 0
        total = 1 if variant == "shared_bottom" else experts + own * len(TASKS)
        features = int(schema["num_features"])
        inputs = {"tcn": channels, "both": channels + features, "history": features}[experts_read]
        bottom = make_experts(expert, total, inputs, expert_dim, kernel)
        if variant == "shared_bottom":
            self.bottom = bottom
        else:
            gates = [_gate(channels, total, experts, own, task) for task in range(len(TASKS))]
            routers = [DenseRouter(channels, total, temperature, gate=gate) for gate in gates]
            self.mixture = MultiGateMoE(routers, bottom)
        self.towers = Towers(expert_dim, tower, schema, dropout)

    def forward(
        self, history: Float[Tensor, "batch time features"], velocity: Float[Tensor, "batch 2"]
    ) -> TrajectoryOutput:
        """Predict from normalised history, whose last frame is now, and the current velocity (m/s)."""
        frames = history[:, (history.shape[1] - 1) % self.expert_stride :: self.expert_stride]
        if self.tcn is None:
            read, summary = frames, frames[:, -1]  # no gate will look
        elif self.experts_read == "history":
            read, summary = frames, self.tcn.summary(history)
        else:
            seen = self.tcn(history, self.expert_stride)
            read = seen if self.experts_read == "tcn" else torch.cat([seen, frames], -1)
            summary = seen[:, -1]
        if self.expert == "mlp":
            read = read[:, -1]
        elif self.expert == "tcn":
            read = read[:, -self.kernel :].mT
        if self.variant == "shared_bottom":
            shared = self.bottom.dense(read)[:, 0]
            per_task, routing = shared.expand(len(TASKS), *shared.shape), {}
        else:
            per_task, records = self.mixture(read, summary)
            routing = self._regularised(dict(zip(TASKS, records, strict=True)))
        output: TrajectoryOutput = self.towers(per_task, velocity, routing)
        return output

    def _regularised(self, routing: dict[str, Routing]) -> dict[str, Routing]:
        if self.training and (self.entropy_coef or self.balance_coef):
            for record in routing.values():
                spread = self.entropy_coef * token_entropy(record.scores)
                record.aux_loss = record.aux_loss - spread - self.balance_coef * batch_entropy(record.scores)
        return routing


class Towers(nn.Module):
    """A two-layer head per task, and the positions they stand for.

    The longitudinal tower says by how much the vehicle deviates from constant velocity, in units of 2 m; the
    lateral one where it goes, in units of 1 m: raw metres would let one task drown the others.
    """

    scale: Tensor
    seconds: Tensor

    def __init__(self, dim: int, hidden: int, schema: Mapping[str, Any], dropout: float = 0.0) -> None:
        super().__init__()
        horizon = int(schema["horizon"])
        self.longitudinal, self.lateral, self.intention = (
            nn.Sequential(nn.Dropout(dropout), nn.Linear(dim, hidden), nn.ReLU(), nn.Linear(hidden, out))
            for out in (horizon, horizon, len(INTENTIONS))
        )
        self.register_buffer("seconds", step_seconds(schema), persistent=False)
        self.register_buffer("scale", torch.tensor([2.0, 1.0]), persistent=False)

    def forward(
        self,
        per_task: Float[Tensor, "tasks batch dim"],
        velocity: Float[Tensor, "batch 2"],
        routing: dict[str, Routing],
    ) -> TrajectoryOutput:
        longitudinal, lateral, intention = per_task
        deviation = torch.stack([self.longitudinal(longitudinal), self.lateral(lateral)], -1) * self.scale
        onward = F.pad(velocity[:, :1, None] * self.seconds, (0, 0, 0, 1)).mT
        return TrajectoryOutput(onward + deviation, self.intention(intention), routing)


class TCN(nn.Module):
    """Causal dilated convolutions in residual blocks (Bai et al., arXiv 1803.01271); frame t sees t and before.

    `receptive_field` is how many frames the last output sees: 1 + 2 (kernel - 1)(2^layers - 1).
    """

    def __init__(self, features: int, channels: int, kernel: int, layers: int, dropout: float) -> None:
        super().__init__()
        if kernel < 2 or layers < 1:
            raise UserError(f"kernel={kernel}, layers={layers}: expected a kernel of at least 2 and a layer")
        self.blocks = nn.ModuleList(
            _TCNBlock(channels if block else features, channels, kernel, dropout) for block in range(layers)
        )
        self.receptive_field = 1 + 2 * (kernel - 1) * (2**layers - 1)

    def forward(
        self, x: Float[Tensor, "batch time features"], stride: int = 1
    ) -> Float[Tensor, "batch steps channels"]:
        """The output at every `stride`-th frame (a power of two up to 2^(layers - 1)), counted from the last back.

        A block of dilation d needs every d-th frame alone, so that fewer frames cost less from the first block on.
        """
        h, step = x.mT, 1
        for level, block in enumerate(self.blocks):
            if 1 < 2**level <= stride:
                h, step = h[..., (h.shape[-1] - 1) % 2 :: 2], 2**level
            h = block(h, 2**level // step)
        return h.mT

    def summary(self, x: Float[Tensor, "batch time features"]) -> Float[Tensor, "batch channels"]:
        """The output at the last frame."""
        steps: Tensor = self(x, 2 ** (len(self.blocks) - 1))
        return steps[:, -1]


class _TCNBlock(nn.Module):
    def __init__(self, inputs: int, channels: int, kernel: int, dropout: float) -> None:
        super().__init__()
        first, second = nn.Conv1d(inputs, channels, kernel), nn.Conv1d(channels, channels, kernel)
        for convolution in (first, second):
            nn.init.kaiming_normal_(convolution.weight, nonlinearity="relu")
            nn.init.zeros_(convolution.bias)  # type: ignore[arg-type]
        self.first, self.second = weight_norm(first), weight_norm(second)
        self.skip = nn.Conv1d(inputs, channels, 1) if inputs != channels else nn.Identity()
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Float[Tensor, "batch inputs time"], dilation: int) -> Float[Tensor, "batch channels time"]:
        h = x
        for convolution in (self.first, self.second):
            padding = (convolution.kernel_size[0] - 1) * dilation
            h = F.conv1d(F.pad(h, (padding, 0)), convolution.weight, convolution.bias, dilation=dilation)
            h = self.dropout(h.relu())
        out: Tensor = (h + self.skip(x)).relu()
        return out


class LastConvExperts(ConvExperts):
    """E causal convolutions and a ReLU, of whose outputs the last frame counts: rows are [channels, kernel]."""

    def dense(
        self, x: Float[Tensor, "tokens in_channels kernel"], weights: Float[Tensor, "tokens experts"] | None = None
    ) -> Float[Tensor, "tokens *out_dims"]:
        y = super().dense(x).squeeze(-1).relu()
        return y if weights is None else torch.einsum("neo,ne->no", y, weights.to(y.dtype))


class OwnGate(Gate):
    """A linear gate that sees the experts of `own` alone; the others get no weight (CGC of PLE, Tang et al. 2020)."""

    closed: Tensor

    def __init__(self, dim: int, own: list[bool]) -> None:
        super().__init__(len(own))
        self.linear = LinearGate(dim, len(own), bias=True, std=0.0)
        self.register_buffer("closed", ~torch.tensor(own), persistent=False)

    def forward(
        self, x: Float[Tensor, "tokens dim"], task_id: Int[Tensor, "tokens *slots"] | None = None
    ) -> Float[Tensor, "tokens experts"]:
        logits: Tensor = self.linear(x)
        return logits.masked_fill(self.closed, -1e9)


def make_experts(kind: ExpertKind, experts: int, channels: int, dim: int, kernel: int) -> Experts:
    """E experts of width `dim` over a sequence of `channels`; those of kind `mlp` read one frame."""
    if kind == "lstm" or kind == "gru":
        return RecurrentExperts(experts, channels, dim, kind, last=True)
    if kind == "tcn":
        return LastConvExperts(experts, channels, dim, kernel, dims=1)
    if kind == "mlp":
        return MLPExperts(experts, channels, 2 * dim, out=dim, act="relu")
    raise UserError(f"expert={kind}: expected lstm, gru, tcn or mlp")


def step_seconds(schema: Mapping[str, Any]) -> Float[Tensor, " horizon"]:
    """Seconds from now to each step of the horizon."""
    return torch.arange(1, int(schema["horizon"]) + 1) / float(schema["frame_rate"])


def _gate(channels: int, total: int, shared: int, own: int, task: int) -> Gate:
    """Starts at zero, so that all experts are mixed alike until a task has reason not to."""
    if not own:
        return LinearGate(channels, total, bias=True, std=0.0)
    seen = [e < shared or (e - shared) // own == task for e in range(total)]
    return OwnGate(channels, seen)
