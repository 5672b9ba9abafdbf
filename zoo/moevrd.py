"""MoE-VRD: what two objects in a video are and what one does to the other, by a mixture of relation experts.

An expert is VidVRD-II's iterative classifier (Shang et al., ACM MM 2021). Letters: N pairs,
F features of a tracklet, C classes with background (the last), P predicates, h hidden, E experts, k of them active.

Source: the papers' equations. The released code of MoE-VRD trains one shared expert and a gate that nothing reads; that
is not reproduced here.
"""

from collections.abc import Iterable, Mapping
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from ..errors import UserError
from .base import ZooModel
from .core import (
    Experts,
    Gate,
    LinearGate,
    MoE,
    NoisyTopKRouter,
    Plan,
    Router,
    Routing,
    StackedLinear,
    TopKRouter,
    dispatch,
    grouped_linear,
    make_plan,
    select_backend,
)
from .core.dispatch import restore
from .core.experts.base import Sorted, matmul_backend
from .core.grouped import Backend, computing_dtype

Combine = Literal["logits", "probs"]
Preference = Literal["iterative", "cascade", "none"]
Unseen = Literal["global_median", "global_mean", "class_median", "class_mean", "none"]
POSITION = 12
_TENSORS = {"iterative": ("po2s", "sp2o", "so2p"), "cascade": ("so2p",), "none": ()}


class Labels(NamedTuple):
    """What is true of each pair, for training."""

    subject: Int[Tensor, " pairs"]
    object: Int[Tensor, " pairs"]
    predicate: Float[Tensor, "pairs predicates"]


class RelationOutput(NamedTuple):
    """Log-probabilities of the classes, log-odds of the predicates, and who decided (a token is a pair)."""

    subject: Float[Tensor, "pairs classes"]
    object: Float[Tensor, "pairs classes"]
    predicate: Float[Tensor, "pairs predicates"]
    routing: dict[str, Routing]


class Belief(NamedTuple):
    """Probabilities of what each pair shows; by slot where experts do not share one."""

    subject: Float[Tensor, "pairs slots classes"]
    object: Float[Tensor, "pairs slots classes"]
    predicate: Float[Tensor, "pairs slots predicates"]


class PairExperts(Experts):
    """E relation classifiers of one shape, weights stacked; rows are [f_s; f_o; f_pos], outputs [s; o; p] logits.

    Objects: F → h → C, one head for both sides. Predicates: 2F → h, then with the position h + 12 → h → P. Xavier's
    initialisation, last layers without bias (VidVRD-II, §3.2).
    """

    def __init__(self, num_experts: int, features: int, classes: int, predicates: int, hidden: int, dropout: float):
        super().__init__(num_experts)
        self.features, self.dropout = features, dropout
        self.object_hidden = StackedLinear(num_experts, features, hidden)
        self.object_out = StackedLinear(num_experts, hidden, classes, bias=False)
        self.pair_hidden = StackedLinear(num_experts, 2 * features, hidden)
        self.position_hidden = StackedLinear(num_experts, hidden + POSITION, hidden)
        self.predicate_out = StackedLinear(num_experts, hidden, predicates, bias=False)
        self.dims = [2 * features, hidden, hidden + POSITION, hidden, predicates]
        for layer in self.children():
            assert isinstance(layer, StackedLinear)
            for weight in layer.weight:
                nn.init.xavier_uniform_(weight)
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)

    def forward(
        self, x_sorted: Float[Tensor, "rows dim"], plan: Plan, *, backend: Sorted = "auto"
    ) -> Float[Tensor, "rows out"]:
        # Widths differ from layer to layer, so each decides for itself whether grouped_mm takes it.
        chosen = "auto" if backend == "grouped" else matmul_backend(backend)

        def layer(which: StackedLinear, x: Tensor) -> Tensor:
            return which.sorted(x, plan.offsets, chosen, plan.dropless)

        pair, position = x_sorted[:, : 2 * self.features], x_sorted[:, 2 * self.features :]
        sides = [
            layer(self.object_out, self._activate(layer(self.object_hidden, side.contiguous())))
            for side in pair.tensor_split(2, 1)
        ]
        h = torch.cat([self._activate(layer(self.pair_hidden, pair.contiguous())), position], 1)
        return torch.cat([*sides, layer(self.predicate_out, layer(self.position_hidden, h).relu())], 1)

    def dense(
        self, x: Float[Tensor, "tokens dim"], weights: Float[Tensor, "tokens experts"] | None = None
    ) -> Float[Tensor, "tokens *out_dims"]:
        pair, position = x[:, : 2 * self.features], x[:, 2 * self.features :]
        sides = [
            self.object_out.batched(self._activate(self.object_hidden.wide(side).transpose(0, 1)))
            for side in pair.tensor_split(2, 1)
        ]
        h = self._activate(self.pair_hidden.wide(pair).transpose(0, 1))
        h = torch.cat([h, position.expand(self.num_experts, *position.shape)], 2)
        y = torch.cat([*sides, self.predicate_out.batched(self.position_hidden.batched(h).relu())], 2)
        if weights is None:
            return y.transpose(0, 1)
        return torch.einsum("eno,ne->no", y, weights.to(y.dtype))

    def select(self, x: Tensor, top_k: int) -> Backend:
        return select_backend(
            tokens=x.shape[0],
            top_k=top_k,
            num_experts=self.num_experts,
            dims=self.dims,
            dtype=computing_dtype(x),
            device=x.device,
        )

    def _activate(self, h: Tensor) -> Tensor:
        return F.dropout(h, self.dropout, self.training).relu()


