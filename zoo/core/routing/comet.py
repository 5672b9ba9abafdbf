"""COMET: k trees that route (Ibrahim et al. 2023)."""

import torch
from jaxtyping import Float
from torch import Tensor

from .gates import Gate
from .permutation import PermutationLearner
from .selectors import Selection, SelectorRouter
from .slots import smooth_step


class CometRouter(SelectorRouter):
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

    FORMULA = "k (2E - 1)"

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
        super().__init__(
            dim,
            num_experts,
            top_k,
            top_k * (2 * num_experts - 1),
            gamma,
            entropy_coef,
            sparse_eval,
            gate,
            permutation,
        )

    def select(self, numbers: Float[Tensor, "tokens outputs"]) -> Selection:
        """What reaches the leaves, and the weights."""
        trees = numbers.unflatten(1, (self.top_k, 2 * self.num_experts - 1))
        nodes, leaves = trees.split([self.num_experts - 1, self.num_experts], dim=-1)
        reached = leaf_shares(smooth_step(nodes, self.gamma))
        return Selection(reached, _reweighted(reached, leaves).sum(1))


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
