"""The control task: parity with DrQ-v2, the rules in training, perturbation, resume to the bit, curves, tables."""

import copy

import polars as pl
import pytest
import pytorch_lightning as lightning
import torch
import torch.nn.functional as F
from moezoo.datasets.control import ControlBatch, ControlData, Episode, Observation
from moezoo.errors import UserError
from moezoo.leaderboard.results import check_units
from moezoo.tasks.control import summarise, write_curve
from moezoo.tasks.control_mentor import MentorTask, expectile_loss, shifted
from moezoo.tasks.control_plots import draw
from moezoo.zoo.core import MoE
from moezoo.zoo.mentor import Mentor
from moezoo.zoo.mentor_rules import flatten, perturbed_parameters
from pytorch_lightning.callbacks import ModelCheckpoint
from torch import nn

SMALL = {"channels": 4, "strides": [2, 2], "feature_dim": 12, "hidden": 16, "expert_hidden": 12, "gate_hidden": 8}


def make_data(**changes):
    sizes = {"size": 16, "batch_size": 8, "frames": 800, "eval_every": 400, "seed_frames": 200, "capacity": 1000}
    return ControlData(**sizes | {"eval_episodes": 2, "test_episodes": 3, "save_replay": True} | changes)


def make_task(data, model=None, **changes):
    sizes = SMALL | {"experts": 4, "top_k": 2} | (model or {})
    return MentorTask(Mentor(data.schema, **sizes), adam, schema=data.schema, **{"perturb_every": 40} | changes)


def adam(parameters):
    return torch.optim.Adam(parameters, 1e-3)


def make_trainer(**changes):
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "accelerator": "cpu"}
    saved = any(isinstance(callback, ModelCheckpoint) for callback in changes.get("callbacks", []))
    checkpoints = {"enable_checkpointing": saved, "num_sanity_val_steps": 0}
    return lightning.Trainer(**quiet | checkpoints | {"max_epochs": -1} | changes)


def run(task, data, **changes):
    trainer = make_trainer(**changes)
    trainer.fit(task, datamodule=data)
    return trainer


@pytest.fixture(scope="module")
def trained():
    torch.manual_seed(0)
    data = make_data()
    task = make_task(data)
    trainer = run(task, data)
    return task, data, trainer


def test_the_clock_drives_everything(trained):
    task, data, trainer = trained
    assert data.frame == 800 and trainer.current_epoch == 2, "stopped when the frames were spent"
    # Seed frames without updates, then one for every two agent steps; the batch of frame 200 comes with it.
    assert task.updates == (800 - 200) // 4 + 1
    assert [row["frame"] for row in task.curve] == [400, 800]
    assert task.top.held == 3, "an agent for each episode but the one of the seed frames"
    assert torch.isfinite(flatten(list(task.parameters()))).all()


def test_target_critics_follow_slowly(trained):
    task, *_ = trained
    for target, own in zip(task.target.parameters(), task.model.critic.parameters(), strict=True):
        assert not target.requires_grad and not torch.equal(target, own)


class TinyDrQ(nn.Module):
    """DrQ-v2 written down again, for one update: the critics and the actor of its paper, without our classes."""

    def __init__(self, source):
        super().__init__()
        state = source.state_dict()
        self.p = nn.ParameterDict({name.replace(".", "/"): nn.Parameter(v.clone()) for name, v in state.items()})

    def __getitem__(self, name):
        return self.p[name.replace(".", "/")]

    def linear(self, x, name):
        return x @ self[f"{name}.weight"].T + self[f"{name}.bias"]

    def encode(self, pixels):
        h = pixels.float() / 255 - 0.5
        for i in (0, 2):
            h = F.conv2d(h, self[f"encoder.layers.{i}.weight"], self[f"encoder.layers.{i}.bias"], stride=2).relu()
        return h.flatten(1)

    def trunk(self, h, part):
        z = self.linear(h, f"{part}.trunk.linear")
        z = (z - z.mean(-1, keepdim=True)) / (z.var(-1, correction=0, keepdim=True) + 1e-5).sqrt()
        return (z * self[f"{part}.trunk.norm.weight"] + self[f"{part}.trunk.norm.bias"]).tanh()

    def mean(self, h):
        z = self.linear(self.trunk(h, "actor"), "actor.first").relu()
        return self.linear(self.linear(z, "actor.middle.0").relu(), "actor.last").tanh()

    def q(self, h, action):
        both = []
        for head in ("q1", "q2"):
            z = torch.cat([self.trunk(h, "critic"), action], -1)
            z = self.linear(self.linear(z, f"critic.{head}.0").relu(), f"critic.{head}.2").relu()
            both.append(self.linear(z, f"critic.{head}.4")[:, 0])
        return both


