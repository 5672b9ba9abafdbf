"""Low-rank experts throughout a network: one forward for all rows equals a loop that switches one on at a time."""

import copy

import pytest
import torch
from moezoo.zoo.core import LoRALinear
from moezoo.zoo.core.adapters import adapt
from torch import nn


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(5, 8), nn.Linear(8, 4)

    def forward(self, x):
        return self.second(torch.tanh(self.first(x)))


def adapted(experts=4, rank=2, targets=("first", "second"), dropout=0.0):
    torch.manual_seed(0)
    net = Net().double()
    adapters = adapt(net, targets, experts, rank, alpha=3.0, dropout=dropout)
    for parameter in adapters.expert_parameters():
        nn.init.normal_(parameter)
    return net, adapters


def merged(net, expert):
    """The network with one expert merged into its base, as a plain network."""
    alone = Net().double()
    for name in ("first", "second"):
        layer = getattr(net, name)
        weight, bias = layer.weight, next(base.bias for base in layer.modules() if isinstance(base, nn.Linear))
        delta = layer.experts.scale * layer.experts.up.weight[expert] @ layer.experts.down.weight[expert]
        getattr(alone, name).load_state_dict({"weight": weight + (delta if expert >= 0 else 0), "bias": bias})
    return alone


@pytest.mark.parametrize("training", [True, False])
def test_one_forward_equals_a_loop_over_adapters_with_its_gradients(training):
    net, adapters = adapted()
    net.train(training)
    x = torch.randn(11, 3, 5, dtype=torch.float64, requires_grad=True)
    indices = torch.randint(-1, 4, (11,))
    cotangent = torch.randn(11, 3, 4, dtype=torch.float64)
    with adapters.choice.choosing(indices):
        y = net(x)
    parameters = list(adapters.expert_parameters())
    got = torch.autograd.grad((y * cotangent).sum(), [x, *parameters])
    loop = torch.zeros_like(y)
    for e in range(-1, 4):  # the loop: one expert on at a time, all rows it has
        rows = (indices == e).nonzero()[:, 0]
        with adapters.choice.choosing(torch.full((len(rows),), e)):
            loop = loop.index_add(0, rows, net(x[rows]))
    want = torch.autograd.grad((loop * cotangent).sum(), [x, *parameters])
    torch.testing.assert_close(y, loop)
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b)


def test_every_row_has_its_own_merged_network():
    net, adapters = adapted()
    x, indices = torch.randn(9, 5, dtype=torch.float64), torch.arange(9) % 4
    with adapters.choice.choosing(indices):
        y = net(x)
    for row, expert in enumerate(indices.tolist()):
        torch.testing.assert_close(y[row], merged(net, expert)(x[row]))


def test_weights_mix_per_row_and_per_layer():
    net, adapters = adapted()
    x, indices = torch.randn(6, 5, dtype=torch.float64), torch.arange(6) % 4
    one_hot = torch.nn.functional.one_hot(indices, 4).double()
    with adapters.choice.choosing(indices):
        want = net(x)
    with adapters.choice.choosing(weights=one_hot):
        torch.testing.assert_close(net(x), want)
    with adapters.choice.choosing(weights=one_hot[:, None].expand(-1, adapters.num_layers, -1)):
        torch.testing.assert_close(net(x), want)
    layerwise = torch.stack([one_hot, torch.zeros_like(one_hot)], 1)  # the second layer alone stays as it was
    with adapters.choice.choosing(weights=layerwise):
        h = torch.tanh(net.first(x))
        torch.testing.assert_close(net(x), net.second.base(h))


def test_sets_stack_and_rows_may_be_sorted():
    net, adapters = adapted()
    more = adapt(net, ["first"], 2, 1, alpha=1.0)
    for parameter in more.expert_parameters():
        nn.init.normal_(parameter)
    assert isinstance(net.first.base, LoRALinear) and net.first.weight is net.first.base.base.weight
    x, one, two = torch.randn(6, 5, dtype=torch.float64), torch.arange(6) % 4, torch.arange(6) % 2
    with adapters.choice.choosing(one), more.choice.choosing(two):
        y = net(x)
        order = torch.randperm(6)
        with adapters.choice.taking(order), more.choice.taking(order):
            torch.testing.assert_close(net(x[order]), y[order])
        torch.testing.assert_close(net(x), y)
    with adapters.choice.choosing(one):
        assert not torch.allclose(net(x), y), "the second set is off"
    with pytest.raises(RuntimeError), adapters.choice.choosing(one):
        raise RuntimeError
    torch.testing.assert_close(net(x), merged(net, -1)(x))


def test_a_copy_chooses_for_itself():
    net, adapters = adapted()
    pair = copy.deepcopy(nn.ModuleList([net, adapters]))
    x = torch.randn(3, 5, dtype=torch.float64)
    with pair[1].choice.choosing(torch.tensor([0, 1, 2])):
        assert not torch.allclose(pair[0](x), net(x))
    assert [id(p) for p in pair[1].expert_parameters()] != [id(p) for p in adapters.expert_parameters()]
    assert {id(p) for p in pair[1].expert_parameters()} <= {id(p) for p in pair[0].parameters()}


def test_a_target_that_is_not_there_is_named():
    with pytest.raises(ValueError, match=r"target 'v_proj' names no linear layer; the network has first, second"):
        adapt(Net(), ["first", "v_proj"], 2, 1, 1.0)
    with pytest.raises(ValueError, match=r"the network has none \(low-rank experts stand beside nn.Linear"):
        adapt(nn.Sequential(nn.Conv1d(3, 3, 1)), ["c_attn"], 2, 1, 1.0)
