"""AW-MoE: personalised ranking with experts weighted by the user's own behaviour (Gong et al., ICDE 2023).

The behaviour sequence enters twice: the input network pools it towards each candidate, and the gate network turns
it into one weight per expert. Letters: batch B sessions, cands C, time L behaviour rows, experts K.

Source: arXiv 2306.05011 (abstract); equations as in this project's fact sheet, whose additions are marked here.
"""

from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple

import torch
import torch.distributed
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from ..errors import UserError
from .base import ZooModel
from .core import MLPExperts, Routing

Context = Literal["query", "target", "both"]
Norm = Literal["none", "softmax", "sqrt_len"]


class RankingOutput(NamedTuple):
    """Logits of candidates, higher is better, and who decided: one routing record per mixture."""

    scores: Float[Tensor, "batch cands"]
    routing: dict[str, Routing]


class UserState(NamedTuple):
    """What a request needs to know of its user, computed once and used for every candidate."""

    history: Float[Tensor, "batch time dim"]
    mask: Bool[Tensor, "batch time"]
    query: Float[Tensor, "batch query_dim"]
    gate_history: Float[Tensor, "batch time gate_dim"]
    gate: Float[Tensor, "batch 1 experts"] | None  # None where the gate depends on the candidate


class AWMoE(ZooModel):
    """AW-MoE: experts score every candidate, the user's gate weighs the experts.

    Args:
        schema: sizes of the data: `fields`, `vocabulary`, `history_fields`, `query`, `dense`.
        embedding_dim: width of each field's embedding.
        embedding_std: standard deviation of the embeddings at the start (0.1 to 0.3 suits retail data).
        hidden: width of the projected behaviour, candidate and query.
        attention_hidden: hidden width of the units that look at every behaviour row: most of the cost.
        num_experts: K; 1 is the control in which the gate can only rescale.
        expert_hidden: hidden widths of an expert.
        gate_hidden: width of the gate's own projections.
        gate_context: what the gate attends from: the query (one gate a request), the candidate, or both; `auto` is
            the query where the data has one.
        gate_norm: `softmax`, or `none` for the un-normalised sum.
        attention_norm: of the input network's activation unit.
        dropout: on the experts' input and hidden layers.
        contrastive_weight: λ of the gate's contrastive loss; 0 switches it off.
        mask_rate: share of behaviour rows hidden in the augmented view.
        temperature: of the contrastive loss.
        sparse: sparse embedding gradients, for large vocabularies.

    Raises:
        UserError: a query gate on data without a query.
    """

    def __init__(
        self,
        schema: Mapping[str, Any],
        embedding_dim: int = 16,
        embedding_std: float = 0.1,
        hidden: int = 32,
        attention_hidden: int = 16,
        num_experts: int = 4,
        expert_hidden: Sequence[int] = (64, 32),
        gate_hidden: int = 32,
        gate_context: Literal["auto", "query", "target", "both"] = "auto",
        gate_norm: Literal["none", "softmax"] = "softmax",
        attention_norm: Norm = "none",
        dropout: float = 0.0,
        contrastive_weight: float = 0.05,
        mask_rate: float = 0.3,
        temperature: float = 0.1,
        sparse: bool = False,
    ) -> None:
        super().__init__()
        if gate_context == "auto":
            gate_context = "query" if schema["query"] else "target"
        if gate_context != "target" and not schema["query"]:
            raise UserError(
                f"gate_context={gate_context} needs a query, and this data has none: set gate_context to target"
            )
        self.embeddings = FieldEmbeddings(schema, embedding_dim, embedding_std, sparse)
        widths, dense = self.embeddings.widths, len(schema["dense"])
        self.inputs = InputNetwork(widths, dense, hidden, attention_hidden, attention_norm)
        self.gate = GateNetwork(widths, gate_hidden, attention_hidden, num_experts, gate_context, gate_norm)
        self.experts = MLPExperts(
            num_experts, self.inputs.out_features, list(expert_hidden), out=1, act="relu", dropout=dropout
        )
        self.dropout = nn.Dropout(dropout)
        self.contrastive_weight, self.mask_rate, self.temperature = contrastive_weight, mask_rate, temperature

    def forward(
        self,
        candidates: Int[Tensor, "batch cands fields"],
        candidate_mask: Bool[Tensor, "batch cands"],
        history: Int[Tensor, "batch time history_fields"],
        history_mask: Bool[Tensor, "batch time"],
        query: Int[Tensor, "batch queries"],
        dense: Float[Tensor, "batch cands features"],
        user: Int[Tensor, " batch"],
    ) -> RankingOutput:
        """Score a batch of sessions. In training the routing's `aux_loss` is λ times the contrastive loss."""
        state = self.encode_user(history, history_mask, query)
        target = self.embeddings.candidates(candidates)
        gate = self._gate(state, target)
        scores = self._score(state, target, dense, gate)
        loss = scores.new_zeros(())
        if self.training and self.contrastive_weight > 0:
            keep = torch.rand(history_mask.shape, device=history_mask.device) >= self.mask_rate
            view = self._gate(state._replace(mask=history_mask & keep, gate=None), target)
            whole, masked = _session_gate(gate, candidate_mask), _session_gate(view, candidate_mask)
            loss = self.contrastive_weight * gate_contrastive_loss(whole, masked, user, self.temperature)
        return RankingOutput(scores, {"gate": dense_routing(gate, candidate_mask, loss)})

    def encode_user(
        self,
        history: Int[Tensor, "batch time history_fields"],
        history_mask: Bool[Tensor, "batch time"],
        query: Int[Tensor, "batch queries"],
    ) -> UserState:
        """The candidate-free part, once a request; with `gate_context="query"` that includes the gate."""
        behaviour, asked = self.embeddings.history(history), self.embeddings.query(query)
        gate_history = self.gate.project_history(behaviour)
        gate = self.gate(gate_history, history_mask, asked, None) if self.gate.context == "query" else None
        return UserState(self.inputs.project_history(behaviour), history_mask, asked, gate_history, gate)

    def score(
        self,
        state: UserState,
        candidates: Int[Tensor, "batch cands fields"],
        dense: Float[Tensor, "batch cands features"],
    ) -> Float[Tensor, "batch cands"]:
        """Logits of candidates for encoded users; `state` may be kept and used again."""
        target = self.embeddings.candidates(candidates)
        return self._score(state, target, dense, self._gate(state, target))

    def _gate(self, state: UserState, target: Float[Tensor, "batch cands dim"]) -> Float[Tensor, "batch _ experts"]:
        if state.gate is not None:
            return state.gate
        gate: Tensor = self.gate(state.gate_history, state.mask, state.query, target)
        return gate

    def _score(
        self,
        state: UserState,
        target: Float[Tensor, "batch cands dim"],
        dense: Float[Tensor, "batch cands features"],
        gate: Float[Tensor, "batch _ experts"],
    ) -> Float[Tensor, "batch cands"]:
        inputs = self.dropout(self.inputs(state.history, state.mask, state.query, target, dense))
        opinions = self.experts.dense(inputs.flatten(0, 1)).view(*inputs.shape[:2], -1)
        return (gate * opinions).sum(-1)


