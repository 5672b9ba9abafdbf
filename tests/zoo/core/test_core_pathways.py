"""Routed CNNs: equality with running every expert and masking, forced pathways, straight-through gradients, surgery."""

import copy
import pickle
import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from moezoo.zoo.core import (
    Gate,
    Routed,
    RoutedConv2d,
    StraightThroughRouter,
    SwitchRouter,
    TopKRouter,
    collect_routing,
    dispatch,
    make_plan,
    moeify,
)
from moezoo.zoo.core.dispatch import restore
from moezoo.zoo.core.pathways import Pathway, block_convs
from moezoo.zoo.core.statistics import parameter_counts
from torch import nn
from torch.nn import functional as F


class MeanGate(Gate):
    """Logits from the mean colour: enough to tell images apart."""

    def __init__(self, channels, experts):
        super().__init__(experts)
        self.linear = nn.Linear(channels, experts)
        nn.init.normal_(self.linear.weight, 0.0, 30.0)

    def forward(self, x, task_id=None):
        return self.linear(x.mean((2, 3)))


class Block(nn.Module):
    def __init__(self, inputs, width, stride, groups=1):
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, width, 3, stride, 1, bias=False)
        self.norm1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, 1, 1, groups=groups)
        self.shortcut = nn.Conv2d(inputs, width, 1, stride)

    def forward(self, x):
        return F.relu(self.conv2(F.relu(self.norm1(self.conv1(x)))) + self.shortcut(x))


def network():
    return nn.Sequential(
        nn.Conv2d(3, 6, 3, padding=1), Block(6, 8, 1, groups=4), Block(8, 12, 2), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
        nn.Linear(12, 5),
    )  # fmt: skip


def routed(experts, **options):
    torch.manual_seed(0)
    return moeify(network(), StraightThroughRouter(3, experts, MeanGate(3, experts)), **options)


class MaskAll(nn.Module):
    """AdvMoE's own way: every expert on every image, then the chosen channels, weighted where there are weights."""

    def __init__(self, conv, expert, weight=None):
        super().__init__()
        self.conv, self.expert, self.gate = conv, expert, weight

    def forward(self, x):
        y = self.conv.dense(x)
        mask = F.one_hot(self.expert, y.shape[1]).to(y.dtype)
        mask = mask if self.gate is None else mask * self.gate[:, None]
        return (y * mask[..., None, None, None]).sum(1)


