"""Which leaf of a tree, or which number, is which expert: a permutation learnt at the start (COMET+)."""

from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn


class PermutationLearner(nn.Module):
    """Relabels a router's experts, `w P`, with a P that is searched first and then frozen.

    During the search P is doubly stochastic: Sinkhorn's iteration on `exp(logits / τ)`, with τ falling and the
    iterations growing log-linearly as `search` is told (Ibrahim et al. 2023, section 4.2; ranges from their code).
    `freeze` takes the best permutation (exactly, by the Hungarian method) for good. A search is short, the
    authors give it 1 to 10 % of the epochs, and costs a mixture of all experts while it lasts. Compile after it.

    Args:
        temperature: τ at the start and at the end of the search.
        iterations: of Sinkhorn, at the start and at the end.
        noise: size of the Gumbel noise on the logits in training; 0 for none.
        entropy_coef: coefficient of the mean entropy of P's rows and columns, in training.
    """

    hard: Tensor

    def __init__(
        self,
        num_experts: int,
        temperature: tuple[float, float] = (1e-3, 1e-7),
        iterations: tuple[int, int] = (20, 150),
        noise: float = 0.0,
        entropy_coef: float = 1e-4,
    ) -> None:
        super().__init__()
        if min(temperature) <= 0 or min(iterations) < 1:
            raise ValueError(f"temperature={temperature} must be positive and iterations={iterations} at least 1")
        self.temperatures, self.iteration_range = temperature, iterations
        self.noise = noise
        self.entropy_coef = entropy_coef
        # As large as τ at first, so that the search begins undecided.
        self.logits = nn.Parameter(torch.randn(num_experts, num_experts) * temperature[0])
        self.register_buffer("hard", torch.zeros(num_experts, num_experts))  # zero until frozen
        self.frozen = False
        self.search(0.0)

    def search(self, progress: float) -> None:
        """Set τ and the iterations for this share of the search; from 1 on, freeze."""
        if progress >= 1:
            self.freeze()
            return
        start, end = self.temperatures
        self.temperature = start * (end / start) ** progress
        first, last = self.iteration_range
        self.iterations = round(first * (last / first) ** progress)

    @torch.no_grad()
    def freeze(self) -> None:
        """Take the permutation nearest to P. Waits for the device; nothing happens a second time."""
        if self.frozen:
            return
        chosen = best_assignment(self.matrix(noise=0.0))
        self.hard.copy_(nn.functional.one_hot(chosen, len(chosen)))
        self._set_frozen()

    def matrix(self, noise: float | None = None) -> Float[Tensor, "experts experts"]:
        """P: row is the router's own number of an expert, column the expert it stands for."""
        if self.frozen:
            return self.hard
        # In float64: at τ = 1e-7 a float32 logarithm is only good to a tenth.
        scores: Tensor = self.logits.double()
        noise = (self.noise if self.training else 0.0) if noise is None else noise
        if noise > 0:
            scores = scores - noise * torch.empty_like(scores).exponential_().log()
        scores = scores / self.temperature
        for _ in range(self.iterations):
            scores = scores - scores.logsumexp(1, keepdim=True)
            scores = scores - scores.logsumexp(0, keepdim=True)
        matrix: Tensor = scores.exp().to(self.logits.dtype)
        return matrix

    def forward(
        self, weights: Float[Tensor, "tokens experts"]
    ) -> tuple[Float[Tensor, "tokens experts"], Float[Tensor, ""]]:
        """The weights by the experts' names, and the search's loss."""
        matrix = self.matrix().to(weights.dtype)
        penalty = weights.new_zeros(())
        if self.training and not self.frozen and self.entropy_coef != 0:
            surprise = -matrix * matrix.clamp_min(1e-20).log()
            penalty = self.entropy_coef * 2 * surprise.sum() / len(matrix)
        return weights @ matrix, penalty

    def _set_frozen(self) -> None:
        self.frozen = True
        self.logits.requires_grad_(False)

    def _load_from_state_dict(self, *args: Any) -> None:
        super()._load_from_state_dict(*args)
        if bool(self.hard.any()):
            self._set_frozen()

    def extra_repr(self) -> str:
        return f"num_experts={len(self.hard)}, frozen={self.frozen}"


def best_assignment(gain: Float[Tensor, "rows rows"]) -> Int[Tensor, "rows"]:
    """The column of each row such that the gains together are greatest.

    The Hungarian method by shortest augmenting paths (Kuhn 1955; Jonker and Volgenant 1987), on the host, in
    rows³ steps: for as many experts as a layer has.
    """
    cost = (-gain.detach().double()).tolist()
    n = len(cost)
    row_price, column_price = [0.0] * n, [0.0] * (n + 1)
    owner = [-1] * (n + 1)  # the row of each column; the last column is where a search begins
    for row in range(n):
        owner[n] = row
        distance, before = [float("inf")] * n, [n] * n
        done = [False] * (n + 1)
        column = n
        while owner[column] >= 0:
            done[column] = True
            current = owner[column]
            for c in range(n):
                reduced = cost[current][c] - row_price[current] - column_price[c]
                if not done[c] and reduced < distance[c]:
                    distance[c], before[c] = reduced, column
            nearest = min((c for c in range(n) if not done[c]), key=distance.__getitem__)
            step = distance[nearest]
            for c in range(n + 1):
                if done[c]:
                    row_price[owner[c]] += step
                    column_price[c] -= step
                elif c < n:
                    distance[c] -= step
            column = nearest
        while column != n:  # hand each column of the path to the row before it
            owner[column] = owner[before[column]]
            column = before[column]
    columns = [0] * n
    for c in range(n):
        columns[owner[c]] = c
    return torch.tensor(columns, device=gain.device)
