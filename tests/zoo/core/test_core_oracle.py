"""The layer against Hugging Face's, with the same weights: output, routing and gradients."""

import pytest
import torch
from moezoo.zoo.core import MLPExperts, MoE, TopKRouter, losses

pytest.importorskip("transformers")
from transformers import DeepseekV3Config, MixtralConfig, Qwen3MoeConfig
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3MoE
from transformers.models.mixtral.modeling_mixtral import MixtralSparseMoeBlock, load_balancing_loss_func
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeSparseMoeBlock

DIM, HIDDEN, EXPERTS = 16, 24, 8


def theirs(kind):
    torch.manual_seed(0)
    if kind == "mixtral":
        config = MixtralConfig(
            hidden_size=DIM, intermediate_size=HIDDEN, num_local_experts=EXPERTS, num_experts_per_tok=2
        )
        block = MixtralSparseMoeBlock(config)
    elif kind.startswith("qwen"):
        config = Qwen3MoeConfig(
            hidden_size=DIM, moe_intermediate_size=HIDDEN, num_experts=EXPERTS, num_experts_per_tok=3,
            norm_topk_prob=kind == "qwen, normalised",
        )  # fmt: skip
        block = Qwen3MoeSparseMoeBlock(config)
    else:
        config = DeepseekV3Config(
            hidden_size=DIM, moe_intermediate_size=HIDDEN, n_routed_experts=EXPERTS, num_experts_per_tok=3,
            n_group=4, topk_group=2, n_shared_experts=1, routed_scaling_factor=2.5, norm_topk_prob=True,
        )  # fmt: skip
        block = DeepseekV3MoE(config)
    block.experts.config._experts_implementation = "eager"
    for parameter in block.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return block


def ours(kind, block):
    if kind == "deepseek":
        router = TopKRouter(
            DIM,
            EXPERTS,
            3,
            score_func="sigmoid",
            routed_scaling_factor=2.5,
            num_groups=4,
            topk_groups=2,
            balance="bias",
        )
    else:
        router = TopKRouter(DIM, EXPERTS, block.gate.top_k, norm_topk_prob=kind != "qwen, raw")
    experts = MLPExperts(EXPERTS, DIM, HIDDEN, act="swiglu", bias=False)
    with torch.no_grad():
        router.weight.copy_(block.gate.weight)
        experts.layers[0].weight.copy_(block.experts.gate_up_proj)
        experts.layers[1].weight.copy_(block.experts.down_proj)
        if kind == "deepseek":
            block.gate.e_score_correction_bias.normal_(std=0.3)
            router.expert_bias.copy_(block.gate.e_score_correction_bias)
    return MoE(router, experts, shared=getattr(block, "shared_experts", None))


@pytest.mark.parametrize("kind", ["mixtral", "qwen, normalised", "qwen, raw", "deepseek"])
def test_a_layer_equals_hugging_faces(kind):
    block = theirs(kind)
    moe = ours(kind, block)
    x = torch.randn(3, 20, DIM)
    a, b = x.clone().requires_grad_(), x.clone().requires_grad_()
    got, routing = moe(a, return_routing=True)
    want = block(b)
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)

    _, weights, indices = block.gate(x.view(-1, DIM))
    order = indices.sort(-1)
    mine = routing.indices.sort(-1)
    assert torch.equal(mine.values, order.values)
    torch.testing.assert_close(
        routing.weights.gather(1, mine.indices), weights.gather(1, order.indices), rtol=1e-5, atol=1e-6
    )

    direction = torch.randn_like(want)
    (got * direction).sum().backward()
    (want * direction).sum().backward()
    torch.testing.assert_close(a.grad, b.grad, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(moe.router.weight.grad, block.gate.weight.grad, rtol=1e-4, atol=1e-4)
    for layer, name in zip(moe.experts.layers, ("gate_up_proj", "down_proj"), strict=True):
        torch.testing.assert_close(layer.weight.grad, getattr(block.experts, name).grad, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("masked", [False, True])
def test_the_balance_loss_is_hugging_faces_over_k(masked):
    """For one layer: theirs counts each of the k slots without dividing by k."""
    logits = torch.randn(2 * 10, EXPERTS)
    mask = torch.arange(20).view(2, 10) % 10 < 7 if masked else None
    indices = logits.topk(2).indices
    if mask is not None:
        indices = indices.masked_fill(~mask.view(-1, 1), -1)
    got = losses.switch_balance_loss(logits.softmax(-1), indices, None if mask is None else mask.flatten())
    want = load_balancing_loss_func((logits,), EXPERTS, 2, None if mask is None else mask.long())
    torch.testing.assert_close(got, want / 2)
