"""What can stand around the experts: extra ones, gates per task, shared and fine-grained ones."""

import pytest
import torch
from moezoo.zoo.core import (
    ConstantExpert,
    CopyExpert,
    DenseRouter,
    MLPExperts,
    MoE,
    MultiGateMoE,
    NullExpertRouter,
    RecurrentExperts,
    TaskGate,
    TopKRouter,
    ZeroExpert,
    fine_grained_moe,
)
from moezoo.zoo.core.statistics import parameter_counts


@pytest.mark.parametrize("backend", ["auto", "dense", "segment", "padded", "gather"])
def test_extra_experts_add_their_share(backend):
    torch.manual_seed(0)
    extra = [ConstantExpert(6), CopyExpert(), ZeroExpert()]
    router = TopKRouter(6, 4, 3, num_extra=3)
    moe = MoE(router, MLPExperts(4, 6, 5), extra_experts=extra, backend=backend).double()
    torch.nn.init.normal_(router.weight)
    x = torch.randn(50, 6, dtype=torch.float64, requires_grad=True)
    y, routing = moe(x, return_routing=True)
    assert (routing.indices >= 4).any() and (routing.indices < 4).any()
    share = routing.dense_weights(extra=True)
    want = moe.experts.dense(x, share[:, :4]) + share[:, 4:5] * extra[0](x) + share[:, 5:6] * x
    torch.testing.assert_close(y, want)
    inputs = [x, *moe.parameters()]
    for got, expected in zip(
        torch.autograd.grad(y.square().sum(), inputs, retain_graph=True),
        torch.autograd.grad(want.square().sum(), inputs), strict=True,
    ):  # fmt: skip
        torch.testing.assert_close(got, expected)


def test_a_token_with_null_experts_alone_keeps_what_is_shared():
    torch.manual_seed(0)
    router = NullExpertRouter(6, 2, num_null=4, top_k=2)
    moe = MoE(router, MLPExperts(2, 6, 5), torch.nn.Identity(), extra_experts=[ZeroExpert()] * 4)
    torch.nn.init.normal_(router.weight, std=3.0)
    x = torch.randn(200, 6)
    y, routing = moe(x, return_routing=True)
    alone = (routing.indices >= 2).all(1)
    assert alone.any() and not alone.all()
    torch.testing.assert_close(y[alone], x[alone])


def test_every_task_mixes_the_same_experts_with_its_own_gate():
    torch.manual_seed(0)
    experts = MLPExperts(4, 6, 5, 3)
    routers = [DenseRouter(6, 4), DenseRouter(6, 4, temperature=0.1), TopKRouter(6, 4, 2)]
    x = torch.randn(2, 7, 6)
    y, records = MultiGateMoE(routers, experts)(x)
    assert y.shape == (3, 2, 7, 3) and len(records) == 3
    for got, router in zip(y, routers, strict=True):
        torch.testing.assert_close(got, MoE(router, experts)(x))


def test_gates_may_read_a_summary_of_the_sequence_that_experts_read():
    torch.manual_seed(0)
    experts = RecurrentExperts(3, 4, 5, last=True)
    routers = [DenseRouter(2, 3), DenseRouter(2, 3, temperature=0.1)]
    x, summary = torch.randn(2, 6, 7, 4), torch.randn(2, 6, 2)
    y, _ = MultiGateMoE(routers, experts)(x, summary)
    assert y.shape == (2, 2, 6, 5)
    each = experts.dense(x.flatten(0, 1))
    for got, router in zip(y, routers, strict=True):
        weights = router(summary.flatten(0, 1)).dense_weights()
        torch.testing.assert_close(got.flatten(0, 1), (weights[..., None] * each).sum(1))
    with pytest.raises(ValueError, match="must begin with the batch shape"):
        MultiGateMoE(routers, experts)(x, summary[:, :5])


def test_a_task_gate_routes_each_token_by_its_task():
    torch.manual_seed(0)
    gate = TaskGate(6, 4, 3)
    moe = MoE(TopKRouter(6, 4, 2, gate=gate), MLPExperts(4, 6, 5))
    x, task = torch.randn(9, 6), torch.arange(9) % 3
    y = moe(x, task_id=task)
    for t in range(3):
        alone = MoE(TopKRouter(6, 4, 2), moe.experts)
        with torch.no_grad():
            alone.router.weight.copy_(gate.weight[t])
        torch.testing.assert_close(y[task == t], alone(x[task == t]))


@pytest.mark.parametrize("act", ["gelu", "swiglu"])
def test_fine_grained_experts_cost_what_coarse_ones_do(act):
    dim, hidden, experts, k = 8, 32, 4, 2
    coarse = parameter_counts(MLPExperts(experts, dim, hidden, act=act, bias=False))["total"] / experts
    moe = fine_grained_moe(dim, hidden, experts, k, split=4, num_shared=1, act=act)
    assert moe.experts.num_experts == 15 and moe.router.top_k == 7
    weights = sum(p.numel() for n, p in moe.named_parameters() if "weight" in n and "router" not in n)
    assert weights == experts * coarse
    x = torch.randn(3, 5, dim)
    torch.testing.assert_close(moe(x), moe.shared(x.flatten(0, 1)).view(3, 5, dim) + MoE(moe.router, moe.experts)(x))


def test_mistakes_are_named():
    with pytest.raises(ValueError, match="router knows 2 extra experts, but 1"):
        MoE(TopKRouter(8, 4, 2, num_extra=2), MLPExperts(4, 8, 16), extra_experts=[ZeroExpert()])
    with pytest.raises(ValueError, match="routers is empty"):
        MultiGateMoE([], MLPExperts(4, 8, 16))
    with pytest.raises(ValueError, match="must be a multiple of split"):
        fine_grained_moe(8, 30, 4, 2)
    with pytest.raises(ValueError, match=r"less than split \* top_k"):
        fine_grained_moe(8, 32, 4, 1, num_shared=4)
