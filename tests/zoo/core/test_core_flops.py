"""The count of operations: what fused and routed products cost, to the digit."""

import pytest
import torch
from moezoo.zoo.core import DenseRouter, MLPExperts, MoE, RecurrentExperts, TopKRouter, grouped_linear
from moezoo.zoo.core.flops import count_flops
from torch import nn


@pytest.mark.parametrize("backend", ["auto", "dense", "padded", "gather", "grouped", "segment"])
def test_a_mixture_costs_its_gate_and_the_experts_chosen(backend):
    layer = MoE(TopKRouter(32, 8, 2), MLPExperts(8, 32, 64), backend=backend).eval()
    x = torch.randn(96, 32)
    assert count_flops(layer, lambda: layer(x)) == 96 * 2 * (32 * 8 + 2 * 2 * 32 * 64)
    assert layer.backend == backend


def test_every_step_of_an_lstm_counts():
    network = nn.Sequential(nn.LSTM(20, 64, num_layers=2, batch_first=True)).eval()
    x = torch.randn(5, 31, 20)
    assert count_flops(network, lambda: network(x)) == 5 * 31 * 2 * 4 * 64 * (20 + 64 + 64 + 64)


def test_every_step_of_lstm_experts_counts():
    layer = MoE(DenseRouter(20, 3), RecurrentExperts(3, 20, 16, last=True), backend="dense").eval()
    experts, x = layer.experts, torch.randn(5, 31, 20)
    assert count_flops(experts, lambda: experts.dense(x)) == 3 * 5 * 31 * 2 * 4 * 16 * (20 + 16)


@pytest.mark.parametrize("backend", ["grouped", "segment"])
def test_grouped_rows_meet_one_matrix_each(backend):
    x, weight, ends = torch.randn(40, 16), torch.randn(3, 24, 16), torch.tensor([7, 7, 40], dtype=torch.int32)
    count = count_flops(nn.Identity(), lambda: grouped_linear(x, weight, ends, backend=backend, dropless=True))
    assert count == 40 * 2 * 16 * 24


@pytest.mark.parametrize("how", [{}, {"is_causal": True}, {"attn_mask": torch.ones(9, 12, dtype=torch.bool)}])
def test_attention_costs_two_products(how):
    q, k, v = torch.randn(2, 4, 9, 16), torch.randn(2, 4, 12, 16), torch.randn(2, 4, 12, 16)
    if "is_causal" in how:
        k, v = k[:, :, :9], v[:, :, :9]
    keys = k.shape[2]
    count = count_flops(nn.Identity(), lambda: nn.functional.scaled_dot_product_attention(q, k, v, **how))
    assert count == 2 * 4 * 9 * keys * 2 * (16 + 16)