class Preferences(nn.Module):
    """How much who they are speaks for what they do, and the reverse: logits from two sides of a triplet to the third.

    Three matrices, zero at first: `po2s` [P C, C], `sp2o` [C P, C], `so2p` [C C, P] (VidVRD-II, eqs. 3 to 5).

    Args:
        kind: `iterative` has all three, `cascade` the last alone, `none` none.
        experts: a set for each expert; None for one that all share.
        unseen: what rows that training never touched, still exactly 0, count as when it is over: the median or mean of
            all values of touched rows, or of each column.
        frequencies: instead of learning the matrices, fill them with smoothed frequencies (see `count`) and learn one
            factor each.
    """

    def __init__(
        self, classes: int, predicates: int, kind: Preference, experts: int | None = None,
        unseen: Unseen = "global_median", frequencies: bool = False,
    ) -> None:  # fmt: skip
        super().__init__()
        self.classes, self.predicates, self.unseen, self.frequencies = classes, predicates, unseen, frequencies
        self.per_expert = experts is not None
        sizes = {
            "po2s": (predicates * classes, classes),
            "sp2o": (classes * predicates, classes),
            "so2p": (classes * classes, predicates),
        }
        self.names = _TENSORS[kind]
        for name in self.names:
            zero = torch.zeros(sizes[name] if experts is None else (experts, *sizes[name]))
            if frequencies:
                self.register_buffer(name, zero)
                self.register_parameter(f"{name}_factor", nn.Parameter(torch.zeros(1)))
            else:
                self.register_parameter(name, nn.Parameter(zero))

    def forward(
        self, name: str, left: Float[Tensor, "pairs slots i"], right: Float[Tensor, "pairs slots j"], plan: Plan | None
    ) -> Float[Tensor, "pairs some out"] | float:
        """Logits from the outer product of two beliefs: [pairs, slots, out], or for matrices per expert [pairs, k, out]
        in the order of the plan's slots; 0 where there is no such matrix."""
        if name not in self.names:
            return 0.0
        both = (left[..., :, None] * right[..., None, :]).flatten(-2)
        weight = self.matrix(name)
        if not self.per_expert:
            return both @ weight.to(both.dtype)
        assert plan is not None
        pairs, k = plan.row.shape
        rows = both.expand(pairs, k, -1).flatten(0, 1).index_select(0, plan.slot)
        y = grouped_linear(rows, weight.mT.contiguous(), plan.offsets, dropless=plan.dropless)
        return restore(y, plan).view(pairs, k, -1)

    def matrix(self, name: str) -> Float[Tensor, "*experts rows out"]:
        """The matrix as it counts now: in training as learned, afterwards with a value for untouched rows."""
        weight: Tensor = getattr(self, name)
        if self.frequencies:
            return weight * self.get_parameter(f"{name}_factor").exp()
        if self.training or self.unseen == "none":
            return weight
        untouched = (weight == 0).all(-1, keepdim=True)
        known = weight.masked_fill(untouched, torch.nan)
        flat = known.flatten(-2) if self.unseen.startswith("global") else known.mT
        middle = flat.nanmedian(-1).values if self.unseen.endswith("median") else flat.nanmean(-1)
        middle = middle[..., None, None] if self.unseen.startswith("global") else middle[..., None, :]
        return torch.where(untouched, middle.nan_to_num(0.0), weight)

    @torch.no_grad()
    def count(self, batches: Iterable[Any], smoothing: float) -> None:
        """Fill the matrices with Laplace-smoothed frequencies of the third side given two (VidVRD-II's n-gram)."""
        total = torch.zeros(self.classes, self.predicates, self.classes)
        for batch in batches:
            known = batch.subject_class >= 0
            triplets = F.one_hot(batch.subject_class.clamp_min(0), self.classes)[:, :, None] * batch.predicate[:, None]
            others = F.one_hot(batch.object_class.clamp_min(0), self.classes) * known[:, None]
            total += torch.einsum("nsp,no->spo", triplets.float(), others.float()).cpu()
        for name in self.names:
            arranged = {"po2s": total.permute(1, 2, 0), "sp2o": total, "so2p": total.permute(0, 2, 1)}[name]
            share = (arranged + smoothing) / (arranged + smoothing).sum(-1, keepdim=True)
            self.get_buffer(name).copy_(share.flatten(0, 1))


