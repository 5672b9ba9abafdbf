"""What MIGA must beat: its encoder without experts, Switch, a dense ensemble, TRA, ridge, LightGBM, a style rule.

Every class takes the data's `schema` and names in `forward` the fields of the batch it needs.
"""

from collections.abc import Iterable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from ...errors import UserError
from ..base import ZooModel
from ..core import MLPExperts, MoE, Routing, TopKRouter
from ..miga import CrossSection, EncoderKind, MIGAOutput, encode, make_encoder


class EncoderRanker(ZooModel):
    """The encoder and one MLP head, no experts. With a widened head it is MIGA's dense twin.

    Args:
        head: hidden width of the head; 0 makes the head linear.
        others: as for `MIGA`.
    """

    def __init__(
        self,
        schema: Mapping[str, Any],
        encoder: EncoderKind = "conv",
        hidden: int = 64,
        layers: int = 1,
        head: int = 0,
        cross_section: bool = False,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        self.encoder = make_encoder(schema, encoder, hidden, layers, dropout)
        self.cross_section = CrossSection(hidden) if cross_section else None
        self.head = make_head(hidden, head)

    def forward(
        self, features: Float[Tensor, "days names time features"], valid: Bool[Tensor, "days names"]
    ) -> MIGAOutput:
        hidden = encode(self.encoder, features)
        if self.cross_section is not None:
            hidden = self.cross_section(hidden, valid)
        return MIGAOutput(self.head(hidden).squeeze(-1) * valid, {})


class SwitchRanker(ZooModel):
    """The encoder and one Switch layer: each name goes to the best of some MLP experts (Fedus et al., 2021).

    Args:
        experts: MLP experts, of which a name uses one.
        expert_hidden: their hidden width.
        aux_coef: weight of the balance loss.
        others: as for `MIGA`.
    """

    def __init__(
        self,
        schema: Mapping[str, Any],
        encoder: EncoderKind = "conv",
        hidden: int = 64,
        layers: int = 1,
        experts: int = 8,
        expert_hidden: int = 64,
        aux_coef: float = 1e-2,
        jitter: float = 0.0,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        self.encoder = make_encoder(schema, encoder, hidden, layers, dropout)
        router = TopKRouter(hidden, experts, 1, norm_topk_prob=False, aux_coef=aux_coef, jitter=jitter)
        self.mixture = MoE(router, MLPExperts(experts, hidden, expert_hidden))
        self.head = nn.Linear(hidden, 1)

    def forward(
        self, features: Float[Tensor, "days names time features"], valid: Bool[Tensor, "days names"]
    ) -> MIGAOutput:
        hidden = encode(self.encoder, features)
        mixed, routing = self.mixture(hidden, return_routing=True, token_mask=valid)
        return MIGAOutput(self.head(hidden + mixed).squeeze(-1) * valid, {"switch": routing})


class EnsembleRanker(ZooModel):
    """Several `EncoderRanker`s with starts and losses of their own, averaged: the field's usual use of parameters.

    Scores of a member have no scale, so each is standardised over the day's names before the average.

    Args:
        members: how many.
        others: as for `EncoderRanker`.
    """

    def __init__(
        self,
        schema: Mapping[str, Any],
        members: int = 3,
        encoder: EncoderKind = "conv",
        hidden: int = 64,
        layers: int = 1,
        head: int = 0,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        self.members = nn.ModuleList(
            EncoderRanker(schema, encoder, hidden, layers, head, dropout=dropout) for _ in range(members)
        )

    def forward(
        self, features: Float[Tensor, "days names time features"], valid: Bool[Tensor, "days names"]
    ) -> MIGAOutput:
        members = torch.stack([member(features, valid).score for member in self.members], -1)
        each = standardise(members.movedim(-1, 0).flatten(0, 1), valid.repeat(len(self.members), 1))
        return MIGAOutput(each.view(-1, *valid.shape).mean(0), {}, members)


class TRA(ZooModel):
    """Temporal routing adaptor (Lin et al., KDD 2021): K linear predictors, routed by their past errors on the name.

    A recurrent router reads how well each predictor did on the name over the last `history` days whose label was
    known at the close of day t, together with the encoder's state. In training one predictor is drawn (Gumbel,
    straight-through), in evaluation the likeliest is taken; an optimal-transport plan that gives every predictor its
    share of the samples pulls the router, ever less. Errors are kept in memory by (day, symbol), never in weights;
    `reset` clears them.

    Args:
        predictors: K.
        history: days of errors the router reads.
        router_hidden: width of its recurrent layer.
        temperature: of the Gumbel softmax.
        transport: weight of the regulariser at the start.
        decay: its factor per step.
        others: as for `MIGA`.
    """

    memory: Tensor
    steps: Tensor

    def __init__(
        self,
        schema: Mapping[str, Any],
        encoder: EncoderKind = "rec",
        hidden: int = 64,
        layers: int = 1,
        predictors: int = 3,
        history: int = 20,
        router_hidden: int = 16,
        temperature: float = 1.0,
        transport: float = 1.0,
        decay: float = 0.99,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        self.encoder = make_encoder(schema, encoder, hidden, layers, dropout)
        self.predictors = nn.Linear(hidden, predictors)
        self.reader = nn.GRU(predictors, router_hidden, batch_first=True)
        self.gate = nn.Linear(router_hidden + hidden, predictors)
        self.horizon, self.history = int(schema["horizon"]), history
        self.temperature, self.transport, self.decay = temperature, transport, decay
        self.register_buffer("memory", torch.zeros(0, 0, predictors), persistent=False)
        self.register_buffer("steps", torch.zeros(()))

    def reset(self) -> None:
        """Forget every error; called before a test, so that its result follows from the weights alone."""
        self.memory = self.memory[:0, :0]

    def forward(
        self,
        features: Float[Tensor, "days names time features"],
        valid: Bool[Tensor, "days names"],
        day: Int[Tensor, " days"],
        symbol: Int[Tensor, "days names"],
        label: Float[Tensor, "days names"] | None = None,
    ) -> MIGAOutput:
        """Scores never depend on `label`: it is remembered, and read once it lies horizon + 1 days back."""
        hidden = encode(self.encoder, features)
        predictions = self.predictors(hidden)
        errors = self._recall(day, symbol, valid)
        _, state = self.reader(errors.flatten(0, 1))
        logits = self.gate(torch.cat([state[-1].view(*valid.shape, -1), hidden], -1)).float()
        if self.training:
            choice = F.gumbel_softmax(logits, self.temperature, hard=True)
        else:
            choice = F.one_hot(logits.argmax(-1), logits.shape[-1]).to(logits.dtype)
        transport = logits.new_zeros(())
        if label is not None:
            known = valid & ~label.isnan()
            target = standardise(label.float().masked_fill(~known, 0.0), known).clamp(-3, 3)
            error = (predictions.float() - target.unsqueeze(-1)).square()
            if self.training and self.transport:
                transport = self.transport * self.decay**self.steps * transport_loss(logits, error.detach(), known)
                self.steps += 1
            self._remember(day, symbol, known, error.detach())
        score = (choice * predictions).sum(-1) * valid
        return MIGAOutput(score, {"predictors": self._record(choice, logits, valid, transport)})

    def _record(self, choice: Tensor, logits: Tensor, valid: Tensor, loss: Tensor) -> Routing:
        tokens = valid.flatten()
        weights, indices = choice.flatten(0, 1).max(-1, keepdim=True)
        logits = logits.flatten(0, 1)
        return Routing(
            weights=weights * tokens[:, None],
            indices=indices.masked_fill(~tokens[:, None], -1),
            scores=logits.softmax(-1),
            logits=logits,
            aux_loss=loss,
        )

    @torch.no_grad()
    def _recall(self, day: Tensor, symbol: Tensor, valid: Tensor) -> Float[Tensor, "days names history predictors"]:
        """Errors of the days up to t - horizon - 1, whose labels end at the close of t; 0 where none is kept."""
        self._grow(day, symbol)
        when = day[:, None] - self.horizon - self.history + torch.arange(self.history, device=day.device)
        kept = (when >= 0)[:, None, :, None] & valid[:, :, None, None]
        return self.memory[when.clamp(min=0)[:, None], symbol.clamp(min=0)[..., None]] * kept

    @torch.no_grad()
    def _remember(self, day: Tensor, symbol: Tensor, known: Tensor, error: Tensor) -> None:
        """Errors relative to the name's best predictor that day, as the paper normalises them."""
        relative = (error - error.amin(-1, keepdim=True)) * known.unsqueeze(-1)
        # Padding and unknown labels write into the spare last column, which is never read.
        column = symbol.masked_fill(~known, self.memory.shape[1] - 1)
        self.memory[day[:, None], column] = relative

    def _grow(self, day: Tensor, symbol: Tensor) -> None:
        if self.memory.is_inference() and not torch.is_inference_mode_enabled():
            self.memory = self.memory.clone()  # grown while validating; training may not write to it
        days, names, predictors = self.memory.shape
        wanted = int(day.max()) + 1, int(symbol.max()) + 2
        if wanted[0] > days or wanted[1] > names:
            larger = self.memory.new_zeros(max(days, wanted[0]), max(names, wanted[1]), predictors)
            larger[:days, : max(names - 1, 0)] = self.memory[:, : max(names - 1, 0)]
            self.memory = larger


class RidgeRanker(ZooModel):
    """Ridge regression of the label's rank on the features, in closed form from one pass over the train days.

    Features and ranks are centred within each day: what all names share tells nothing of their order.

    Args:
        schema: the data's sizes.
        penalty: of the squared weights, per sample; features are of unit scale.
        window: use every day of the window, not the last alone.
    """

    weight: Tensor

    def __init__(self, schema: Mapping[str, Any], penalty: float = 1e-3, window: bool = False) -> None:
        super().__init__()
        self.penalty, self.window = penalty, window
        self.register_buffer("weight", torch.zeros(schema["num_features"] * (schema["lookback"] if window else 1)))

    def fit(self, loader: Iterable[Any]) -> None:
        """Accumulate X'X and X'y in float64 and solve."""
        size = len(self.weight)
        gram = torch.zeros(size, size, dtype=torch.double)
        moment, samples = torch.zeros(size, dtype=torch.double), 0
        for batch in loader:
            known = batch.valid & ~batch.label.isnan()
            x = centre(self._inputs(batch.features), known.unsqueeze(-1))
            y = rank_target(batch.label, known)
            gram += (x.flatten(0, 1).mT @ x.flatten(0, 1)).double().cpu()
            moment += (x.flatten(0, 1).mT @ y.flatten()).double().cpu()
            samples += int(known.sum())
        gram.diagonal().add_(self.penalty * samples)
        self.weight.copy_(torch.linalg.solve(gram, moment))

    def forward(
        self, features: Float[Tensor, "days names time features"], valid: Bool[Tensor, "days names"]
    ) -> MIGAOutput:
        return MIGAOutput((self._inputs(features) @ self.weight) * valid, {})

    def _inputs(self, features: Tensor) -> Float[Tensor, "days names inputs"]:
        return features.flatten(2) if self.window else features[:, :, -1]


class LightGBMRanker(ZooModel):
    """Gradient-boosted trees on the last day's features and the label's rank. Needs the extra `stocks`.

    Args:
        schema: the data's sizes.
        rounds: trees.
        leaves: leaves of a tree.
        learning_rate: of the boosting.
        min_leaf: fewest samples of a leaf; returns are noise for the most part, so many.
        feature_fraction: share of the features a tree sees.
        l2: penalty of the leaf values.
        seed: of the feature sampling.
        threads: of LightGBM.
    """

    booster: Tensor

    def __init__(
        self,
        schema: Mapping[str, Any],
        rounds: int = 200,
        leaves: int = 31,
        learning_rate: float = 0.05,
        min_leaf: int = 2000,
        feature_fraction: float = 0.8,
        l2: float = 10.0,
        seed: int = 0,
        threads: int = 1,
    ) -> None:
        super().__init__()
        self.rounds = rounds
        self.parameters_ = {
            "objective": "regression",
            "num_leaves": leaves,
            "learning_rate": learning_rate,
            "min_data_in_leaf": min_leaf,
            "feature_fraction": feature_fraction,
            "lambda_l2": l2,
            "seed": seed,
            "num_threads": threads,
            "deterministic": True,
            "force_row_wise": True,
            "verbosity": -1,
        }
        # The model's text as bytes: weights files hold tensors and nothing that would be executed.
        self.register_buffer("booster", torch.zeros(0, dtype=torch.uint8))
        self._trees: Any = None

    def fit(self, loader: Iterable[Any]) -> None:
        """Train on every labelled (day, name) of the train days."""
        lightgbm = _lightgbm()
        inputs, targets = [], []
        for batch in loader:
            known = batch.valid & ~batch.label.isnan()
            inputs.append(batch.features[:, :, -1][known].cpu())
            targets.append(rank_target(batch.label, known)[known].cpu())
        data = lightgbm.Dataset(torch.cat(inputs).numpy(), torch.cat(targets).numpy())
        trees = lightgbm.train(self.parameters_, data, self.rounds)
        self.booster = torch.frombuffer(bytearray(trees.model_to_string().encode()), dtype=torch.uint8)
        self._trees = None

    def forward(
        self, features: Float[Tensor, "days names time features"], valid: Bool[Tensor, "days names"]
    ) -> MIGAOutput:
        if self._trees is None:
            if not len(self.booster):
                raise UserError("LightGBM has no trees yet: call fit(loader) or load weights")
            self._trees = _lightgbm().Booster(model_str=self.booster.cpu().numpy().tobytes().decode())
        last = features[:, :, -1].flatten(0, 1).cpu().numpy()
        score = torch.from_numpy(self._trees.predict(last, num_threads=self.parameters_["num_threads"]))
        return MIGAOutput(score.to(features).view(valid.shape) * valid, {})

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *rest: Any) -> None:
        # The text's length is known only once it is read.
        self.booster = torch.zeros_like(state_dict.get(f"{prefix}booster", self.booster))
        self._trees = None
        super()._load_from_state_dict(state_dict, prefix, *rest)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_trees": None}


class StyleRule(ZooModel):
    """Buy what has, or lacks, a style: `momentum` with sign 1, `volatility` with sign -1, and so on.

    Args:
        schema: the data's `styles`.
        style: one of them.
        sign: 1 or -1 (the reversal of it).
    """

    def __init__(self, schema: Mapping[str, Any], style: str = "momentum", sign: int = 1) -> None:
        super().__init__()
        if style not in schema["styles"]:
            raise UserError(f"style={style}: the data has {', '.join(schema['styles'])}")
        if sign not in (1, -1):
            raise UserError(f"sign={sign}: expected 1 or -1")
        self.column, self.sign = list(schema["styles"]).index(style), sign

    def fit(self, loader: Iterable[Any]) -> None:
        """Nothing to fit."""

    def forward(self, style: Float[Tensor, "days names styles"], valid: Bool[Tensor, "days names"]) -> MIGAOutput:
        return MIGAOutput(self.sign * style[..., self.column] * valid, {})


class FeatureRule(ZooModel):
    """Rank by one feature of the last day: short-term reversal is the past return with sign -1.

    Args:
        schema: the data's sizes and, where it has them, the names of its `features`.
        feature: name of a feature, or its column.
        sign: 1 or -1.
    """

    def __init__(self, schema: Mapping[str, Any], feature: str | int = 0, sign: int = -1) -> None:
        super().__init__()
        names = list(schema.get("features", []))
        if isinstance(feature, str):
            if feature not in names:
                raise UserError(f"feature={feature}: the data has {', '.join(names) or 'no feature names'}")
            feature = names.index(feature)
        if not 0 <= feature < schema["num_features"]:
            raise UserError(f"feature={feature}: the data has {schema['num_features']} features")
        if sign not in (1, -1):
            raise UserError(f"sign={sign}: expected 1 or -1")
        self.column, self.sign = feature, sign

    def fit(self, loader: Iterable[Any]) -> None:
        """Nothing to fit."""

    def forward(
        self, features: Float[Tensor, "days names time features"], valid: Bool[Tensor, "days names"]
    ) -> MIGAOutput:
        return MIGAOutput(self.sign * features[:, :, -1, self.column] * valid, {})


def make_head(hidden: int, head: int) -> nn.Module:
    """A linear read-out, or (`head` > 0) an MLP with one hidden layer."""
    if not head:
        return nn.Linear(hidden, 1)
    return nn.Sequential(nn.Linear(hidden, head), nn.GELU(), nn.Linear(head, 1))


def transport_loss(
    logits: Float[Tensor, "days names predictors"],
    error: Float[Tensor, "days names predictors"],
    known: Bool[Tensor, "days names"],
    epsilon: float = 0.05,
    iterations: int = 5,
) -> Float[Tensor, ""]:
    """Cross-entropy of the router to the optimal-transport plan that gives each predictor an equal share.

    The plan minimises the errors, each scaled to [0, 1] on its sample, by Sinkhorn's iterations in logs.
    """
    spread = error - error.amin(-1, keepdim=True)
    spread = spread / spread.amax(-1, keepdim=True).clamp(min=1e-8)
    plan = (-spread / epsilon).flatten(0, 1).masked_fill(~known.flatten()[:, None], -torch.inf)
    for _ in range(iterations):
        plan = plan - plan.logsumexp(0, keepdim=True)
        plan = plan - plan.logsumexp(1, keepdim=True).masked_fill(~known.flatten()[:, None], 0.0)
    each = -(plan.exp() * logits.flatten(0, 1).log_softmax(-1)).sum(-1)
    return each.sum() / known.sum().clamp(min=1)


def centre(values: Float[Tensor, "days names *width"], mask: Bool[Tensor, "days names *one"]) -> Tensor:
    """Less the day's mean over the names of `mask`; 0 elsewhere."""
    values = values.masked_fill(~mask, 0.0)
    mean = values.sum(1, keepdim=True) / mask.sum(1, keepdim=True).clamp(min=1)
    return (values - mean) * mask


def standardise(values: Float[Tensor, "days names"], mask: Bool[Tensor, "days names"]) -> Float[Tensor, "days names"]:
    """Mean 0 and standard deviation 1 over the names of each day; 0 elsewhere."""
    centred = centre(values, mask)
    variance = centred.square().sum(1, keepdim=True) / mask.sum(1, keepdim=True).clamp(min=1)
    return centred / (variance + 1e-12).sqrt()


def rank_target(label: Float[Tensor, "days names"], mask: Bool[Tensor, "days names"]) -> Float[Tensor, "days names"]:
    """The label's rank within its day, centred and of unit variance; 0 elsewhere. Ties in the names' order."""
    order = label.masked_fill(~mask, torch.inf).argsort(dim=1, stable=True)
    rank = torch.empty_like(label).scatter_(1, order, torch.arange(label.shape[1]).to(label).expand_as(label))
    count = mask.sum(1, keepdim=True)
    return (rank - (count - 1) / 2) / count.clamp(min=1) * 12**0.5 * mask


def _lightgbm() -> Any:
    try:
        import lightgbm
    except ImportError:
        raise UserError("LightGBM is not installed: pip install 'moezoo[stocks]'") from None
    return lightgbm
