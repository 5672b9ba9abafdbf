"""From a matrix of weights with exact zeros to a record's slots."""

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from .router import ExpertMask, switched_off


def slots_of(
    weights: Float[Tensor, "tokens experts"], top_k: int | None = None
) -> tuple[Float[Tensor, "tokens slots"], Int[Tensor, "tokens slots"]]:
    """Weights and indices, -1 where a weight is exactly zero: sorted backends then compute what counts, no more.

    A slot per expert, or with `top_k` that many, of the largest weights, scaled to the sum of all.
    """
    if top_k is None:
        indices = torch.arange(weights.shape[1], device=weights.device).expand(weights.shape)
        return weights, indices.masked_fill(weights == 0, -1)
    kept, indices = weights.topk(top_k, dim=-1)
    total = weights.sum(-1, keepdim=True)
    kept = kept * (total / kept.sum(-1, keepdim=True).clamp_min(torch.finfo(kept.dtype).tiny))
    return kept, indices.masked_fill(kept == 0, -1)


def without_switched_off(
    weights: Float[Tensor, "tokens experts"], expert_mask: ExpertMask | None
) -> Float[Tensor, "tokens experts"]:
    """The weights of the experts that are on, scaled to the same sum; a token with none of them gets zeros."""
    if expert_mask is None:
        return weights
    kept = weights.masked_fill(switched_off(expert_mask), 0.0)
    total = weights.sum(-1, keepdim=True)
    return kept * (total / kept.sum(-1, keepdim=True).clamp_min(1e-20))


def smooth_step(t: Float[Tensor, "*dims"], gamma: float) -> Float[Tensor, "*dims"]:
    """`S(t)`: 0 up to -γ/2, 1 from γ/2, between them `-2 t³/γ³ + 3 t/(2γ) + 1/2` (Hazimeh et al. 2021, eq. 4).

    Continuous with its derivative, yet exactly 0 or 1 outside.
    """
    t = (t / gamma).clamp(-0.5, 0.5)
    return (1.5 - 2 * t.square()) * t + 0.5


def selection_entropy(
    shares: Float[Tensor, "tokens selectors experts"], token_mask: Bool[Tensor, "tokens"] | None = None
) -> Float[Tensor, ""]:
    """Mean over tokens of `Σ_i Σ_e -r_i(e) log(r_i(e) + 10⁻⁶)`: 0 once every selector has made up its mind."""
    entropy = -(shares * (shares + 1e-6).log()).sum((1, 2))
    if token_mask is None:
        return entropy.sum() / max(entropy.shape[0], 1)
    return entropy.masked_fill(~token_mask, 0.0).sum() / token_mask.sum().clamp_min(1)
