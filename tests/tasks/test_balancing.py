"""The bias evens the load whatever the micro-batches and ranks; the temperature follows its formula."""

import json
import os
import socket
import subprocess
import sys

import pytest
import pytorch_lightning as lightning
import torch
from moezoo.errors import UserError
from moezoo.tasks.balancing import PermutationSearch, RouterBias, TemperatureSchedule
from moezoo.tasks.base import BaseTask
from moezoo.zoo.core import CometRouter, DenseRouter, MLPExperts, MoE, PermutationLearner, TopKRouter
from moezoo.zoo.core.statistics import max_violation
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset


class Toy(lightning.LightningModule):
    """Regression over skewed clusters with one MoE layer; notes what its router does in each training step."""

    def __init__(self, router=None, balance="bias", rate=0.02):
        super().__init__()
        torch.manual_seed(0)
        if router is None:
            router = TopKRouter(8, 4, 2, score_func="sigmoid", balance=balance, bias_update_rate=rate)
        self.moe = MoE(router, MLPExperts(4, 8, 16))
        torch.nn.init.normal_(
            getattr(router, "gate", router).weight, 0.0, 0.3
        )  # scores apart: the bias has something to overcome
        self.violations, self.temperatures, self.evaluated, self.biases = [], [], [], []

    def training_step(self, batch, batch_idx):
        (x,) = batch
        y, routing = self.moe(x, return_routing=True)
        self.violations.append(float(max_violation(routing)))
        self.temperatures.append(getattr(self.moe.router, "temperature", None))
        if hasattr(self.moe.router, "expert_bias"):
            self.biases.append(self.moe.router.expert_bias.tolist())
        return (y - x.roll(1, -1)).square().mean() + routing.aux_loss

    def validation_step(self, batch, batch_idx):
        self.moe(batch[0])
        self.evaluated.append(getattr(self.moe.router, "temperature", None))

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), lr=1e-3)


def clusters(samples):
    g = torch.Generator().manual_seed(1)
    share = torch.tensor([0.5, 0.2, 0.1, 0.1, 0.05, 0.05])
    centre = 2 * torch.randn(6, 8, generator=g)
    which = torch.multinomial(share, samples, replacement=True, generator=g)
    return TensorDataset(centre[which] + 0.3 * torch.randn(samples, 8, generator=g))


def fit(task, callbacks, samples=512, batch_size=64, sampler=None, ckpt_path=None, validate=False, **trainer_kw):
    trainer = lightning.Trainer(
        accelerator="cpu",
        callbacks=callbacks,
        use_distributed_sampler=False,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        **{"devices": 1, "max_epochs": 1, **trainer_kw},
    )
    data = clusters(samples)
    loaders = [DataLoader(data, batch_size, sampler=sampler), DataLoader(data, samples) if validate else None]
    trainer.fit(task, *loaders, ckpt_path=ckpt_path)
    return trainer


def test_the_bias_evens_the_load():
    balanced, free = Toy(rate=0.005), Toy(balance="none")
    fit(balanced, [RouterBias()], samples=1024, batch_size=256, max_epochs=30)
    fit(free, [], samples=1024, batch_size=256, max_epochs=30)
    late = [sum(task.violations[-8:]) / 8 for task in (balanced, free)]
    assert late[0] < 0.25 and late[1] > 0.4


def final_bias(task):
    return task.moe.router.expert_bias.tolist()


def test_every_task_moves_the_biases_of_its_model():
    biased, plain = (TopKRouter(8, 4, 2, balance=balance) for balance in ("bias", "aux"))
    task = BaseTask(torch.nn.Sequential(MoE(biased, MLPExperts(4, 8, 16))))
    assert [type(callback) for callback in task.configure_callbacks()] == [RouterBias]
    assert BaseTask(MoE(plain, MLPExperts(4, 8, 16))).configure_callbacks() == []


