"""Learning from states: SAC with a mixture policy (PMOE, arXiv:2104.09122); with one primitive it is SAC."""

import copy
import math
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from pytorch_lightning.cli import LRSchedulerCallable, OptimizerCallable
from torch import Tensor, nn

from ..datasets.control import ControlBatch, Observation
from ..errors import UserError
from ..zoo.pmoe import PMOE, squashed
from .control import ControlTask
from .control_mentor import frozen


class Temperature(nn.Module):
    """The weight of the entropy, learned as its logarithm."""

    def __init__(self, start: float) -> None:
        super().__init__()
        self.log = nn.Parameter(torch.tensor(math.log(start)))

    def forward(self) -> Float[Tensor, ""]:
        return self.log.exp()


class PMOETask(ControlTask):
    """One action of every primitive is drawn; the one with the best Q learns, and the router learns that it was best.

    Args:
        model: a `PMOE`.
        optimizer: factory; actor, critics and temperature have one each.
        lr_scheduler: not used.
        agent: name in `eval.csv`.
        target_entropy: of the policy; default: minus the numbers of an action.
        temperature: where it starts.
        router_coef: weight of the router's squared error against the best primitive.
        tau: share of the critics that goes into their targets at each update.
        schema: the data's schema, linked by the command line.
    """

    model: PMOE

    def __init__(
        self,
        model: nn.Module,
        optimizer: OptimizerCallable = torch.optim.Adam,
        lr_scheduler: LRSchedulerCallable | None = None,
        agent: str = "pmoe",
        target_entropy: float | None = None,
        temperature: float = 0.2,
        router_coef: float = 1.0,
        tau: float = 0.01,
        schema: dict[str, Any] | None = None,
    ) -> None:
        super().__init__(model, optimizer, lr_scheduler, agent, schema)
        if not isinstance(model, PMOE):
            raise UserError(f"model.model={type(model).__name__}: PMOETask trains moezoo.zoo.pmoe.PMOE")
        if temperature <= 0 or not 0 < tau <= 1:
            raise UserError(f"temperature={temperature}, tau={tau}: expected more than 0, tau at most 1")
        actions = int(self.schema.get("action", 1))
        self.target_entropy = -float(actions) if target_entropy is None else target_entropy
        self.router_coef, self.tau = router_coef, tau
        self.temperature = Temperature(temperature)
        self.target = copy.deepcopy(model.critic).requires_grad_(False)

    def parts(self) -> dict[str, nn.Module]:
        return {"critic": self.model.critic, "actor": self.model.actor, "temperature": self.temperature}

    @torch.no_grad()
    def explore(self, observation: Observation) -> Float[Tensor, "batch action"]:
        assert observation.state is not None
        return self.drawn(observation.state.to(self.device))[0]

    def drawn(
        self, state: Float[Tensor, "batch state"]
    ) -> tuple[Float[Tensor, "batch action"], Float[Tensor, " batch"]]:
        """An action of a primitive drawn by the router, and its log density under that primitive."""
        mean, log_std, routing = self.model.actor(state)
        chosen = torch.multinomial(routing.scores, 1, generator=self.generator).squeeze(1)
        return squashed(pick(mean, chosen), pick(log_std, chosen), self.random(*mean[:, 0].shape))

    def update(self, batch: ControlBatch) -> dict[str, Tensor | float]:
        critic, actor, temperature = self._optimizers()
        state, later = batch.observation.state, batch.next_observation.state
        assert state is not None and later is not None
        state, alpha = state.to(self.device), self.temperature().detach()
        with torch.no_grad():
            action, log_density = self.drawn(later.to(self.device))
            value = torch.minimum(*self.target(later, action)) - alpha * log_density
            target = batch.reward + batch.discount * value
        q1, q2 = self.model.critic(state, batch.action)
        critic_loss = F.mse_loss(q1, target) + F.mse_loss(q2, target)
        self._step(critic_loss, critic)
        actor_loss, log_density = self.actor_loss(state, alpha)
        self._step(actor_loss, actor)
        entropy_loss = -self.temperature.log * (log_density + self.target_entropy).detach().mean()
        self._step(entropy_loss, temperature)
        with torch.no_grad():
            torch._foreach_lerp_(list(self.target.parameters()), list(self.model.critic.parameters()), self.tau)
        logs = {"critic_loss": critic_loss.detach(), "actor_loss": actor_loss.detach(), "q": q1.detach().mean()}
        return {**logs, "temperature": alpha, "entropy": -log_density.detach().mean()}

    def actor_loss(
        self, state: Float[Tensor, "batch state"], alpha: Float[Tensor, ""]
    ) -> tuple[Float[Tensor, ""], Float[Tensor, " batch"]]:
        """`alpha log pi_k*(a_k*) - Q(a_k*)`, k* being the primitive with the best action, plus the router's error; and
        the log densities of the best actions."""
        mean, log_std, routing = self.model.actor(state)
        actions, log_densities = squashed(mean, log_std, self.random(*mean.shape))
        with frozen(self.model.critic):
            q = torch.minimum(*self.model.critic(state[:, None].expand(-1, mean.shape[1], -1), actions))
        best = q.detach().argmax(-1)
        log_density = pick(log_densities, best)
        loss = (alpha * log_density - pick(q, best)).mean()
        if mean.shape[1] > 1:
            loss = loss + self.router_coef * F.mse_loss(routing.scores, F.one_hot(best, mean.shape[1]).to(q.dtype))
        balance = self.record({"actor": routing})
        return loss + balance, log_density

    def _step(self, loss: Tensor, optimizer: Any) -> None:
        optimizer.zero_grad(set_to_none=True)
        self.manual_backward(loss)
        optimizer.step()

    def telemetry(self) -> dict[str, float]:
        return {"temperature": float(self.temperature())}


def pick(values: Float[Tensor, "batch experts *rest"], chosen: Int[Tensor, " batch"]) -> Float[Tensor, "batch *rest"]:
    """Of each row the chosen expert's."""
    return values[torch.arange(len(chosen), device=chosen.device), chosen]
