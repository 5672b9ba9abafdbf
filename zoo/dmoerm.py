"""DMoERM: a reward model of two layers of experts, tasks outside and capabilities inside.

Quan, "DMoERM: Recipes of Mixture-of-Experts for Effective Reward Modeling", Findings of ACL 2024 (arXiv 2403.01197). A
router that reads the prompt alone sends all of a prompt's responses to one task's model. There every capability has its
low-rank expert, all of them run, and an MLP reads their hidden vectors side by side.

Letters: T tasks, K capabilities of the task that has most, C capabilities of all tasks together, D width of the
backbone. Source: the paper's abstract and figure and the released code (github quanshr/DMoERM-v1), by this project's
fact sheet; that code's defects (§1.7 there) are not repeated.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from typing import Any, Literal, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from ..errors import UserError
from .base import ZooModel
from .core import FixedRouter, LinearGate, Routing, StackedLinear, TopKRouter
from .text_backbones import TRANSFORMER, Backbone, build_backbone

Route = Literal["predicted", "oracle", "single"]
TaskBase = Literal["full", "lora", "shared"]
RouterKind = Literal["separate", "head"]
TARGETS = ("q_proj", "v_proj")


class RewardOutput(NamedTuple):
    """What a reward model says of rows, of which each prompt has the same number, one after another.

    Attributes:
        reward: the model's judgement; comparable within a prompt alone.
        capability_rewards: of each capability of the row's task, in the order of the schema; nan where there is none,
            and all of them while they are not computed.
        task_logits: the router's, for each prompt; no columns for models without one.
        hidden: what the reward is read from.
        scores: the rewards that are trained: one, or one of each member of an ensemble.
        routing: records of the routers.
    """

    reward: Float[Tensor, "rows"]
    capability_rewards: Float[Tensor, "rows capabilities"]
    task_logits: Float[Tensor, "prompts tasks"]
    hidden: Float[Tensor, "rows hidden"]
    scores: Float[Tensor, "rows scores"]
    routing: dict[str, Routing]


class RewardModel(ZooModel):
    """A reward model that is trained in `phases`, each of which moves some of its parameters."""

    phases = 1

    def phase_parameters(self, phase: int) -> list[nn.Parameter]:
        """What phase 1, 2, ... trains."""
        return [parameter for parameter in self.parameters() if parameter.requires_grad]

    def enter_phase(self, phase: int) -> None:
        """Called once when a phase begins, after the best state of the one before was restored."""


class DMoERM(RewardModel):
    """Tasks routed hard by the prompt; inside a task one low-rank expert per capability and an MLP over their outputs.

    Trained in three phases: (1) each task's base and the router on human preferences; (2) the capabilities' experts,
    all at once, on preferences for one capability each; (3) the MLP on other human preferences.

    Args:
        schema: the data's sizes: `tasks` (name, capabilities), `vocab_size`, `max_length`, `tokenizer`.
        backbone: see `build_backbone`.
        backbone_options: its further arguments.
        route: `predicted` sends every prompt where the router says; `oracle` where its task is known, and as predicted
            elsewhere; `single` has no router: one model for all tasks, with every capability that any of them has.
        task_base: `full`, a backbone of its own for each task, as in the paper; `lora`, one backbone with a low-rank
            expert per task; `shared`, one backbone. Each task has its own heads in any case.
        train_backbone: whether phase 1 moves the backbone; None: unless `task_base` is `lora` and it is pretrained.
        router: `separate`, a network of its own; `head`, a linear layer on the hidden vector of the shared backbone.
        router_options: of the separate router's backbone; default: those of the backbone.
        rank: r of the low-rank experts.
        alpha: their scale is alpha / rank.
        lora_dropout: of their input, in training.
        targets: linear layers that have them.
        aggregate: hidden width of the MLP; default D, as in the paper; 0, which needs `residual`, has no MLP: a linear
            mixture of rewards for each task, for few human judgements.
        residual: the MLP starts at zero, and the base's reward and a mixture of the capabilities' rewards, which starts
            at zero too, are added to what it says. The paper has the MLP alone.
        inner: False leaves the inner layer out, for preferences without capabilities: a routed base per task, one
            phase.

    Raises:
        UserError: a task without capabilities, a target that is not there, or `router: head` without a shared backbone.
    """

    phases = 3
    slots: Tensor
    members: Tensor
    inner_of: Tensor

    def __init__(
        self,
        schema: Mapping[str, Any],
        backbone: str = TRANSFORMER,
        backbone_options: Mapping[str, Any] | None = None,
        route: Route = "predicted",
        task_base: TaskBase = "full",
        train_backbone: bool | None = None,
        router: RouterKind = "separate",
        router_options: Mapping[str, Any] | None = None,
        rank: int = 8,
        alpha: float = 8.0,
        lora_dropout: float = 0.0,
        targets: Sequence[str] = TARGETS,
        aggregate: int | None = None,
        residual: bool = False,
        inner: bool = True,
    ) -> None:
        super().__init__()
        names = capability_names(schema, required=inner)
        if aggregate == 0 and not residual:
            raise UserError(
                "aggregate=0 leaves no MLP to read the capabilities: set residual=true for a linear mixture"
            )
        self.inner, self.phases = inner, 3 if inner else 1
        self.route, self.task_base, self.residual = route, task_base, residual
        for name, value in _layout(names, merged=route == "single").items():
            self.register_buffer(name, value, persistent=False)
        models, capabilities = len(self.members), int(self.members.max()) + 1
        copies = models if task_base == "full" else 1
        self.backbone = build_backbone(backbone, schema, copies, backbone_options)
        frozen = task_base == "lora" and backbone != TRANSFORMER
        self.train_backbone = not frozen if train_backbone is None else train_backbone
        self.own = list(self.backbone.parameters()) if self.train_backbone else []
        width = self.backbone.dim
        low_rank: Any = {"rank": rank, "alpha": alpha, "dropout": lora_dropout}
        self.task_adapters = self.backbone.adapt(targets, models, **low_rank) if task_base == "lora" else None
        self.base_head = StackedLinear(models, width, 1)
        if inner:
            self.capability_adapters = self.backbone.adapt(targets, capabilities, **low_rank)
            self.capability_head = StackedLinear(capabilities, width, 1)
            self.aggregator = Aggregator(
                models, self.members.shape[1], width, width if aggregate is None else aggregate, residual
            )
            self.inner_experts = FixedRouter(capabilities, self.members.shape[1])
        self.outer: PromptRouter | None = None
        self.fixed = FixedRouter(len(names))
        if route != "single":
            options = backbone_options if router_options is None else router_options
            if router == "separate":
                reader = build_backbone(backbone, schema, 1, options)
            elif copies == 1:
                reader = None
            else:
                raise UserError(
                    "router=head reads the shared backbone, but task_base=full has none: give router=separate"
                )
            self.outer = PromptRouter(reader, width if reader is None else reader.dim, len(names))

    def forward(
        self,
        tokens: Int[Tensor, "rows length"],
        mask: Bool[Tensor, "rows length"],
        prompt_tokens: Int[Tensor, "prompts prompt_length"],
        prompt_mask: Bool[Tensor, "prompts prompt_length"],
        task: Int[Tensor, "prompts"] | None = None,
        capability: Int[Tensor, "prompts"] | None = None,
        phase: int = 3,
        route: Route | None = None,
    ) -> RewardOutput:
        """Judge rows of which the first rows / prompts belong to the first prompt, the next to the second, and so on.

        Args:
            tokens: prompt and response.
            mask: True for tokens, False for padding.
            prompt_tokens: the prompt alone: all that the router sees.
            prompt_mask: the same for the prompt.
            task: index in the schema; -1 unknown.
            capability: for phase 2, which capability of the task a row is judged on; where it is -1, the first.
            phase: 1 the base's reward, 2 that of `capability`, 3 the whole model's.
            route: instead of the model's own.
        """
        rows, each = len(tokens), len(tokens) // max(len(prompt_tokens), 1)
        if each * len(prompt_tokens) != rows:
            raise ValueError(f"{rows} rows for {len(prompt_tokens)} prompts: expected the same number for every prompt")
        chosen, logits, routing = self._choose(prompt_tokens, prompt_mask, task, phase, route or self.route)
        inner = self.inner_of[chosen].repeat_interleave(each, output_size=rows)
        if phase == 1 or not self.inner:
            hidden = self._encode(tokens, mask, inner)
            reward = own_output(self.base_head, hidden, inner)
            return self._output(reward, None, logits, hidden, routing)
        if phase == 2:
            asked = torch.zeros_like(chosen) if capability is None else capability.clamp(min=0)
            expert = self.slots[chosen, asked].repeat_interleave(each, output_size=rows)
            hidden = self._encode(tokens, mask, inner, expert)
            reward = own_output(self.capability_head, hidden, expert)
            return self._output(reward, None, logits, hidden, routing)
        return self._whole(tokens, mask, inner, chosen.repeat_interleave(each, output_size=rows), logits, routing)

    def _whole(
        self, tokens: Tensor, mask: Tensor, inner: Tensor, task: Tensor, logits: Tensor, routing: dict[str, Routing]
    ) -> RewardOutput:
        """Every row K times, each with one capability's expert, in one pass through the backbone."""
        rows, width = len(tokens), self.members.shape[1]
        experts = self.members[inner]
        z = self._encode(
            tokens.repeat_interleave(width, 0), mask.repeat_interleave(width, 0), inner.repeat_interleave(width),
            experts.flatten(),
        ).view(rows, width, -1)  # fmt: skip
        present = experts >= 0
        z = z * present[..., None]
        own = own_output(self.capability_head, z.flatten(0, 1), experts.flatten().clamp(min=0)).view(rows, width)
        base = None
        if self.residual:
            base = own_output(self.base_head, self._encode(tokens, mask, inner), inner)
        reward, hidden = self.aggregator(z, inner, own.masked_fill(~present, 0.0), present, base)
        routing = routing | {"capability": self.inner_experts(hidden.detach(), task_id=experts)}
        slots = self.slots[task]
        place = (experts[:, None, :] == slots[:, :, None]).to(torch.uint8).argmax(-1)
        by_task = own.gather(1, place).masked_fill(slots < 0, torch.nan)
        return self._output(reward, by_task, logits, hidden, routing)

    def _encode(
        self, tokens: Tensor, mask: Tensor, inner: Tensor, expert: Tensor | None = None
    ) -> Float[Tensor, "rows dim"]:
        """Hidden vectors of the task's base, with one capability's expert on top where `expert` names one."""
        with ExitStack() as stack:
            if self.task_adapters is not None:
                stack.enter_context(self.task_adapters.choice.choosing(inner))
            if expert is not None:
                stack.enter_context(self.capability_adapters.choice.choosing(expert))
            hidden: Tensor = self.backbone(tokens, mask, inner)
        return hidden.float() if hidden.dtype in (torch.bfloat16, torch.float16) else hidden

    def _choose(
        self, prompt_tokens: Tensor, prompt_mask: Tensor, task: Tensor | None, phase: int, route: Route
    ) -> tuple[Int[Tensor, "prompts"], Float[Tensor, "prompts tasks"], dict[str, Routing]]:
        """The task of every prompt, the router's logits and the record of the choice."""
        prompts = len(prompt_tokens)
        unknown = torch.full((prompts,), -1, device=prompt_tokens.device)
        given = unknown if task is None else task
        if self.outer is None:
            record = self.fixed(prompt_tokens.float(), task_id=given)
            return given.clamp(min=0), prompt_tokens.new_zeros((prompts, 0), dtype=torch.float32), {"task": record}
        trains = phase == 1 and torch.is_grad_enabled()
        with torch.set_grad_enabled(trains):
            record = self.outer(prompt_tokens, prompt_mask, None if self.outer.reader is not None else self._prompt)
        chosen = record.indices[:, 0]
        # Training knows where a row belongs; a router that still errs must not mix the tasks up.
        if route == "oracle" or self.training or phase < self.phases:
            chosen = torch.where(given >= 0, given, chosen)
        return chosen, record.logits, {"task": record}

    def _prompt(self, tokens: Tensor, mask: Tensor) -> Tensor:
        """What the shared backbone makes of a prompt, without any expert."""
        hidden: Tensor = self.backbone(tokens, mask)
        return hidden.detach()

    def _output(
        self,
        reward: Tensor,
        capability_rewards: Tensor | None,
        logits: Tensor,
        hidden: Tensor,
        routing: dict[str, Routing],
    ) -> RewardOutput:
        if capability_rewards is None:
            capability_rewards = reward.new_full((len(reward), self.slots.shape[1]), torch.nan)
        return RewardOutput(reward, capability_rewards, logits, hidden, reward[:, None], routing)

    def score(
        self,
        tokens: Int[Tensor, "rows length"],
        mask: Bool[Tensor, "rows length"],
        prompt_tokens: Int[Tensor, "prompts prompt_length"],
        prompt_mask: Bool[Tensor, "prompts prompt_length"],
        return_capabilities: bool = False,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Rewards [rows] for use, and with `return_capabilities` those of each capability [rows, K], nan for none."""
        output = self(tokens, mask, prompt_tokens, prompt_mask)
        return (output.reward, output.capability_rewards) if return_capabilities else output.reward

    def phase_parameters(self, phase: int) -> list[nn.Parameter]:
        """1: base and router; 2: the capabilities' experts and heads; 3: the MLP."""
        if phase == 1:
            found = [*self.own, *self.base_head.parameters()]
            found += [] if self.task_adapters is None else self.task_adapters.expert_parameters()
            return found + ([] if self.outer is None else list(self.outer.parameters()))
        if phase == 2:
            return [*self.capability_adapters.expert_parameters(), *self.capability_head.parameters()]
        return list(self.aggregator.parameters())

    def active_shares(self) -> Iterator[tuple[nn.Parameter, float]]:
        """What a response touches: of what each task has its own, one task's; of the capabilities' experts, its own."""
        inner, capabilities = len(self.members), int(self.members.max()) + 1
        touched = float((self.members >= 0).sum()) / inner / capabilities
        owned = list(self.base_head.parameters())
        owned += [] if self.task_adapters is None else self.task_adapters.expert_parameters()
        low_rank: list[nn.Parameter] = []
        if self.inner:
            owned += self.aggregator.parameters()
            low_rank += self.capability_adapters.expert_parameters()
            yield from ((parameter, touched) for parameter in [*low_rank, *self.capability_head.parameters()])
        if self.backbone.copies > 1:
            known = {id(parameter) for parameter in low_rank}
            owned += [parameter for parameter in self.backbone.parameters() if id(parameter) not in known]
        yield from ((parameter, 1 / inner) for parameter in owned)

    @torch.no_grad()
    def enter_phase(self, phase: int) -> None:
        """Phase 2 starts with every capability's head as a copy of its task's; shared ones take the first task's."""
        if phase != 2:
            return
        inner, place = torch.nonzero(self.members >= 0, as_tuple=True)
        capability = self.members[inner, place]
        self.capability_head.weight[capability] = self.base_head.weight[inner]
        assert self.capability_head.bias is not None and self.base_head.bias is not None
        self.capability_head.bias[capability] = self.base_head.bias[inner]


class PromptRouter(nn.Module):
    """Reads a prompt and says which task it is: a supervised classifier, trained by cross-entropy on its logits.

    Args:
        reader: a backbone of its own, or None where the caller gives one.
        dim: width of its hidden vector.
        tasks: T.
    """

    def __init__(self, reader: Backbone | None, dim: int, tasks: int) -> None:
        super().__init__()
        self.reader = reader
        gate = LinearGate(dim, tasks, bias=True)
        self.router = TopKRouter(dim, tasks, 1, norm_topk_prob=tasks == 1, balance="none", gate=gate)

    def forward(
        self,
        tokens: Int[Tensor, "prompts length"],
        mask: Bool[Tensor, "prompts length"],
        read: Any = None,
    ) -> Routing:
        """The choice for each prompt; `read(tokens, mask)` stands in for the reader."""
        hidden = (self.reader or read)(tokens, mask)
        record: Routing = self.router(hidden)
        return record


class Aggregator(nn.Module):
    """`r = w·PReLU(V [z_1 … z_K])`, of which every task has its own (Quan 2024, figure of the inner layer).

    Args:
        tasks: T.
        capabilities: K; tasks that have fewer see zeros in the places of the others.
        dim: D.
        hidden: width of the hidden layer; 0 for none.
        residual: add the base's reward and a mixture of the capabilities', and start at the base's.
    """

    def __init__(self, tasks: int, capabilities: int, dim: int, hidden: int, residual: bool) -> None:
        super().__init__()
        self.hidden, self.residual = hidden, residual
        if hidden:
            self.up, self.down = StackedLinear(tasks, capabilities * dim, hidden), StackedLinear(tasks, hidden, 1)
            self.slope = nn.Parameter(torch.full((tasks,), 0.25))
        if residual:
            self.mix = nn.Parameter(torch.zeros(tasks, capabilities))
            self.base = nn.Parameter(torch.ones(tasks))
            if hidden:
                nn.init.zeros_(self.down.weight)

    def forward(
        self,
        z: Float[Tensor, "rows capabilities dim"],
        task: Int[Tensor, "rows"],
        own: Float[Tensor, "rows capabilities"],
        present: Bool[Tensor, "rows capabilities"],
        base: Float[Tensor, "rows"] | None = None,
    ) -> tuple[Float[Tensor, "rows"], Float[Tensor, "rows hidden"]]:
        """The reward and the hidden vector it is read from."""
        if not self.hidden:
            assert base is not None
            return base * self.base[task] + (own * self.mix[task]).sum(-1), own
        every = self.up.wide(z.flatten(1))  # all tasks' MLPs: cheaper than sorting, and nothing beside the backbone
        h = every.gather(1, task[:, None, None].expand(-1, 1, every.shape[2])).squeeze(1)
        h = torch.where(h > 0, h, h * self.slope[task][:, None])
        reward = own_output(self.down, h, task)
        if self.residual:
            assert base is not None
            reward = reward + base * self.base[task] + (own * self.mix[task]).sum(-1)
        return reward, h


def own_output(
    layer: StackedLinear, x: Float[Tensor, "rows dim"], expert: Int[Tensor, "rows"]
) -> Float[Tensor, "rows"]:
    """Each row through its own one of many linear layers with a single output."""
    y = (x * layer.weight[expert, 0]).sum(-1)
    return y if layer.bias is None else y + layer.bias[expert, 0]


def capability_names(schema: Mapping[str, Any], required: bool = True) -> list[list[str]]:
    """The capabilities of each task; where they are not required, one without a name stands for them.

    Raises:
        UserError: no tasks, or a task without a capability.
    """
    names = [list(task["capabilities"]) for task in schema["tasks"]]
    if not names:
        raise UserError("the data names no task: DMoERM needs preferences with a column task")
    if not required:
        return [own or [""] for own in names]
    for task, own in zip(schema["tasks"], names, strict=True):
        if not own:
            raise UserError(
                f"task {task['name']} has no capability: give preferences with a column capability, or set inner=false"
            )
    return names


def _layout(names: list[list[str]], merged: bool) -> dict[str, Tensor]:
    """Which expert serves which capability of a task (`slots` [T, K]), which experts an inner model has (`members`),
    and each task's inner model (`inner_of`). Merged, there is one inner model, and a capability that several tasks
    have is one; -1 fills up."""
    widest = max(map(len, names))
    slots = torch.full((len(names), widest), -1)
    if merged:
        ids = {name: i for i, name in enumerate(dict.fromkeys(name for own in names for name in own))}
        for row, own in zip(slots, names, strict=True):
            row[: len(own)] = torch.tensor([ids[name] for name in own])
        return {"slots": slots, "members": torch.arange(len(ids))[None], "inner_of": torch.zeros(len(names)).long()}
    start = 0
    for row, own in zip(slots, names, strict=True):
        row[: len(own)] = torch.arange(start, start + len(own))
        start += len(own)
    return {"slots": slots, "members": slots.clone(), "inner_of": torch.arange(len(names))}
