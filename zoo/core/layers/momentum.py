"""Momentum over depth: a stack of MoE layers seen as steps of an optimiser (MomentumSMoE, Teo and Nguyen 2024).

A residual layer `x + f(x)` is a gradient step; these make it a step with a memory. Each returns the state for the
next layer:

    state = None
    for norm, moe, step in layers:
        x, state = step(x, moe(norm(x)), state)

They have no parameters. The authors' code subtracts where we add: the sign is the experts' to learn.
"""

from jaxtyping import Float
from torch import Tensor, nn


class MomentumResidual(nn.Module):
    """`m_l = μ m_{l-1} + γ y_l`, `x_{l+1} = x_l + m_l`: heavy-ball momentum; μ = 0, γ = 1 is the plain residual."""

    def __init__(self, mu: float = 0.7, gamma: float = 1.0) -> None:
        super().__init__()
        if not 0 <= mu < 1:
            raise ValueError(f"mu={mu} must lie in [0, 1)")
        self.mu, self.gamma = mu, gamma

    def forward(
        self, x: Float[Tensor, "*batch dim"], y: Float[Tensor, "*batch dim"], state: Tensor | None = None
    ) -> tuple[Float[Tensor, "*batch dim"], Float[Tensor, "*batch dim"]]:
        """The layer's input x and its experts' output y to the next layer's input and m."""
        momentum = self.gamma * y if state is None else self.mu * state + self.gamma * y
        return x + momentum, momentum

    def extra_repr(self) -> str:
        return f"mu={self.mu}, gamma={self.gamma}"


class AdamResidual(nn.Module):
    """`p = β₁ p + (1 - β₁) y`, `v = β₂ v + (1 - β₂) y²`, `x_{l+1} = (1 - κ) x_l + γ p / √(v + ε)`, from zeros.

    κ is a weight decay. The authors use κ = 1, in the first layer alone, and momentum in all others: the first
    layer's output is then bounded whatever its input. The step is as long as γ, so choose γ with an eye on x.
    """

    def __init__(
        self, gamma: float = 1.0, betas: tuple[float, float] = (0.9, 0.999), kappa: float = 0.0, eps: float = 1e-8
    ) -> None:
        super().__init__()
        if not all(0 <= beta < 1 for beta in betas):
            raise ValueError(f"betas={betas} must lie in [0, 1)")
        self.gamma, self.betas, self.kappa, self.eps = gamma, betas, kappa, eps

    def forward(
        self,
        x: Float[Tensor, "*batch dim"],
        y: Float[Tensor, "*batch dim"],
        state: tuple[Tensor, Tensor] | None = None,
    ) -> tuple[Float[Tensor, "*batch dim"], tuple[Float[Tensor, "*batch dim"], Float[Tensor, "*batch dim"]]]:
        """The layer's input x and its experts' output y to the next layer's input and (p, v)."""
        (b1, b2), y_squared = self.betas, y.square()
        first = (1 - b1) * y if state is None else b1 * state[0] + (1 - b1) * y
        second = (1 - b2) * y_squared if state is None else b2 * state[1] + (1 - b2) * y_squared
        step = self.gamma * first / (second + self.eps).sqrt()
        return (1 - self.kappa) * x + step, (first, second)

    def extra_repr(self) -> str:
        return f"gamma={self.gamma}, betas={self.betas}, kappa={self.kappa}"
