"""The floors, and our layer by every backend."""

from functools import partial
from typing import Literal, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ...zoo.core import MLPExperts, MoE, TopKRouter, make_plan
from .problem import Built, Contender, Problem, Unsuited

_Choice = Literal["auto", "dense", "grouped", "segment", "padded", "gather", "triton"]


def activate(h: Tensor, act: str) -> Tensor:
    if act == "gelu":
        return F.gelu(h)
    gate, value = h.chunk(2, dim=-1)
    return F.silu(gate) * value


def leaf(value: Tensor) -> Tensor:
    return value.detach().requires_grad_()


def _floor(problem: Problem) -> Built:
    """One dense network on N k rows: the same multiplications, nothing to route."""
    rows = leaf(problem.x.repeat(problem.case.top_k, 1))
    w1, w2 = leaf(problem.w1[0]), leaf(problem.w2[0])

    def forward(x: Tensor) -> list[Tensor]:
        y = F.linear(activate(F.linear(rows, w1), problem.case.act), w2)
        return [y]

    return Built(forward, [rows, w1, w2], exact=False)


def _floor_bmm(problem: Problem) -> Built:
    """The same with the weights of all experts, on equal groups of rows."""
    case = problem.case
    groups = min(case.experts, case.tokens * case.top_k)
    size = case.tokens * case.top_k // groups
    rows = leaf(problem.x.repeat(case.top_k, 1)[: groups * size].view(groups, size, case.dim))
    w1, w2 = leaf(problem.w1[:groups]), leaf(problem.w2[:groups])

    def forward(x: Tensor) -> list[Tensor]:
        h = activate(torch.bmm(rows, w1.transpose(1, 2)), case.act)
        return [torch.bmm(h, w2.transpose(1, 2))]

    return Built(forward, [rows, w1, w2], exact=False)


def _ours(problem: Problem, backend: _Choice, compiled: bool = False) -> Built:
    case = problem.case
    if backend == "gather" and case.mode == "train":
        raise Unsuited("a few small products per token: without gradients only")
    if backend == "triton" and problem.x.device.type != "cuda":
        raise Unsuited("Triton kernels: GPU only")
    if backend == "dense" and case.tokens >= 1024 and case.experts > 8 * case.top_k:
        raise Unsuited("more than eight times the floating point operations of the others")
    experts = MLPExperts(case.experts, case.dim, case.hidden, act=case.act, bias=case.bias, backend=backend)
    router = TopKRouter(case.dim, case.experts, case.top_k, norm_topk_prob=case.top_k > 1 or case.experts == 1)
    with torch.no_grad():
        for parameter in experts.parameters():
            parameter.zero_()  # the biases
        for layer, weight in zip(experts.layers, (problem.w1, problem.w2), strict=True):
            cast(nn.Parameter, layer.weight).copy_(weight)
        router.weight.copy_(problem.gate)
    moe = MoE(router, experts, backend=backend).to(problem.x).train(case.mode == "train")
    if case.part == "layer":
        call = torch.compile(moe, mode="reduce-overhead") if compiled else moe

        def layer_forward(x: Tensor) -> list[Tensor]:
            if not moe.training:
                return [call(x)]
            y, routing = call(x, return_routing=True)
            return [y, routing.aux_loss]

        return Built(layer_forward, list(moe.parameters()))
    weights = leaf(problem.weights)

    def network(x: Tensor) -> Tensor:
        return _routed(experts, x, weights, problem.indices)

    run = torch.compile(network, mode="reduce-overhead") if compiled else network
    return Built(lambda x: [run(x)], [weights, *experts.parameters()])


def _routed(experts: MLPExperts, x: Tensor, weights: Tensor, indices: Tensor) -> Tensor:
    """What `MoE` does once the router has spoken."""
    backend = experts.select(x, indices.shape[1])
    if backend == "dense":
        gates = weights.new_zeros(x.shape[0], experts.num_experts).scatter_add(1, indices, weights)
        y: Tensor = experts.dense(x, gates)
        return y
    if backend == "gather":
        return experts.gather(x, weights, indices)
    return experts.routed(x, weights, make_plan(indices, experts.num_experts, dropless=True))


def _compiled(problem: Problem) -> Built:
    if problem.x.device.type != "cuda":
        raise Unsuited("torch.compile(mode='reduce-overhead') replays CUDA graphs: GPU only")
    return _ours(problem, "auto", compiled=True)


def reference(problem: Problem, x: Tensor) -> Tensor:
    """Expert after expert, as simple as can be: what every exact contender must equal."""
    case, weights, indices = problem.case, problem.weights, problem.indices
    if case.part == "layer":
        weights, indices = F.linear(x, problem.gate).softmax(-1).topk(case.top_k)
        weights = weights / weights.sum(-1, keepdim=True) if case.top_k > 1 else weights
    y = torch.zeros_like(x)
    for expert in range(case.experts):
        token, slot = (indices == expert).nonzero(as_tuple=True)
        out = F.linear(activate(F.linear(x[token], problem.w1[expert]), case.act), problem.w2[expert])
        y = y.index_add(0, token, out * weights[token, slot, None].to(x.dtype))
    return y


def parameters_of(module: nn.Module) -> list[Tensor]:
    return [p for p in module.parameters() if p.requires_grad]


def floors() -> list[Contender]:
    """What no mixture can beat by much: the same floating point operations without routing."""
    return [
        Contender("floor", "floor", _floor, "one dense network on N k rows"),
        Contender("floor_bmm", "floor", _floor_bmm, "equal groups, all experts' weights"),
    ]


def ours() -> list[Contender]:
    """Our layer as it comes, by each backend, and compiled."""
    backends: tuple[_Choice, ...] = ("dense", "grouped", "segment", "padded", "gather", "triton")
    return [
        Contender("ours", "ours", partial(_ours, backend="auto"), "backend chosen by shape"),
        *(Contender(f"ours/{name}", "ours", partial(_ours, backend=name)) for name in backends),
        Contender("ours/compiled", "ours", _compiled, "torch.compile(mode='reduce-overhead')"),
    ]
