"""Two real processes over gloo compute what one does: forward, gradients, checkpoints, a Lightning fit.

The functions of `CHECKS` run in each of the two processes, one launch for all of them.
"""

import copy
import json
import os
import subprocess
import sys
import traceback
from pathlib import Path

import pytest
import pytorch_lightning as lightning
import torch
import torch.distributed as dist
from moezoo.zoo.core import (
    DenseRouter,
    Experts,
    FixedRouter,
    MLPExperts,
    ModuleExperts,
    MoE,
    TopKRouter,
    shard_experts,
)
from pytorch_lightning.strategies import ModelParallelStrategy
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict, set_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

EXACT = {"rtol": 1e-12, "atol": 1e-12}
RANKS = 2


def layer(seed=0, router=None, **kw):
    torch.manual_seed(seed)
    return MoE(router or TopKRouter(8, 4, 2), MLPExperts(4, 8, 16, 5, **kw)).double()


def tokens(count, seed=1, dim=8):
    return torch.randn(count, dim, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


class PackedExperts(Experts):
    """1x1 convolutions over [rows, in_dim, size] with one weight [experts·out, in_dim]."""

    def __init__(self, num_experts, in_dim, out_dim):
        super().__init__(num_experts)
        self.out_dim, self.weight = out_dim, nn.Parameter(torch.randn(num_experts * out_dim, in_dim))

    def forward(self, x_sorted, plan, *, backend="auto"):
        groups = x_sorted.split(plan.counts.tolist())
        return torch.cat([w @ x for w, x in zip(self.weight.split(self.out_dim), groups, strict=True)])

    def dense(self, x, weights=None):
        y = torch.stack([w @ x for w in self.weight.split(self.out_dim)], dim=1)
        return y if weights is None else torch.einsum("nets,ne->nts", y, weights)


def two_layers():
    return nn.Sequential(
        nn.Linear(8, 8),
        MoE(TopKRouter(8, 4, 2), MLPExperts(4, 8, 16), shared=nn.Linear(8, 8)),
        nn.Tanh(),
        MoE(TopKRouter(8, 6, 3, score_func="sigmoid"), MLPExperts(6, 8, 16, act="swiglu")),
        nn.Linear(8, 5),
    )


def mesh_of_all():
    return init_device_mesh("cpu", (RANKS,))


def my_part(x, sizes):
    return x.split(sizes)[dist.get_rank()]


def mean_gradients(module):
    """Gradients as after a step of data parallelism: means over the ranks, experts gathered."""
    gradients = {}
    for name, parameter in module.named_parameters():
        if isinstance(parameter.grad, DTensor):
            gradients[name] = parameter.grad.full_tensor()
        else:
            dist.all_reduce(parameter.grad)
            gradients[name] = parameter.grad / RANKS
    return gradients


def equals_one_process(module, sizes, average=True, **router_kw):
    """Outputs and gradients with `sizes[rank]` tokens on each rank equal those of all tokens on one."""
    whole = copy.deepcopy(module)
    split = shard_experts(module, mesh_of_all(), average=average)
    assert all(isinstance(parameter, DTensor) for parameter in split) and len(split) == 4
    x = tokens(sum(sizes))
    mine, everything = my_part(x, sizes).clone().requires_grad_(), x.clone().requires_grad_()
    y = module(mine, **{key: my_part(value, sizes) for key, value in router_kw.items()})
    want = whole(everything, **router_kw)
    torch.testing.assert_close(y, my_part(want, sizes), **EXACT)
    (y.square().sum() if average else y.square().sum() / RANKS).backward()
    (want.square().sum() / RANKS).backward()
    torch.testing.assert_close(mine.grad, my_part(everything.grad, sizes) * (RANKS if average else 1), **EXACT)
    gradients = mean_gradients(module)
    for name, parameter in whole.named_parameters():
        scale = RANKS if not average and "experts" not in name else 1
        torch.testing.assert_close(gradients[name] * scale, parameter.grad, msg=lambda m, n=name: f"{n}: {m}", **EXACT)


def check_every_backend():
    for backend in ("auto", "segment", "padded", "dense"):
        module = layer()
        module.backend = backend
        equals_one_process(module, [7, 13])


def check_sum_losses_need_no_division():
    equals_one_process(layer(), [7, 13], average=False)


def check_dense_gate_and_wide_top_k():
    equals_one_process(layer(router=DenseRouter(8, 4)), [5, 3])
    equals_one_process(layer(router=TopKRouter(8, 4, 3, score_func="sigmoid")), [5, 3])


def check_rank_without_tokens():
    equals_one_process(layer(), [0, 9])
    equals_one_process(layer(), [9, 0])
    equals_one_process(layer(), [0, 0])


def check_experts_that_nobody_uses():
    for ids in ([0, 1, 1, 1, 0, 1], [3, 3, 3, 3, 3, 3], [-1, 2, -1, -1, 3, 3], [-1] * 6):
        equals_one_process(layer(router=FixedRouter(4)), [2, 4], task_id=torch.tensor(ids))


def check_padding_stays_at_home():
    mask = torch.tensor([True, False, False, True, True, False, True])
    equals_one_process(layer(), [3, 4], token_mask=mask)


def check_experts_on_whole_samples():
    """Rows of several dimensions, parameters packed [experts·out, ...]: what convolutions as experts need."""
    torch.manual_seed(0)
    module = nn.Sequential(MoE(FixedRouter(4), PackedExperts(4, 3, 5))).double()
    whole = copy.deepcopy(module)[0].experts
    shard_experts(module, mesh_of_all())
    x, gates = tokens(6, dim=6).view(6, 3, 2), tokens(6, seed=2, dim=4)
    mine, parallel = my_part(x, [2, 4]), module[0].experts
    torch.testing.assert_close(parallel.dense(mine), my_part(whole.dense(x), [2, 4]), **EXACT)
    mixed = parallel.dense(mine, my_part(gates, [2, 4]))
    torch.testing.assert_close(mixed, my_part(whole.dense(x, gates), [2, 4]), **EXACT)


def check_no_grad_and_dropout_mode():
    module = layer(dropout=0.5)
    whole = copy.deepcopy(module).eval()
    shard_experts(module, mesh_of_all())
    x = tokens(6)
    with torch.no_grad():
        trained = module(my_part(x, [3, 3]))
        y = module.eval()(my_part(x, [3, 3]))
        module.backend = "gather"
        gathered = module(my_part(x, [3, 3]))
    want = my_part(whole(x), [3, 3])
    torch.testing.assert_close(y, want.detach(), **EXACT)
    torch.testing.assert_close(gathered, want.detach(), **EXACT)
    assert type(y + 0) is torch.Tensor and not torch.allclose(trained, y)


def check_values_come_from_the_first_rank():
    module = layer(seed=dist.get_rank())
    shard_experts(module, mesh_of_all())
    weight = module.experts.layers[0].weight
    assert weight.to_local().shape[0] == 2
    assert torch.equal(weight.full_tensor(), layer(seed=0).experts.layers[0].weight)


def check_full_state_dict():
    full = StateDictOptions(full_state_dict=True, cpu_offload=True)
    module, want = layer(), layer().state_dict()
    shard_experts(module, mesh_of_all())
    saved = get_model_state_dict(module, options=full)
    if dist.get_rank() == 0:  # a full state dict is gathered where it is written
        assert list(saved) == list(want)
        assert all(type(saved[key]) is torch.Tensor and torch.equal(saved[key], want[key]) for key in want)
    other = layer(seed=5)
    shard_experts(other, mesh_of_all())
    set_model_state_dict(other, want, options=StateDictOptions(full_state_dict=True))
    x = tokens(6)
    torch.testing.assert_close(other(my_part(x, [2, 4])), my_part(layer()(x), [2, 4]), **EXACT)


def check_three_ddp_steps_with_an_unused_expert():
    """Without expert parallelism: stacked weights have a gradient even for experts without tokens."""
    task_id, x, target = torch.tensor([0, 1, 1, 3, 0, 1]), tokens(6), tokens(6, seed=3, dim=5)
    whole = layer(router=FixedRouter(4))
    parallel = nn.parallel.DistributedDataParallel(layer(router=FixedRouter(4)))
    optimizers = [torch.optim.AdamW(m.parameters(), lr=0.1) for m in (whole, parallel)]
    for _ in range(3):
        for optimizer in optimizers:
            optimizer.zero_grad()
        (whole(x, task_id=task_id) - target).square().mean().backward()
        y = parallel(my_part(x, [3, 3]), task_id=my_part(task_id, [3, 3]))
        (y - my_part(target, [3, 3])).square().mean().backward()
        for optimizer in optimizers:
            optimizer.step()
    for name, value in parallel.module.state_dict().items():
        torch.testing.assert_close(value, whole.state_dict()[name], **EXACT)


def check_fsdp_steps():
    """Two layers, FSDP2 around them, clipping by the norm over sharded and split parameters alike."""
    torch.manual_seed(0)
    whole = two_layers().double()
    parallel = copy.deepcopy(whole)
    mesh = mesh_of_all()
    fully_shard(parallel, mesh=mesh, ignored_params=shard_experts(parallel, mesh))
    optimizers = [torch.optim.AdamW(m.parameters(), lr=0.05) for m in (whole, parallel)]
    x, target = tokens(10), tokens(10, seed=3, dim=5)
    for _ in range(3):
        losses = (whole(x) - target).square().mean(), (parallel(my_part(x, [5, 5])) - my_part(target, [5, 5])).square()
        losses = losses[0], losses[1].mean()
        for loss in losses:
            loss.backward()
        norms = [nn.utils.clip_grad_norm_(m.parameters(), 0.1) for m in (whole, parallel)]
        torch.testing.assert_close(norms[1].full_tensor(), norms[0], **EXACT)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
    for name, value in parallel.state_dict().items():
        torch.testing.assert_close(value.full_tensor(), whole.state_dict()[name], **EXACT)


def check_mistakes_are_named():
    mesh = mesh_of_all()
    with pytest.raises(ValueError, match="3 experts cannot be split evenly over 2 ranks"):
        shard_experts(MoE(TopKRouter(8, 3, 2), MLPExperts(3, 8, 16)), mesh)
    modules = MoE(TopKRouter(8, 8, 2), ModuleExperts(lambda: nn.Linear(8, 8), 8))
    with pytest.raises(ValueError, match="MoE holds no MoE whose experts can be split"):
        shard_experts(modules, mesh)
    with pytest.raises(ValueError, match=r"the mesh has 2: pass mesh\['name'\]"):
        shard_experts(layer(), init_device_mesh("cpu", (1, RANKS)))
    module = layer()
    shard_experts(module, mesh)
    with pytest.raises(ValueError, match="all of them are split already"):
        shard_experts(module, mesh)


class Regression(lightning.LightningModule):
    """The same fit for one process and for two: `configure_model` splits where there is a mesh."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.net = two_layers()
        self.losses = []

    def configure_model(self):
        if self._device_mesh is not None:
            mesh = self.device_mesh["data_parallel"]
            fully_shard(self.net, mesh=mesh, ignored_params=shard_experts(self.net, mesh))

    def training_step(self, batch, batch_idx):
        x, y = batch
        loss = (self.net(x) - y).square().mean()
        self.log("loss", loss, on_step=False, on_epoch=True, sync_dist=True)
        return loss

    def on_train_epoch_end(self):
        self.losses.append(float(self.trainer.callback_metrics["loss"]))

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=0.01)


def fit(epochs, ranks=1, rank=0, ckpt_path=None, **trainer_kw):
    data = torch.utils.data.TensorDataset(tokens(48).float(), tokens(48, seed=3, dim=5).float())
    sampler = torch.utils.data.DistributedSampler(data, ranks, rank, shuffle=False)
    trainer = lightning.Trainer(
        accelerator="cpu",
        devices=ranks,
        max_epochs=epochs,
        use_distributed_sampler=False,  # Lightning's own would shuffle
        gradient_clip_val=0.5,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **trainer_kw,
    )
    task = Regression()
    trainer.fit(task, torch.utils.data.DataLoader(data, 16 // ranks, sampler=sampler), ckpt_path=ckpt_path)
    return trainer, task


def lightning_fit_in_two_parts(folder):
    """FSDP2 and split experts under ModelParallelStrategy; the second fit resumes from the first's checkpoint."""
    rank = dist.get_rank()
    os.environ.update(LOCAL_RANK=str(rank), NODE_RANK="0")  # by which Lightning knows that it was launched
    strategies = [ModelParallelStrategy(RANKS, 1, save_distributed_checkpoint=False) for _ in range(2)]
    trainer, task = fit(2, RANKS, rank, strategy=strategies[0])
    trainer.save_checkpoint(folder / "two.ckpt")
    _, resumed = fit(3, RANKS, rank, folder / "two.ckpt", strategy=strategies[1])
    return [*task.losses, *resumed.losses]


CHECKS = {name.removeprefix("check_"): check for name, check in list(globals().items()) if name.startswith("check_")}


def main(rank, folder):
    """One of the two processes: runs every check and writes what came out."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder / 'meet'}", rank=rank, world_size=RANKS)
    outcome = {}
    try:
        for name, check in CHECKS.items():
            outcome[name] = "failed"
            check()
            outcome[name] = "passed"
        outcome["losses"] = lightning_fit_in_two_parts(folder)
    except BaseException:
        outcome["error"] = traceback.format_exc()
    (folder / f"{rank}.json").write_text(json.dumps(outcome))
    os._exit(0)  # without waiting for a process that may have failed elsewhere


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory):
    """What each rank says of each check; a check that comes after a failure is missing."""
    folder = tmp_path_factory.mktemp("ranks")
    code = (
        "import runpy, sys; sys.path.insert(0, sys.argv[2]); import conftest; "
        "runpy.run_path(sys.argv[1])['main'](int(sys.argv[3]), __import__('pathlib').Path(sys.argv[4]))"
    )
    command = [sys.executable, "-c", code, __file__, str(Path(__file__).parents[2])]
    processes = [
        subprocess.Popen([*command, str(rank), str(folder)], stderr=(folder / f"{rank}.txt").open("w"))
        for rank in range(RANKS)
    ]
    try:
        for process in processes:
            process.wait(timeout=300)
    finally:
        for process in processes:
            process.kill()
    reports = [folder / f"{rank}.json" for rank in range(RANKS)]
    assert all(report.exists() for report in reports), [p.read_text()[-2000:] for p in folder.glob("*.txt")]
    return [json.loads(report.read_text()) for report in reports], folder


@pytest.mark.parametrize("name", CHECKS)
def test_two_processes_equal_one(name, two_processes):
    for rank, outcome in enumerate(two_processes[0]):
        assert outcome.get(name) == "passed", f"rank {rank}: {outcome.get('error', 'never ran')}"


def test_a_lightning_fit_over_two_processes_equals_one(two_processes):
    outcomes, folder = two_processes
    _, task = fit(3)
    for outcome in outcomes:
        assert outcome.get("losses") == pytest.approx(task.losses, rel=1e-5), outcome.get("error")
    assert task.losses[2] < task.losses[1] < task.losses[0]
    weights = torch.load(folder / "two.ckpt", weights_only=True)["state_dict"]
    _, earlier = fit(2)
    for name, value in earlier.state_dict().items():
        torch.testing.assert_close(weights[name], value, rtol=1e-4, atol=1e-5)
