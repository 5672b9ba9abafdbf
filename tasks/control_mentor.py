"""Learning from pixels: DrQ-v2, DrM and MENTOR as settings of one update.

| | experts | perturbation | noise | value net |
| --- | --- | --- | --- | --- |
| DrQ-v2 | 0 | none | schedule | exploit 0 |
| DrM | 0 | random | awake | exploit 0.6 |
| MENTOR | 16 | task | dormant | exploit 0.6 |
"""

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float, UInt8
from pytorch_lightning.cli import LRSchedulerCallable, OptimizerCallable
from torch import Tensor, nn

from ..datasets.control import ControlBatch, Episode, Observation
from ..errors import UserError
from ..zoo.mentor import Mentor, orthogonal
from ..zoo.mentor_rules import (
    TARGET,
    TopAgents,
    dormant_ratio,
    exploitation,
    exploration_noise,
    flatten,
    fresh,
    linear_schedule,
    perturb,
    perturbation_strength,
    perturbed_parameters,
)
from .control import ControlTask

Perturbation = Literal["none", "random", "task"]
Noise = Literal["schedule", "dormant", "awake"]


class MentorTask(ControlTask):
    """Deterministic policy gradients on augmented images (DrQ-v2), with DrM's and MENTOR's additions.

    Order of an update: perturb if it is due, augment, encode, dormant ratio, value net, critics and encoder, actor,
    target critics. beta is the dormant ratio of the actor on the batch.

    Args:
        model: a `Mentor`.
        optimizer: factory; encoder, actor, critics and value net have one each.
        lr_scheduler: not used.
        agent: name in `eval.csv`.
        shift: pixels that an image is shifted by at most, edges repeated.
        noise: standard deviation sigma of the action noise: `schedule`, from `noise_start` to `noise_end` over
            `noise_frames`; `dormant`, `noise_most / (1 + exp(-10 (beta - target)))`; `awake`, that or the schedule
            counted from the first frame with beta below the target, whichever is larger (DrM).
        noise_start, noise_end, noise_frames: of the schedule; frames are environment frames.
        noise_most: sigma of a wholly dormant agent.
        noise_clip: bound of the noise in targets and in the actor's update.
        beta_target: the dormant ratio at which noise and trust in the value net are half of their most.
        exploit: lambda of a wholly awake agent, weight of V(s') in targets; 0 leaves the value net out.
        exploit_constant: the weight is `exploit` whatever beta is (the released Meta-World agent).
        expectile: of the value net, in (0.5, 1).
        perturbation: `task` mixes the weights with a draw from a Gaussian over the best agents so far (MENTOR),
            `random` with a new network (DrM). Linear layers alone; the optimisers start anew.
        perturb_every: updates between two perturbations.
        keep_least, keep_most: bounds of alpha = 1 - 2 beta, the share of a weight that stays.
        top_agents: N, how many of the best agents are remembered.
        tau: share of the critics that goes into their targets at each update.
        actor_clip: norm that the actor's gradient is clipped to (the released code: 0.001); default: no bound.
        compiled: compile the networks, for large ones on a GPU.
        schema: the data's schema, linked by the command line.

    Raises:
        UserError: a number out of range, or `exploit` without a value net.
    """

    model: Mentor
    beta: Tensor
    awake_at: Tensor

    def __init__(
        self,
        model: nn.Module,
        optimizer: OptimizerCallable = torch.optim.Adam,
        lr_scheduler: LRSchedulerCallable | None = None,
        agent: str = "mentor",
        shift: int = 4,
        noise: Noise = "dormant",
        noise_start: float = 1.0,
        noise_end: float = 0.1,
        noise_frames: int = 1_000_000,
        noise_most: float = 0.8,
        noise_clip: float = 0.3,
        beta_target: float = TARGET,
        exploit: float = 0.6,
        exploit_constant: bool = False,
        expectile: float = 0.9,
        perturbation: Perturbation = "task",
        perturb_every: int = 10_000,
        keep_least: float = 0.2,
        keep_most: float = 0.9,
        top_agents: int = 10,
        tau: float = 0.01,
        actor_clip: float | None = None,
        compiled: bool = False,
        schema: dict[str, Any] | None = None,
    ) -> None:
        super().__init__(model, optimizer, lr_scheduler, agent, schema)
        if not isinstance(model, Mentor):
            raise UserError(f"model.model={type(model).__name__}: MentorTask trains moezoo.zoo.mentor.Mentor")
        if exploit > 0 and model.value is None:
            raise UserError(f"model.exploit={exploit}: the model has no value net; give it value: true, or exploit: 0")
        if not 0 <= keep_least <= keep_most <= 1:
            raise UserError(f"keep_least={keep_least}, keep_most={keep_most}: expected 0 <= least <= most <= 1")
        if perturb_every < 1 or top_agents < 2:
            raise UserError(f"perturb_every={perturb_every}, top_agents={top_agents}: expected at least 1 and 2")
        if not 0 < expectile < 1 or not 0 < tau <= 1 or not 0 <= exploit <= 1:
            raise UserError(f"expectile={expectile}, tau={tau}, exploit={exploit}: expected shares within (0, 1]")
        self.shift, self.noise, self.noise_most, self.noise_clip = shift, noise, noise_most, noise_clip
        self.schedule = (noise_start, noise_end, noise_frames)
        self.beta_target, self.expectile, self.tau, self.actor_clip = beta_target, expectile, tau, actor_clip
        self.exploit, self.exploit_constant = exploit, exploit_constant
        self.perturbation, self.perturb_every = perturbation, perturb_every
        self.keep = (keep_least, keep_most)
        self.target = copy.deepcopy(model.critic).requires_grad_(False)
        self.register_buffer("beta", torch.ones(()))
        self.register_buffer("awake_at", torch.full((), -1.0))  # frame, -1 before
        self.alpha = 1.0  # of the last perturbation
        self.compiled = compiled
        self.activations: Callable[..., list[Tensor]] = model.actor.activations
        self.top = TopAgents(top_agents, len(flatten(self._perturbed()))) if perturbation == "task" else None

    def parts(self) -> dict[str, nn.Module]:
        parts: dict[str, nn.Module] = {"encoder": self.model.encoder, "critic": self.model.critic}
        parts["actor"] = self.model.actor
        if self.exploit > 0 and self.model.value is not None:
            parts["value"] = self.model.value
        return parts

    def on_fit_start(self) -> None:
        super().on_fit_start()
        if self.top is not None and self.top.weights.shape[1] != (numbers := len(flatten(self._perturbed()))):
            self.top = TopAgents(len(self.top.returns), numbers).to(self.device)  # surgery changed the model
        if self.compiled:
            self.compile_parts()

    def compile_parts(self) -> None:
        """Compile every network in place; names of weights stay."""
        for part in (*self.model.children(), self.target):
            part.compile()
        self.activations = torch.compile(self.model.actor.activations)

    @torch.no_grad()
    def explore(self, observation: Observation) -> Float[Tensor, "batch action"]:
        mean = self.act(observation)
        return (mean + self.sigma(self.data.frame) * self.random(*mean.shape)).clamp(-1, 1)

    def sigma(self, frame: int) -> Tensor | float:
        """Standard deviation of the noise at this frame."""
        if self.noise == "schedule":
            return linear_schedule(*self.schedule, frame)
        sigma = exploration_noise(self.beta, self.noise_most, target=self.beta_target)
        if self.noise == "awake":
            first, last, length = self.schedule
            share = ((frame - self.awake_at) / length).clamp(0, 1)
            scheduled = torch.where(self.awake_at < 0, 0.0, (1 - share) * first + share * last)
            sigma = torch.maximum(sigma, scheduled)
        return sigma

    def update(self, batch: ControlBatch) -> dict[str, Tensor | float]:
        if self.updates and self.updates % self.perturb_every == 0:
            self.perturb()
        self.model.train()
        optimizers = dict(zip(self.parts(), self._optimizers(), strict=True))
        state, later_state = batch.observation.state, batch.next_observation.state
        features = self.model.encoder(self._augmented(batch.observation))
        seen = features.detach()
        with torch.no_grad():
            later = self.model.encoder(self._augmented(batch.next_observation))
            self.beta.copy_(dormant_ratio(self.activations(seen, state)))
            if self.noise == "awake":
                first = (self.awake_at < 0) & (self.beta < self.beta_target)
                self.awake_at.copy_(torch.where(first, float(self.data.frame), self.awake_at))
            sigma = self.sigma(self.data.frame)
        logs: dict[str, Tensor | float] = {}
        if "value" in optimizers:
            loss = self.value_loss(seen, state, batch.action)
            self._step(loss, optimizers["value"])
            logs["value_loss"] = loss.detach()
        target = self.targets(later, later_state, batch, sigma)
        q1, q2 = self.model.critic(features, batch.action, state)
        loss = F.mse_loss(q1, target) + F.mse_loss(q2, target)
        self._step(loss, optimizers["encoder"], optimizers["critic"])
        actor_loss = self.actor_loss(seen, state, sigma)
        self._step(actor_loss, optimizers["actor"], clip=self.actor_clip)
        with torch.no_grad():
            torch._foreach_lerp_(list(self.target.parameters()), list(self.model.critic.parameters()), self.tau)
        logs |= {"critic_loss": loss.detach(), "actor_loss": actor_loss.detach(), "q": q1.detach().mean()}
        return logs | {"dormant_ratio": self.beta.clone(), "sigma": sigma}

    def value_loss(
        self, features: Float[Tensor, "batch features"], state: Tensor | None, action: Float[Tensor, "batch action"]
    ) -> Float[Tensor, ""]:
        """Expectile regression of V on the smaller Q of the replay's actions (IQL; DrM, eq. 6)."""
        assert self.model.value is not None
        with torch.no_grad():
            q = torch.minimum(*self.model.critic(features, action, state))
        return expectile_loss(self.model.value(features, state), q, self.expectile)

    @torch.no_grad()
    def targets(
        self, later: Float[Tensor, "batch features"], state: Tensor | None, batch: ControlBatch, sigma: Tensor | float
    ) -> Float[Tensor, " batch"]:
        """R + discount [lambda V(s') + (1 - lambda) min Q'(s', a')] with a noisy a'."""
        action = self._noisy(self.model.actor(later, state)[0], sigma)
        value = torch.minimum(*self.target(later, action, state))
        if self.exploit > 0 and self.model.value is not None:
            trust: Tensor | float = self.exploit
            if not self.exploit_constant:
                trust = exploitation(self.beta, self.exploit, target=self.beta_target)
            value = trust * self.model.value(later, state) + (1 - trust) * value
        target: Tensor = batch.reward + batch.discount * value
        return target

    def actor_loss(
        self, features: Float[Tensor, "batch features"], state: Tensor | None, sigma: Tensor | float
    ) -> Float[Tensor, ""]:
        """Minus the smaller Q of noisy actions, plus the router's balance loss."""
        mean, routing = self.model.actor(features, state)
        action = self._noisy(mean, sigma)
        with frozen(self.model.critic):
            q = torch.minimum(*self.model.critic(features, action, state))
        balance = self.record({} if routing is None else {"actor": routing})
        loss: Tensor = balance - q.mean()
        return loss

    def _noisy(self, mean: Float[Tensor, "batch action"], sigma: Tensor | float) -> Float[Tensor, "batch action"]:
        """Mean plus clipped noise, within (-1, 1); the bound lets the gradient through."""
        noise = (sigma * self.random(*mean.shape)).clamp(-self.noise_clip, self.noise_clip)
        action = mean + noise
        return action + (action.clamp(-1 + 1e-6, 1 - 1e-6) - action).detach()

    def _augmented(self, observation: Observation) -> UInt8[Tensor, "batch channels height width"]:
        assert observation.pixels is not None
        pixels = observation.pixels.to(self.device)
        if not self.shift:
            return pixels
        by = torch.randint(
            -self.shift, self.shift + 1, (2, len(pixels)), generator=self.generator, device=pixels.device
        )
        return shifted(pixels, by)

    def _step(self, loss: Tensor, *optimizers: Any, clip: float | None = None) -> None:
        for optimizer in optimizers:
            optimizer.zero_grad(set_to_none=True)
        self.manual_backward(loss)
        if clip is not None:
            nn.utils.clip_grad_norm_(self.model.actor.parameters(), clip)
        for optimizer in optimizers:
            optimizer.step()

    # Perturbation.

    def episode_ended(self, episode: Episode) -> None:
        """Remember the agent that played it, if it is among the best; random actions say nothing of an agent."""
        if self.top is not None and not episode.random:
            self.top.push(episode.episode_return, flatten(self._perturbed()))

    def perturb(self, alpha: Tensor | float | None = None) -> bool:
        """Mix the linear layers with a candidate and clear the optimisers' memory; False if nothing was to be done.

        alpha, the share that stays, follows from beta by default.
        """
        candidate = self._candidate()
        if candidate is None:
            return False
        if alpha is None:
            alpha = perturbation_strength(self.beta, self.keep[1], self.keep[0])
        perturb(self._perturbed(), candidate, alpha)
        self.alpha = float(alpha)
        if self.trainer.training:
            for optimizer in self._optimizers():
                optimizer.optimizer.state.clear()
        return True

    def _candidate(self) -> Float[Tensor, " numbers"] | None:
        if self.perturbation == "random":
            return fresh(self._perturbed_modules(), orthogonal)
        if self.top is None or self.top.held < 2:  # fewer have no deviation
            return None
        return self.top.draw(self.generator)

    def _perturbed_modules(self) -> list[nn.Module]:
        value = [] if self.model.value is None else [self.model.value]
        return [self.model.actor, self.model.critic, self.target, *value]

    def _perturbed(self) -> list[nn.Parameter]:
        return perturbed_parameters(self._perturbed_modules())

    def telemetry(self) -> dict[str, float]:
        numbers = {"dormant_ratio": float(self.beta), "sigma": float(self.sigma(self.data.frame)), "alpha": self.alpha}
        return numbers | ({} if self.top is None else {"top_held": float(self.top.held)})


def expectile_loss(value: Float[Tensor, " batch"], q: Float[Tensor, " batch"], expectile: float) -> Float[Tensor, ""]:
    """Mean of |e - 1(V > Q)| (V - Q)^2."""
    weight = torch.where(value > q, 1 - expectile, expectile)
    return (weight * (value - q).square()).mean()


def shifted(
    pixels: UInt8[Tensor, "batch channels height width"], by: Tensor
) -> UInt8[Tensor, "batch channels height width"]:
    """Each image moved up and to the left by its numbers in `by` [2, batch], edges repeated; one gather."""
    batch, channels, height, width = pixels.shape
    rows = (torch.arange(height, device=pixels.device) + by[0, :, None]).clamp(0, height - 1)
    columns = (torch.arange(width, device=pixels.device) + by[1, :, None]).clamp(0, width - 1)
    place = (rows[:, :, None] * width + columns[:, None, :]).view(batch, 1, -1).expand(-1, channels, -1)
    return pixels.flatten(2).gather(2, place).view_as(pixels)


@contextmanager
def frozen(module: nn.Module) -> Iterator[None]:
    """No gradients for the module's own parameters."""
    parameters = list(module.parameters())
    for parameter in parameters:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in parameters:
            parameter.requires_grad_(True)
