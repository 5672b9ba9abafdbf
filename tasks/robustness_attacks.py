"""Attacks in the L∞ ball: PGD, and those that see the router of a hard-routed network.

The argmax of a router hides it from plain gradients, so PGD alone flatters mixtures. `survive` is the worst case over
attacks that push on the router too; each image's is its own. Everything runs on the images' device.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from ..errors import UserError
from ..zoo.advmoe import RobustModel, RobustOutput
from ..zoo.core import Routed
from .robustness_losses import cross_entropy, routers_cross_entropy

Objective = Callable[[Tensor], Tensor]  # images -> one number per image, which the attack raises
_TOLERANCE = 1e-6


@dataclass(frozen=True)
class Ball:
    """Where and how far an attack goes: `eps` around each image in units of [0, 1], and inside [0, 1].

    Raises:
        UserError: eps outside [0, 1], fewer than no steps, or a step that goes nowhere.
    """

    eps: float
    steps: int
    step_size: float

    def __post_init__(self) -> None:
        if not 0 <= self.eps <= 1 or self.steps < 0 or self.step_size < 0:
            raise UserError(
                f"eps={self.eps}, steps={self.steps}, step_size={self.step_size}: expected eps in [0, 1] (8/255 is "
                "0.0314), and neither of the others below 0"
            )

    def bounds(self, image: Tensor) -> tuple[Tensor, Tensor]:
        """The least and the largest image of the ball."""
        return (image - self.eps).clamp(min=0.0), (image + self.eps).clamp(max=1.0)

    def random(self, image: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """A uniformly random image of the ball."""
        noise = torch.rand(image.shape, generator=generator, device=image.device, dtype=image.dtype)
        low, high = self.bounds(image)
        return (image + self.eps * (2 * noise - 1)).clamp(low, high)


class Health:
    """Whether an attack's gradients could be trusted; counted on the device, looked at when asked.

    PGD follows the sign of the gradient, and the sign of NaN is 0: a broken network would look robust.
    """

    def __init__(self) -> None:
        self._first: list[Tensor] = []
        self._broken: list[Tensor] = []

    def note(self, gradient: Tensor, first: bool) -> None:
        largest = gradient.detach().abs().flatten(1).amax(1)
        self._broken.append((~largest.isfinite()).sum())
        if first:
            self._first.append(largest == 0)

    def zero_share(self) -> float:
        """Share of images whose gradient was exactly zero at the first step."""
        return float(torch.cat(self._first).double().mean()) if self._first else 0.0

    def check(self, most_zero: float = 1.0) -> None:
        """Raise what the gradients deserve.

        Raises:
            UserError: a gradient was NaN or infinite, or more than `most_zero` of the images had none.
        """
        broken = int(torch.stack(self._broken).sum()) if self._broken else 0
        self._broken = []
        if broken:
            raise UserError(
                f"the attack met {broken} gradients that are NaN or infinite, so a robust accuracy would mean nothing: "
                "lower the learning rate (of the router too), or use precision 32-true"
            )
        if (share := self.zero_share()) > most_zero:
            raise UserError(
                f"{share:.1%} of the images have no gradient at all, so PGD cannot attack them and a robust accuracy "
                "would mean nothing: the model is constant or its logits are saturated; train it with weight decay"
            )


@contextmanager
def attackable(model: nn.Module) -> Iterator[None]:
    """Gradients in evaluation: eval mode, float32, autograd on whatever the Trainer thinks, and no straight-through
    gradient, which is not that of the function."""
    modes = [(part, part.training) for part in model.modules()]
    weighted = [part for part in model.modules() if isinstance(part, Routed) and part.weighted]
    model.eval()
    for routed in weighted:
        routed.weighted = False
    try:
        with torch.inference_mode(False), torch.enable_grad():
            yield
    finally:
        for routed in weighted:
            routed.weighted = True
        for part, training in modes:
            part.training = training


def ascend(
    objective: Objective,
    image: Float[Tensor, "batch channels height width"],
    ball: Ball,
    start: Float[Tensor, "batch channels height width"],
    health: Health | None = None,
) -> Float[Tensor, "batch channels height width"]:
    """Projected gradient ascent by the sign of the gradient; the last iterate.

    Raises:
        RuntimeError: the result left the ball, which is a defect.
    """
    low, high = ball.bounds(image)
    x = start.clamp(low, high)
    for step in range(ball.steps):
        x = x.detach().requires_grad_()
        (gradient,) = torch.autograd.grad(objective(x).sum(), x)
        if health is not None:
            health.note(gradient, step == 0)
        x = (x.detach() + ball.step_size * gradient.sign()).clamp(low, high)
    return x.detach()


def check_ball(image: Tensor, adversarial: Tensor, eps: float) -> None:
    """Raise unless every pixel is within eps of the image's and in [0, 1]. Waits for the device.

    Raises:
        RuntimeError: it is not, which is a defect of the attack.
    """
    far = float((adversarial - image).abs().amax()) if len(image) else 0.0
    inside = bool(((adversarial >= 0) & (adversarial <= 1)).all())
    if not far <= eps + _TOLERANCE or not inside:
        raise RuntimeError(f"an attack left its ball: |δ| = {far} at eps = {eps}, in [0, 1]: {inside}")


class Attacker:
    """Attacks on one batch of images; keeps which have been misclassified, and by what.

    Args:
        model: in eval mode, inside `attackable`.
        image, label: images in [0, 1] and their classes.
        generator: of random starts; None uses torch's own.

    `fooled` are the images misclassified at any iterate seen, the clean one included; `adversarial` what did it;
    `clean` the output for the unchanged images and `route` each router's expert there.
    """

    def __init__(
        self,
        model: RobustModel,
        image: Float[Tensor, "batch channels height width"],
        label: Int[Tensor, " batch"],
        generator: torch.Generator | None = None,
        health: Health | None = None,
    ) -> None:
        self.model, self.image, self.label, self.generator = model, image, label.long(), generator
        self.health = Health() if health is None else health
        with torch.no_grad():
            self.clean: RobustOutput = model(image)
        self.route = {name: logits.argmax(-1) for name, logits in self.clean.router_logits.items()}
        self.experts = max((logits.shape[-1] for logits in self.clean.router_logits.values()), default=1)
        self.fooled = self.clean.logits.argmax(-1) != self.label
        self.adversarial = image

    def keep(self, chosen: Bool[Tensor, " batch"]) -> "Attacker":
        """The same for the chosen images alone. Waits for the device."""
        own: Attacker = object.__new__(Attacker)
        own.__dict__ |= self.__dict__
        own.image, own.label, own.fooled = self.image[chosen], self.label[chosen], self.fooled[chosen]
        own.adversarial = self.adversarial[chosen]
        own.route = {name: route[chosen] for name, route in self.route.items()}
        return own

    def merge(self, own: "Attacker", chosen: Bool[Tensor, " batch"]) -> None:
        """Take over what attacks on the chosen images alone have found."""
        self.fooled = self.fooled.masked_scatter(chosen, own.fooled)
        self.adversarial = self.adversarial.masked_scatter(chosen[:, None, None, None], own.adversarial)

    def pgd(self, ball: Ball) -> Float[Tensor, "batch channels height width"]:
        """Plain PGD on the cross-entropy from a random start; the last iterate, as published numbers have it."""

        def objective(x: Tensor) -> Tensor:
            output = self.model(x)
            self._see(x, output)
            return cross_entropy(output.logits, self.label)

        return self._ascend(objective, ball)

    def joint(self, ball: Ball, weight: float = 1.0) -> None:
        """PGD on the cross-entropy plus `weight` times that of each router's clean decision."""

        def objective(x: Tensor) -> Tensor:
            output = self.model(x)
            self._see(x, output)
            routers = routers_cross_entropy(output.router_logits, self.route)
            return cross_entropy(output.logits, self.label) + weight * routers

        self._ascend(objective, ball)

    def soft_mixture(self, ball: Ball) -> None:
        """PGD on -log Σ_e π_e p_e(y): all pathways e at once, weighed with the router's probabilities π.

        With several routers log π_e is the mean over them, along pathway e.
        """
        experts, count = self.experts, len(self.image)
        label = self.label.repeat(experts)
        forced = torch.arange(experts, device=label.device).repeat_interleave(count)

        def objective(x: Tensor) -> Tensor:
            copies = x.repeat(experts, 1, 1, 1)
            output = self.model(copies, forced)
            self._see(x, output, forced)
            log_p = -cross_entropy(output.logits, label)
            log_route = -_mean(routers_cross_entropy(output.router_logits, dict.fromkeys(self.route, forced)), output)
            return -(log_p + log_route).view(experts, count).logsumexp(0)

        self._ascend(objective, ball)

    def per_path(self, ball: Ball) -> None:
        """For each pathway e PGD on CE(pathway e) - CE(router -> e): go there and be wrong there."""
        experts, count = self.experts, len(self.image)
        label = self.label.repeat(experts)
        forced = torch.arange(experts, device=label.device).repeat_interleave(count)

        def objective(x: Tensor) -> Tensor:
            output = self.model(x, forced)
            self._see(x, output, forced)
            towards = _mean(routers_cross_entropy(output.router_logits, dict.fromkeys(self.route, forced)), output)
            return cross_entropy(output.logits, label) - towards

        image = self.image.repeat(experts, 1, 1, 1)
        x = ascend(objective, image, ball, ball.random(image, self.generator), self.health)
        for copy in x.view(experts, count, *x.shape[1:]):
            self._look(copy)

    def reroute(self, ball: Ball) -> tuple[Float[Tensor, "batch channels height width"], Bool[Tensor, " batch"]]:
        """PGD on the routers alone, away from their clean decisions; the last iterate, and which images changed
        expert at any iterate."""
        flipped = torch.zeros_like(self.fooled)

        def objective(x: Tensor) -> Tensor:
            nonlocal flipped
            logits = router_logits(self.model, x)
            flipped = flipped | self._rerouted(logits)
            return torch.as_tensor(routers_cross_entropy(logits, self.route))

        x = self._ascend(objective, ball)
        with torch.no_grad():
            return x, flipped | self._rerouted(router_logits(self.model, x))

    def router_first(self, ball: Ball, start: Float[Tensor, "batch channels height width"]) -> None:
        """Plain PGD from where an attack on the router has ended."""

        def objective(x: Tensor) -> Tensor:
            output = self.model(x)
            self._see(x, output)
            return cross_entropy(output.logits, self.label)

        self._look(ascend(objective, self.image, ball, start, self.health))

    def _ascend(self, objective: Objective, ball: Ball) -> Tensor:
        x = ascend(objective, self.image, ball, ball.random(self.image, self.generator), self.health)
        self._look(x)
        return x

    def _rerouted(self, logits: Mapping[str, Tensor]) -> Tensor:
        return torch.stack([logits[name].argmax(-1) != route for name, route in self.route.items()]).any(0)

    def _look(self, x: Tensor) -> None:
        with torch.no_grad():
            self._see(x, self.model(x))

    def _see(self, x: Tensor, output: RobustOutput, forced: Tensor | None = None) -> None:
        """Note who is misclassified. A forced pathway counts where every router would have chosen it itself.

        `output` may hold several copies of the batch, one after another, and `x` as many or one.
        """
        count = len(self.image)
        copies = len(output.logits) // count if count else 0
        wrong = output.logits.detach().argmax(-1) != self.label.repeat(copies)
        if forced is not None:
            for logits in output.router_logits.values():
                wrong = wrong & (logits.detach().argmax(-1) == forced)
        images = x.detach().view(-1, *self.image.shape)
        for i, found in enumerate(wrong.view(copies, count)):
            new = (found & ~self.fooled)[:, None, None, None]
            self.adversarial = torch.where(new, images[min(i, len(images) - 1)], self.adversarial)
            self.fooled = self.fooled | found