class IterativeModel(ZooModel):
    """What one expert and a mixture share: logits of what is seen, corrected by preferences in a few steps.

    A step is s = softmax(v_s + (p⊗o) po2s), o = softmax(v_o + (s⊗p) sp2o), then p = sigmoid(v_p + (s⊗o) so2p) with the
    new s and o; the first starts from nothing (VidVRD-II, eqs. 3 to 6). Training has one step from the truth (or from
    what is seen alone, `teacher: predicted`).

    Subclasses say what is seen.
    """

    preferences: Preferences

    def __init__(self) -> None:
        super().__init__()
        self.steps, self.soft, self.teacher, self.smoothing = 3, True, "truth", 0.0
        self.combine: Combine = "logits"
        self.mix_every_step = True

    def forward(
        self,
        subject: Float[Tensor, "pairs features"],
        object: Float[Tensor, "pairs features"],
        position: Float[Tensor, "pairs 12"],
        labels: Labels | None = None,
        start: Belief | None = None,
    ) -> RelationOutput:
        """What each pair shows.

        Args:
            labels: given in training alone.
            start: belief from an earlier window, instead of none.
        """
        x = torch.cat([subject, object, position], -1)
        seen, weights, routing, plan = self._seen(x)
        if labels is not None and self.teacher == "truth":
            belief = self._truth(labels, seen.dtype)
            logits = self._corrected(seen, belief, belief, plan)
            return self._output(self._mixed(logits, weights), routing)
        belief = start or Belief(*(torch.zeros_like(part[:, :1]) for part in self._split(seen)))
        logits = self._split(seen)
        for _ in range(self.steps if labels is None else 2):  # refine: what is seen, then one correction
            logits = self._step(seen, belief, weights, plan)
            belief = self._belief(logits, weights)
        return self._output(self._mixed(logits, weights), routing)

    def _seen(
        self, x: Float[Tensor, "pairs dim"]
    ) -> tuple[Float[Tensor, "pairs slots out"], Float[Tensor, "pairs k"] | None, dict[str, Routing], Plan | None]:
        """Logits [s; o; p] by slot, the slots' weights, the records, and how pairs were sent to experts."""
        raise NotImplementedError

    @property
    def _sizes(self) -> list[int]:
        return [self.preferences.classes, self.preferences.classes, self.preferences.predicates]

    def _split(self, seen: Float[Tensor, "pairs slots out"]) -> Belief:
        return Belief(*seen.split(self._sizes, -1))

    def _truth(self, labels: Labels, dtype: torch.dtype) -> Belief:
        s, o = (F.one_hot(side, self.preferences.classes).to(dtype)[:, None] for side in labels[:2])
        return Belief(s, o, labels.predicate.to(dtype)[:, None])

    def _corrected(
        self, seen: Float[Tensor, "pairs slots out"], before: Belief, after: Belief | None, plan: Plan | None,
        weights: Float[Tensor, "pairs k"] | None = None,
    ) -> Belief:  # fmt: skip
        """Logits of s and o given the belief before, of p given s and o after (None: computed here)."""
        v = self._split(seen)
        s = v.subject + self.preferences("po2s", before.predicate, before.object, plan)
        o = v.object + self.preferences("sp2o", before.subject, before.predicate, plan)
        if after is None:
            after = self._belief(Belief(s, o, v.predicate), weights)
        return Belief(s, o, v.predicate + self.preferences("so2p", after.subject, after.object, plan))

    def _step(
        self, seen: Float[Tensor, "pairs slots out"], belief: Belief,
        weights: Float[Tensor, "pairs k"] | None, plan: Plan | None,
    ) -> Belief:  # fmt: skip
        return self._corrected(seen, belief, None, plan, weights)

    def _belief(self, logits: Belief, weights: Float[Tensor, "pairs k"] | None) -> Belief:
        """Probabilities, of all experts together where they share a belief."""
        if self.mix_every_step and self.combine == "logits":
            logits = Belief(*(_weighted(part, weights) for part in logits))
        parts = [logits.subject.softmax(-1), logits.object.softmax(-1), logits.predicate.sigmoid()]
        if self.mix_every_step and self.combine == "probs":
            parts = [_weighted(part, weights) for part in parts]
        if not self.soft:
            hard = [F.one_hot(part.argmax(-1), part.shape[-1]).to(part.dtype) for part in parts[:2]]
            parts = [*hard, (parts[2] > 0.5).to(parts[2].dtype)]
        return Belief(*parts)

    def _mixed(
        self, logits: Belief, weights: Float[Tensor, "pairs k"] | None
    ) -> tuple[Float[Tensor, "pairs classes"], Float[Tensor, "pairs classes"], Float[Tensor, "pairs predicates"]]:
        """Log-probabilities of the classes and log-odds of the predicates."""
        if self.combine == "logits" or weights is None:
            s, o, p = (_weighted(part, weights)[:, 0] for part in logits)
            return s.log_softmax(-1), o.log_softmax(-1), p
        sides = [_weighted(part.softmax(-1), weights)[:, 0] for part in logits[:2]]
        held = _weighted(logits.predicate.sigmoid(), weights)[:, 0].clamp(1e-6, 1 - 1e-6)
        s, o = (side.clamp_min(1e-12).log() for side in sides)
        return s, o, held.logit()

    def _output(self, parts: tuple[Tensor, Tensor, Tensor], routing: dict[str, Routing]) -> RelationOutput:
        return RelationOutput(*parts, routing)

    def count_triplets(self, batches: Iterable[Any]) -> None:
        """Before training: frequencies for a model that has them instead of learned preferences."""
        if self.preferences.frequencies:
            self.preferences.count(batches, self.smoothing)


