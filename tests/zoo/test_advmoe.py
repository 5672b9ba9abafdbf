"""AdvMoE: the spec's counts, pathways, router scopes, timm backbones, order of the batch, round trip."""

import pytest
import torch
from moezoo.errors import UserError
from moezoo.zoo.advmoe import AdvMoE, ResNetGate
from moezoo.zoo.base import ZooModel
from moezoo.zoo.baselines.robustness import DenseCNN
from moezoo.zoo.core import Routed, RoutedConv2d, StraightThroughRouter, moeify
from moezoo.zoo.core.pathways import block_convs
from moezoo.zoo.core.statistics import parameter_counts
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

CIFAR = {"channels": 3, "num_classes": 10, "image_size": 32, "mean": [0.5, 0.4, 0.3], "std": [0.2, 0.3, 0.25]}
GREY = {"channels": 1, "num_classes": 7, "image_size": 28, "mean": [0.3], "std": [0.35]}
SMALL = {"backbone": "small_resnet", "router_width": 4, "router_blocks": 1, "widths": (8, 12), "blocks": (1, 1)}
SCOPES = ["global", "stage", "layer"]


def count(parameters):
    return sum(parameter.numel() for parameter in parameters)


def gmac(module, image):
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        module.eval()(image)
    return counter.get_total_flops() / 2e9


def stir(model):
    """Routers of many minds, and running statistics that are not those of birth."""
    routers = [part for part in model.modules() if isinstance(part, Routed)]
    for part in routers:
        nn.init.normal_(part.router.gate.head.weight, 0.0, 30.0)
    image = pictures(16, model.mean.shape[0])
    with torch.no_grad():
        for _ in range(3):
            model.train()(image)
        for part in routers:  # no expert is everybody's favourite
            logits = model.eval()(image).router_logits[part.name]
            part.router.gate.head.bias -= logits.mean(0)
    return model


def pictures(batch, channels=1):
    """Noise of many brightnesses and contrasts, so that a router can tell images apart."""
    return torch.rand(batch, channels, 28, 28) * torch.rand(batch, 1, 1, 1) + torch.randn(batch, channels, 1, 1)


def test_a2_resnet18_counts_as_published():
    """Spec A2, to the digit."""
    model = AdvMoE(CIFAR)
    assert count(model.expert_parameters()) == 5_565_450
    assert count(model.router_parameters()) == 269_202
    assert count(AdvMoE(CIFAR, experts=4).expert_parameters()) == 11_076_618
    image = torch.rand(1, 3, 32, 32)
    router = gmac(model.network.router, image)
    assert router == pytest.approx(0.0406, abs=5e-5)
    assert gmac(model, image) - router == pytest.approx(0.15172, abs=5e-6)
    assert gmac(DenseCNN(CIFAR), image) == pytest.approx(0.55542, abs=5e-6)
    assert gmac(DenseCNN(CIFAR, ratio=0.5), image) == pytest.approx(0.1393, abs=5e-6)
    active = parameter_counts(model)["active"] - 269_202
    assert active == pytest.approx(2.810e6, abs=500)


@pytest.mark.parametrize(
    ("backbone", "dense", "narrow", "two", "four"),
    [
        ("resnet18", 11_173_962, 2_797_610, 5_565_450, 11_076_618),
        ("wrn28_10", 36_479_194, 9_126_002, 18_239_602, 36_466_802),
        ("vgg16_bn", 15_311_818, 4_013_034, 7_690_218, 15_044_586),
        ("densenet40", 176_122, 45_802, 85_114, 163_738),
    ],
)
def test_parameters_of_every_backbone(backbone, dense, narrow, two, four):
    """Those of the spec's table, in millions to three places; DenseNet-BC-40-12 is known to have 176,122."""
    with torch.device("meta"):
        rivals = [DenseCNN(CIFAR, backbone, ratio).parameters() for ratio in (1.0, 0.5)]
        ours = [AdvMoE(CIFAR, backbone, experts).expert_parameters() for experts in (2, 4)]
    assert [count(parameters) for parameters in (*rivals, *ours)] == [dense, narrow, two, four]