class FieldEmbeddings(nn.Module):
    """One table for all fields, shared by candidates, behaviour and query: a single look-up each.

    Embeddings of a row's fields are concatenated. Id 0 pads, 1 is unknown.
    """

    _fields: Tensor
    _history_fields: Tensor
    _query: Tensor

    def __init__(self, schema: Mapping[str, Any], dim: int, std: float, sparse: bool = False) -> None:
        super().__init__()
        names = sorted(schema["vocabulary"])
        sizes = [schema["vocabulary"][name] for name in names]
        first = dict(zip(names, torch.tensor([0, *sizes]).cumsum(0).tolist(), strict=False))
        self.table = nn.Embedding(sum(sizes), dim, sparse=sparse)
        nn.init.normal_(self.table.weight, std=std)
        for kind in ("fields", "history_fields", "query"):
            offsets = torch.tensor([first[name] for name in schema[kind]], dtype=torch.long)
            self.register_buffer(f"_{kind}", offsets, persistent=False)
        self.widths = {kind: len(schema[kind]) * dim for kind in ("fields", "history_fields", "query")}

    def candidates(self, ids: Int[Tensor, "batch cands fields"]) -> Float[Tensor, "batch cands dim"]:
        return _rows(self.table, ids + self._fields)

    def history(self, ids: Int[Tensor, "batch time fields"]) -> Float[Tensor, "batch time dim"]:
        return _rows(self.table, ids + self._history_fields)

    def query(self, ids: Int[Tensor, "batch queries"]) -> Float[Tensor, "batch dim"]:
        return _rows(self.table, ids + self._query)