def test_micro_batches_count_as_one_step():
    whole, parts = Toy(rate=0.03), Toy(rate=0.03)
    fit(whole, [RouterBias()], batch_size=64)
    fit(parts, [RouterBias()], batch_size=16, accumulate_grad_batches=4)
    assert max(final_bias(whole)) > 0.05
    expected = [bias for bias in whole.biases for _ in range(4)]
    torch.testing.assert_close(parts.biases, expected, rtol=0, atol=1e-6)


def test_the_last_short_step_of_an_epoch_counts():
    task = Toy(rate=0.03)
    fit(task, [RouterBias()], samples=48, batch_size=16, accumulate_grad_batches=2)
    assert task.biases[2] != final_bias(task) and not task.moe.router.expert_counts.any()


def test_a_resumed_run_ends_with_the_same_bias(tmp_path):
    straight, first, second = Toy(rate=0.03), Toy(rate=0.03), Toy(rate=0.03)
    fit(straight, [RouterBias()], max_epochs=2)
    trainer = fit(first, [RouterBias()])
    trainer.save_checkpoint(tmp_path / "first.ckpt")
    fit(second, [RouterBias()], max_epochs=2, ckpt_path=tmp_path / "first.ckpt")
    assert len(second.biases) == len(straight.biases) - len(first.biases)
    assert final_bias(second) == pytest.approx(final_bias(straight), abs=1e-6)