@pytest.mark.parametrize(("backbone", "dense", "pathway"), [("wrn28_10", 5.24, 1.311), ("vgg16_bn", 0.3138, 0.0791)])
def test_multiply_adds_of_the_spec_table(backbone, dense, pathway):
    image = torch.rand(1, 3, 32, 32)
    digits = {"abs": 5e-3} if dense > 1 else {"abs": 5e-5}
    assert gmac(DenseCNN(CIFAR, backbone), image) == pytest.approx(dense, **digits)
    model = AdvMoE(CIFAR, backbone)
    assert gmac(model, image) - gmac(model.network.router, image) == pytest.approx(pathway, abs=5e-4)


def test_timm_resnet18_made_cifar_like_is_the_same_network():
    """Spec 2.3: channels=(32, 64, 128, 256), 3x3 stem, no max-pool, 16 routed convolutions."""
    import timm

    narrow = timm.create_model("resnet18", num_classes=10, channels=(32, 64, 128, 256))
    narrow.conv1, narrow.maxpool = nn.Conv2d(3, 64, 3, padding=1, bias=False), nn.Identity()
    model = moeify(narrow, StraightThroughRouter(0, 2, ResNetGate(3, 2)))
    assert sum(isinstance(part, RoutedConv2d) for part in model.modules()) == 16
    assert count(model.body.parameters()) == 5_565_450
    image = torch.rand(1, 3, 32, 32)
    assert gmac(model, image) - gmac(model.router, image) == pytest.approx(0.15172, abs=5e-6)


def test_resnet18_of_imagenet_with_routed_shortcuts():
    """Spec 2.3, last row: 1.814 / 0.483 GMAC; 11.690, 3.056, 5.845, 11.424 M parameters."""
    import timm

    def narrow():  # timm's stem has 64 channels; with 32 the first block needs no shortcut
        net = timm.create_model("resnet18", channels=(32, 64, 128, 256))
        net.conv1, net.bn1 = nn.Conv2d(3, 32, 7, 2, 3, bias=False), nn.BatchNorm2d(32)
        net.layer1[0].conv1, net.layer1[0].downsample = nn.Conv2d(32, 32, 3, 1, 1, bias=False), None
        return net

    class Constant(ResNetGate):  # the real one costs four times the network
        def forward(self, x, task_id=None):
            return x.new_zeros(len(x), self.out_features)

    assert count(timm.create_model("resnet18").parameters()) == pytest.approx(11.690e6, abs=500)
    assert count(narrow().parameters()) == pytest.approx(3.056e6, abs=500)
    for experts, millions in ((2, 5.845), (4, 11.424)):
        router = StraightThroughRouter(0, experts, Constant(3, experts))
        model = moeify(narrow(), router, lambda name, _: name != "conv1")
        assert count(model.body.parameters()) == pytest.approx(millions * 1e6, abs=500)
    assert gmac(model, torch.rand(1, 3, 224, 224)) == pytest.approx(0.483, abs=5e-4)


@pytest.mark.parametrize(
    ("backbone", "routed"), [("resnet18", 16), ("vgg16_bn", 12), ("densenet121", 116), ("wide_resnet50_2", 48)]
)
def test_timm_backbones_become_mixtures(backbone, routed):
    torch.manual_seed(0)
    options = {"mlp_ratio": 0.05} if backbone == "vgg16_bn" else {}
    model = AdvMoE(CIFAR, f"timm/{backbone}", backbone_args=options, router_width=4, router_blocks=1).eval()
    assert sum(isinstance(part, RoutedConv2d) for part in model.modules()) == routed
    for part in model.modules():  # timm's residual branches start at zero
        if isinstance(part, nn.BatchNorm2d):
            nn.init.ones_(part.weight)
    image = torch.rand(3, 3, 32, 32)
    output = model(image, torch.tensor([0, 1, 0]))
    assert output.logits.shape == (3, 10)
    torch.testing.assert_close(model(image[1:2], torch.tensor([1])).logits, output.logits[1:2], rtol=1e-4, atol=1e-4)
    assert not torch.allclose(model(image[1:2], torch.tensor([0])).logits, output.logits[1:2])


