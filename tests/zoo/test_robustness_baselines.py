"""The dense rivals: widths, equal cost, the output they share with AdvMoE, round trip."""

import pytest
import torch
from moezoo.zoo.advmoe import AdvMoE
from moezoo.zoo.base import ZooModel
from moezoo.zoo.baselines.robustness import DenseCNN
from moezoo.zoo.cnns import BACKBONES, build_backbone
from moezoo.zoo.core.statistics import parameter_counts
from torch import nn

GREY = {"channels": 1, "num_classes": 7, "image_size": 28, "mean": [0.3], "std": [0.35]}
TINY = {"widths": (4, 6), "blocks": (2, 1)}


@pytest.mark.parametrize("backbone", BACKBONES)
def test_a_rival_is_a_classifier_without_routers(backbone):
    torch.manual_seed(0)
    model = DenseCNN(GREY, backbone, **TINY).eval()
    image = torch.rand(5, 1, 28, 28)
    output = model(image)
    assert output.logits.shape == (5, 7) and output.routing == {} and output.router_logits == {}
    assert list(model.router_parameters()) == []
    assert len(list(model.expert_parameters())) == len(list(model.parameters()))
    torch.testing.assert_close(model(image[2:3]).logits, output.logits[2:3])


@pytest.mark.parametrize("backbone", BACKBONES)
def test_every_parameter_gets_gradient(backbone):
    torch.manual_seed(0)
    model = DenseCNN(GREY, backbone, **TINY)
    loss = model(torch.rand(16, 1, 28, 28)).logits.logsumexp(-1).sum()
    grads = torch.autograd.grad(loss, list(model.parameters()))
    assert all(g.abs().sum() > 0 for g in grads)


@pytest.mark.parametrize("backbone", BACKBONES)
def test_one_expert_is_the_narrow_network(backbone):
    """The same numbers, whatever the router says; a ResNet's stem, which AdvMoE keeps wide, aside."""
    torch.manual_seed(0)
    moe = AdvMoE(GREY, backbone, experts=1, ratio=1.0, router_width=2, router_blocks=1, **TINY).eval()
    dense = DenseCNN(GREY, backbone, ratio=1.0, **TINY).eval()
    dense.network.load_state_dict(moe.network.body.state_dict())
    image = torch.rand(4, 1, 28, 28)
    torch.testing.assert_close(moe(image).logits, dense(image).logits)


@pytest.mark.parametrize("backbone", ["resnet18", "wrn28_10", "vgg16_bn", "densenet40"])
def test_half_width_quarters_what_is_between_stem_and_head(backbone):
    with torch.device("meta"):
        full, half = (build_backbone(backbone, 3, 10, ratio) for ratio in (1.0, 0.5))
    names = [n for n, m in full.named_modules() if isinstance(m, nn.Conv2d) and n.startswith("stages")][1:]
    weights = [[net.get_submodule(name).weight.numel() for name in names] for net in (full, half)]
    assert weights[0] == [4 * small for small in weights[1]]


def test_stem_strides_and_default_sizes():
    small = build_backbone("small_resnet", 1, 7)
    assert small.stem[0].stride == (2, 2) and small.stem[0].out_channels == 32
    finer = build_backbone("small_resnet", 1, 7, 0.5, widths=(40, 80, 160), blocks=(1, 1, 1), stem_stride=1)
    assert finer.stem[0].stride == (1, 1) and finer.stem[0].out_channels == 20
    assert [stage[0].conv2.out_channels for stage in finer.stages] == [20, 40, 80]
    assert build_backbone("small_resnet", 1, 7, 0.5, routed=True).stem[0].out_channels == 32


def test_a_rival_of_equal_active_parameters_can_be_solved_for():
    """`ratio` is fine enough for the two per cent that a twin is allowed."""
    with torch.device("meta"):
        moe = parameter_counts(AdvMoE(GREY, "small_resnet", router_width=8, router_blocks=1))["active"]
        sizes = {r: parameter_counts(DenseCNN(GREY, "small_resnet", r / 100))["active"] for r in range(30, 120)}
    assert min(abs(size / moe - 1) for size in sizes.values()) < 0.02


def test_weights_come_back(tmp_path):
    torch.manual_seed(0)
    model = DenseCNN(GREY, "small_resnet", 0.5)
    model(torch.rand(8, 1, 28, 28))
    model.eval().save_pretrained(tmp_path / "w")
    again = ZooModel.from_pretrained(tmp_path / "w")
    image = torch.rand(3, 1, 28, 28)
    assert torch.equal(model(image).logits, again(image).logits)