def test_without_experts_and_perturbation_it_is_drqv2():
    """Check g: the same batch and weights give the same weights after two updates."""
    torch.manual_seed(3)
    data = make_data()
    settings = {"perturbation": "none", "exploit": 0.0, "noise": "schedule", "noise_frames": 1000, "shift": 0}
    task = make_task(data, {"experts": 0, "value": False}, **settings)
    ours = task.model
    with torch.no_grad():
        for parameter in ours.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    task.target.load_state_dict(ours.critic.state_dict())
    theirs = TinyDrQ(ours)
    target = copy.deepcopy(theirs)
    names = list(theirs.p)
    groups = [[n for n in names if n.startswith(part)] for part in ("encoder", "critic", "actor")]
    encoder, critic, actor = (torch.optim.Adam([theirs.p[n] for n in group], 1e-3) for group in groups)
    run(task, make_data(frames=8, eval_every=8))  # attaches trainer and optimisers; too short to learn
    pixels = torch.randint(0, 256, (2, 8, 3, 16, 16), dtype=torch.uint8)
    noise = torch.randn(4, 8, 1)
    draws = iter(noise)
    task.random = lambda *shape: next(draws)
    task.sigma = lambda frame: 0.7
    for step in range(2):
        batch = ControlBatch(
            Observation(pixels[0], None),
            torch.rand(8, 1) * 2 - 1,
            torch.randn(8),
            torch.full((8,), 0.97),
            Observation(pixels[1], None),
        )
        task.update(batch)
        smooth = [(0.7 * n).clamp(-0.3, 0.3) for n in noise[2 * step : 2 * step + 2]]
        with torch.no_grad():
            later = theirs.encode(pixels[1])
            action = (theirs.mean(later) + smooth[0]).clamp(-1 + 1e-6, 1 - 1e-6)
            y = batch.reward + batch.discount * torch.minimum(*target.q(later, action))
        h = theirs.encode(pixels[0])
        q1, q2 = theirs.q(h, batch.action)
        loss = ((q1 - y) ** 2).mean() + ((q2 - y) ** 2).mean()
        for optimizer in (encoder, critic):
            optimizer.zero_grad()
        loss.backward()
        for optimizer in (encoder, critic):
            optimizer.step()
        mean = theirs.mean(h.detach())
        action = mean + smooth[1]
        action = action + (action.clamp(-1 + 1e-6, 1 - 1e-6) - action).detach()
        loss = -torch.minimum(*theirs.q(h.detach(), action)).mean()
        actor.zero_grad()
        loss.backward()
        actor.step()
        with torch.no_grad():
            for name in groups[1]:
                target.p[name].mul_(0.99).add_(0.01 * theirs.p[name])
    for name, value in ours.state_dict().items():
        torch.testing.assert_close(
            value, theirs[name].data, atol=1e-6, rtol=1e-5, msg=lambda text, n=name: f"{n}: {text}"
        )
    for name, value in task.target.state_dict().items():
        torch.testing.assert_close(value, target[f"critic.{name}"].data, atol=1e-6, rtol=1e-5)


def test_shifts_repeat_the_edges():
    pixels = torch.randint(0, 256, (20, 3, 9, 9), dtype=torch.uint8)
    by = torch.randint(-4, 5, (2, 20))
    moved = shifted(pixels, by)
    padded = F.pad(pixels.float(), (4, 4, 4, 4), mode="replicate")
    for i in range(20):
        y, x = (by[:, i] + 4).tolist()
        assert torch.equal(moved[i].float(), padded[i, :, y : y + 9, x : x + 9])


def test_expectile_loss_by_hand():
    value, q = torch.tensor([1.0, 0.0]), torch.tensor([0.0, 2.0])
    assert float(expectile_loss(value, q, 0.9)) == pytest.approx((0.1 * 1 + 0.9 * 4) / 2)
    v = torch.zeros((), requires_grad=True)
    samples = torch.randn(4000, generator=torch.Generator().manual_seed(0))
    optimizer = torch.optim.Adam([v], 0.05)
    for _ in range(200):
        optimizer.zero_grad()
        expectile_loss(v.expand(4000), samples, 0.9).backward()
        optimizer.step()
    v = v.detach()
    above, below = (samples - v).clamp(min=0).mean(), (v - samples).clamp(min=0).mean()
    assert float(0.9 * above / (0.1 * below)) == pytest.approx(1.0, abs=0.02), "the 0.9 expectile"