class MoEVRD(IterativeModel):
    """A sparse mixture of E relation experts, of which a noisy gate chooses k for each pair.

    Args:
        schema: the data's sizes: `num_features`, `objects`, `predicates` (names).
        hidden: h of each expert.
        experts: E.
        top_k: k; at least 2 with `gate: noisy`, since the softmax over one kept logit is constant.
        dropout: after the first layers.
        combine: experts' `logits` or `probs` are summed with the gate's weights.
        mix_every_step: experts share a belief, mixed after each step; else each carries on with its own.
        preference: `iterative`, `cascade` (classes speak for predicates alone) or `none` (independent).
        share_preferences: one set of preference matrices for all experts; else each has its own.
        unseen: see `Preferences`.
        steps: of inference.
        soft: probabilities are handed on between steps; else the likeliest classes and predicates above 0.5.
        gate: `noisy` (Shazeer et al. 2017: noise, top-k, softmax over the chosen; importance and load loss) or
            `softmax` (softmax over all, then top-k, Switch loss), for which one expert a pair is enough.
        balance: weight of the balance losses (the paper's α).

    Raises:
        UserError: k = 1 behind a noisy gate, or sizes that do not fit.
    """

    def __init__(
        self,
        schema: Mapping[str, Any],
        hidden: int = 48,
        experts: int = 4,
        top_k: int = 2,
        dropout: float = 0.2,
        combine: Combine = "logits",
        mix_every_step: bool = True,
        preference: Preference = "iterative",
        share_preferences: bool = True,
        unseen: Unseen = "global_median",
        steps: int = 3,
        soft: bool = True,
        gate: Literal["noisy", "softmax"] = "noisy",
        balance: float = 0.01,
    ) -> None:
        super().__init__()
        if not 1 <= top_k <= experts:
            raise UserError(f"top_k={top_k}: expected between 1 and experts={experts}")
        if gate == "noisy" and top_k == 1 and experts > 1:
            raise UserError(
                "top_k=1: the softmax over one kept logit is always 1, so the gate would not learn from the task; "
                "give top_k=2 or more, or gate=softmax"
            )
        if gate == "softmax" and combine == "probs":
            raise UserError("gate=softmax: its weights do not sum to 1, so it needs combine=logits")
        check_sizes(hidden, steps)
        self.combine, self.mix_every_step, self.steps, self.soft = combine, mix_every_step, steps, soft
        features, classes, predicates = sizes_of(schema)
        dim = 2 * features + POSITION
        self.moe = MoE(
            _router(gate, dim, experts, top_k, balance),
            PairExperts(experts, features, classes, predicates, hidden, dropout),
        )
        own = None if share_preferences else experts
        self.preferences = Preferences(classes, predicates, preference, own, unseen)

    def _seen(
        self, x: Float[Tensor, "pairs dim"]
    ) -> tuple[Float[Tensor, "pairs slots out"], Float[Tensor, "pairs k"] | None, dict[str, Routing], Plan | None]:
        own = self.preferences.per_expert
        if self.combine == "logits" and self.mix_every_step and not own:
            # Preferences are the same for all experts: their logits can be summed before any step.
            mixed, routing = self.moe(x, return_routing=True)
            return mixed[:, None], None, {"experts": routing}, None
        routing = self.moe.router(x)
        experts, k = self.moe.experts, routing.top_k
        backend = experts.select(x, k)
        plan = make_plan(routing.indices, experts.num_experts, dropless=routing.dropless)
        if backend == "dense":
            y = experts.dense(x)
            slots = y.gather(1, routing.indices[..., None].expand(-1, -1, y.shape[-1]))
        else:
            slots = restore(experts(dispatch(x, plan), plan, backend=backend), plan).view(x.shape[0], k, -1)
        return slots, routing.weights.to(slots.dtype), {"experts": routing}, plan


