"""What DSelect-k and COMET share: k smooth selections of experts that harden while they learn."""

from abc import abstractmethod
from typing import Any, NamedTuple

from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from .gates import Gate, LinearGate
from .permutation import PermutationLearner
from .record import Routing
from .router import ExpertMask, Router, drop_padding, full_precision
from .slots import selection_entropy, slots_of, without_switched_off


class Selection(NamedTuple):
    """What each selector gives each expert before they are mixed, and the weights, which sum to one."""

    shares: Float[Tensor, "tokens selectors experts"]
    scores: Float[Tensor, "tokens experts"]


class SelectorRouter(Router):
    """k selectors that share out each token among the experts, smoothly at first, in the end to one expert each.

    The record has a slot per expert, -1 where the weight is exactly zero. Losses are zero outside training.

    Args:
        top_k: the selectors k.
        outputs: numbers that a token needs from its gate.
        gamma: width of the smooth step's slope.
        entropy_coef: coefficient of `selection_entropy`, which makes selectors decide.
        sparse_eval: outside training, keep the k largest weights, scaled to the sum of all.
        gate: linear by default, with bias and weights in ±γ/100 at first.
        permutation: relabels the experts while it searches, see `PermutationLearner`.

    `FORMULA` says what `outputs` is, for who brings a gate.
    """

    FORMULA = "outputs"

    def __init__(
        self,
        dim: int,
        num_experts: int,
        top_k: int,
        outputs: int,
        gamma: float,
        entropy_coef: float,
        sparse_eval: bool,
        gate: Gate | None,
        permutation: PermutationLearner | None,
    ) -> None:
        super().__init__(num_experts, top_k)
        if gamma <= 0:
            raise ValueError(f"gamma={gamma} must be positive")
        if gate is None:
            gate = LinearGate(dim, outputs, bias=True)
            nn.init.uniform_(gate.weight, -gamma / 100, gamma / 100)
        if gate.out_features != outputs:
            raise ValueError(f"the gate gives {gate.out_features} numbers, but {self.FORMULA} = {outputs} are needed")
        self.gate = gate
        self.gamma = gamma
        self.entropy_coef = entropy_coef
        self.sparse_eval = sparse_eval
        self.permutation = permutation

    @abstractmethod
    def select(self, numbers: Float[Tensor, "tokens outputs"]) -> Selection:
        """The selection, from what the gate gives."""

    def selection_loss(
        self, shares: Float[Tensor, "tokens selectors experts"], token_mask: Bool[Tensor, "tokens"] | None
    ) -> Float[Tensor, ""]:
        """In training."""
        if self.entropy_coef == 0:
            return shares.new_zeros(())
        return self.entropy_coef * selection_entropy(shares, token_mask)

    def forward(
        self,
        x: Float[Tensor, "tokens *features"],
        *,
        token_mask: Bool[Tensor, "tokens"] | None = None,
        task_id: Int[Tensor, "tokens *slots"] | None = None,
        expert_mask: ExpertMask | None = None,
        state: Any = None,
    ) -> Routing:
        """`expert_mask` can only switch experts off."""
        with full_precision(x):
            shares, scores = self.select(self.gate(x, task_id))
            aux_loss = self.selection_loss(shares, token_mask) if self.training else scores.new_zeros(())
            if self.permutation is not None:
                scores, penalty = self.permutation(scores)
                aux_loss = aux_loss + penalty
            weights = without_switched_off(scores, expert_mask)
            weights, indices = slots_of(weights, self.top_k if self.sparse_eval and not self.training else None)
            weights, indices = drop_padding(weights, indices, token_mask)
        return Routing(
            weights=weights,
            indices=indices,
            scores=scores,
            logits=scores.clamp_min(1e-30).log(),
            aux_loss=aux_loss,
            state=state,
        )

    def extra_repr(self) -> str:
        return f"num_experts={self.num_experts}, top_k={self.top_k}, gamma={self.gamma}"
