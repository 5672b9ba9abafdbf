"""Routed convolutions: one plan for many layers, memory formats, the packed weight."""

import pytest
import torch
from moezoo.zoo.core import combine, dispatch, make_plan
from moezoo.zoo.core.experts import ConvExperts
from torch import nn
from torch.nn import functional as F


class Network(nn.Module):
    """Three routed convolutions with what stands between them in a CNN."""

    def __init__(self, experts):
        super().__init__()
        self.first = ConvExperts(experts, 3, 8, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(8)
        self.second = ConvExperts(experts, 8, 8, 3, padding=1, stride=2)
        self.third = ConvExperts(experts, 8, 5, 1)

    def forward(self, x, plan):
        h = F.relu(self.norm(self.first(x, plan)))
        return self.third(F.relu(self.second(h, plan)), plan)


def everything_then_mask(network, x, expert):
    """AdvMoE's own way: every expert on every image, then the chosen channels."""

    def layer(conv, h):
        weight = conv.weight.unflatten(0, (conv.num_experts, -1))
        bias = None if conv.bias is None else conv.bias.unflatten(0, (conv.num_experts, -1))
        each = [
            F.conv2d(h, weight[e], None if bias is None else bias[e], conv.stride, conv.padding)
            for e in range(conv.num_experts)
        ]
        return sum(y * (expert == e).to(y.dtype).view(-1, 1, 1, 1) for e, y in enumerate(each))

    h = F.relu(network.norm(layer(network.first, x)))
    return layer(network.third, F.relu(layer(network.second, h)))


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("used", [1, 2, 4])
@pytest.mark.parametrize("num", [1, 2, 4])
def test_one_plan_routes_a_whole_network(num, used, memory_format):
    torch.manual_seed(0)
    network = Network(num).double().to(memory_format=memory_format)  # a 5-D weight could not take channels_last
    x = torch.randn(9, 3, 6, 6, dtype=torch.float64).to(memory_format=memory_format).requires_grad_()
    expert = torch.arange(9) % min(used, num)  # the other experts stay idle
    plan = make_plan(expert[:, None], num, dropless=True)
    sorted_output = network(dispatch(x, plan), plan)
    assert sorted_output.is_contiguous(memory_format=memory_format)
    y = combine(sorted_output, torch.ones(9, 1, dtype=torch.float64), plan)
    want = everything_then_mask(network, x, expert)
    torch.testing.assert_close(y, want)
    inputs = [x, *network.parameters()]
    cotangent = torch.randn_like(want)
    for a, b in zip(*(torch.autograd.grad(out, inputs, cotangent) for out in (y, want)), strict=True):
        torch.testing.assert_close(a, b)


def test_one_expert_alone_convolves_what_it_is_given():
    """No copy of the rows: the very tensor reaches the convolution."""
    experts = ConvExperts(3, 2, 4, 3)
    plan = make_plan(torch.full((5, 1), 1), 3, dropless=True)
    seen = []
    original = experts._convolve
    experts._convolve = lambda x, *rest: seen.append(x) or original(x, *rest)
    x = torch.randn(5, 2, 4, 4)
    y = experts(x, plan)
    assert len(seen) == 1 and seen[0] is x
    torch.testing.assert_close(y, F.conv2d(x, experts.weight[4:8], experts.bias[4:8]))


def test_dense_is_one_wide_convolution_of_the_packed_weight():
    experts = ConvExperts(3, 2, 4, 3, padding=1)
    x = torch.randn(5, 2, 4, 4)
    torch.testing.assert_close(experts.dense(x).flatten(1, 2), F.conv2d(x, experts.weight, experts.bias, padding=1))


def test_causal_convolution_sees_no_future():
    torch.manual_seed(0)
    experts = ConvExperts(2, 3, 4, 3, padding="causal", dilation=2, dims=1)
    plan = make_plan(torch.tensor([[0], [1]]), 2, dropless=True)
    x = torch.randn(2, 3, 10)
    later = x.clone()
    later[..., 6:] += 1
    assert experts(x, plan).shape == (2, 4, 10)
    changed = (experts(x, plan) - experts(later, plan)).abs().amax((0, 1)) > 1e-6
    assert changed.tolist() == [False] * 6 + [True] * 4


def test_a_batch_without_any_expert_is_zero_of_the_right_size():
    experts = ConvExperts(2, 3, 4, 3, stride=2)
    plan = make_plan(torch.full((5, 1), -1), 2)
    y = experts(torch.randn(5, 3, 9, 9), plan)
    assert y.shape == (5, 4, 4, 4) and (y == 0).all()


def test_bfloat16_autocast():
    torch.manual_seed(0)
    experts, x = ConvExperts(2, 3, 4, 3), torch.randn(6, 3, 8, 8)
    plan = make_plan(torch.tensor([[0], [1], [1], [0], [1], [1]]), 2, dropless=True)
    exact = experts(x, plan)
    with torch.autocast("cpu", torch.bfloat16):
        y = experts(x, plan)
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y.float(), exact, rtol=0.05, atol=0.05)


def test_mistakes_are_named():
    with pytest.raises(ValueError, match="multiples of groups=2"):
        ConvExperts(2, 3, 4, 3, groups=2)
    with pytest.raises(ValueError, match=r"kernel_size=\(3, 3\) must be a number or 1"):
        ConvExperts(2, 3, 4, (3, 3), dims=1)
    with pytest.raises(ValueError, match="needs dims=1"):
        ConvExperts(2, 3, 4, 3, padding="causal")
    with pytest.raises(ValueError, match="stride 1"):
        ConvExperts(2, 3, 4, 3, padding="same", stride=2)
