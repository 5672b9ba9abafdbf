"""The rules of MENTOR and DrM: dormant ratio, what follows from it, and the perturbation of weights.

beta is the dormant ratio, the share of neurons that hardly fire (Sokar et al. 2023; DrM, arXiv:2310.19668). It sets how
much noise the agent explores with, how far targets trust the value net, and how much of the weights a perturbation
keeps. MENTOR (arXiv:2410.14972) perturbs towards a Gaussian fitted on the weights of the best agents so far.
"""

import copy
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from .core import StackedLinear

TARGET = 0.2  # beta at which noise and trust are half of their most


@torch.no_grad()
def dormant_ratio(activations: Sequence[Tensor], threshold: float = 0.025) -> Float[Tensor, ""]:
    """Share of units whose mean absolute activation is at most `threshold` times the mean over their layer.

    `activations` are [..., batch, units], one layer for each index before the batch. At most, not less than: a layer
    that is dead altogether is dormant.
    """
    dormant, units = torch.zeros((), device=activations[0].device), 0
    for layer in activations:
        score = layer.abs().mean(-2)
        dormant = dormant + (score <= threshold * score.mean(-1, keepdim=True)).sum()
        units += score.numel()
    return dormant / units


def exploration_noise(
    beta: Float[Tensor, ""], most: float = 0.8, slope: float = 10.0, target: float = TARGET
) -> Float[Tensor, ""]:
    """Standard deviation of the action noise, `most / (1 + exp(-slope (beta - target)))`: dormant agents explore."""
    return most * torch.sigmoid(slope * (beta - target))


def exploitation(
    beta: Float[Tensor, ""], most: float = 0.6, slope: float = 50.0, target: float = TARGET
) -> Float[Tensor, ""]:
    """lambda, the weight of V(s') in targets, `most / (1 + exp(slope (beta - target)))`: awake agents exploit."""
    return most * torch.sigmoid(slope * (target - beta))


def perturbation_strength(
    beta: Float[Tensor, ""], most: float = 0.9, least: float = 0.2, slope: float = 2.0
) -> Float[Tensor, ""]:
    """alpha, the share of the present weights that a perturbation keeps: 1 - slope beta, within [least, most]."""
    return (1 - slope * beta).clamp(least, most)


def linear_schedule(start: float, end: float, length: int, at: int) -> float:
    """From `start` to `end` over `length`, then `end`."""
    share = min(max(at / length, 0.0), 1.0) if length > 0 else 1.0
    return (1 - share) * start + share * end


def perturbed_parameters(modules: Iterable[nn.Module]) -> list[nn.Parameter]:
    """Weights and biases of all linear layers, the experts' included; normalisation and convolutions are left alone."""
    parts = [part for module in modules for part in module.modules() if isinstance(part, nn.Linear | StackedLinear)]
    every: list[Any] = [parameter for part in parts for parameter in (part.weight, part.bias)]
    return [parameter for parameter in every if parameter is not None]


@torch.no_grad()
def flatten(parameters: Sequence[Tensor]) -> Float[Tensor, " numbers"]:
    """All of them in a row."""
    return torch.cat([parameter.reshape(-1) for parameter in parameters])


@torch.no_grad()
def perturb(
    parameters: Sequence[Tensor], candidate: Float[Tensor, " numbers"], alpha: Float[Tensor, ""] | float
) -> None:
    """In place: `alpha theta + (1 - alpha) phi`, phi being the candidate's numbers."""
    start = 0
    for parameter in parameters:
        phi = candidate[start : start + parameter.numel()].view_as(parameter)
        parameter.mul_(alpha).add_(phi * (1 - alpha))
        start += parameter.numel()


def fresh(modules: Sequence[nn.Module], initialise: object) -> Float[Tensor, " numbers"]:
    """The linear layers of newly initialised copies, in a row: DrM's candidate. Draws from torch's global generator."""
    copies = [copy.deepcopy(module).apply(initialise) for module in modules]  # type: ignore[arg-type]
    return flatten(perturbed_parameters(copies))


class TopAgents(nn.Module):
    """S_top: the weights of the agents with the best training episodes so far, a row each.

    Args:
        size: how many are kept.
        numbers: of an agent's perturbed parameters.
    """

    weights: Tensor
    returns: Tensor

    def __init__(self, size: int, numbers: int) -> None:
        super().__init__()
        self.register_buffer("weights", torch.zeros(size, numbers))
        self.register_buffer("returns", torch.full((size,), -torch.inf))

    @property
    def held(self) -> int:
        """How many agents there are; waits for the device."""
        return int((self.returns > -torch.inf).sum())

    @torch.no_grad()
    def push(self, episode_return: float, weights: Float[Tensor, " numbers"]) -> None:
        """Take a place that is free, or that of the worst agent if this one's return is larger."""
        place = self.returns.argmin(keepdim=True)
        better = episode_return > self.returns[place]
        self.returns[place] = torch.where(better, episode_return, self.returns[place])
        self.weights[place] = torch.where(better[:, None], weights[None], self.weights[place])

    @torch.no_grad()
    def draw(self, generator: torch.Generator | None = None) -> Float[Tensor, " numbers"]:
        """A candidate: every number from a Gaussian with the mean and (unbiased) deviation of those held.

        Raises:
            ValueError: fewer than two agents, which have no deviation.
        """
        held = self.weights[self.returns > -torch.inf]
        if len(held) < 2:
            raise ValueError(f"{len(held)} agents held; expected at least 2 to draw from")
        noise = torch.randn(held.shape[1], generator=generator, device=held.device, dtype=held.dtype)
        return held.mean(0) + held.std(0).clamp(min=1e-7) * noise
