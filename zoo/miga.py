"""MIGA: stocks ranked by groups of experts that confer before they vote (Yu et al., arXiv 2410.02241).

Letters: N tokens (names of all days of a batch), T days of a window, G groups of E experts, M = G·E, expert width V.

Source: the paper's abstract; the body could not be obtained, so the structure follows this project's fact sheet
(§1.3), which marks what is known and what is decided here.
"""

from collections.abc import Mapping
from itertools import pairwise
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from ..errors import UserError
from .base import ZooModel
from .core import MLPExperts, Routing, TopKRouter
from .core.losses import importance_loss

EncoderKind = Literal["conv", "rec", "attn", "mlp", "linear"]
RouterLoss = Literal["switch", "cv2", "variance", "l2prob", "none"]


class MIGAOutput(NamedTuple):
    """Scores of names, higher is better and of no scale, and who decided: one routing record per mixture.

    A routing token is a name on a day, days flattened first. `members` are the scores of an ensemble's members
    where each has a loss of its own.
    """

    score: Float[Tensor, "days names"]
    routing: dict[str, Routing]
    members: Float[Tensor, "days names members"] | None = None


class MIGA(ZooModel):
    """MIGA: an encoder, a global top-k over the experts of all groups, attention among the experts of a group.

    Args:
        schema: the data's sizes: `num_features`, `lookback`.
        encoder: `conv`, `rec` (GRU), `attn` (Transformer), `mlp` and `linear` (the last day alone).
        hidden: H, width of the encoder.
        layers: layers of the encoder (blocks, recurrent layers, hidden layers).
        groups: G.
        experts_per_group: E.
        top_k: K experts of all G·E that vote on a name.
        expert_dim: V, what a linear expert says; 1 is the scalar expert.
        heads: of the attention within a group; divides `expert_dim`.
        group_attention: False leaves it out (the ablation).
        attend: the experts of a group listen to `all` of it or to the `selected` ones alone.
        cross_section: attention over the names of the day before routing, so that the router sees the market.
        router_loss: `switch` (Switch balance), `cv2` (of the gate mass), `variance` and `l2prob` (of each name's own
            probabilities, scaled to 1-balanced: the two forms of the unofficial code), `none`.
        router_coef: its weight.
        z_coef: weight of the router z-loss.
        jitter: multiplicative noise on the router's input in training, against early collapse.
        dropout: on the encoder's output.

    Raises:
        UserError: heads do not divide expert_dim, or top_k is not between 1 and G·E.
    """

    def __init__(
        self,
        schema: Mapping[str, Any],
        encoder: EncoderKind = "conv",
        hidden: int = 64,
        layers: int = 1,
        groups: int = 7,
        experts_per_group: int = 9,
        top_k: int = 8,
        expert_dim: int = 8,
        heads: int = 2,
        group_attention: bool = True,
        attend: Literal["all", "selected"] = "all",
        cross_section: bool = False,
        router_loss: RouterLoss = "switch",
        router_coef: float = 2e-3,
        z_coef: float = 0.0,
        jitter: float = 0.0,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        experts = groups * experts_per_group
        if not 1 <= top_k <= experts:
            raise UserError(f"top_k={top_k}: expected 1 to {experts} (groups x experts_per_group)")
        self.encoder = make_encoder(schema, encoder, hidden, layers, dropout)
        self.cross_section = CrossSection(hidden) if cross_section else None
        self.router = TopKRouter(
            hidden,
            experts,
            top_k,
            norm_topk_prob=top_k > 1,
            balance="aux" if router_loss == "switch" else "none",
            aux_coef=router_coef,
            z_coef=z_coef,
            jitter=jitter,
        )
        self.groups = ExpertGroups(
            hidden, groups, experts_per_group, expert_dim, heads if group_attention else 0, attend
        )
        self.router_loss, self.router_coef = router_loss, router_coef

    def forward(
        self, features: Float[Tensor, "days names time features"], valid: Bool[Tensor, "days names"]
    ) -> MIGAOutput:
        """Score the names of each day; padding scores 0 and touches nothing else."""
        hidden = encode(self.encoder, features)
        if self.cross_section is not None:
            hidden = self.cross_section(hidden, valid)
        tokens = hidden.flatten(0, 1)
        routing: Routing = self.router(tokens, token_mask=valid.flatten())
        score = self.groups(tokens, routing).view(valid.shape)
        if self.training and self.router_loss in ("cv2", "variance", "l2prob"):
            penalty = router_penalty(routing, valid.flatten(), self.router_loss)
            routing.aux_loss = routing.aux_loss + self.router_coef * penalty
        return MIGAOutput(score, {"experts": routing})


class ExpertGroups(nn.Module):
    """M linear experts in G groups, attention within each group, and the sum of the chosen experts' votes.

    All opinions are computed for every token: with linear experts that is cheaper than dispatch, and the attention
    asks them all anyway. What a chosen expert hears is computed for the chosen ones alone.
    """

    def __init__(
        self,
        hidden: int,
        groups: int,
        experts_per_group: int,
        dim: int,
        heads: int,
        attend: Literal["all", "selected"] = "all",
    ) -> None:
        super().__init__()
        self.shape, self.attend = (groups, experts_per_group), attend
        self.experts = MLPExperts(groups * experts_per_group, hidden, [], out=dim)
        self.attention = GroupAttention(groups, dim, heads) if heads else None
        self.readout = nn.Parameter(torch.empty(groups, experts_per_group, dim).uniform_(-(dim**-0.5), dim**-0.5))

    def forward(self, tokens: Float[Tensor, "tokens hidden"], routing: Routing) -> Float[Tensor, " tokens"]:
        opinions = self.experts.dense(tokens)
        chosen = routing.indices.clamp(min=0)  # -1 is padding, of weight 0
        votes = (opinions * self.readout.flatten(0, 1)).sum(-1).gather(1, chosen)
        if self.attention is not None:
            grouped = opinions.unflatten(1, self.shape)
            heard = routing.dense_weights().unflatten(1, self.shape) > 0 if self.attend == "selected" else None
            votes = votes + self.attention(grouped, chosen, self.readout, heard)
        return (routing.weights * votes).sum(-1)


class GroupAttention(nn.Module):
    """What the other experts of its group add to the vote of each chosen expert: multi-head attention.

    z̃_e = z_e + softmax(q_e·K_g) V_g W_g with the group's own weights; the vote is z̃_e·o_e, of which the caller
    computes z_e·o_e. The output projection W_g is folded into the readout o_e, so that it acts once per expert
    instead of once per token.

    Args:
        groups: G.
        dim: V, width of an expert's opinion.
        heads: divides V.
    """

    def __init__(self, groups: int, dim: int, heads: int) -> None:
        super().__init__()
        if dim % heads:
            raise UserError(f"heads={heads} must divide expert_dim={dim}")
        self.heads = heads
        bound = dim**-0.5
        self.query, self.output = (
            nn.Parameter(torch.empty(groups, dim, dim).uniform_(-bound, bound)) for _ in range(2)
        )
        self.key_value = nn.Parameter(torch.empty(groups, dim, 2 * dim).uniform_(-bound, bound))

    def forward(
        self,
        opinions: Float[Tensor, "tokens groups experts dim"],
        chosen: Int[Tensor, "tokens k"],
        readout: Float[Tensor, "groups experts dim"],
        heard: Bool[Tensor, "tokens groups experts"] | None = None,
    ) -> Float[Tensor, "tokens k"]:
        """`heard` are the experts that are listened to; a chosen expert must be among them."""
        tokens, groups, experts, dim = opinions.shape
        by_group = opinions.transpose(0, 1).reshape(groups, tokens * experts, dim)
        # One row for each (token, chosen expert), out of the rows (group, token) of the products.
        own_group = chosen // experts
        row = (own_group * tokens + torch.arange(tokens, device=chosen.device)[:, None]).flatten()
        expert = (chosen % experts).flatten()
        query = (by_group @ self.query).view(-1, dim).index_select(0, row * experts + expert)
        pairs = (by_group @ self.key_value).view(groups * tokens, -1).index_select(0, row)
        key, value = pairs.view(-1, experts, 2 * dim).split(dim, -1)
        # Heads as one matmul: a query's columns are its heads, each zero outside its own slice of the width.
        slices = torch.eye(self.heads, device=query.device, dtype=query.dtype).repeat_interleave(dim // self.heads, 0)
        logits = key @ (query.unsqueeze(-1) * (slices * (dim // self.heads) ** -0.5))
        if heard is not None:
            mask = heard.transpose(0, 1).reshape(-1, experts).index_select(0, row)
            # Padding hears nobody: a finite floor keeps it, and its gradient, free of NaN.
            logits = logits.masked_fill(~mask[..., None], torch.finfo(logits.dtype).min)
        answer = ((logits.softmax(1).mT @ value) * slices.T).sum(1)
        direction = (readout @ self.output.mT).flatten(0, 1).index_select(0, chosen.flatten())
        added: Tensor = (answer * direction).sum(-1).view(chosen.shape)
        return added


class CrossSection(nn.Module):
    """Attention over the names of a day, with a residual: what a name's router knows of the market."""

    def __init__(self, hidden: int, heads: int = 4) -> None:
        super().__init__()
        if hidden % heads:
            raise UserError(f"cross_section needs hidden={hidden} to be a multiple of {heads}")
        self.heads = heads
        self.norm = nn.LayerNorm(hidden)
        self.qkv, self.out = nn.Linear(hidden, 3 * hidden), nn.Linear(hidden, hidden)

    def forward(
        self, hidden: Float[Tensor, "days names hidden"], valid: Bool[Tensor, "days names"]
    ) -> Float[Tensor, "days names hidden"]:
        qkv = self.qkv(self.norm(hidden)).unflatten(-1, (3, self.heads, -1))
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        # A day without names would have nothing to attend to: let it attend to its padding.
        keys = valid | ~valid.any(1, keepdim=True)
        mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=keys[:, None, None, :])
        answer: Tensor = self.out(mixed.transpose(1, 2).flatten(2))
        return hidden + answer


def router_penalty(
    routing: Routing,
    mask: Bool[Tensor, " tokens"],
    kind: Literal["cv2", "variance", "l2prob"],
) -> Float[Tensor, ""]:
    """Balance losses besides the router's own; `variance` is 0 and `l2prob` 1 for uniform probabilities."""
    if kind == "cv2":
        return importance_loss(routing.dense_weights())
    scaled = routing.scores * routing.num_experts
    each = (scaled - 1).square().mean(-1) if kind == "variance" else scaled.square().mean(-1)
    return (each * mask).sum() / mask.sum().clamp(min=1)


def encode(
    encoder: nn.Module, features: Float[Tensor, "days names time features"]
) -> Float[Tensor, "days names hidden"]:
    """Each name's window by itself; names meet later or never."""
    hidden: Tensor = encoder(features.flatten(0, 1))
    return hidden.view(*features.shape[:2], -1)


def make_encoder(
    schema: Mapping[str, Any], kind: EncoderKind, hidden: int, layers: int = 1, dropout: float = 0.0
) -> nn.Module:
    """An encoder [tokens, time, features] -> [tokens, hidden] for the data's sizes."""
    if layers < 1:
        raise UserError(f"layers={layers}: expected 1 or more")
    features, time = schema["num_features"], schema["lookback"]
    encoder: nn.Module
    if kind == "conv":
        encoder = ConvEncoder(features, hidden, layers)
    elif kind == "rec":
        encoder = RecurrentEncoder(features, hidden, layers)
    elif kind == "attn":
        encoder = AttentionEncoder(features, time, hidden, layers)
    elif kind == "mlp":
        encoder = LastDayEncoder(features, hidden, layers)
    elif kind == "linear":
        encoder = LastDayEncoder(features, hidden, 0)
    else:
        raise UserError(f"encoder={kind!r}: expected conv, rec, attn, mlp or linear")
    return nn.Sequential(encoder, nn.Dropout(dropout)) if dropout else encoder


class ConvEncoder(nn.Module):
    """Blocks of causal depthwise convolution and feed-forward (after ModernTCN), read at the last day."""

    def __init__(self, features: int, hidden: int, layers: int, kernel: int = 9) -> None:
        super().__init__()
        self.project = nn.Linear(features, hidden)
        self.blocks = nn.ModuleList(TemporalBlock(hidden, kernel) for _ in range(layers))

    def forward(self, x: Float[Tensor, "tokens time features"]) -> Float[Tensor, "tokens hidden"]:
        h: Tensor = self.project(x)
        *early, last = self.blocks
        for block in early:
            h = block(h)
        out: Tensor = last(h, last_only=True)
        return out[:, -1]


class TemporalBlock(nn.Module):
    """Depthwise causal convolution over time, LayerNorm, pointwise feed-forward, residual."""

    def __init__(self, hidden: int, kernel: int) -> None:
        super().__init__()
        bound = kernel**-0.5
        self.weight = nn.Parameter(torch.empty(hidden, kernel).uniform_(-bound, bound))
        self.bias = nn.Parameter(torch.zeros(hidden))
        self.feed = nn.Sequential(
            nn.LayerNorm(hidden), nn.Linear(hidden, 2 * hidden), nn.GELU(), nn.Linear(2 * hidden, hidden)
        )

    def forward(
        self, x: Float[Tensor, "tokens time hidden"], last_only: bool = False
    ) -> Float[Tensor, "tokens _ hidden"]:
        """All days, or (`last_only`) the last one, which is all that a reader of the last day needs."""
        hidden, kernel = self.weight.shape
        if last_only:
            x = x[:, -kernel:]
            mixed = (x * self.weight[:, -x.shape[1] :].T).sum(1, keepdim=True) + self.bias
            x = x[:, -1:]
        else:
            mixed = F.conv1d(F.pad(x.mT, (kernel - 1, 0)), self.weight[:, None], self.bias, groups=hidden).mT
        out: Tensor = x + self.feed(mixed)
        return out


class RecurrentEncoder(nn.Module):
    """A GRU, read at the last day."""

    def __init__(self, features: int, hidden: int, layers: int) -> None:
        super().__init__()
        self.gru = nn.GRU(features, hidden, layers, batch_first=True)

    def forward(self, x: Float[Tensor, "tokens time features"]) -> Float[Tensor, "tokens hidden"]:
        out: Tensor = self.gru(x)[0]
        return out[:, -1]


class AttentionEncoder(nn.Module):
    """A Transformer encoder with learned positions, read at the last day."""

    def __init__(self, features: int, time: int, hidden: int, layers: int, heads: int = 4) -> None:
        super().__init__()
        if hidden % heads:
            raise UserError(f"encoder=attn needs hidden={hidden} to be a multiple of {heads}")
        self.project = nn.Linear(features, hidden)
        self.position = nn.Parameter(torch.randn(time, hidden) * 0.02)
        self.layers = nn.ModuleList(
            nn.TransformerEncoderLayer(hidden, heads, 2 * hidden, 0.0, "gelu", batch_first=True, norm_first=True)
            for _ in range(layers)
        )

    def forward(self, x: Float[Tensor, "tokens time features"]) -> Float[Tensor, "tokens hidden"]:
        h = self.project(x) + self.position
        for layer in self.layers:
            h = layer(h)
        out: Tensor = h[:, -1]
        return out


class LastDayEncoder(nn.Module):
    """The last day's features through `layers` hidden layers (0: a linear map)."""

    def __init__(self, features: int, hidden: int, layers: int) -> None:
        super().__init__()
        widths = [features, *[hidden] * layers]
        stack: list[nn.Module] = [part for i, o in pairwise(widths) for part in (nn.Linear(i, o), nn.GELU())]
        self.net = nn.Sequential(*stack, nn.Linear(widths[-1], hidden))

    def forward(self, x: Float[Tensor, "tokens time features"]) -> Float[Tensor, "tokens hidden"]:
        out: Tensor = self.net(x[:, -1])
        return out
