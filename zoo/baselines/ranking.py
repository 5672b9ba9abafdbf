"""What AW-MoE must beat: rules, a linear scorer, DNN, DIN and the usual mixtures of experts.

Every class takes the data's `schema` and names in `forward` the fields of the batch it needs.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from ...errors import UserError
from ..awmoe import FieldEmbeddings, InputNetwork, Norm, RankingOutput
from ..base import ZooModel
from ..core import DenseRouter, MLPExperts, MoE, Routing, TopKRouter

Rule = Literal["random", "popularity", "inverse_popularity", "repeat", "repeat_popularity"]


class CountRule(ZooModel):
    """Rules without training: chance, train popularity (either sign), own repeats, repeats with ties by popularity.

    A learned model is worth listing only above the best of them.
    """

    probabilistic = False  # scores are counts

    def __init__(self, rule: Rule = "repeat_popularity") -> None:
        super().__init__()
        self.rule = rule

    def fit(self, loader: Iterable[Any]) -> None:
        """Nothing to fit: the counts come with the batch."""

    def forward(self, counts: Float[Tensor, "batch cands 2"]) -> RankingOutput:
        repeats, popularity = counts.double().unbind(-1)
        scores = {
            "random": lambda: torch.rand_like(popularity),
            "popularity": lambda: popularity,
            "inverse_popularity": lambda: -popularity,
            "repeat": lambda: repeats,
            "repeat_popularity": lambda: repeats + popularity / (1 + popularity.max()),
        }
        return RankingOutput(scores[self.rule](), {})


class LinearScorer(ZooModel):
    """Conditional logit on the cross features: score = w·x, fitted by L-BFGS on the listwise likelihood.

    Args:
        schema: the data's sizes; only `dense` is used.
        l2: penalty on w, against separation.
        sessions: train sessions used at most.
    """

    weight: Tensor

    def __init__(self, schema: Mapping[str, Any], l2: float = 1e-4, sessions: int = 50_000) -> None:
        super().__init__()
        if not schema["dense"]:
            raise UserError("the linear scorer needs cross features: set data.cross_features to true")
        self.l2, self.sessions = l2, sessions
        self.register_buffer("weight", torch.zeros(len(schema["dense"])))

    def fit(self, loader: Iterable[Any]) -> None:
        """Maximise the likelihood of the positives among their candidates; convex, started at zero."""
        seen: list[tuple[Tensor, Tensor, Tensor]] = []
        for batch in loader:
            seen.append((batch.dense, batch.labels, batch.candidate_mask))
            if sum(len(x) for x, _, _ in seen) >= self.sessions:
                break
        width = max(x.shape[1] for x, _, _ in seen)
        dense, labels, mask = (
            torch.cat([torch.cat([v, v.new_zeros(len(v), width - v.shape[1], *v.shape[2:])], 1) for v in values])
            for values in zip(*seen, strict=True)
        )
        weight = torch.zeros_like(self.weight, dtype=torch.double).requires_grad_()
        optimizer = torch.optim.LBFGS([weight], max_iter=200, line_search_fn="strong_wolfe")
        dense, positive = dense.double(), labels * mask

        def loss() -> Tensor:
            optimizer.zero_grad()
            log_p = (dense @ weight).masked_fill(~mask, -torch.inf).log_softmax(1).masked_fill(positive == 0, 0)
            value = -(log_p * positive).sum() / positive.sum() + self.l2 * weight.square().sum()
            value.backward()
            return value

        with torch.enable_grad():
            optimizer.step(loss)
        self.weight.copy_(weight.detach())

    def forward(self, dense: Float[Tensor, "batch cands features"]) -> RankingOutput:
        return RankingOutput((dense @ self.weight.unsqueeze(-1)).squeeze(-1), {})


class TowerRanker(ZooModel):
    """One MLP on the input network's features: DNN with mean pooling, DIN with the activation unit (Zhou et al., 2018).

    With widened layers it is AW-MoE's dense twin: everything the same but the experts and their gate.

    Args:
        pooling: `attention` towards each candidate (DIN) or `mean` of the behaviour (DNN).
        tower_hidden: hidden widths of the MLP.
        others: as for `AWMoE`.
    """

    def __init__(
        self,
        schema: Mapping[str, Any],
        pooling: Literal["attention", "mean"] = "attention",
        embedding_dim: int = 16,
        embedding_std: float = 0.1,
        hidden: int = 32,
        attention_hidden: int = 16,
        tower_hidden: Sequence[int] = (64, 32),
        attention_norm: Norm = "none",
        dropout: float = 0.0,
        sparse: bool = False,
    ) -> None:
        super().__init__()
        self.embeddings = FieldEmbeddings(schema, embedding_dim, embedding_std, sparse)
        network = InputNetwork if pooling == "attention" else MeanInputNetwork
        self.inputs = network(self.embeddings.widths, len(schema["dense"]), hidden, attention_hidden, attention_norm)
        self.dropout = nn.Dropout(dropout)
        # A single expert is an MLP with the same start and the same arithmetic as one of AW-MoE's.
        self.tower = MLPExperts(1, self.inputs.out_features, list(tower_hidden), out=1, act="relu", dropout=dropout)

    def forward(
        self,
        candidates: Int[Tensor, "batch cands fields"],
        history: Int[Tensor, "batch time history_fields"],
        history_mask: Bool[Tensor, "batch time"],
        query: Int[Tensor, "batch queries"],
        dense: Float[Tensor, "batch cands features"],
    ) -> RankingOutput:
        inputs = _inputs(self.embeddings, self.inputs, candidates, history, history_mask, query, dense)
        scores = self.tower.dense(self.dropout(inputs).flatten(0, 1)).view(inputs.shape[:2])
        return RankingOutput(scores, {})


class MeanInputNetwork(InputNetwork):
    """The input network with a plain mean over the behaviour instead of the activation unit."""

    def __init__(
        self, widths: Mapping[str, int], dense: int, hidden: int, attention_hidden: int = 16, norm: Norm = "none"
    ) -> None:
        super().__init__(widths, dense, hidden, attention_hidden, norm)
        del self.activation

    def weigh(
        self, history: Float[Tensor, "batch time hidden"], mask: Bool[Tensor, "batch time"], candidate: Tensor
    ) -> Float[Tensor, "batch cands time"]:
        mean = mask / mask.sum(1, keepdim=True).clamp(min=1)
        return mean.unsqueeze(1).expand(-1, candidate.shape[1], -1)


class SessionGatedMoE(ZooModel):
    """Experts weighed once a session by a gate on a pooled vector, without attention in the gate.

    `gate_input="pooled"`: softmax gate on the mean behaviour and the query (the classic mixture). `"category"`: a
    top-k gate that sees the query's category alone, Category-MoE (Xiao et al., arXiv 2007.12349), with its two
    regularisers: the distance of the gate to a second one fed with the parent category, and an adversarial term
    that pushes a random idle expert's opinion away from the active ones.

    Args:
        top_k: experts used by the category gate.
        parent: item field one level above the query, for the first regulariser; none leaves it out.
        parent_weight: weight of the distance between the two gates.
        adversarial_weight: weight of the adversarial term.
        others: as for `AWMoE`.
    """

    def __init__(
        self,
        schema: Mapping[str, Any],
        gate_input: Literal["pooled", "category"] = "pooled",
        embedding_dim: int = 16,
        embedding_std: float = 0.1,
        hidden: int = 32,
        attention_hidden: int = 16,
        num_experts: int = 4,
        expert_hidden: Sequence[int] = (64, 32),
        top_k: int = 2,
        parent: str | None = None,
        parent_weight: float = 0.01,
        adversarial_weight: float = 0.01,
        attention_norm: Norm = "none",
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        if gate_input == "category" and not schema["query"]:
            raise UserError("gate_input=category needs a query, and this data has none: set gate_input to pooled")
        if parent is not None and parent not in schema["fields"]:
            raise UserError(f"parent={parent}: items have no such field; there are {', '.join(schema['fields'])}")
        self.embeddings = FieldEmbeddings(schema, embedding_dim, embedding_std)
        widths = self.embeddings.widths
        self.inputs = InputNetwork(widths, len(schema["dense"]), hidden, attention_hidden, attention_norm)
        self.experts = MLPExperts(
            num_experts, self.inputs.out_features, list(expert_hidden), out=1, act="relu", dropout=dropout
        )
        self.dropout = nn.Dropout(dropout)
        self.gate_input = gate_input
        self.parent_weight, self.adversarial_weight = parent_weight, adversarial_weight
        self.parent_field = None if parent is None else schema["fields"].index(parent)
        if gate_input == "pooled":
            self.router: DenseRouter | TopKRouter = DenseRouter(hidden + widths["query"], num_experts)
        else:
            self.router = TopKRouter(widths["query"], num_experts, top_k, balance="none")
            self.parent_router = DenseRouter(embedding_dim, num_experts) if parent is not None else None

    def forward(
        self,
        candidates: Int[Tensor, "batch cands fields"],
        candidate_mask: Bool[Tensor, "batch cands"],
        history: Int[Tensor, "batch time history_fields"],
        history_mask: Bool[Tensor, "batch time"],
        query: Int[Tensor, "batch queries"],
        dense: Float[Tensor, "batch cands features"],
    ) -> RankingOutput:
        inputs = _inputs(self.embeddings, self.inputs, candidates, history, history_mask, query, dense)
        opinions = self.experts.dense(self.dropout(inputs).flatten(0, 1)).view(*inputs.shape[:2], -1)
        routing: Routing = self.router(self._gate_vector(history, history_mask, query))
        gate = routing.dense_weights()
        if self.training and self.gate_input == "category":
            routing.aux_loss = routing.aux_loss + self._regularisers(
                routing, gate, opinions, candidates, candidate_mask
            )
        return RankingOutput((gate.unsqueeze(1) * opinions).sum(-1), {"gate": routing})

    def _gate_vector(self, history: Tensor, mask: Tensor, query: Tensor) -> Float[Tensor, "batch dim"]:
        asked = self.embeddings.query(query)
        if self.gate_input == "category":
            return asked
        behaviour = self.inputs.project_history(self.embeddings.history(history))
        share = mask / mask.sum(1, keepdim=True).clamp(min=1)
        return torch.cat([(share.unsqueeze(1) @ behaviour).squeeze(1), asked], -1)

    def _regularisers(
        self, routing: Routing, gate: Tensor, opinions: Tensor, candidates: Tensor, mask: Tensor
    ) -> Float[Tensor, ""]:
        loss = gate.new_zeros(())
        if self.parent_router is not None:
            dim = self.embeddings.table.embedding_dim
            fields = self.embeddings.candidates(candidates[:, :1]).unflatten(-1, (-1, dim))
            parent: Routing = self.parent_router(fields[:, 0, self.parent_field])
            loss = loss + self.parent_weight * (routing.scores - parent.scores).square().sum(-1).mean()
        idle = gate == 0
        if self.adversarial_weight and gate.shape[1] > routing.top_k:
            chosen = torch.rand_like(gate).masked_fill(~idle, -1).argmax(1)
            chance = opinions.sigmoid()
            away = (chance - chance.gather(2, chosen[:, None, None].expand(*chance.shape[:2], 1))).square()
            away = (away * (~idle).unsqueeze(1)).sum(-1) / routing.top_k
            loss = loss - self.adversarial_weight * away[mask].mean()
        return loss


class MMoERanker(ZooModel):
    """MMoE-style (Ma et al., 2018): a softmax gate on each candidate mixes expert vectors, one head scores."""

    def __init__(
        self,
        schema: Mapping[str, Any],
        embedding_dim: int = 16,
        embedding_std: float = 0.1,
        hidden: int = 32,
        attention_hidden: int = 16,
        num_experts: int = 4,
        expert_hidden: Sequence[int] = (64,),
        expert_out: int = 32,
        attention_norm: Norm = "none",
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        self.embeddings = FieldEmbeddings(schema, embedding_dim, embedding_std)
        self.inputs = InputNetwork(
            self.embeddings.widths, len(schema["dense"]), hidden, attention_hidden, attention_norm
        )
        dim = self.inputs.out_features
        experts = MLPExperts(num_experts, dim, list(expert_hidden), out=expert_out, act="relu", dropout=dropout)
        self.mixture = MoE(DenseRouter(dim, num_experts), experts)
        self.dropout = nn.Dropout(dropout)
        self.head = nn.Sequential(nn.ReLU(), nn.Linear(expert_out, 1))

    def forward(
        self,
        candidates: Int[Tensor, "batch cands fields"],
        candidate_mask: Bool[Tensor, "batch cands"],
        history: Int[Tensor, "batch time history_fields"],
        history_mask: Bool[Tensor, "batch time"],
        query: Int[Tensor, "batch queries"],
        dense: Float[Tensor, "batch cands features"],
    ) -> RankingOutput:
        inputs = _inputs(self.embeddings, self.inputs, candidates, history, history_mask, query, dense)
        mixed, routing = self.mixture(self.dropout(inputs), return_routing=True, token_mask=candidate_mask)
        return RankingOutput(self.head(mixed).squeeze(-1), {"mixture": routing})


def _inputs(
    embeddings: FieldEmbeddings,
    network: InputNetwork,
    candidates: Tensor,
    history: Tensor,
    mask: Tensor,
    query: Tensor,
    dense: Tensor,
) -> Float[Tensor, "batch cands features"]:
    behaviour = network.project_history(embeddings.history(history))
    features: Tensor = network(behaviour, mask, embeddings.query(query), embeddings.candidates(candidates), dense)
    return features