def _rows(table: nn.Embedding, ids: Int[Tensor, "*rows fields"]) -> Float[Tensor, "*rows dim"]:
    rows: Tensor = table(ids)
    return rows.flatten(-2)


class PairUnit(nn.Module):
    """An MLP on [a ; b ; a*b ; a-b] for every behaviour row a and context b (DIN's activation unit, its eq. 3).

    The first layer is linear, so its blocks are folded into one matrix per context before a and b are paired:
    nothing of size rows x contexts x 4 dim is ever made. Without `difference` the last block is left out.
    """

    def __init__(self, dim: int, hidden: int, out: int, difference: bool = True) -> None:
        super().__init__()
        self.first = nn.Linear((4 if difference else 3) * dim, hidden)
        self.last = nn.Linear(hidden, out)
        self.difference = difference

    def forward(
        self, rows: Float[Tensor, "batch time dim"], context: Float[Tensor, "batch contexts dim"]
    ) -> Float[Tensor, "batch contexts time out"]:
        w_rows, w_context, w_product, *w_rest = self.first.weight.split(rows.shape[-1], 1)
        if self.difference:
            w_rows, w_context = w_rows + w_rest[0], w_context - w_rest[0]
        batch, contexts, _ = context.shape
        # Everything that meets a row is one matrix per context: W_a + W_ab diag(b).
        matrix = torch.addcmul(w_rows, context.unsqueeze(-2), w_product).flatten(1, 2)
        offset = F.linear(context, w_context, self.first.bias).flatten(1).unsqueeze(-1)
        hidden = torch.baddbmm(offset, matrix, rows.mT).relu_().view(batch, contexts, len(w_rows), -1)
        out = self.last.weight @ hidden + self.last.bias.unsqueeze(-1)
        return out.transpose(-1, -2)


class InputNetwork(nn.Module):
    """Pools the behaviour towards each candidate and joins it with candidate, query and dense features."""

    def __init__(
        self, widths: Mapping[str, int], dense: int, hidden: int, attention_hidden: int = 16, norm: Norm = "none"
    ) -> None:
        super().__init__()
        self.project_history = nn.Sequential(nn.Linear(widths["history_fields"], hidden), nn.ReLU())
        self.project_target = nn.Sequential(nn.Linear(widths["fields"], hidden), nn.ReLU())
        self.project_query = nn.Sequential(nn.Linear(widths["query"], hidden), nn.ReLU()) if widths["query"] else None
        self.activation = PairUnit(hidden, attention_hidden, 1)
        self.norm = norm
        self.out_features = (3 if widths["query"] else 2) * hidden + dense

    def forward(
        self,
        history: Float[Tensor, "batch time hidden"],
        mask: Bool[Tensor, "batch time"],
        query: Float[Tensor, "batch query_dim"],
        target: Float[Tensor, "batch cands dim"],
        dense: Float[Tensor, "batch cands features"],
    ) -> Float[Tensor, "batch cands out"]:
        candidate = self.project_target(target)
        parts = [self.weigh(history, mask, candidate) @ history, candidate, dense]
        if self.project_query is not None:
            parts.append(self.project_query(query).unsqueeze(1).expand_as(candidate))
        return torch.cat(parts, -1)

    def weigh(
        self,
        history: Float[Tensor, "batch time hidden"],
        mask: Bool[Tensor, "batch time"],
        candidate: Float[Tensor, "batch cands hidden"],
    ) -> Float[Tensor, "batch cands time"]:
        """How much each behaviour row counts towards each candidate."""
        return attention_weights(self.activation(history, candidate).squeeze(-1), mask.unsqueeze(1), self.norm)


def attention_weights(
    logits: Float[Tensor, "batch cands time"], mask: Bool[Tensor, "batch 1 time"], norm: Norm
) -> Float[Tensor, "batch cands time"]:
    """Weights of behaviour rows; padding gets exactly 0 under every norm, also where all is padding."""
    if norm == "softmax":
        # A finite floor keeps an all-padding row free of NaN; the mask then takes its weights away.
        logits = logits.masked_fill(~mask, torch.finfo(logits.dtype).min).softmax(-1)
    elif norm == "sqrt_len":
        logits = logits / mask.sum(-1, keepdim=True).clamp(min=1).sqrt()
    return logits * mask


