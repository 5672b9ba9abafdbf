"""PMOE's task: only the best primitive learns, the router learns who it was, one primitive is SAC."""

import pytest
import pytorch_lightning as lightning
import torch
from moezoo.datasets.control import ControlData
from moezoo.errors import UserError
from moezoo.tasks.control_pmoe import PMOETask, pick
from moezoo.zoo.mentor import Mentor
from moezoo.zoo.pmoe import PMOE, squashed


def make(experts=3, **changes):
    torch.manual_seed(0)
    sizes = {"batch_size": 16, "frames": 600, "eval_every": 300, "seed_frames": 400, "capacity": 2000}
    data = ControlData(
        "gym:Pendulum-v1", action_repeat=1, frame_stack=1, n_step=1, eval_episodes=1, test_episodes=2, **sizes
    )
    model = PMOE(data.schema, hidden=16, experts=experts, critic_hidden=16)
    return PMOETask(model, lambda p: torch.optim.Adam(p, 1e-3), schema=data.schema, **changes), data


def trainer(**changes):
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "accelerator": "cpu"}
    return lightning.Trainer(
        **quiet | {"enable_checkpointing": False, "num_sanity_val_steps": 0, "max_epochs": -1} | changes
    )


def test_only_the_best_primitive_learns_and_the_router_hears_of_it():
    task, _ = make(router_coef=0.0)
    state, alpha = torch.randn(1, 3), torch.tensor(0.1)
    noise = torch.randn(1, 3, 1)
    task.random = lambda *shape: noise
    loss, log_density = task.actor_loss(state, alpha)
    mean, log_std, _ = task.model.actor(state)
    actions, densities = squashed(mean, log_std, noise)
    q = torch.minimum(*task.model.critic(state[:, None].expand(-1, 3, -1), actions))
    best = int(q.argmax())
    torch.testing.assert_close(loss, 0.1 * densities[0, best] - q[0, best])
    torch.testing.assert_close(log_density, densities[:, best])
    loss.backward()
    felt = task.model.actor.experts.layers[0].weight.grad.flatten(1).norm(dim=1)
    assert felt[best] > 0 and all(felt[k] == 0 for k in range(3) if k != best)
    assert all(p.grad is None for p in task.model.critic.parameters()), "the critics only judge"
    task.router_coef = 1.0
    bias = task.model.actor.router.gate.bias
    optimizer = torch.optim.SGD([bias, task.model.actor.router.gate.weight], 1.0)
    before = float(task.model.actor(state)[2].scores[0, best].detach())
    for _ in range(20):
        optimizer.zero_grad()
        task.actor_loss(state, alpha)[0].backward()
        optimizer.step()
    assert float(task.model.actor(state)[2].scores[0, best]) > before + 0.2


def test_pick():
    values = torch.arange(24.0).view(4, 3, 2)
    assert pick(values, torch.tensor([2, 0, 1, 2])).tolist() == [[4, 5], [6, 7], [14, 15], [22, 23]]


@pytest.mark.parametrize("experts", [1, 3])
def test_training_learns_the_critic_and_the_temperature(experts):
    task, data = make(experts)
    play = trainer()
    play.fit(task, datamodule=data)
    assert data.frame == 600 and task.updates == 101 and float(task.temperature().detach()) != pytest.approx(0.2)
    assert all(torch.isfinite(p).all() for p in task.parameters())
    play.test(task, datamodule=data, verbose=False)
    assert task.result.units.height == 2 and task.result.metrics["episode_length"] == 200
    (table,) = trainer().predict(task, datamodule=data)
    assert table.height == 400 and len([c for c in table.columns if c.startswith("gate_")]) == experts


def test_mistakes_are_told():
    _, data = make()
    with pytest.raises(UserError, match="PMOETask trains"):
        PMOETask(torch.nn.Linear(1, 1), schema=data.schema)
    with pytest.raises(UserError, match="gives no pixels"):
        Mentor(data.schema)
    with pytest.raises(UserError, match="expected more than 0"):
        make(temperature=0.0)