def test_targets_trust_the_value_net_by_beta(trained):
    task, *_ = trained
    features = task.model.encoder(torch.randint(0, 256, (6, 3, 16, 16), dtype=torch.uint8)).detach()
    batch = ControlBatch(
        Observation(None, None), torch.zeros(6, 1), torch.randn(6), torch.rand(6), Observation(None, None)
    )
    task.model.eval()
    kept = task.beta.clone()
    parts = []
    for beta in (0.0, 0.2, 1.0):
        task.beta.fill_(beta)
        parts.append(task.targets(features, None, batch, 0.0))
    task.beta.copy_(kept)
    q = torch.minimum(*task.target(features, task.model.actor(features)[0].clamp(-1 + 1e-6, 1 - 1e-6)))
    v = task.model.value(features)
    for target, trust in zip(parts, (0.6 / (1 + torch.e**-10), 0.3, 0.0), strict=True):
        expected = batch.reward + batch.discount * (trust * v + (1 - trust) * q)
        torch.testing.assert_close(target, expected.detach(), atol=1e-5, rtol=1e-4)


def test_noise_follows_its_rule():
    data = make_data()
    scheduled = make_task(data, noise="schedule", noise_start=1.0, noise_end=0.2, noise_frames=100)
    assert [scheduled.sigma(f) for f in (0, 50, 300)] == pytest.approx([1.0, 0.6, 0.2])
    dormant = make_task(data, noise="dormant")
    dormant.beta.fill_(0.2)
    assert float(dormant.sigma(10**9)) == pytest.approx(0.4)
    awake = make_task(data, noise="awake", noise_start=1.0, noise_end=0.1, noise_frames=100)
    awake.beta.fill_(0.0)
    asleep = float(awake.sigma(50))
    awake.awake_at.fill_(50.0)
    awake.schedule = (1.0, 0.05, 100)
    assert float(awake.sigma(10**6)) == pytest.approx(asleep), "never below what beta asks for"
    awake.schedule = (1.0, 0.1, 100)
    assert asleep == pytest.approx(0.8 / (1 + torch.e**2), rel=1e-4)
    assert [float(awake.sigma(f)) for f in (50, 100, 150)] == pytest.approx([1.0, 0.55, 0.1], rel=1e-4)


def test_a_perturbation_mixes_the_weights_and_clears_adam():
    seen = {}

    class Watch(lightning.Callback):
        def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
            if module.updates == 120 and not seen:
                optimizers = module.optimizers()
                before = flatten(module._perturbed())
                norm = module.model.actor.trunk.norm.weight.clone()
                conv = module.model.encoder.layers[0].weight.clone()
                filled = [len(o.optimizer.state) for o in optimizers]
                assert module.perturb(1.0) and torch.equal(flatten(module._perturbed()), before)
                assert module.perturb(0.25)
                after = flatten(module._perturbed())
                seen["moved"] = float((after - before).norm() / before.norm())
                seen["kept"] = torch.equal(module.model.actor.trunk.norm.weight, norm)
                seen["conv"] = torch.equal(module.model.encoder.layers[0].weight, conv)
                seen["states"] = filled, [len(o.optimizer.state) for o in optimizers]

    data = make_data()
    run(make_task(data, perturb_every=1000), data, callbacks=[Watch()])
    assert seen["moved"] > 0.01 and seen["kept"] and seen["conv"]
    assert min(seen["states"][0]) > 0 and seen["states"][1] == [0, 0, 0, 0]


def test_one_agent_is_too_few_to_perturb_with(trained):
    _, data, _ = trained
    lonely = make_task(data)
    assert not lonely.perturb(0.5)
    lonely.episode_ended(Episode(0, 1.0))
    before = flatten(lonely._perturbed())
    assert not lonely.perturb(0.5) and torch.equal(flatten(lonely._perturbed()), before)


def test_training_with_random_perturbation_stays_finite():
    torch.manual_seed(1)
    data = make_data(frames=400)
    task = make_task(data, perturbation="random", perturb_every=30, noise="awake")
    run(task, data)
    assert task.alpha < 1 and torch.isfinite(flatten(list(task.model.parameters()))).all()
    assert isinstance(task.model.actor.middle, MoE) and 0 <= float(task.beta) <= 1 and task.top is None


def test_resume_is_exact_to_the_bit(tmp_path):
    """Check h: checkpoint, stop, go on in new objects; dropout, noise, shifts, replay and environment included."""

    def fresh_run(frames, seed, folder, checkpoint=None):
        torch.manual_seed(seed)
        data = make_data(frames=frames, eval_every=200)
        task = make_task(data, perturb_every=60)
        save = ModelCheckpoint(folder, save_last=True, monitor="val/episode_return", mode="max")
        trainer = make_trainer(callbacks=[save])
        trainer.fit(task, datamodule=data, ckpt_path=checkpoint, weights_only=True)
        return task, data

    whole, played = fresh_run(1000, 5, tmp_path / "whole")
    fresh_run(600, 5, tmp_path / "half")
    torch.manual_seed(77)
    resumed, again = fresh_run(1000, 77, tmp_path / "rest", tmp_path / "half" / "last.ckpt")
    assert again.frame == played.frame == 1000 and resumed.updates == whole.updates and whole.alpha < 1
    for (name, a), b in zip(whole.state_dict().items(), resumed.state_dict().values(), strict=True):
        assert torch.equal(a, b), name
    hours = [{k: v for k, v in row.items() if k not in ("hour", "seed")} for row in whole.curve]
    assert hours == [{k: v for k, v in row.items() if k not in ("hour", "seed")} for row in resumed.curve]
    a, b = played.collector.replay, again.collector.replay
    assert torch.equal(a.frames[: a.written], b.frames[: b.written])


