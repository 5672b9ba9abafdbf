"""Reward models that need no network: the longer response wins, and a linear Bradley-Terry model of n-grams."""

from collections.abc import Iterable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from ...errors import UserError
from ..core import FixedRouter
from ..dmoerm import RewardModel, RewardOutput, Route
from .rewards import plain_output

_PRIME = 1_000_003  # spreads pairs of tokens over the buckets


class LengthRule(RewardModel):
    """The longer response is the better one, in characters; the bias that every reward model is suspected of.

    Args:
        schema: not used.
        shorter: the shorter one wins instead.
    """

    def __init__(self, schema: Mapping[str, Any], shorter: bool = False) -> None:
        super().__init__()
        self.sign = -1.0 if shorter else 1.0

    def fit(self, loader: Iterable[Any]) -> None:
        """Nothing to fit."""

    def forward(self, length: Int[Tensor, "rows"]) -> RewardOutput:
        reward = self.sign * length.float()
        return plain_output(reward, reward[:, None])


class LinearRM(RewardModel):
    """`r = w·x` of hashed n-gram counts and the log of the length, fitted by L-BFGS on the Bradley-Terry likelihood.

    Args:
        schema: `tasks` and `vocab_size`.
        route: `single`, one w for all tasks; `predicted` and `oracle`, one for each task, chosen by a linear classifier
            of the prompt's n-grams or by the known task.
        ngrams: longest n-gram, 1 or 2.
        buckets: n-grams share so many weights.
        ridge: penalty on w, per pair.
        router_ridge: the same for the classifier.
        length: whether x has the log of the number of tokens.

    Raises:
        UserError: in `fit`: no pairs, or a task without any.
    """

    weight: Tensor
    outer: Tensor
    outer_bias: Tensor

    def __init__(
        self,
        schema: Mapping[str, Any],
        route: Route = "single",
        ngrams: int = 2,
        buckets: int = 16384,
        ridge: float = 1e-2,
        router_ridge: float = 1e-3,
        length: bool = True,
    ) -> None:
        super().__init__()
        if ngrams not in (1, 2) or buckets < 2 or min(ridge, router_ridge) <= 0:
            raise UserError(f"ngrams={ngrams}, buckets={buckets}, ridge={ridge}: expected 1 or 2, more than 1, above 0")
        names = [task["name"] for task in schema["tasks"]]
        if route != "single" and not names:
            raise UserError(f"route={route} needs tasks, and the data names none; use route=single")
        self.route, self.ngrams, self.buckets, self.ridge, self.length = route, ngrams, buckets, ridge, length
        self.router_ridge = router_ridge
        self.names = names
        self.fixed = FixedRouter(max(len(names), 1))
        self.register_buffer("weight", torch.zeros(1 if route == "single" else len(names), buckets + 1))
        self.register_buffer("outer", torch.zeros(len(names), buckets))
        self.register_buffer("outer_bias", torch.zeros(len(names)))

    def fit(self, loader: Iterable[Any]) -> None:
        """Both linear models; convex, started at zero."""
        sides, prompts, tasks = [], [], []
        for batch in loader:
            known = batch.pool < 0
            tokens, mask = batch.tokens[known], batch.mask[known]
            sides.append(self._difference(tokens, mask))
            prompts.append(self._counts(batch.prompt_tokens[known], batch.prompt_mask[known]))
            tasks.append(batch.task[known])
        if not sides:
            raise UserError("LinearRM: no pair to fit")
        x, task = torch.cat(sides), torch.cat(tasks)
        for t in range(len(self.weight)):
            own = x if self.route == "single" else x.index_select(0, (task == t).nonzero()[:, 0])
            if not own.shape[0]:
                raise UserError(f"LinearRM: task {self.names[t]} has no train pair; use route=single")
            self.weight[t] = _bradley_terry(own.coalesce(), self.ridge)
        if self.route != "single":
            known = (task >= 0).nonzero()[:, 0]
            seen = torch.cat(prompts).index_select(0, known).coalesce()
            self.outer, self.outer_bias = _softmax_regression(seen, task[known], len(self.names), self.router_ridge)

    def forward(
        self,
        tokens: Int[Tensor, "rows length"],
        mask: Bool[Tensor, "rows length"],
        prompt_tokens: Int[Tensor, "prompts prompt_length"],
        prompt_mask: Bool[Tensor, "prompts prompt_length"],
        task: Int[Tensor, "prompts"] | None = None,
        route: Route | None = None,
    ) -> RewardOutput:
        """As `DMoERM.forward`."""
        each = len(tokens) // max(len(prompt_tokens), 1)
        x = self._features(tokens, mask)
        rewards = (x @ self.weight.T).float()
        if self.route == "single":
            return plain_output(rewards[:, 0], rewards)
        logits = (self._counts(prompt_tokens, prompt_mask) @ self.outer.T) + self.outer_bias
        chosen = logits.argmax(1)
        if (route or self.route) == "oracle" and task is not None:
            chosen = torch.where(task >= 0, task, chosen)
        record = self.fixed(logits, task_id=chosen)
        reward = rewards.gather(1, chosen.repeat_interleave(each)[:, None])[:, 0]
        return plain_output(reward, rewards, routing={"task": record})._replace(task_logits=logits)

    def _features(self, tokens: Tensor, mask: Tensor) -> Tensor:
        """Sparse [rows, buckets + 1]: n-gram counts, then the log of the length."""
        counts = self._counts(tokens, mask)
        last = (mask.sum(1).float() + 1).log()[:, None] * float(self.length)
        return torch.cat([counts, last.to_sparse()], 1)

    def _difference(self, tokens: Tensor, mask: Tensor) -> Tensor:
        chosen, rejected = (self._features(tokens[:, side], mask[:, side]) for side in (0, 1))
        return (chosen - rejected).coalesce()

    def _counts(self, tokens: Tensor, mask: Tensor) -> Tensor:
        """Square roots of n-gram counts, sparse [rows, buckets]."""
        place = tokens % self.buckets
        row = torch.arange(len(tokens), device=tokens.device)[:, None].expand_as(place)
        index = [torch.stack([row[mask], place[mask]])]
        if self.ngrams == 2:
            follows = mask[:, 1:] & mask[:, :-1]
            pair = (tokens[:, :-1] * _PRIME + tokens[:, 1:] + 1) % self.buckets
            index.append(torch.stack([row[:, 1:][follows], pair[follows]]))
        where = torch.cat(index, 1)
        ones = torch.ones(where.shape[1], device=tokens.device)
        counts = torch.sparse_coo_tensor(where, ones, (len(tokens), self.buckets)).coalesce()
        return torch.sparse_coo_tensor(counts.indices(), counts.values().sqrt(), counts.shape, is_coalesced=True)


