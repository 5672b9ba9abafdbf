"""Fewer bits for experts that matter less: MC-MoE (Huang et al. 2024)."""

import copy
from collections.abc import Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor

from ..experts import Experts
from .pools import stacked_layers

FULL = 16  # from so many bits on, weights stay as they are


@torch.no_grad()
def round_to_bits(weight: Float[Tensor, "*rows inputs"], bits: int) -> Float[Tensor, "*rows inputs"]:
    """The weight as `bits` bits per number would have it, dequantised.

    Each row has 2^bits equally spaced levels from its least to its greatest number (asymmetric rounding to nearest);
    one bit is the sign times the row's mean magnitude. 16 bits and more leave it as it is.
    """
    if bits < 1:
        raise ValueError(f"bits={bits} must be at least 1")
    if bits >= FULL:
        return weight.clone()
    if bits == 1:
        signs: Tensor = torch.where(weight < 0, -1.0, 1.0).to(weight)
        return signs * weight.abs().mean(-1, keepdim=True)
    low, high = weight.amin(-1, keepdim=True), weight.amax(-1, keepdim=True)
    step = ((high - low) / (2**bits - 1)).clamp_min(torch.finfo(weight.dtype).tiny)
    rounded: Tensor = low + ((weight - low) / step).round() * step
    return rounded


@torch.no_grad()
def quantise_experts(experts: Experts, bits: Int[Tensor, "experts"] | Sequence[int]) -> None:
    """Round every expert's weights to its own number of bits, in place; biases stay.

    The numbers are those of a model of that size; stored and computed they are full ones still.
    """
    widths = torch.as_tensor(bits).tolist()
    if len(widths) != experts.num_experts:
        raise ValueError(f"{len(widths)} numbers of bits were given for {experts.num_experts} experts")
    for layer in stacked_layers(experts):
        weight = layer.weight
        for e, width in enumerate(widths):
            weight[e] = round_to_bits(weight[e], width)


def stored_bits(experts: Experts, bits: Int[Tensor, "experts"] | Sequence[int]) -> int:
    """What the experts take: their weights at their bits, two 16-bit numbers per quantised row, biases at 16."""
    total = 0
    for layer in stacked_layers(experts):
        weight = layer.weight
        rows, columns = weight.shape[1], weight.shape[2]
        for width in torch.as_tensor(bits).tolist():
            total += rows * columns * min(width, FULL) + (0 if width >= FULL else 2 * 16 * rows)
        total += 0 if layer.bias is None else weight.shape[0] * rows * 16
    return total


@torch.no_grad()
def rounding_errors(
    experts: Experts,
    x: Float[Tensor, "tokens dim"],
    weights: Float[Tensor, "tokens experts"],
    bits: Sequence[int],
) -> Float[Tensor, "experts choices"]:
    """ε: by how much each expert's answers change at each number of bits, mean square over the tokens it gets.

    Args:
        x: calibration inputs of the layer.
        weights: `Routing.dense_weights()` for them; a token counts for an expert if its weight is not zero.
    """
    gets = (weights != 0).double()
    exact, errors = experts.dense(x), []
    for width in bits:
        rounded = copy.deepcopy(experts)
        quantise_experts(rounded, [width] * experts.num_experts)
        change = (rounded.dense(x) - exact).double().square().mean(-1)
        errors.append((change * gets).sum(0) / gets.sum(0).clamp_min(1))
    return torch.stack(errors, dim=1)


def expert_importance(
    weights: Float[Tensor, "tokens experts"], alpha: float = 1.0, beta: float = 1.5
) -> Float[Tensor, "experts"]:
    """`φ^α w^β`: φ the share of slots that an expert gets, w the mean weight there (MC-MoE's α = 1, β = 1.5)."""
    gets = weights != 0
    count = gets.sum(0).double()
    frequency = count / count.sum().clamp_min(1)
    mean = weights.abs().double().sum(0) / count.clamp_min(1)
    return frequency.pow(alpha) * mean.pow(beta)


def allocate_bits(
    importance: Float[Tensor, "experts"],
    errors: Float[Tensor, "experts choices"],
    bits: Sequence[int],
    budget: float,
    at_least_one: Sequence[int] = (),
) -> Int[Tensor, "experts"]:
    """The number of bits of each expert that costs least, `min Σ_e importance_e · ε_e(b_e)`, within the budget.

    Exact, by dynamic programming over experts and the bits spent so far; MC-MoE solves the same integer programme with
    a commercial solver. On the host.

    Args:
        bits: the choices, the columns of `errors`.
        budget: the mean number of bits per expert, at most.
        at_least_one: choices that some expert must get (MC-MoE: 2 and 3).

    Raises:
        ValueError: nothing fits the budget.
    """
    cost = (importance.double()[:, None] * errors.double()).tolist()
    experts, limit = len(cost), int(budget * len(cost) + 1e-9)
    wanted = {choice: 1 << i for i, choice in enumerate(dict.fromkeys(at_least_one))}
    if not set(wanted) <= set(bits):
        raise ValueError(f"at_least_one={list(at_least_one)} must be among bits={list(bits)}")
    # By bits spent and which of the wanted choices were made: the least cost and the last choice.
    best: dict[tuple[int, int], float] = {(0, 0): 0.0}
    history: list[dict[tuple[int, int], tuple[tuple[int, int], int]]] = []
    for e in range(experts):
        reached: dict[tuple[int, int], float] = {}
        came: dict[tuple[int, int], tuple[tuple[int, int], int]] = {}
        for (spent, met), price in best.items():
            for i, width in enumerate(bits):
                state = (spent + width, met | wanted.get(width, 0))
                total = price + cost[e][i]
                if state[0] <= limit and total < reached.get(state, float("inf")):
                    reached[state], came[state] = total, ((spent, met), width)
        best = reached
        history.append(came)
    complete = {state: price for state, price in best.items() if state[1] == (1 << len(wanted)) - 1}
    if not complete:
        raise ValueError(
            f"no choice of bits={list(bits)} for {experts} experts has a mean of at most {budget}"
            + (f" and each of {list(at_least_one)} at least once" if wanted else "")
        )
    state = min(complete, key=lambda s: (complete[s], s))
    chosen = []
    for came in reversed(history):
        state, width = came[state]
        chosen.append(width)
    return torch.tensor(chosen[::-1])
