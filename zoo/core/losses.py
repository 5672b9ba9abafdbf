"""Balance losses, without coefficients: those live in the routers."""

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor


def cv_squared(x: Float[Tensor, "experts"]) -> Float[Tensor, ""]:
    """Squared coefficient of variation with the population variance; 0 for one expert."""
    return x.var(correction=0) / (x.mean().square() + 1e-10)


def importance_loss(gates: Float[Tensor, "tokens experts"]) -> Float[Tensor, ""]:
    """CV² of the gate mass per expert (Shazeer et al. 2017, eq. 7)."""
    return cv_squared(gates.sum(0))


def load_loss(load: Float[Tensor, "experts"]) -> Float[Tensor, ""]:
    """CV² of the smooth estimate of how many tokens each expert gets (Shazeer et al. 2017, eq. 11)."""
    return cv_squared(load)


def switch_balance_loss(
    scores: Float[Tensor, "tokens experts"],
    indices: Int[Tensor, "tokens k"],
    token_mask: Bool[Tensor, "tokens"] | None = None,
    *,
    dropless: bool = False,
) -> Float[Tensor, ""]:
    """`E Σ_e f_e P_e`: 1 at perfect balance for every k (Fedus et al. 2021, eq. 4).

    f is the share of all chosen slots that went to an expert (sums to one, no gradient), P the mean score
    (which should sum to one over experts). Libraries differ by a factor k: Hugging Face's value is k at
    balance. `dropless=True` promises that no index is -1.
    """
    tokens, experts = scores.shape
    counts = slot_counts(indices, experts, scores.dtype, dropless=dropless)
    if token_mask is None and dropless:
        slots_times_tokens: float | Tensor = max(tokens * indices.numel(), 1)
    else:
        kept = tokens if token_mask is None else token_mask.sum()
        slots_times_tokens = (counts.sum() * kept).clamp_min(1.0)
        scores = scores if token_mask is None else scores.masked_fill(~token_mask[:, None], 0.0)
    return torch.dot(scores.sum(0), counts) * (experts / slots_times_tokens)


def z_loss(
    logits: Float[Tensor, "tokens experts"], token_mask: Bool[Tensor, "tokens"] | None = None
) -> Float[Tensor, ""]:
    """Mean of `logsumexp(logits)²`, which keeps logits small (ST-MoE, Zoph et al. 2022, eq. 5)."""
    return _token_mean(logits.logsumexp(-1).square()[:, None], token_mask).sum()


def slot_counts(
    indices: Int[Tensor, "tokens k"],
    num_experts: int,
    dtype: torch.dtype = torch.float32,
    *,
    dropless: bool = False,
) -> Float[Tensor, "experts"]:
    """How many slots chose each expert; dropped slots (-1) count nowhere. Never waits for the device."""
    # Ones add up exactly, in any order, up to 2**24 slots of one expert in float32.
    slots = indices.reshape(-1)
    ones = torch.ones(slots.shape, dtype=dtype, device=slots.device)
    if dropless:
        return torch.zeros(num_experts, dtype=dtype, device=slots.device).scatter_add_(0, slots, ones)
    counts = torch.zeros(num_experts + 1, dtype=dtype, device=slots.device)
    return counts.scatter_add_(0, slots + 1, ones)[1:]


def _token_mean(x: Tensor, token_mask: Tensor | None) -> Tensor:
    if token_mask is None:
        return x.sum(0) / max(x.shape[0], 1)  # not mean(): an empty batch must give 0, not NaN
    return x.masked_fill(~token_mask[:, None], 0.0).sum(0) / token_mask.sum().clamp_min(1)