def test_without_the_replay_a_resumed_run_refills_first(tmp_path):
    torch.manual_seed(0)
    data = make_data(frames=400, save_replay=False)
    run(make_task(data), data, callbacks=[ModelCheckpoint(tmp_path, save_last=True)])
    assert (tmp_path / "last.ckpt").stat().st_size < 1_000_000
    data = make_data(save_replay=False)
    task, started = make_task(data), []
    updates = task.update
    task.update = lambda batch: (started.append(data.frame), updates(batch))[1]
    make_trainer().fit(task, datamodule=data, ckpt_path=tmp_path / "last.ckpt", weights_only=True)
    assert started[0] == 400 + 200 and data.frame == 800


def test_results_units_predictions_and_pictures(trained, tmp_path):
    task, data, _ = trained
    trainer = make_trainer()
    trainer.test(task, datamodule=data, verbose=False)
    units = task.result.units
    check_units(units)
    assert task.result.metrics["episode_return"] == pytest.approx(units["episode_return"].mean()) and len(units) == 3
    assert task(next(iter(data.test_dataloader()))).action.shape == (3, 1)
    table = pl.concat(trainer.predict(task, datamodule=data))
    assert table.height == 300 and {"gate_0", "gate_3", "action_0", "episode_return"} <= set(table.columns)
    finals = table.group_by("seed", maintain_order=True).last()["episode_return"]
    assert finals.to_list() == pytest.approx(units["episode_return"].to_list())
    weights = table.select(pl.col("^gate_.*$")).to_numpy()
    assert weights.sum(1) == pytest.approx(1.0) and ((weights > 0).sum(1) == 2).all()
    drawn = draw(task.shown, task.curve, task.schema, tmp_path)
    assert [path.name for path in drawn] == ["episode.gif", "episode.png", "learning.png"]
    assert all(path.stat().st_size > 2000 for path in drawn)


def test_curves_are_written_in_drqv2s_layout(tmp_path):
    row = {
        "agent": "mentor",
        "task": "t",
        "seed": 1,
        "frame": 1000,
        "episode_reward": -3.5,
        "success_rate": None,
        "hour": 0.5,
    }
    write_curve([row, row | {"frame": 2000}], tmp_path / "eval.csv")
    table = pl.read_csv(tmp_path / "eval.csv")
    assert table.columns == ["agent", "task", "seed", "frame", "episode_reward", "hour"] and table[
        "frame"
    ].to_list() == [1000, 2000]
    write_curve([row | {"success_rate": 0.25}], tmp_path / "eval.csv")
    assert pl.read_csv(tmp_path / "eval.csv")["success_rate"].to_list() == [0.25]


def test_success_counts_where_there_is_such_a_notion():
    result = summarise([Episode(1, 5.0, 10, True), Episode(2, 1.0, 10, False), Episode(3, 0.0, 10, True)])
    assert result.metrics["success_rate"] == pytest.approx(2 / 3) and result.metrics["episode_return"] == 2.0
    assert "success_rate" not in summarise([Episode(1, 5.0, 10)]).metrics


def test_results_tell_how_fast_an_agent_learned():
    curve = [{"frame": frame, "episode_reward": float(frame)} for frame in (1000, 2500, 4000, 5000, 9000)]
    metrics = summarise([Episode(1, 5.0, 10)], curve, 10_000).metrics
    assert [metrics[f"return_at_{p}"] for p in (25, 50, 75)] == [2500.0, 5000.0, 5000.0]
    assert "return_at_25" not in summarise([Episode(1, 5.0, 10)], curve[-1:], 10_000).metrics


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"lr_scheduler": adam}, "drop the scheduler"),
        ({"keep_least": 0.9, "keep_most": 0.5}, "0 <= least <= most"),
        ({"top_agents": 1}, "at least 1 and 2"),
        ({"tau": 0.0}, "shares within"),
    ],
)
def test_mistakes_are_told(changes, message):
    with pytest.raises(UserError, match=message):
        make_task(make_data(), **changes)


def test_exploitation_needs_a_value_net():
    data = make_data()
    with pytest.raises(UserError, match="no value net"):
        make_task(data, {"value": False})
    assert len(perturbed_parameters([Mentor(data.schema, **SMALL)])) > 20
