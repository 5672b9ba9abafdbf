"""Low-rank experts: identities of the literature, and a linear layer with experts beside it."""

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from moezoo.zoo.core import MoE, TopKRouter
from moezoo.zoo.core.experts import LoRAExperts, LoRALinear
from torch import nn
from torch.nn import functional as F


def trained(experts):
    """B starts at zero; give it values."""
    nn.init.normal_(experts.up.weight)
    return experts


def test_a_new_expert_changes_nothing():
    x = torch.randn(4, 6)
    layer = LoRALinear(nn.Linear(6, 5), 3, 2, alpha=4.0)
    for kw in ({}, {"weights": torch.rand(4, 3)}, {"indices": torch.tensor([0, 1, 2, 0])}):
        assert torch.equal(layer(x, **kw), layer.base(x))


@pytest.mark.parametrize("top_k", [2, 5])
def test_a_mixture_of_low_ranks_is_one_lora_with_gated_blocks(top_k):
    torch.manual_seed(0)
    experts = trained(LoRAExperts(5, 12, 7, rank=4, alpha=4.0))
    moe = MoE(TopKRouter(12, 5, top_k), experts, backend="segment")
    x = torch.randn(30, 12)
    y, routing = moe(x, return_routing=True)
    a = experts.down.weight.reshape(5 * 4, 12)
    b = experts.up.weight.permute(1, 0, 2).reshape(7, 5 * 4)
    gates = routing.dense_weights().repeat_interleave(4, dim=1)
    torch.testing.assert_close(y, ((x @ a.T) * gates) @ b.T, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("backend", ["auto", "segment", "dense"])
def test_smora_is_rank_one_experts(backend):
    """SMoRA: y = B diag(g) A x, g the top-k over the R ranks of one LoRA."""
    torch.manual_seed(0)
    ranks, k = 16, 4
    experts = trained(LoRAExperts(ranks, 12, 7, rank=1, alpha=1.0))
    moe = MoE(TopKRouter(12, ranks, k), experts, backend=backend)
    x = torch.randn(30, 12)
    y, routing = moe(x, return_routing=True)
    a, b = experts.down.weight[:, 0], experts.up.weight[:, :, 0].T
    g = torch.zeros(30, ranks).scatter(1, routing.indices, routing.weights)
    assert ((g > 0).sum(1) == k).all()
    want = torch.stack([b @ torch.diag(row) @ a @ token for row, token in zip(g, x, strict=True)])
    torch.testing.assert_close(y, want, rtol=1e-5, atol=1e-5)


@st.composite
def calls(draw):
    batch = draw(st.lists(st.integers(0, 4), min_size=1, max_size=3))
    named = draw(st.integers(1, len(batch)))
    return batch, named, draw(st.integers(1, 4)), draw(st.integers(1, 2)), draw(st.integers(0, 999))


@settings(max_examples=80, deadline=None)
@given(call=calls(), select=st.sampled_from(["dense", "segment"]))
def test_rows_by_index_equal_one_adapter_at_a_time(call, select):
    batch, named, num, rank, seed = call
    torch.manual_seed(seed)
    layer = LoRALinear(nn.Linear(5, 3), num, rank, alpha=3.0).double()
    trained(layer.experts)
    layer.experts.select = lambda *_: select
    x = torch.randn(*batch, 5, dtype=torch.float64, requires_grad=True)
    indices = torch.randint(-1, num + 1, batch[:named])  # also such as name no expert
    want = layer.base(x)
    for e in range(num):
        delta = 3.0 / rank * x @ layer.experts.down.weight[e].T @ layer.experts.up.weight[e].T
        want = want + delta * (indices == e).view(*indices.shape, *[1] * (x.dim() - named))
    got = layer(x, indices=indices)
    torch.testing.assert_close(got, want)
    inputs, cotangent = [x, *layer.experts.parameters()], torch.randn_like(want)
    for a, b in zip(*(torch.autograd.grad(y, inputs, cotangent) for y in (got, want)), strict=True):
        torch.testing.assert_close(a, b)


def test_weights_may_be_per_token_or_per_sequence():
    torch.manual_seed(0)
    layer = LoRALinear(nn.Linear(6, 5), 3, 2, alpha=4.0)
    trained(layer.experts)
    x, weights = torch.randn(2, 4, 6), torch.randn(2, 3)
    each = layer.experts.dense(x.view(-1, 6)).view(2, 4, 3, 5)
    want = layer.base(x) + torch.einsum("be,bteo->bto", weights, each)
    torch.testing.assert_close(layer(x, weights=weights), want)
    torch.testing.assert_close(layer(x, weights=weights[:, None].expand(2, 4, 3)), want)
    one_hot = F.one_hot(torch.tensor([2, 0]), 3).float()
    torch.testing.assert_close(layer(x, weights=one_hot), layer(x, indices=torch.tensor([2, 0])))


def test_a_row_does_not_depend_on_the_rows_beside_it():
    torch.manual_seed(0)
    layer = LoRALinear(nn.Linear(16, 16), 6, 4, alpha=4.0)
    trained(layer.experts)
    x, indices = torch.randn(32, 20, 16), torch.arange(32) % 6
    together = layer(x, indices=indices)
    alone = torch.cat([layer(x[i : i + 1], indices=indices[i : i + 1]) for i in range(32)])
    torch.testing.assert_close(together, alone, rtol=1e-5, atol=1e-5)


def test_all_adapters_train_in_one_pass_and_the_base_stays():
    torch.manual_seed(0)
    base = nn.Linear(6, 5)
    layer = LoRALinear(base, 3, 2, alpha=4.0, dropout=0.1).train()
    trained(layer.experts)
    layer(torch.randn(8, 6), indices=torch.tensor([0, 1, 0, 1, 0, 1, 0, 1])).square().sum().backward()
    assert base.weight.grad is None and base.bias.grad is None
    grad = layer.experts.down.weight.grad.flatten(1).norm(dim=1)
    assert (grad[:2] > 0).all() and grad[2] == 0
    assert LoRALinear(nn.Linear(6, 5), 3, 2, 4.0, freeze_base=False).base.weight.requires_grad


def test_merging_is_exact_and_undone_bit_by_bit():
    torch.manual_seed(0)
    layer = LoRALinear(nn.Linear(6, 5), 3, 2, alpha=4.0)
    trained(layer.experts)
    x, before = torch.randn(7, 6), layer.base.weight.clone()
    want = layer(x, indices=torch.full((7,), 1))
    layer.merge(1)
    torch.testing.assert_close(layer(x), want)
    torch.testing.assert_close(copy.deepcopy(layer)(x), want)
    with pytest.raises(ValueError, match="unmerge"):
        layer(x, indices=torch.zeros(7, dtype=torch.int64))
    with pytest.raises(ValueError, match="merged already"):
        layer.merge(0)
    layer.unmerge()
    assert torch.equal(layer.base.weight, before)
    with pytest.raises(ValueError, match="no expert"):
        layer.unmerge()


def test_the_state_has_plain_names_and_round_trips():
    layer = LoRALinear(nn.Linear(6, 5), 3, 2, alpha=4.0)
    trained(layer.experts)
    assert {k: tuple(v.shape) for k, v in layer.state_dict().items()} == {
        "base.weight": (5, 6),
        "base.bias": (5,),
        "experts.down.weight": (3, 2, 6),
        "experts.up.weight": (3, 5, 2),
    }
    twin = LoRALinear(nn.Linear(6, 5), 3, 2, alpha=4.0)
    twin.load_state_dict(layer.state_dict())
    x = torch.randn(2, 6)
    assert torch.equal(twin(x, weights=torch.ones(2, 3)), layer(x, weights=torch.ones(2, 3)))


def test_dropout_is_of_the_input_in_training_only():
    experts = trained(LoRAExperts(2, 400, 3, 4, alpha=4.0, dropout=0.5))
    x = torch.ones(1, 400)
    kept = F.linear(x, experts.down.weight[0])
    assert not torch.allclose(experts.dense(x), experts.dense(x))
    assert torch.equal(experts.eval().dense(x), experts.dense(x))
    assert torch.allclose(experts.dense(x)[:, 0], kept @ experts.up.weight[0].T, atol=1e-4)


def test_bfloat16_autocast():
    torch.manual_seed(0)
    layer = LoRALinear(nn.Linear(8, 16), 4, 8, alpha=8.0)
    trained(layer.experts)
    x, indices = torch.randn(20, 8), torch.arange(20) % 4
    for kw in ({"indices": indices}, {"weights": torch.rand(20, 4)}):
        exact = layer(x, **kw)
        with torch.autocast("cpu", torch.bfloat16):
            y = layer(x, **kw)
        assert y.dtype == torch.bfloat16
        torch.testing.assert_close(y.float(), exact, rtol=0.05, atol=0.1)


def test_mistakes_are_named():
    with pytest.raises(ValueError, match="rank=0"):
        LoRAExperts(2, 4, 4, 0, alpha=1.0)
    with pytest.raises(ValueError, match=r"dropout=1\.5"):
        LoRAExperts(2, 4, 4, 1, alpha=1.0, dropout=1.5)
    layer = LoRALinear(nn.Linear(4, 4), 2, 1, alpha=1.0)
    x = torch.randn(3, 4)
    with pytest.raises(ValueError, match="not both"):
        layer(x, weights=torch.ones(3, 2), indices=torch.zeros(3, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"indices \[2\]"):
        layer(x, indices=torch.zeros(2, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"weights \[2, 2\]"):
        layer(x, weights=torch.ones(2, 2))
    with pytest.raises(ValueError, match="expert=2"):
        layer.merge(2)
