"""TMMOE's rivals: shapes, independence of windows, gradients, rules against plain loops, equal sizes."""

import math

import numpy as np
import pytest
import torch
from moezoo import list_recipes
from moezoo.datasets.trajectories_windows import TrajectoryBatch
from moezoo.errors import UserError
from moezoo.recipes import import_class, metadata, read
from moezoo.zoo.base import ZooModel
from moezoo.zoo.baselines.trajectories import (
    ConstantVelocity,
    DenseTwin,
    LSTMPredictor,
    ManoeuvreLSTM,
    MMoE,
    SingleTaskTCN,
    macro_f1,
)
from moezoo.zoo.core.statistics import parameter_counts
from moezoo.zoo.tmmoe import TASKS, TMMOE
from sklearn.metrics import f1_score

SCHEMA = {"num_features": 5, "history": 9, "horizon": 6, "frame_rate": 5.0}
MODELS = {
    "twin": lambda: DenseTwin(SCHEMA, channels=8, layers=2, expert_dim=6, expert_stride=2, tower=7),
    "lstm": lambda: LSTMPredictor(SCHEMA, hidden=8, tower=7),
    "two lstms": lambda: LSTMPredictor(SCHEMA, hidden=8, layers=2, tower=7),
    "manoeuvre": lambda: ManoeuvreLSTM(SCHEMA, hidden=8, decoder=6),
    "single": lambda: SingleTaskTCN(SCHEMA, channels=8, layers=2, tower=7),
    "mmoe": lambda: MMoE(SCHEMA, experts=3, expert_dim=6, tower=7),
    "mmoe of mlps": lambda: MMoE(SCHEMA, "mlp", experts=3, expert_dim=6, tower=7),
    "mmoe of convolutions": lambda: MMoE(SCHEMA, "tcn", experts=3, expert_dim=6, tower=7),
}


def inputs(batch=8, seed=0):
    rng = torch.Generator().manual_seed(seed)
    return torch.randn(batch, 9, 5, generator=rng), torch.randn(batch, 2, generator=rng)


def make_batch(batch=200, seed=0):
    rng = torch.Generator().manual_seed(seed)
    intention = torch.randint(-1, 3, (batch,), generator=rng)
    side = torch.tensor([0.0, 1.0, -1.0])[intention.clamp(min=0)]
    velocity = torch.randn(batch, 2, generator=rng) * 0.3 + torch.stack([torch.full((batch,), 20.0), side], 1)
    lateral = torch.randn(batch, generator=rng) * 0.3 + 0.5 * side
    lateral[0] = math.nan
    return TrajectoryBatch(
        torch.randn(batch, 9, 5), torch.randn(batch, 6, 2), velocity, intention, torch.full((batch,), math.nan),
        lateral, torch.arange(batch), torch.arange(batch),
    )  # fmt: skip