def run_rank(rank, folder, port):
    """One of two DDP processes, which see a quarter of each step's samples in each of two micro-batches."""
    torch.set_num_threads(1)
    os.environ.update(LOCAL_RANK=str(rank), NODE_RANK="0", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    task = Toy(rate=0.03)
    sampler = DistributedSampler(clusters(512), 2, rank, shuffle=False)
    strategy = lightning.strategies.DDPStrategy(process_group_backend="gloo")
    fit(task, [RouterBias()], batch_size=16, sampler=sampler, devices=2, strategy=strategy, accumulate_grad_batches=2)
    (folder / f"{rank}.json").write_text(json.dumps(final_bias(task)))


@pytest.fixture
def unused_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return str(s.getsockname()[1])


def test_two_ddp_ranks_with_micro_batches_equal_one_process(tmp_path, unused_port):
    code = (
        "import runpy, sys, pathlib; "
        "runpy.run_path(sys.argv[1])['run_rank'](int(sys.argv[2]), pathlib.Path(sys.argv[3]), sys.argv[4])"
    )
    processes = [
        subprocess.Popen([sys.executable, "-c", code, __file__, str(rank), str(tmp_path), unused_port])
        for rank in range(2)
    ]
    try:
        assert [process.wait(timeout=300) for process in processes] == [0, 0]
    finally:
        for process in processes:
            process.kill()
    whole = Toy(rate=0.03)
    fit(whole, [RouterBias()], batch_size=64)
    for rank in range(2):
        assert json.loads((tmp_path / f"{rank}.json").read_text()) == pytest.approx(final_bias(whole), abs=1e-6)


@pytest.mark.parametrize("accumulate", [1, 2])
def test_the_temperature_goes_from_start_to_the_routers_own(accumulate):
    task = Toy(DenseRouter(8, 4, temperature=0.5))
    fit(
        task,
        [TemperatureSchedule(2.0)],
        samples=5 * 16 * accumulate,
        batch_size=16,
        accumulate_grad_batches=accumulate,
        validate=True,
    )
    want = [t for t in (2.0, 1.625, 1.25, 0.875, 0.5) for _ in range(accumulate)]
    assert task.temperatures == pytest.approx(want)
    assert task.evaluated == [0.5] and task.moe.router.temperature == 0.5


def test_exponential_halves_at_equal_steps_and_stays_at_the_end():
    task = Toy(DenseRouter(8, 4, temperature=0.25))
    fit(task, [TemperatureSchedule(2.0, "exponential", steps=4)], samples=96, batch_size=16)
    assert task.temperatures == pytest.approx([2.0, 1.0, 0.5, 0.25, 0.25, 0.25])


def test_a_resumed_run_goes_on_where_it_stopped(tmp_path):
    straight, first, second = (Toy(DenseRouter(8, 4, temperature=0.5)) for _ in range(3))
    fit(straight, [TemperatureSchedule(3.0)], max_epochs=2)
    trainer = fit(first, [TemperatureSchedule(3.0, steps=16)])
    trainer.save_checkpoint(tmp_path / "first.ckpt")
    fit(second, [TemperatureSchedule(3.0)], max_epochs=2, ckpt_path=tmp_path / "first.ckpt")
    assert first.temperatures + second.temperatures == pytest.approx(straight.temperatures)
    for name, value in straight.state_dict().items():
        torch.testing.assert_close(second.state_dict()[name], value)


class TwoOptimizers(Toy):
    """Steps both in every batch, as tasks with sparse tables do."""

    automatic_optimization = False

    def __init__(self, router):
        super().__init__(router)
        self.automatic_optimization = False

    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        self.manual_backward(loss)
        for optimizer in self.optimizers():
            optimizer.step()
            optimizer.zero_grad()

    def configure_optimizers(self):
        return [torch.optim.Adam(m.parameters(), lr=1e-3) for m in (self.moe.router, self.moe.experts)]


def test_two_optimisers_step_once_a_batch():
    task = TwoOptimizers(DenseRouter(8, 4, temperature=0.5))
    fit(task, [TemperatureSchedule(2.0)], samples=80, batch_size=16)
    assert task.temperatures == pytest.approx([2.0, 1.625, 1.25, 0.875, 0.5])
    router = TopKRouter(8, 4, 2, balance="bias", bias_update_rate=0.03)
    two, one = TwoOptimizers(router), Toy(rate=0.03)
    one.moe.router = TopKRouter(8, 4, 2, balance="bias", bias_update_rate=0.03)
    one.load_state_dict(two.state_dict())
    for task in (two, one):
        fit(task, [RouterBias()])
    assert final_bias(two) == pytest.approx(final_bias(one), abs=1e-6)


class Interrupted(Exception):
    pass


def test_a_crash_in_a_step_leaves_the_routers_own_temperature():
    task = Toy(DenseRouter(8, 4, temperature=0.5))

    def crash(*_):
        assert task.moe.router.temperature == 2.0
        raise Interrupted

    task.moe.router.register_forward_hook(crash)
    with pytest.raises(Interrupted):
        fit(task, [TemperatureSchedule(2.0)])
    assert task.moe.router.temperature == 0.5


def test_mistakes_are_named():
    with pytest.raises(UserError, match='no router with balance="bias"'):
        fit(Toy(balance="aux"), [RouterBias()])
    with pytest.raises(UserError, match="no router of the model has a temperature"):
        fit(Toy(), [TemperatureSchedule(2.0)])
    with pytest.raises(UserError, match=r"start=0\.0 must be positive"):
        TemperatureSchedule(0.0)
    with pytest.raises(UserError, match="steps=0 must be at least 1"):
        TemperatureSchedule(2.0, steps=0)
    with pytest.raises(UserError, match="the run has no end"):
        fit(Toy(DenseRouter(8, 4)), [TemperatureSchedule(2.0)], max_epochs=-1)


def test_a_permutation_is_searched_in_the_first_steps_and_then_stays():
    learner = PermutationLearner(4)
    seen = []

    class Watch(lightning.Callback):
        def on_train_batch_end(self, *_):
            seen.append((learner.frozen, learner.temperature))

    task = Toy(CometRouter(8, 4, 2, permutation=learner))
    fit(task, [PermutationSearch(share=0.5), Watch()])  # 8 steps
    assert [frozen for frozen, _ in seen] == [False] * 4 + [True] * 4
    assert [t for _, t in seen[:4]] == pytest.approx([1e-3, 1e-4, 1e-5, 1e-6])
    assert torch.equal(learner.matrix().sum(0), torch.ones(4))
    with pytest.raises(UserError, match="no router of the model has a permutation"):
        fit(Toy(), [PermutationSearch()])
    with pytest.raises(UserError, match=r"share=2\.0"):
        PermutationSearch(share=2.0)