class GateNetwork(nn.Module):
    """g = g0(x) + sum over behaviour rows of (activation unit) * (gate unit), one weight per expert.

    g0, a default learned from the context x, is this project's addition: without it a user with no behaviour
    gets g = 0 and every candidate the same score.
    """

    def __init__(
        self,
        widths: Mapping[str, int],
        hidden: int,
        attention_hidden: int,
        num_experts: int,
        context: Context,
        norm: Literal["none", "softmax"] = "softmax",
    ) -> None:
        super().__init__()
        self.context, self.norm = context, norm
        width = {"query": widths["query"], "target": widths["fields"], "both": widths["query"] + widths["fields"]}
        self.project_history = nn.Sequential(nn.Linear(widths["history_fields"], hidden), nn.ReLU())
        self.project_context = nn.Sequential(nn.Linear(width[context], hidden), nn.ReLU())
        self.default = nn.Linear(hidden, num_experts)
        self.unit = PairUnit(hidden, attention_hidden, num_experts, difference=False)
        self.activation = PairUnit(hidden, attention_hidden, 1)
        # Votes of a long history add up: at the usual start they saturate the softmax, and one expert gets all the
        # weight for the first fifth of training. Without votes the gate starts at its default, near uniform.
        nn.init.zeros_(self.unit.last.weight)
        nn.init.zeros_(self.unit.last.bias)

    def forward(
        self,
        history: Float[Tensor, "batch time hidden"],
        mask: Bool[Tensor, "batch time"],
        query: Float[Tensor, "batch query_dim"],
        target: Float[Tensor, "batch cands dim"] | None,
    ) -> Float[Tensor, "batch contexts experts"]:
        """One gate a session (`contexts` = 1) for the query context, else one a candidate."""
        if self.context == "query":
            context = query.unsqueeze(1)
        elif target is None:
            raise ValueError(f"a gate with context '{self.context}' needs the candidates")
        elif self.context == "target":
            context = target
        else:
            context = torch.cat([target, query.unsqueeze(1).expand(-1, target.shape[1], -1)], -1)
        context = self.project_context(context)
        default: Tensor = self.default(context)
        votes: Tensor = self.unit(history, context) * self.activation(history, context) * mask[:, None, :, None]
        gate = default.float() + votes.float().sum(2)  # sums over long histories stay in fp32
        return gate.softmax(-1) if self.norm == "softmax" else gate


def gate_contrastive_loss(
    gate: Float[Tensor, "batch experts"],
    view: Float[Tensor, "batch experts"],
    user: Int[Tensor, " batch"],
    temperature: float,
) -> Float[Tensor, ""]:
    """InfoNCE between each session's gate and its gate under a masked history, in fp32.

    Negatives are the views of *other* users: two sessions of one user should agree. Under DistributedDataParallel
    the views of all ranks serve as negatives.
    """
    anchor = F.normalize(gate.float(), dim=-1)
    views, users, first = F.normalize(view.float(), dim=-1), user, 0
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        from torch.distributed.nn.functional import all_gather

        views = torch.cat(all_gather(views))
        gathered = [torch.empty_like(user) for _ in range(torch.distributed.get_world_size())]
        torch.distributed.all_gather(gathered, user)
        users = torch.cat(gathered)
        first = torch.distributed.get_rank() * len(user)
    logits = anchor @ views.T / temperature
    own = torch.arange(len(user), device=user.device) + first
    barred = (user.unsqueeze(1) == users) & (own.unsqueeze(1) != torch.arange(len(users), device=user.device))
    return F.cross_entropy(logits.masked_fill(barred, -torch.inf), own)


def _session_gate(
    gate: Float[Tensor, "batch contexts experts"], mask: Bool[Tensor, "batch cands"]
) -> Float[Tensor, "batch experts"]:
    """One gate a session: the gate itself, or its mean over the real candidates."""
    if gate.shape[1] == 1:
        return gate.squeeze(1)
    weight = mask.unsqueeze(-1) / mask.sum(1).clamp(min=1)[:, None, None]
    return (gate * weight).sum(1)


def dense_routing(
    gate: Float[Tensor, "batch contexts experts"], mask: Bool[Tensor, "batch cands"], loss: Float[Tensor, ""]
) -> Routing:
    """The record of a gate that uses every expert: a token is a session (or, per-candidate gates, its mean)."""
    weights = _session_gate(gate, mask)
    indices = torch.arange(weights.shape[-1], device=weights.device).expand_as(weights)
    return Routing(weights, indices, weights, weights, loss, dropless=True)