def test_timm_vgg_narrows_as_timm_would():
    import timm

    with torch.device("meta"):
        ours = DenseCNN({**CIFAR, "num_classes": 1000}, "timm/vgg16_bn", 1.0)
        narrow = DenseCNN(CIFAR, "timm/vgg16_bn", 0.5).network
        assert count(ours.parameters()) == count(timm.create_model("vgg16_bn").parameters())
    assert [m.out_channels for m in narrow.features if isinstance(m, nn.Conv2d)][-3:] == [256, 256, 256]
    assert any(isinstance(m, nn.BatchNorm2d) for m in narrow.modules())


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("scope", SCOPES)
def test_every_parameter_learns_in_its_own_half(scope, training):
    """Class loss moves experts alone, router logits routers alone; the halves share nothing and leave nothing out."""
    torch.manual_seed(0)
    model = stir(AdvMoE(GREY, router_scope=scope, **SMALL)).train(training)
    routers, experts = list(model.router_parameters()), list(model.expert_parameters())
    assert {id(p) for p in routers} | {id(p) for p in experts} == {id(p) for p in model.parameters()}
    assert len(routers) + len(experts) == len(list(model.parameters()))
    output = model(torch.rand(32, 1, 28, 28), torch.arange(32) % 2)
    loss = output.logits.logsumexp(-1).sum() + (output.logits[:, 0] ** 2).sum()
    grads = torch.autograd.grad(loss, [*routers, *experts], retain_graph=True, allow_unused=True)
    assert all(g is None for g in grads[: len(routers)])
    assert all(g is not None and g.abs().sum() > 0 for g in grads[len(routers) :])
    loss = sum((logits**3).sum() for logits in output.router_logits.values())
    assert all(g is not None for g in torch.autograd.grad(loss, routers))


@pytest.mark.parametrize("scope", SCOPES)
def test_straight_through_reaches_every_router(scope):
    torch.manual_seed(0)
    model = AdvMoE(GREY, router_scope=scope, ste=True, **SMALL).train()
    plain = AdvMoE(GREY, router_scope=scope, **SMALL).train()
    plain.load_state_dict(model.state_dict())
    image = torch.rand(16, 1, 28, 28)
    output = model(image)
    torch.testing.assert_close(output.logits, plain(image).logits)
    grads = torch.autograd.grad(output.logits[:, 0].sum(), list(model.router_parameters()))
    assert all(g.isfinite().all() for g in grads)
    heads = {id(p) for n, p in model.named_parameters() if n.endswith("gate.head.weight")}
    pairs = zip(model.router_parameters(), grads, strict=True)
    assert all(g.abs().max() > 0 for p, g in pairs if id(p) in heads)


@pytest.mark.parametrize("backbone", ["small_resnet", "wrn28_10", "vgg16_bn", "densenet40"])
@pytest.mark.parametrize("scope", SCOPES)
def test_router_scopes_name_their_routers_and_force_every_layer(scope, backbone):
    torch.manual_seed(0)
    model = stir(AdvMoE(GREY, backbone, router_scope=scope, widths=(4, 6), blocks=(2, 1), router_width=4))
    image = pictures(12)
    output = model(image)
    names = {
        "global": ["router"],
        "stage": ["stage1", "stage2"],
        "layer": block_convs(DenseCNN(GREY, backbone, widths=(4, 6), blocks=(2, 1)).network),
    }[scope]
    assert sorted(output.routing) == sorted(output.router_logits) == sorted(names)
    for name in names:
        record = output.routing[name]
        assert output.router_logits[name].shape == (12, 2)
        assert torch.equal(record.indices[:, 0], output.router_logits[name].argmax(-1))
    for e in (0, 1):
        forced = model(image, torch.full((12,), e))
        assert all((record.indices == e).all() for record in forced.routing.values())
        for part in model.modules():  # the other expert's weights do not take part
            if isinstance(part, RoutedConv2d):
                part.weight.data.chunk(2)[1 - e].add_(1.0)
        torch.testing.assert_close(model(image, torch.full((12,), e)).logits, forced.logits)