def mask_all(module, expert, weight=None):
    """The network with shared parameters, every routed convolution replaced by the naive one."""
    body = copy.copy(module.body)
    body._modules = dict(body._modules)
    for path, part in module.body.named_modules():
        if isinstance(part, RoutedConv2d):
            *parents, name = path.split(".")
            owner = body
            for parent in parents:
                inner = copy.copy(owner._modules[parent])
                inner._modules = dict(inner._modules)
                owner._modules[parent] = inner
                owner = inner
            owner._modules[name] = MaskAll(part, expert, weight)
    return body


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("used", [1, 2, 4])
@pytest.mark.parametrize("experts", [1, 2, 4])
def test_a1_sorted_pathways_equal_masking(experts, used, memory_format, training):
    """Spec A1: outputs to 1e-6, gradients to 1e-5; with `used` < `experts` some experts are idle."""
    module = routed(experts).train(training).to(memory_format=memory_format)
    torch.manual_seed(1)
    x = torch.randn(9, 3, 10, 10).to(memory_format=memory_format).requires_grad_()
    expert = torch.randperm(9) % min(used, experts)
    with collect_routing(module, expert):
        y = module(x)
    body = mask_all(module, expert)
    body.train(training)
    want = body(x)
    torch.testing.assert_close(y, want, rtol=0, atol=1e-6)
    inputs = [x, *module.body.parameters()]
    cotangent = torch.randn_like(want)
    for a, b in zip(*(torch.autograd.grad(out, inputs, cotangent) for out in (y, want)), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


def test_batch_statistics_are_those_of_all_images_in_training_and_unmoved_in_evaluation():
    module = routed(3).double().train()
    x = torch.randn(20, 3, 8, 8, dtype=torch.float64)
    expert = torch.arange(20) % 3
    seen = []
    norm = module.body[1].norm1
    norm.register_forward_hook(lambda _, inputs, __: seen.append(inputs[0]))
    with collect_routing(module, expert):
        module(x)
    assert len(seen) == 1 and len(seen[0]) == 20
    torch.testing.assert_close(norm.running_mean, 0.1 * seen[0].mean((0, 2, 3)))
    seen.clear()
    before = norm.running_mean.clone()
    with collect_routing(module.eval(), expert):
        module(x)
    assert [len(group) for group in seen] == [7, 7, 6]  # each expert's images through the whole network
    assert torch.equal(norm.running_mean, before)


@settings(max_examples=20, deadline=None)
@given(experts=st.integers(1, 5), batch=st.integers(0, 9), seed=st.integers(0, 99))
def test_each_image_goes_through_the_plain_network_of_its_expert(experts, batch, seed):
    torch.manual_seed(seed)
    plain = [network().eval().double() for _ in range(experts)]
    for other in plain[1:]:  # alike but for what is routed
        state = {k: v for k, v in plain[0].state_dict().items() if k.rpartition(".")[0] not in block_convs(other)}
        other.load_state_dict(state, strict=False)
    module = moeify(copy.deepcopy(plain[0]), StraightThroughRouter(3, experts, MeanGate(3, experts)).double()).eval()
    for name in block_convs(plain[0]):
        layers = [net.get_submodule(name) for net in plain]
        conv = module.body.get_submodule(name)
        conv.weight.data.copy_(torch.cat([layer.weight for layer in layers]))
        if conv.bias is not None:
            conv.bias.data.copy_(torch.cat([layer.bias for layer in layers]))
    x = torch.randn(batch, 3, 7, 9, dtype=torch.float64)
    with collect_routing(module) as records:
        y = module(x)
    expert = records["router"].indices[:, 0]
    assert y.shape == (batch, 5)
    assert torch.equal(expert, module.router.gate(x).argmax(-1))
    for i in range(batch):
        torch.testing.assert_close(y[i : i + 1], plain[expert[i]](x[i : i + 1]))


def test_a7_the_order_of_the_batch_does_not_matter():
    module = routed(3).eval()
    x = torch.randn(40, 3, 8, 8)
    order = torch.randperm(40)
    with collect_routing(module) as records:
        y = module(x)
    assert records["router"].indices.unique().numel() == 3
    torch.testing.assert_close(module(x[order]), y[order], rtol=0, atol=1e-6)


@pytest.mark.parametrize("training", [True, False])
def test_weighted_changes_no_value_and_gives_the_gate_the_gradient_of_the_chosen_score(training):
    module = routed(3, weighted=True).double().train(training)
    x = torch.randn(12, 3, 8, 8, dtype=torch.float64)
    with collect_routing(module) as records:
        y = module(x)
    plain = routed(3).double().train(training)
    torch.testing.assert_close(y, plain(x))
    record = records["router"]
    score = module.router.gate(x).softmax(-1).gather(1, record.indices)[:, 0]
    want = mask_all(module, record.indices[:, 0], 1 + score - score.detach())
    want.train(training)
    parameters = list(module.router.parameters())
    cotangent = torch.randn_like(y)
    found = torch.autograd.grad(y, parameters, cotangent)
    assert all(gradient.abs().max() > 0 for gradient in found)
    for a, b in zip(found, torch.autograd.grad(want(x), parameters, cotangent), strict=True):
        torch.testing.assert_close(a, b)
    gradients = torch.autograd.grad(plain(x).sum(), list(plain.router.parameters()), allow_unused=True)
    assert gradients == (None, None)


def test_forced_pathways_keep_the_routers_own_logits():
    module = routed(3).eval()
    x = torch.randn(10, 3, 8, 8)
    with collect_routing(module) as free:
        module(x)
    with collect_routing(module, torch.full((10,), 2)) as forced:
        y = module(x)
    assert torch.equal(free["router"].logits, forced["router"].logits)
    assert (forced["router"].indices == 2).all() and (forced["router"].weights == 1).all()
    body = mask_all(module, torch.full((10,), 2))
    torch.testing.assert_close(y, body.eval()(x))
    assert not torch.allclose(y, module(x))  # outside of the block the router decides again
    with (
        pytest.raises(ValueError, match="2 images have an expert outside 0 to 2"),
        collect_routing(module, torch.tensor([0, 1, 2, 3, -1])),
    ):
        module(x[:5])
    with (
        pytest.raises(ValueError, match=r"expert has shape \[4\], expected one per image: \[10\]"),
        collect_routing(module, torch.zeros(4, dtype=torch.int64)),
    ):
        module(x)


def test_nothing_stays_of_a_call_and_copies_are_independent():
    module = routed(2).eval()
    x = torch.randn(6, 3, 8, 8, requires_grad=True)
    with collect_routing(module):
        y = module(x)
    assert module._call is None and module.pathway.rows is None and module.pathway.gate is None
    clones = copy.deepcopy(module), pickle.loads(pickle.dumps(module))
    for clone in clones:
        torch.testing.assert_close(clone(x), y)
        assert clone.pathway is not module.pathway
        assert {id(m.pathway) for m in clone.modules() if isinstance(m, RoutedConv2d)} == {id(clone.pathway)}
    with pytest.raises(RuntimeError, match="outside of its router"):
        module.body(x)
    module.body[2].register_forward_pre_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError), collect_routing(module):
        module(x)
    assert module._call is None and module.pathway.rows is None


