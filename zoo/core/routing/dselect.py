"""DSelect-k: differentiable selection of k experts (Hazimeh et al. 2021)."""

import math

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from .gates import Gate
from .permutation import PermutationLearner
from .selectors import Selection, SelectorRouter
from .slots import smooth_step


class DSelectKRouter(SelectorRouter):
    """k selectors each pick an expert by its binary number, bit by bit; smooth while they learn, then exact.

    With m = ⌈log₂ E⌉ bits, `z_i = W_i x` in R^m and the smooth step S, selector i gives expert e the share
    `r_i(e) = Π_j S(z_ij)` over its one bits times `Π_j (1 - S(z_ij))` over its zero bits; the weights are
    `w = Σ_i a_i r_i`, `a = softmax(W_a x)` in R^k (Hazimeh et al. 2021, eqs. 5 to 7). They sum to one, and a
    selector whose bits have all passed ±γ/2 names one expert, all others getting exactly zero.

    The record has a slot per expert, -1 where the weight is zero: in the beginning every token uses all experts.

    Args:
        top_k: the selectors k.
        gamma: width of the smooth step's slope, in units of z; the paper tries 1e-3 to 10.
        entropy_coef: coefficient of `selection_entropy`, which makes selectors decide; the paper tries 5e-2 to 10.
        code_coef: coefficient of the mean of `1 / (10⁻⁶ + Σ_e r_i(e))`, which keeps the selectors off the numbers
            that no expert has; counts where E is no power of two. The weights then sum to one once they do.
        sparse_eval: outside training, keep the k largest weights, scaled to the sum of all. Exact once selectors
            have decided; until then an approximation.
        gate: gives the `k (m + 1)` numbers z and W_a x; linear by default, with z in ±γ/100 at first. A
            `StaticGate` makes the selection one for all tokens, as the paper does per task for MMoE.
        permutation: relabels the experts while it searches, see `PermutationLearner`.

    Losses are zero outside training.
    """

    FORMULA = "k (⌈log₂ E⌉ + 1)"

    def __init__(
        self,
        dim: int,
        num_experts: int,
        top_k: int,
        gamma: float = 1.0,
        entropy_coef: float = 1e-2,
        code_coef: float = 1e-2,
        sparse_eval: bool = False,
        gate: Gate | None = None,
        permutation: PermutationLearner | None = None,
    ) -> None:
        self.bits = math.ceil(math.log2(max(num_experts, 1)))
        super().__init__(
            dim,
            num_experts,
            top_k,
            top_k * (self.bits + 1),
            gamma,
            entropy_coef,
            sparse_eval,
            gate,
            permutation,
        )
        self.code_coef = code_coef

    def select(self, numbers: Float[Tensor, "tokens outputs"]) -> Selection:
        """The selectors' shares r, and the weights w."""
        bits = numbers[:, : self.top_k * self.bits].unflatten(1, (self.top_k, self.bits))
        shares = self._shares(smooth_step(bits, self.gamma))
        mixture = numbers[:, self.top_k * self.bits :].softmax(-1)
        return Selection(shares, (mixture[..., None] * shares).sum(1))

    def selection_loss(
        self, shares: Float[Tensor, "tokens selectors experts"], token_mask: Bool[Tensor, "tokens"] | None
    ) -> Float[Tensor, ""]:
        """Also keeps the selectors off the numbers that no expert has."""
        loss = super().selection_loss(shares, token_mask)
        if self.code_coef != 0 and 2**self.bits != self.num_experts:
            price = (1 / (shares.sum(-1) + 1e-6)).sum(-1)
            kept = torch.ones_like(price) if token_mask is None else token_mask.to(price.dtype)
            loss = loss + self.code_coef * (price * kept).sum() / kept.sum().clamp_min(1)
        return loss

    def _shares(self, bits: Float[Tensor, "tokens k bits"]) -> Float[Tensor, "tokens k experts"]:
        """r: by doubling, since the gradient of `prod` waits for the device. Bit j of expert e is `e >> j & 1`."""
        shares = bits.new_ones(*bits.shape[:2], 1)
        for j in range(self.bits):
            bit = bits[..., j : j + 1]
            shares = torch.cat([shares * (1 - bit), shares * bit], dim=-1)
        return shares[..., : self.num_experts]