@pytest.mark.parametrize("scope", SCOPES)
def test_a7_the_order_of_the_batch_does_not_matter(scope):
    """Spec A7."""
    torch.manual_seed(0)
    model = stir(AdvMoE(GREY, router_scope=scope, experts=3, **SMALL))
    image, order = pictures(50), torch.randperm(50)
    output = model(image)
    assert all(record.indices.unique().numel() > 1 for record in output.routing.values())
    torch.testing.assert_close(model(image[order]).logits, output.logits[order], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("scope", SCOPES)
def test_a8_weights_come_back(tmp_path, scope):
    """Spec A8, the model's half."""
    torch.manual_seed(0)
    model = stir(AdvMoE(GREY, router_scope=scope, **SMALL))
    model.save_pretrained(tmp_path / "w")
    again = ZooModel.from_pretrained(tmp_path / "w")
    image = pictures(9)
    one, other = model(image), again(image)
    assert torch.equal(one.logits, other.logits)
    assert all(torch.equal(one.router_logits[name], other.router_logits[name]) for name in one.router_logits)


def test_images_are_normalised_inside():
    torch.manual_seed(0)
    model = AdvMoE(CIFAR, router_width=4, router_blocks=1).eval()
    image = torch.rand(2, 3, 32, 32)
    plain = AdvMoE({**CIFAR, "mean": [0.0] * 3, "std": [1.0] * 3}, router_width=4, router_blocks=1).eval()
    plain.load_state_dict(model.state_dict())
    mean, std = torch.tensor(CIFAR["mean"]).view(-1, 1, 1), torch.tensor(CIFAR["std"]).view(-1, 1, 1)
    torch.testing.assert_close(model(image).logits, plain((image - mean) / std).logits)


def test_large_images_are_pooled_before_the_router():
    with torch.device("meta"):
        pools = {
            size: AdvMoE({**CIFAR, "image_size": size}, "timm/resnet18").network.router.gate.pool
            for size in (28, 64, 65, 128, 224)
        }
    assert pools == {28: 1, 64: 1, 65: 2, 128: 2, 224: 4}
    image = torch.rand(1, 3, 224, 224)
    assert gmac(ResNetGate(3, 2, pool=4), image) < 0.13 < 1.9 < gmac(ResNetGate(3, 2), image)


def test_gradients_are_right():
    torch.manual_seed(0)
    options = {**SMALL, "widths": (3, 4), "router_width": 2}
    model = stir(AdvMoE(GREY, **options)).double()
    image = torch.rand(3, 1, 10, 10, dtype=torch.float64, requires_grad=True)
    expert = torch.tensor([0, 1, 0])
    names, values = zip(
        *((n, p) for n, p in model.named_parameters() if "conv" in n and "router" not in n), strict=True
    )

    def run(image, *weights):
        return torch.func.functional_call(model, dict(zip(names, weights, strict=True)), (image, expert)).logits

    assert torch.autograd.gradcheck(run, (image, *values), fast_mode=True)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"backbone": "resnet19"}, "backbone='resnet19': expected one of resnet18, small_resnet"),
        ({"backbone": "timm/resnet19x"}, "timm/resnet19x: this timm has no such model"),
        ({"backbone": "timm/mobilenetv3_small_050"}, "how to scale a mobilenetv3 is not known; give ratio: 1"),
        ({"backbone": "timm/resnet18", "widths": [4]}, "takes no widths"),
        ({"backbone_args": {"a": 1}}, "takes no backbone_args"),
        ({"widths": [4, 8]}, r"widths=\[4, 8\], blocks=\[2, 2, 2, 2\]: expected as many of each"),
        ({"backbone": "vgg16_bn", "stem_stride": 2}, "vgg16_bn has no stem"),
        ({"backbone": "timm/vgg11", "router_scope": "stage"}, "this backbone has no stages"),
        ({"ratio": 0.0}, "ratio=0"),
        ({"experts": 0}, "experts=0"),
        ({"schema": {**CIFAR, "std": [0.1, 0.0, 0.1]}}, r"schema: std=\[0.1, 0.0, 0.1\], expected 3 numbers"),
    ],
)
def test_mistakes_are_named(options, message):
    with torch.device("meta"), pytest.raises(UserError, match=message):
        AdvMoE(**{"schema": CIFAR, **options})