def test_rows_come_back_in_their_memory_format_and_group_sizes_are_read_once(monkeypatch):
    plan = make_plan(torch.tensor([[1], [0], [1], [0]]), 2, dropless=True)
    x = torch.randn(4, 3, 5, 5).to(memory_format=torch.channels_last).requires_grad_()
    y = restore(dispatch(x, plan), plan)
    assert torch.equal(x, y) and y.is_contiguous(memory_format=torch.channels_last)
    (gradient,) = torch.autograd.grad((y * x.detach()).sum(), x)
    assert torch.equal(gradient, x) and gradient.is_contiguous(memory_format=torch.channels_last)
    module, calls = routed(2).train(), []
    read = torch.Tensor.tolist
    monkeypatch.setattr(torch.Tensor, "tolist", lambda tensor: calls.append(1) or read(tensor))
    with collect_routing(module, torch.tensor([0, 1, 1])):
        module(torch.randn(3, 3, 8, 8))
    assert len(calls) == 1


def test_moeify_leaves_stem_shortcuts_and_heads_and_can_keep_what_was_learnt():
    names = ["1.conv1", "1.conv2", "2.conv1", "2.conv2"]
    assert block_convs(network()) == names
    plain = network().eval()
    x = torch.randn(4, 3, 8, 8)
    want = plain(x)
    module = moeify(plain, StraightThroughRouter(3, 2, MeanGate(3, 2)), upcycle=True)
    assert [n for n, m in module.body.named_modules() if isinstance(m, RoutedConv2d)] == names
    assert not module.body[1].conv1.training
    torch.testing.assert_close(module.eval()(x), want)
    assert module.body[2].conv1.weight.shape == (24, 8, 3, 3)
    fresh = moeify(nn.Conv2d(30, 40, 3), StraightThroughRouter(30, 8, MeanGate(30, 8))).body
    assert isinstance(fresh, RoutedConv2d)
    assert fresh.weight.std().item() == pytest.approx((2 / (40 * 9)) ** 0.5, rel=0.02)
    assert not fresh.bias.any()
    own = moeify(network(), StraightThroughRouter(3, 2, MeanGate(3, 2)), lambda name, conv: conv.kernel_size == (1, 1))
    assert [n for n, m in own.body.named_modules() if isinstance(m, RoutedConv2d)] == ["1.shortcut", "2.shortcut"]


def test_an_image_touches_the_parameters_of_one_pathway():
    module = routed(4)
    every = sum(p.numel() for p in module.parameters())
    experts = sum(p.numel() for m in module.modules() if isinstance(m, RoutedConv2d) for p in m.parameters())
    assert parameter_counts(module) == {"total": every, "active": every - experts * 3 // 4}


def test_mistakes_are_named():
    router = StraightThroughRouter(3, 2, MeanGate(3, 2))
    with pytest.raises(ValueError, match="Linear has no convolution to route"):
        moeify(nn.Linear(2, 2), router)

    class Padded(nn.Conv2d):
        pass

    with pytest.raises(ValueError, match="1 is a Padded: only plain"):
        moeify(nn.Sequential(nn.Conv2d(3, 3, 3), Padded(3, 3, 3)), router)
    with pytest.raises(ValueError, match="padding_mode='reflect'"):
        moeify(nn.Conv2d(3, 3, 3, padding=1, padding_mode="reflect"), router)
    with pytest.raises(ValueError, match="top_k=2 must be 1"):
        Routed(TopKRouter(3, 4, 2), network(), Pathway())


def test_any_router_of_one_slot_will_do():
    module = moeify(network(), SwitchRouter(3, 2, None, gate=MeanGate(3, 2)), weighted=True).eval()
    x = torch.randn(5, 3, 8, 8)
    with collect_routing(module) as records:
        y = module(x)
    record = records["router"]
    body = mask_all(module, record.indices[:, 0], record.weights[:, 0])
    torch.testing.assert_close(y, body.eval()(x))


COMPILE = """
import torch
from torch import nn
from moezoo.zoo.core import Gate, StraightThroughRouter, collect_routing, moeify
class MeanGate(Gate):
    def __init__(self):
        super().__init__(2)
        self.linear = nn.Linear(3, 2)
    def forward(self, x, task_id=None):
        return self.linear(x.mean((2, 3)))
torch.manual_seed(0)
conv = lambda: nn.Conv2d(3, 3, 3, padding=1)
net = nn.Sequential(conv(), nn.BatchNorm2d(3), conv(), nn.ReLU(), conv())
module = moeify(net, StraightThroughRouter(3, 2, MeanGate()), weighted=True).double()
x = torch.randn(8, 3, 6, 6, dtype=torch.float64, requires_grad=True)
def call(x, expert=None):
    with collect_routing(module, expert) as records:
        return module(x), records["router"].logits
for training, expert in ((True, None), (False, None), (False, torch.arange(8) % 2)):
    module.train(training)
    results = []
    for run in (torch.compile(call, fullgraph=True, backend="aot_eager"), call):
        y, logits = run(x, expert)
        results.append([y, logits, *torch.autograd.grad(y.square().sum(), [x, *module.parameters()])])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b)
"""


def test_compiles_to_one_graph():
    done = subprocess.run([sys.executable, "-c", COMPILE], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
