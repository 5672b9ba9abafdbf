"""COMET: k trees that route (Ibrahim et al. 2023)."""

from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from .gates import Gate, LinearGate
from .permutation import PermutationLearner
from .record import Routing
from .router import ExpertMask, Router, drop_padding, full_precision
from .slots import selection_entropy, slots_of, smooth_step, without_switched_off


class CometRouter(Router):
    """Each of k binary trees leads the token to a leaf, and leaf e is expert e.

    Every inner node of tree i sends the share `S(v · x + b)` of what reaches it right and the rest left, with the
    smooth step S; q_i(e) is what reaches leaf e. The weights are `w_e = Σ_i softmax over all (i, e) of
    (a_ie(x) + log q_i(e))` with linear a (Ibrahim et al. 2023, section 4): leaves that nothing reaches get
    exactly zero, and once all nodes have decided a token uses k experts. The weights sum to one.

    A tree has E leaves whatever E is: those of a heap of 2E - 1 nodes, where E is no power of two at two depths.
    The record has a slot per expert, -1 where the weight is zero.

    Args:
        top_k: the trees k.
        gamma: width of the smooth step's slope, in units of `v · x + b`.
        entropy_coef: coefficient of `selection_entropy` of q; the authors try 5e-2 to 10.
        sparse_eval: outside training, keep the k largest weights, scaled to sum to one.
        gate: gives the `k (2E - 1)` numbers, nodes first; linear with bias by default.
        permutation: which leaf is which expert is a choice like any other, and COMET+ learns it first, see
            `PermutationLearner`.

    Losses are zero outside training.
    """

    def __init__(
        self,
        dim: int,
        num_experts: int,
        top_k: int,
        gamma: float = 1.0,
        entropy_coef: float = 1e-2,
        sparse_eval: bool = False,
        gate: Gate | None = None,
        permutation: PermutationLearner | None = None,
    ) -> None:
        super().__init__(num_experts, top_k)
        if gamma <= 0:
            raise ValueError(f"gamma={gamma} must be positive")
        outputs = top_k * (2 * num_experts - 1)
        if gate is None:
            gate = LinearGate(dim, outputs, bias=True)
            nn.init.uniform_(gate.weight, -gamma / 100, gamma / 100)
        if gate.out_features != outputs:
            raise ValueError(f"the gate gives {gate.out_features} numbers, but k (2E - 1) = {outputs} are needed")
        self.gate = gate
        self.gamma = gamma
        self.entropy_coef = entropy_coef
        self.sparse_eval = sparse_eval
        self.permutation = permutation

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
            numbers = self.gate(x, task_id).unflatten(1, (self.top_k, 2 * self.num_experts - 1))
            nodes, leaves = numbers.split([self.num_experts - 1, self.num_experts], dim=-1)
            reached = leaf_shares(smooth_step(nodes, self.gamma))
            scores = _reweighted(reached, leaves).sum(1)
            aux_loss = scores.new_zeros(())
            if self.training and self.entropy_coef != 0:
                aux_loss = aux_loss + self.entropy_coef * selection_entropy(reached, token_mask)
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


def leaf_shares(right: Float[Tensor, "*rows nodes"]) -> Float[Tensor, "*rows leaves"]:
    """What reaches each leaf of a heap-shaped tree, from the share that each inner node sends right.

    Node n has the children 2n + 1 and 2n + 2; leaves come in the order of their node numbers.
    """
    level = right.new_ones(*right.shape[:-1], 1)
    start, leaves = 0, []
    while start < right.shape[-1]:
        inner = min(level.shape[-1], right.shape[-1] - start)
        if inner < level.shape[-1]:
            leaves.append(level[..., inner:])
        share, parent = right[..., start : start + inner], level[..., :inner]
        start += level.shape[-1]
        level = torch.stack([parent * (1 - share), parent * share], dim=-1).flatten(-2)
    return torch.cat([*leaves, level], dim=-1)


def _reweighted(reached: Float[Tensor, "tokens k experts"], logits: Tensor) -> Float[Tensor, "tokens k experts"]:
    """`softmax(logits + log reached)` over trees and leaves, without the logarithm of zero."""
    unreached = reached == 0
    best = logits.detach().masked_fill(unreached, -torch.inf).amax((1, 2), keepdim=True)
    # The logit of an unreached leaf may lie far above the best one: exp must not overflow to inf · 0.
    mass = reached * (logits - best).masked_fill(unreached, 0.0).exp()
    return mass / mass.sum((1, 2), keepdim=True)