def _mean(total: Tensor | float, output: RobustOutput) -> Tensor:
    return torch.as_tensor(total) / max(len(output.router_logits), 1)


def router_logits(model: RobustModel, image: Tensor) -> dict[str, Tensor]:
    """The routers' logits; without the network's own cost where one router reads the image itself."""
    network: Any = getattr(model, "network", None)
    if isinstance(network, Routed):
        return {network.name: network.router(model.normalise(image)).logits}
    output: RobustOutput = model(image)
    return output.router_logits


class Survival(NamedTuple):
    """Images right under every attack of the set, what the attacks found, and whose expert an attack on the router
    alone changes."""

    robust: Bool[Tensor, " batch"]
    adversarial: Float[Tensor, "batch channels height width"]
    flipped: Bool[Tensor, " batch"]


def survive(attacker: Attacker, ball: Ball) -> Survival:
    """The worst case over the route-aware set, at any iterate of any attack.

    The set: plain, joint with weight 1, soft mixture, router first, one per pathway. A network without router gets as
    many plain attacks from other random starts. Images that have fallen are attacked no more.
    """
    flipped = torch.zeros_like(attacker.fooled)
    attacks: list[Callable[[Attacker, Tensor], object]] = [lambda own, _: own.pgd(ball)]
    if attacker.route:
        rerouted, flipped = attacker.reroute(ball)
        attacks += [
            lambda own, _: own.joint(ball),
            lambda own, _: own.soft_mixture(ball),
            lambda own, standing: own.router_first(ball, rerouted[standing]),
            lambda own, _: own.per_path(ball),
        ]
    else:
        attacks *= 5
    for attack in attacks:
        standing = ~attacker.fooled
        own = attacker.keep(standing)
        if not len(own.image):
            break
        attack(own, standing)
        attacker.merge(own, standing)
    check_ball(attacker.image, attacker.adversarial, ball.eps)
    return Survival(~attacker.fooled, attacker.adversarial, flipped)
