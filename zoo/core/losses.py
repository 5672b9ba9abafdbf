"""Balance losses, without coefficients: those live in the routers."""

import math

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
    coef: float = 1.0,
) -> Float[Tensor, ""]:
    """`E Σ_e f_e P_e`: 1 at perfect balance for every k (Fedus et al. 2021, eq. 4).

    f is the share of all chosen slots that went to an expert (sums to one, no gradient), P the mean score
    (which should sum to one over experts). Libraries differ by a factor k: Hugging Face's value is k at
    balance. `dropless=True` promises that no index is -1. `coef` multiplies the loss, for no extra operation.
    """
    tokens, experts = scores.shape
    counts = slot_counts(indices, experts, scores.dtype, dropless=dropless)
    if token_mask is None and dropless:
        slots_times_tokens: float | Tensor = max(tokens * indices.numel(), 1)
    else:
        kept = tokens if token_mask is None else token_mask.sum()
        slots_times_tokens = (counts.sum() * kept).clamp_min(1.0)
        scores = scores if token_mask is None else scores.masked_fill(~token_mask[:, None], 0.0)
    return torch.dot(scores.sum(0), counts * (coef * experts / slots_times_tokens))


def sequence_balance_loss(
    scores: Float[Tensor, "tokens experts"],
    indices: Int[Tensor, "tokens k"],
    sequence_id: Int[Tensor, "tokens"],
    token_mask: Bool[Tensor, "tokens"] | None = None,
) -> Float[Tensor, ""]:
    """The mean over sequences of each one's `switch_balance_loss` (DeepSeek-V3, eqs. 17 to 20).

    `sequence_id` names the sequence of every token, in any order, so packed batches work; ids lie below the
    number of tokens.
    """
    tokens, experts = scores.shape
    kept = torch.ones_like(scores[:, 0]) if token_mask is None else token_mask.to(scores.dtype)
    lengths = torch.zeros_like(kept).index_add(0, sequence_id, kept)
    slots = indices + 1 + sequence_id[:, None] * (experts + 1)  # column 0 takes what was dropped
    ones = torch.ones(slots.numel(), dtype=scores.dtype, device=scores.device)
    counts = torch.zeros(tokens * (experts + 1), dtype=scores.dtype, device=scores.device)
    counts = counts.scatter_add_(0, slots.flatten(), ones).view(tokens, experts + 1)[:, 1:]
    shares = counts / counts.sum(-1, keepdim=True).clamp_min(1.0)
    mean_scores = torch.zeros_like(scores).index_add(0, sequence_id, scores * kept[:, None])
    mean_scores = mean_scores / lengths.clamp_min(1.0)[:, None]
    return experts * (shares * mean_scores).sum() / (lengths > 0).sum().clamp_min(1)


def batch_entropy(
    scores: Float[Tensor, "tokens experts"], token_mask: Bool[Tensor, "tokens"] | None = None
) -> Float[Tensor, ""]:
    """Entropy of the mean score over ln E: 1 where experts are used alike. A loss with a negative coefficient.

    Scores of a token sum to one. With `token_entropy` it is the mutual-information objective of a router.
    """
    return normalised_entropy(_token_mean(scores, token_mask))


def token_entropy(
    scores: Float[Tensor, "tokens experts"], token_mask: Bool[Tensor, "tokens"] | None = None
) -> Float[Tensor, ""]:
    """Mean entropy of a token's scores over ln E: 0 for a router that is sure. A positive coefficient sharpens."""
    return _token_mean(normalised_entropy(scores)[:, None], token_mask).sum()


def null_balance_loss(
    scores: Float[Tensor, "tokens columns"],
    indices: Int[Tensor, "tokens k"],
    num_null: int,
    token_mask: Bool[Tensor, "tokens"] | None = None,
) -> Float[Tensor, ""]:
    """`switch_balance_loss` that asks nothing of how null experts, the last columns, share their load.

    Each of their loads is replaced by the mean of theirs (AdaMoE, Zeng et al. 2024).
    """
    columns = scores.shape[1]
    counts = slot_counts(indices, columns, scores.dtype)
    null = counts[columns - num_null :]
    counts = torch.cat([counts[: columns - num_null], null.mean().expand(num_null)])
    return columns * torch.dot(_token_mean(scores, token_mask), counts / counts.sum().clamp_min(1.0))


def density_balance_loss(
    gates: Float[Tensor, "tokens experts"],
    kept: Bool[Tensor, "tokens experts"],
    token_mask: Bool[Tensor, "tokens"] | None = None,
) -> Float[Tensor, ""]:
    """`E Σ_e G_e S_e`, G the mean gate and S the share of tokens that keep the expert (EvoMoE, Nie et al. 2022).

    At balance it is the mean number of experts that a token keeps, so it asks for few as well as for balance.
    """
    return gates.shape[1] * torch.dot(_token_mean(gates, token_mask), _token_mean(kept.to(gates.dtype), token_mask))


def z_loss(
    logits: Float[Tensor, "tokens experts"], token_mask: Bool[Tensor, "tokens"] | None = None
) -> Float[Tensor, ""]:
    """Mean of `logsumexp(logits)²`, which keeps logits small (ST-MoE, Zoph et al. 2022, eq. 5)."""
    return _token_mean(logits.logsumexp(-1).square()[:, None], token_mask).sum()


def normalised_entropy(p: Float[Tensor, "*rows experts"]) -> Float[Tensor, "*rows"]:
    """Entropy of distributions over ln E; 0 for one expert. The gradient is finite where a share is zero."""
    experts = p.shape[-1]
    if experts == 1:
        return p.sum(-1) * 0.0
    tiny = torch.finfo(p.dtype).tiny
    entropy: Tensor = -(p * p.clamp_min(tiny).log()).sum(-1) / math.log(experts)
    return entropy


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
