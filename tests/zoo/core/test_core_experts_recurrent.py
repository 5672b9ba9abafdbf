"""Recurrent experts against torch's own LSTM and GRU."""

import pytest
import torch
from moezoo.zoo.core import make_plan
from moezoo.zoo.core.experts import RecurrentExperts
from torch import nn


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU])
def test_experts_from_modules_equal_them_in_values_and_gradients(kind, bias):
    torch.manual_seed(0)
    modules = [kind(5, 7, bias=bias, batch_first=True).double() for _ in range(3)]
    experts = RecurrentExperts.from_modules(modules)
    x = torch.randn(6, 9, 5, dtype=torch.float64, requires_grad=True)
    want = torch.stack([m(x)[0] for m in modules], 1)
    got = experts.dense(x)
    torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-9)
    last = RecurrentExperts.from_modules(modules, last=True).dense(x)
    torch.testing.assert_close(last, want[:, :, -1], rtol=1e-9, atol=1e-9)
    cotangent = torch.randn_like(want)
    got_x, *got_grads = torch.autograd.grad(got, [x, *experts.parameters()], cotangent)
    want.backward(cotangent)
    torch.testing.assert_close(got_x, x.grad, rtol=1e-9, atol=1e-9)
    names = [name for name, _ in experts.named_parameters()]
    for name, grad in zip(names, got_grads, strict=True):
        layer, parameter = name.split(".")
        theirs = f"{parameter}_{'ih' if layer == 'input' else 'hh'}_l0"
        torch.testing.assert_close(grad, torch.stack([getattr(m, theirs).grad for m in modules]), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU])
@pytest.mark.parametrize("skewed", [False, True])  # padded together, and one after another
def test_routed_sequences_go_through_their_own_module(kind, skewed):
    torch.manual_seed(0)
    modules = [kind(5, 7, batch_first=True).double() for _ in range(4)]
    experts = RecurrentExperts.from_modules(modules)
    indices = torch.tensor([0, 0, 0, 0, 0, 0, 0, 2] if skewed else [3, 1, 0, 2, 1, 0, 3, 2])
    plan = make_plan(indices[:, None], 4)
    x = torch.randn(8, 6, 5, dtype=torch.float64)
    y = experts(x[plan.token], plan)
    for row, token in enumerate(plan.token.tolist()):
        torch.testing.assert_close(y[row], modules[int(indices[token])](x[token : token + 1])[0][0])


@pytest.mark.parametrize("kind", ["lstm", "gru"])
def test_large_inputs_saturate_and_stay_finite(kind):
    torch.manual_seed(0)
    experts = RecurrentExperts(2, 3, 4, kind)
    x = (1e4 * torch.randn(2, 5, 3)).requires_grad_()
    y = experts.dense(x)
    assert y.abs().max() <= 1
    assert all(torch.isfinite(g).all() for g in torch.autograd.grad(y.sum(), [x, *experts.parameters()]))


@pytest.mark.parametrize("kind", ["lstm", "gru"])
def test_bfloat16_autocast(kind):
    torch.manual_seed(0)
    experts, x = RecurrentExperts(3, 4, 8, kind), torch.randn(5, 6, 4)
    exact = experts.dense(x)
    with torch.autocast("cpu", torch.bfloat16):
        y = experts.dense(x)
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y.float(), exact, rtol=0.05, atol=0.03)
    y.float().sum().backward()
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in experts.parameters())


def test_gradients_are_the_same_when_asked_for_twice():
    """The backward pass may not spend what the forward pass kept."""
    experts = RecurrentExperts(2, 3, 4)
    y = experts.dense(torch.randn(2, 5, 3)).square().sum()
    first = torch.autograd.grad(y, list(experts.parameters()), retain_graph=True)
    for a, b in zip(first, torch.autograd.grad(y, list(experts.parameters())), strict=True):
        assert torch.equal(a, b)


def test_mistakes_are_named():
    with pytest.raises(ValueError, match="hidden=0"):
        RecurrentExperts(2, 3, 0)
    with pytest.raises(ValueError, match="all of one size"):
        RecurrentExperts.from_modules([nn.LSTM(3, 4), nn.LSTM(3, 5)])
    with pytest.raises(ValueError, match="all of one size"):
        RecurrentExperts.from_modules([])
    with pytest.raises(ValueError, match="one layer"):
        RecurrentExperts.from_modules([nn.GRU(3, 4, num_layers=2)])