def _bradley_terry(x: Tensor, ridge: float) -> Float[Tensor, " features"]:
    """Weights of the largest penalised likelihood that x·w is positive."""

    def loss(w: Tensor) -> Tensor:
        return -F.logsigmoid(torch.sparse.mm(x, w[:, None])[:, 0]).mean() + 0.5 * ridge * w.square().sum()

    return _minimise(loss, torch.zeros(x.shape[1], device=x.device))


def _softmax_regression(x: Tensor, label: Tensor, classes: int, ridge: float) -> tuple[Tensor, Tensor]:
    features = x.shape[1]

    def loss(flat: Tensor) -> Tensor:
        w = flat.view(features + 1, classes)
        logits = torch.sparse.mm(x, w[:-1]) + w[-1]
        return F.cross_entropy(logits, label) + 0.5 * ridge * w[:-1].square().sum()

    found = _minimise(loss, torch.zeros((features + 1) * classes, device=x.device)).view(features + 1, classes)
    return found[:-1].T.contiguous(), found[-1].clone()


def _minimise(loss: Any, start: Tensor) -> Tensor:
    point = start.requires_grad_()
    optimizer = torch.optim.LBFGS([point], max_iter=100, line_search_fn="strong_wolfe", tolerance_grad=1e-6)

    def closure() -> Tensor:
        optimizer.zero_grad()
        value: Tensor = loss(point)
        value.backward()
        return value

    optimizer.step(closure)
    return point.detach()
