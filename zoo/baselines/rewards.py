"""What DMoERM must beat: one reward model, ensembles of them, dense twins, and mixtures of low-rank experts.

Every class takes the data's `schema` and names in `forward` the fields of the batch it needs. The learned ones share
DMoERM's backbones, so that what differs is who shares what. Rules and the linear model are in `rewards_linear`.
"""

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from ...errors import UserError
from ..core import DenseRouter, LinearGate, LoRALinear, Router, Routing, StackedLinear, TopKRouter
from ..dmoerm import RewardModel, RewardOutput, capability_names, own_output
from ..text_backbones import TRANSFORMER, build_backbone

Objective = Literal["mean", "wco", "uwo"]
FEED_FORWARD = ("up_proj", "down_proj")


class SingleRM(RewardModel):
    """One network and a linear head for all tasks: the plain reward model (Stiennon et al. 2020).

    Args:
        schema: the data's sizes.
        backbone: see `build_backbone`.
        backbone_options: its further arguments.
    """

    def __init__(
        self,
        schema: Mapping[str, Any],
        backbone: str = TRANSFORMER,
        backbone_options: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__()
        self.backbone = build_backbone(backbone, schema, 1, backbone_options)
        self.head = nn.Linear(self.backbone.dim, 1)

    def forward(self, tokens: Int[Tensor, "rows length"], mask: Bool[Tensor, "rows length"]) -> RewardOutput:
        hidden = self.backbone(tokens, mask).float()
        return plain_output(self.head(hidden)[:, 0], hidden)


class EnsembleRM(RewardModel):
    """M reward models that differ in their initial values, run as one, and what they agree on (Coste et al. 2023).

    Each member's rewards are standardised by their running mean and deviation in training before they are compared:
    without it the worst of them is merely the one of smallest scale.

    Args:
        schema: the data's sizes.
        members: M.
        objective: `mean`; `wco`, the worst member's; `uwo`, the mean less `uncertainty` times the members' variance.
        uncertainty: lambda of `uwo`.
        momentum: of the running statistics.
        backbone, backbone_options: see `build_backbone`; M copies.
    """

    centre: Tensor
    variance: Tensor

    def __init__(
        self,
        schema: Mapping[str, Any],
        members: int = 5,
        objective: Objective = "mean",
        uncertainty: float = 0.5,
        momentum: float = 0.02,
        backbone: str = TRANSFORMER,
        backbone_options: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__()
        if members < 2:
            raise UserError(f"members={members}: expected at least 2")
        self.members, self.objective, self.uncertainty, self.momentum = members, objective, uncertainty, momentum
        self.backbone = build_backbone(backbone, schema, members, backbone_options)
        self.head = StackedLinear(members, self.backbone.dim, 1)
        self.register_buffer("centre", torch.zeros(members))
        self.register_buffer("variance", torch.ones(members))

    def forward(self, tokens: Int[Tensor, "rows length"], mask: Bool[Tensor, "rows length"]) -> RewardOutput:
        rows = len(tokens)
        member = torch.arange(self.members, device=tokens.device).repeat_interleave(rows)
        hidden = self.backbone(tokens.repeat(self.members, 1), mask.repeat(self.members, 1), member).float()
        scores = own_output(self.head, hidden, member).view(self.members, rows).T
        if self.training:
            self._follow(scores.detach())
        alike = (scores - self.centre) / self.variance.clamp(min=1e-12).sqrt()
        reward = alike.mean(1)
        if self.objective == "wco":
            reward = alike.amin(1)
        elif self.objective == "uwo":
            reward = reward - self.uncertainty * alike.var(1, correction=0)
        hidden = hidden.view(self.members, rows, -1).transpose(0, 1).flatten(1)
        return plain_output(reward, hidden, scores)

    @torch.no_grad()
    def _follow(self, scores: Float[Tensor, "rows members"]) -> None:
        self.centre.lerp_(scores.mean(0), self.momentum)
        self.variance.lerp_(scores.var(0, correction=0), self.momentum)


class DenseTwin(RewardModel):
    """DMoERM without experts: one network through the same three phases and data, with a head per capability.

    Args:
        schema: the data's sizes.
        backbone, backbone_options: see `build_backbone`; the width makes it as large as what DMoERM touches, or has.
        aggregate: hidden width of the MLP of phase 3; default: the backbone's.
        freeze: phase 3 leaves the network as it is, as DMoERM does.
    """

    phases = 3
    slots: Tensor

    def __init__(
        self,
        schema: Mapping[str, Any],
        backbone: str = TRANSFORMER,
        backbone_options: Mapping[str, Any] | None = None,
        aggregate: int | None = None,
        freeze: bool = False,
    ) -> None:
        super().__init__()
        self.freeze = freeze
        self.backbone = build_backbone(backbone, schema, 1, backbone_options)
        width, names = self.backbone.dim, capability_names(schema)
        self.head = nn.Linear(width, 1)
        self.register_buffer("slots", capability_slots(names), persistent=False)
        self.capability_head = nn.Linear(width, int(self.slots.max()) + 1)
        hidden = aggregate or width
        self.aggregator = nn.Sequential(nn.Linear(width, hidden), nn.PReLU(), nn.Linear(hidden, 1))

    def forward(
        self,
        tokens: Int[Tensor, "rows length"],
        mask: Bool[Tensor, "rows length"],
        task: Int[Tensor, "prompts"],
        capability: Int[Tensor, "prompts"] | None = None,
        phase: int = 3,
    ) -> RewardOutput:
        """As `DMoERM.forward`, without a router."""
        hidden = self.backbone(tokens, mask).float()
        if phase == 1:
            return plain_output(self.head(hidden)[:, 0], hidden)
        own = self.capability_head(hidden)
        slots = self.slots[task.clamp(min=0)].repeat_interleave(len(tokens) // len(task), 0)
        by_task = own.gather(1, slots.clamp(min=0)).masked_fill(slots < 0, torch.nan)
        if phase == 2:
            asked = torch.zeros_like(task) if capability is None else capability.clamp(min=0)
            asked = asked.repeat_interleave(len(tokens) // len(task))
            return plain_output(by_task.gather(1, asked[:, None])[:, 0], hidden)
        return plain_output(self.aggregator(hidden)[:, 0], hidden)._replace(capability_rewards=by_task)

    def phase_parameters(self, phase: int) -> list[nn.Parameter]:
        """The network always (unless `freeze` and phase 3), with the phase's head."""
        head = {1: self.head, 2: self.capability_head, 3: self.aggregator}[phase]
        body = [] if self.freeze and phase == 3 else list(self.backbone.parameters())
        return [*body, *head.parameters()]


class XLoRARM(RewardModel):
    """A soft gate over DMoERM's capability experts, layer by layer, in place of routing by task (X-LoRA, Buehler &
    Buehler 2024).

    Phases 1 and 2 are DMoERM's on one shared backbone. In phase 3 a first pass without experts gives the hidden vector
    from which the gate mixes all experts for a second pass; the gate and a head are trained.

    Args:
        schema: the data's sizes.
        backbone, backbone_options: see `build_backbone`.
        rank, alpha, targets: of the low-rank experts, see `DMoERM`.
        temperature: of the softmax over experts.
        layerwise: one mixture for each adapted layer, or one for all.
    """

    phases = 3
    slots: Tensor

    def __init__(
        self,
        schema: Mapping[str, Any],
        backbone: str = TRANSFORMER,
        backbone_options: Mapping[str, Any] | None = None,
        rank: int = 8,
        alpha: float = 8.0,
        targets: Sequence[str] = ("q_proj", "v_proj"),
        temperature: float = 1.0,
        layerwise: bool = True,
    ) -> None:
        super().__init__()
        names = capability_names(schema)
        self.register_buffer("slots", capability_slots(names), persistent=False)
        self.backbone = build_backbone(backbone, schema, 1, backbone_options)
        self.own = list(self.backbone.parameters())
        experts, width = int(self.slots.max()) + 1, self.backbone.dim
        self.adapters = self.backbone.adapt(targets, experts, rank, alpha)
        self.head, self.last = nn.Linear(width, 1), nn.Linear(width, 1)
        self.capability_head = StackedLinear(experts, width, 1)
        self.layers = self.adapters.num_layers if layerwise else 1
        gates = [LinearGate(width, experts, bias=True, std=0.0) for _ in range(self.layers)]
        self.gates = nn.ModuleList(DenseRouter(width, experts, temperature, gate=gate) for gate in gates)

    def forward(
        self,
        tokens: Int[Tensor, "rows length"],
        mask: Bool[Tensor, "rows length"],
        task: Int[Tensor, "prompts"],
        capability: Int[Tensor, "prompts"] | None = None,
        phase: int = 3,
    ) -> RewardOutput:
        """As `DMoERM.forward`; the task says in phase 2 alone which expert learns."""
        each = len(tokens) // len(task)
        if phase == 2:
            asked = torch.zeros_like(task) if capability is None else capability.clamp(min=0)
            expert = self.slots[task.clamp(min=0), asked].repeat_interleave(each)
            with self.adapters.choice.choosing(expert):
                hidden = self.backbone(tokens, mask).float()
            return plain_output(own_output(self.capability_head, hidden, expert), hidden)
        first = self.backbone(tokens, mask).float()
        if phase == 1:
            return plain_output(self.head(first)[:, 0], first)
        records = [gate(first) for gate in self.gates]
        weights = torch.stack([record.weights for record in records], 1)
        with self.adapters.choice.choosing(weights=weights if self.layers > 1 else weights[:, 0]):
            hidden = self.backbone(tokens, mask).float()
        mean = records[0] if len(records) == 1 else _mean_record(records)
        return plain_output(self.last(hidden)[:, 0], hidden, routing={"xlora": mean})

    def phase_parameters(self, phase: int) -> list[nn.Parameter]:
        """1: backbone and head; 2: experts and their heads; 3: gate and the last head."""
        if phase == 1:
            return [*self.own, *self.head.parameters()]
        if phase == 2:
            return [*self.adapters.expert_parameters(), *self.capability_head.parameters()]
        return [*self.gates.parameters(), *self.last.parameters()]

    @torch.no_grad()
    def enter_phase(self, phase: int) -> None:
        """Heads start as copies of phase 1's."""
        if phase == 2:
            self.capability_head.weight.copy_(self.head.weight.expand_as(self.capability_head.weight))
            assert self.capability_head.bias is not None
            self.capability_head.bias.copy_(self.head.bias.expand_as(self.capability_head.bias))
        if phase == 3:
            self.last.load_state_dict(self.head.state_dict())


class MixtureContext:
    """What the mixtures inside a network must know of the rows it runs, and the records they leave."""

    def __init__(self) -> None:
        self.mask: Tensor | None = None
        self.task: Tensor | None = None
        self.records: list[Routing] = []


class MixtureLinear(LoRALinear):
    """A linear layer with low-rank experts that each token mixes by a router of the layer's own.

    Args:
        base: the layer it replaces.
        router: over the experts.
        rank, alpha: of the experts.
        context: shared by all layers of the network.
        localized: coefficient of LoRAMoE's localized balance loss; experts are told off to tasks in turn.
        delta: how much more an expert should be used by its own task.
    """

    def __init__(
        self,
        base: nn.Linear,
        router: Router,
        rank: int,
        alpha: float,
        context: MixtureContext,
        localized: float = 0.0,
        delta: float = 0.1,
    ) -> None:
        super().__init__(base, router.num_experts, rank, alpha, freeze_base=False)
        self.router, self.context = router, context
        self.localized, self.delta = localized, delta

    def forward(  # type: ignore[override]
        self, x: Float[Tensor, "rows length in_dim"]
    ) -> Float[Tensor, "rows length out_dim"]:
        context = self.context
        assert context.mask is not None
        seen = context.mask.flatten()
        record = self.router(x.flatten(0, 1), token_mask=seen)
        if self.training and self.localized and context.task is not None:
            loss = localized_balance_loss(record.scores, context.task, context.mask, self.delta)
            record.aux_loss = record.aux_loss + self.localized * loss
        context.records.append(record)
        return super().forward(x, record.dense_weights().view(*x.shape[:2], -1))


class MixtureRM(RewardModel):
    """One reward model whose feed-forward layers have low-rank experts, mixed token by token; one phase, no labels of
    tasks or capabilities at inference.

    `loramoe`: a softmax over E experts of rank r and the localized balance loss (LoRAMoE, Dou et al. 2024).
    `smora`: every expert is a single rank, the best k of E are on, balanced by a bias (SMoRA, arXiv 2501.15103).

    Args:
        schema: the data's sizes.
        kind: of the mixture.
        experts: E.
        rank: of an expert, for `loramoe`.
        top_k: for `smora`.
        alpha: scale of the experts is alpha / rank.
        balance: coefficient of the localized balance loss, for `loramoe`.
        backbone, backbone_options: see `build_backbone`.
        targets: linear layers that get a mixture.
        freeze_backbone: train experts, routers and head alone, for pretrained backbones.
    """

    def __init__(
        self,
        schema: Mapping[str, Any],
        kind: Literal["loramoe", "smora"] = "loramoe",
        experts: int = 5,
        rank: int = 8,
        top_k: int = 8,
        alpha: float = 8.0,
        balance: float = 0.01,
        backbone: str = TRANSFORMER,
        backbone_options: Mapping[str, Any] | None = None,
        targets: Sequence[str] = FEED_FORWARD,
        freeze_backbone: bool = False,
    ) -> None:
        super().__init__()
        self.backbone = build_backbone(backbone, schema, 1, backbone_options)
        self.backbone.requires_grad_(not freeze_backbone)
        self.context = MixtureContext()
        found = [
            (path, layer)
            for path, layer in self.backbone.named_modules()
            if isinstance(layer, nn.Linear) and path.rpartition(".")[2] in targets
        ]
        if not found:
            raise UserError(f"targets={list(targets)}: {backbone} has no linear layer of such a name")
        for path, layer in found:
            width = layer.in_features
            if kind == "loramoe":
                router: Router = DenseRouter(width, experts)
                mixture = MixtureLinear(layer, router, rank, alpha, self.context, balance)
            else:
                router = TopKRouter(width, experts, top_k, balance="bias", score_func="sigmoid")
                mixture = MixtureLinear(layer, router, 1, alpha / rank, self.context)
            parent, _, name = path.rpartition(".")
            setattr(self.backbone.get_submodule(parent), name, mixture)
        self.head = nn.Linear(self.backbone.dim, 1)

    def forward(
        self,
        tokens: Int[Tensor, "rows length"],
        mask: Bool[Tensor, "rows length"],
        task: Int[Tensor, "prompts"] | None = None,
    ) -> RewardOutput:
        """The task, where known, tells the localized balance loss alone which experts should serve a token."""
        context = self.context
        context.mask, context.records = mask, []
        context.task = None if task is None else task.repeat_interleave(len(tokens) // len(task))
        try:
            hidden = self.backbone(tokens, mask).float()
            records = context.records
        finally:
            context.mask, context.task, context.records = None, None, []
        routing = {f"layer{i}": record for i, record in enumerate(records)}
        return plain_output(self.head(hidden)[:, 0], hidden, routing=routing)


def localized_balance_loss(
    scores: Float[Tensor, "tokens experts"],
    task: Int[Tensor, "rows"],
    mask: Bool[Tensor, "rows length"],
    delta: float,
) -> Float[Tensor, ""]:
    """`var(Z) / mean(Z)` of the importance Z = I * Q summed over tokens (LoRAMoE, Dou et al. 2024, eqs. 6 to 8).

    Q are the routing weights; I is 1 + delta where the expert's kind is that of the sample, else 1 - delta. Z is the
    mean over tokens rather than their sum, so that the loss does not grow with the batch. Expert e is told off to task
    e modulo E.
    """
    experts = torch.arange(scores.shape[1], device=scores.device)
    own = (task[:, None] % scores.shape[1]) == experts
    sign = torch.where(own, 1 + delta, 1 - delta).to(scores.dtype)
    sign = torch.where(task[:, None] < 0, torch.ones_like(sign), sign)
    kept = mask.to(scores.dtype)[..., None]
    weighted = scores.view(*mask.shape, -1) * sign[:, None] * kept
    importance = weighted.sum((0, 1)) / kept.sum().clamp(min=1)
    return importance.var(correction=0) / importance.mean().clamp(min=1e-12)


def plain_output(
    reward: Float[Tensor, "rows"],
    hidden: Float[Tensor, "rows hidden"],
    scores: Float[Tensor, "rows scores"] | None = None,
    routing: dict[str, Routing] | None = None,
) -> RewardOutput:
    """The output of a model without capabilities or router."""
    nothing = reward.new_zeros(len(reward), 0)
    return RewardOutput(reward, nothing, nothing, hidden, reward[:, None] if scores is None else scores, routing or {})


def capability_slots(names: Sequence[Sequence[str]]) -> Int[Tensor, "tasks capabilities"]:
    """Which of all capabilities each one of a task is; -1 fills up."""
    slots = torch.full((len(names), max(map(len, names))), -1)
    start = 0
    for row, own in zip(slots, names, strict=True):
        row[: len(own)] = torch.arange(start, start + len(own))
        start += len(own)
    return slots


def _mean_record(records: Sequence[Routing]) -> Routing:
    """One record for the mixtures of all layers, for telemetry."""
    first = records[0]
    weights = torch.stack([record.weights for record in records]).mean(0)
    return Routing(weights, first.indices, weights, weights.clamp_min(1e-30).log(), first.aux_loss, dropless=True)
