"""Spec checks f and f2: PixelPendulum is solved from its recipe, and what a perturbation does to a trained agent."""

import copy

import pytest
import pytorch_lightning as lightning
import torch
from moezoo.datasets.control import VALIDATION_SEED
from moezoo.runs import RecipeCLI, Request
from moezoo.tasks.control import mean_return
from moezoo.zoo.mentor import orthogonal
from moezoo.zoo.mentor_rules import flatten, fresh, perturb


def train(seed):
    """The recipe in place; its task and data after 10,000 frames."""
    cli = RecipeCLI(Request("control/mentor", seed=seed))
    lightning.seed_everything(seed)
    quiet = {"logger": False, "enable_progress_bar": False, "enable_checkpointing": False, "accelerator": "cpu"}
    trainer = lightning.Trainer(max_epochs=-1, num_sanity_val_steps=0, enable_model_summary=False, **quiet)
    trainer.fit(cli.model, datamodule=cli.datamodule)
    return cli.model, cli.datamodule


def greedy(task, data):
    task.model.eval()
    return mean_return(data.play(range(VALIDATION_SEED, VALIDATION_SEED + 10), task.act))


def effect(task, data, draw, alpha):
    """By how much one perturbation changes the greedy return; the agent is as before afterwards."""
    kept = copy.deepcopy(task.state_dict())
    before = greedy(task, data)
    perturb(task._perturbed(), draw(), alpha)
    after = greedy(task, data)
    task.load_state_dict(kept)
    return after - before


@pytest.mark.slow
def test_pixel_pendulum_is_solved_and_survives_only_its_own_perturbation():
    finals, agents = [], []
    for seed in range(3):
        task, data = train(seed)
        finals.append(task.curve[-1]["episode_reward"])
        agents.append((task, data))
    assert min(finals) >= -400 and sorted(finals)[1] >= -250, finals
    task, data = agents[finals.index(max(finals))]
    assert task.top.held == 10
    torch.manual_seed(0)
    mild = effect(task, data, lambda: task.top.draw(torch.Generator().manual_seed(0)), 0.5)
    harsh = effect(task, data, lambda: fresh(task._perturbed_modules(), orthogonal), 0.4)
    assert abs(mild) < 60 and harsh < -400, (mild, harsh)
    assert torch.isfinite(flatten(task._perturbed())).all()