@pytest.mark.parametrize("name", MODELS)
def test_shapes_and_independence_of_windows(name):
    torch.manual_seed(0)
    model = MODELS[name]().eval()
    history, velocity = inputs()
    output = model(history, velocity)
    assert output.position.shape == (8, 6, 2) and output.intention.shape == (8, 3)
    assert list(output.routing) == (list(TASKS) if "mmoe" in name else [])
    order = torch.randperm(8)
    moved = model(history[order], velocity[order])
    torch.testing.assert_close(moved.position, output.position[order])
    torch.testing.assert_close(moved.intention, output.intention[order])
    faster = model(history, velocity + torch.tensor([1.0, 0.0]))
    along = (faster.position - output.position)[..., 0]
    torch.testing.assert_close(along, (torch.arange(1, 7) / 5.0).expand(8, 6), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("name", MODELS)
def test_every_parameter_gets_gradient(name):
    torch.manual_seed(0)
    model = MODELS[name]()
    for parameter in (p for n, p in model.named_parameters() if ".gate." in n):
        torch.nn.init.normal_(parameter)
    output = model(*inputs())
    (output.position.square().sum() + output.intention.square().sum()).backward()
    quiet = [n for n, p in model.named_parameters() if p.grad is None or not p.grad.abs().sum()]
    assert not quiet, quiet


@pytest.mark.parametrize("name", MODELS)
def test_weights_come_back(tmp_path, name):
    model = MODELS[name]().eval()
    model.save_pretrained(tmp_path / "w")
    again = ZooModel.from_pretrained(tmp_path / "w")
    assert torch.equal(model(*inputs()).position, again(*inputs()).position)


def test_single_tasks_share_nothing():
    model = MODELS["single"]()
    model(*inputs()).intention.sum().backward()
    touched = {n for n, p in model.named_parameters() if p.grad is not None and p.grad.abs().sum() > 0}
    assert touched and all(n.startswith(("encoders.2.", "towers.intention.")) for n in touched)


def test_constant_velocity_goes_on():
    model = ConstantVelocity(SCHEMA)
    output = model(torch.tensor([[20.0, -0.5]]), torch.zeros(1))
    seconds = torch.arange(1, 7) / 5
    torch.testing.assert_close(output.position[0], torch.stack([20 * seconds, -0.5 * seconds], 1))
    straight = ConstantVelocity(SCHEMA, lateral=False)(torch.tensor([[20.0, -0.5]]), torch.zeros(1))
    assert (straight.position[..., 1] == 0).all() and torch.equal(straight.position[..., 0], output.position[..., 0])


@pytest.mark.parametrize("use_offset", [False, True])
def test_the_rule_is_the_best_of_its_grid(use_offset):
    batches = [make_batch(seed=s) for s in range(3)]
    model = ConstantVelocity(SCHEMA, use_offset=use_offset)
    model.fit(batches)
    known = [b.intention >= 0 for b in batches]
    label = torch.cat([b.intention[k] for b, k in zip(batches, known, strict=True)]).numpy()
    speed = torch.cat([b.velocity[k, 1] for b, k in zip(batches, known, strict=True)]).numpy()
    place = np.nan_to_num(torch.cat([b.lateral[k] for b, k in zip(batches, known, strict=True)]).numpy())

    def score(seconds, threshold):
        ahead = seconds * speed + (place if use_offset else 0)
        said = np.where(ahead > threshold, 1, np.where(ahead < -threshold, 2, 0))
        return f1_score(label, said, average="macro")

    grid = [0.0, 0.25, 0.5, 1.0, 1.5, 2.0, 3.0] if use_offset else [1.0]
    best = max(score(s, t) for s in grid for t in np.arange(0.05, 3.0, 0.05, dtype=np.float32))
    assert score(float(model.rule[0]), float(model.rule[1])) == pytest.approx(best, abs=1e-6)
    assert best > 0.8
    batch = batches[0]
    said = model(batch.velocity, batch.lateral).intention.argmax(-1)
    direct = f1_score(batch.intention[known[0]], said[known[0]], average="macro")
    assert direct == pytest.approx(best, abs=0.1)


def test_a_rule_without_labels_says_so():
    batch = make_batch()
    with pytest.raises(UserError, match="no train window has a known intention"):
        ConstantVelocity(SCHEMA).fit([batch._replace(intention=torch.full_like(batch.intention, -1))])


def test_macro_f1_equals_scikit_learn():
    rng = torch.Generator().manual_seed(0)
    said, label = torch.randint(0, 3, (4, 90), generator=rng), torch.randint(0, 3, (90,), generator=rng)
    expected = [f1_score(label, one, average="macro") for one in said]
    np.testing.assert_allclose(macro_f1(said, label), expected, atol=1e-6)


def built(name):
    model = read(name)["model"]["init_args"]["model"]
    schema = {"num_features": 20, "history": 31, "horizon": 30, "frame_rate": 10.0}
    return import_class(model["class_path"])(schema=schema, **model.get("init_args", {}))


def test_every_recipe_builds_and_every_twin_is_as_large_as_its_mixture():
    names = list_recipes("trajectories/*")
    assert {"trajectories/tmmoe", "trajectories/constant_velocity", "trajectories/lstm"} <= set(names)
    twins = 0
    for name in names:
        model = built(name)
        of = metadata(name).twin_of
        if metadata(name).kind == "dense":
            assert of is not None
        if of is not None:
            twins += 1
            sizes = [parameter_counts(m)["active"] for m in (model, built(of))]
            assert sizes[0] == pytest.approx(sizes[1], rel=0.02), name
            assert isinstance(built(of), TMMOE)
    assert twins >= 1
