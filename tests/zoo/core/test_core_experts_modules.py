"""Arbitrary modules as experts: what happens to those without rows."""

import torch
from moezoo.zoo.core import make_plan
from moezoo.zoo.core.experts import ModuleExperts
from torch import distributed, nn
from torch.nn.parallel import DistributedDataParallel


def experts(**kw):
    torch.manual_seed(0)
    return ModuleExperts(lambda: nn.Sequential(nn.Linear(4, 8), nn.LayerNorm(8), nn.Linear(8, 3)), 4, **kw)


def test_calling_idle_experts_changes_nothing_but_their_gradients():
    plan = make_plan(torch.tensor([[0], [2], [2], [-1]]), 4)
    x = torch.randn(4, 4)
    skipping, calling = experts(), experts(call_idle=True)
    for e in (skipping, calling):
        e(x, plan).sum().backward()
    assert torch.equal(skipping(x, plan), calling(x, plan))
    for e, (a, b) in enumerate(zip(skipping.experts, calling.experts, strict=True)):
        for p, q in zip(a.parameters(), b.parameters(), strict=True):
            if e in (0, 2):
                assert torch.equal(p.grad, q.grad)
            else:
                assert p.grad is None and (q.grad == 0).all()


def test_idle_experts_are_never_called_in_evaluation():
    calling = experts(call_idle=True).eval()
    calling.experts[3].register_forward_hook(lambda *_: 1 / 0)
    calling(torch.randn(2, 4), make_plan(torch.tensor([[0], [1]]), 4))


def test_distributed_training_runs_with_idle_experts():
    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    try:
        model = DistributedDataParallel(experts(call_idle=True))
        for chosen in (0, 3, 1):  # DDP complains at the step after one whose reduction was left unfinished
            plan = make_plan(torch.full((3, 1), chosen), 4)
            model(torch.randn(3, 4), plan).sum().backward()
        assert all(p.grad is not None for p in model.parameters())
    finally:
        distributed.destroy_process_group()