class NormalisedGate(Gate):
    """A linear gate on the normalised input: features and positions come in units of their own."""

    def __init__(self, dim: int, num_experts: int) -> None:
        super().__init__(num_experts)
        self.linear = LinearGate(dim, num_experts, std=0.0)

    def forward(
        self, x: Float[Tensor, "tokens dim"], task_id: Int[Tensor, "tokens *slots"] | None = None
    ) -> Float[Tensor, "tokens experts"]:
        logits: Tensor = self.linear(F.layer_norm(x, x.shape[-1:]))
        return logits


def sizes_of(schema: Mapping[str, Any]) -> tuple[int, int, int]:
    """Features of a tracklet, classes with background, predicates."""
    return int(schema["num_features"]), len(schema["objects"]) + 1, len(schema["predicates"])


def check_sizes(hidden: int, steps: int) -> None:
    if hidden < 1 or steps < 1:
        raise UserError(f"hidden={hidden}, steps={steps}: expected at least 1 of each")


def _router(gate: str, dim: int, experts: int, top_k: int, balance: float) -> Router:
    if gate == "softmax":
        return TopKRouter(
            dim, experts, top_k, norm_topk_prob=False, aux_coef=balance, gate=NormalisedGate(dim, experts)
        )
    gates = NormalisedGate(dim, experts), NormalisedGate(dim, experts)
    return NoisyTopKRouter(
        dim, experts, top_k, importance_coef=balance, load_coef=balance, gate=gates[0], noise_gate=gates[1]
    )


def _weighted(
    parts: Float[Tensor, "pairs slots out"], weights: Float[Tensor, "pairs k"] | None
) -> Float[Tensor, "pairs some out"]:
    """The weighted sum over slots as one slot; without weights there is but one."""
    if weights is None:
        return parts
    return torch.einsum("nko,nk->no", parts, weights.to(parts.dtype))[:, None]
