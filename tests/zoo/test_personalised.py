"""GE/LE/GN: sizes of the sheet, equality with a plain loop, whose parameters learn when, round trip."""

import pytest
import torch
import torch.nn.functional as F
from moezoo.errors import UserError
from moezoo.zoo.base import ZooModel
from moezoo.zoo.baselines.personalised import FineTuned, LocalExperts, OneForAll
from moezoo.zoo.core.statistics import parameter_counts
from moezoo.zoo.personalised import Personalised

USERS = 3
SCHEMA = {
    "channels": 1,
    "image_size": 28,
    "num_classes": 10,
    "users": [f"user {k}" for k in range(USERS)],
    "mean": [0.13],
    "std": [0.31],
}
SMALL = SCHEMA | {"image_size": 14}
TINY = {"widths": (2, 3), "hidden": (6, 5)}


def randomised(model):
    """Users' parts are zero at first; here they are not."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))
    return model


def sample(count=24, size=14):
    generator = torch.Generator().manual_seed(1)
    return torch.rand(count, 1, size, size, generator=generator), torch.arange(count) % USERS


def test_sizes_are_those_of_the_sheet():
    model = Personalised(SCHEMA)
    generic = sum(p.numel() for p in model.generic.parameters())
    assert generic == 61_706
    own = 400 * 10 + 10 + 400 + 1
    assert parameter_counts(model) == {"total": generic + USERS * own, "active": generic + own}
    assert model.overhead() == pytest.approx(own / generic) and model.overhead() < 0.08
    assert LocalExperts(SCHEMA).overhead() == pytest.approx(4010 / generic)
    assert (OneForAll(SCHEMA).overhead(), FineTuned(SCHEMA).overhead()) == (0.0, 1.0)


def test_every_user_begins_with_the_generic_expert():
    image, user = sample()
    for model in (Personalised(SMALL, **TINY), LocalExperts(SMALL, **TINY)):
        model.eval()
        alone = model(image)
        served = model(image, user)
        torch.testing.assert_close(served.logits, alone.logits)
        torch.testing.assert_close(served.generic, alone.logits)


@pytest.mark.parametrize("training", [False, True])
def test_equals_a_plain_loop(training):
    model = randomised(Personalised(SMALL, **TINY)).train(training)
    image, user = sample()
    output = model(image, user)
    correction, gate = model.correction.experts.layers[0], model.router.gate.layer.experts.layers[0]
    picks = []
    for i, k in enumerate(user.tolist()):
        generic, features = model.generic(model.normalise(image[i : i + 1]))
        local = generic + F.linear(features, correction.weight[k], correction.bias[k])
        picked = bool(F.linear(features, gate.weight[k], gate.bias[k]) > 0)
        picks.append(picked)
        torch.testing.assert_close(output.generic[i], generic[0])
        torch.testing.assert_close(output.logits[i], local[0] if picked else generic[0])
        torch.testing.assert_close(output.local[i], local[0] if picked or training else generic[0])
    assert 0 < sum(picks) < len(picks)
    assert output.routing["gate"].indices[:, 0].tolist() == [int(picked) for picked in picks]


def test_no_user_sees_another_ones_parameters():
    model = randomised(Personalised(SMALL, **TINY)).eval()
    image, user = sample()
    before = model(image, user).logits
    with torch.no_grad():
        for part in (model.correction, model.router.gate.layer):
            for parameter in part.parameters():
                parameter[1].fill_(1.0)
    after = model(image, user).logits
    assert torch.equal(before[user != 1], after[user != 1]) and not torch.allclose(before[user == 1], after[user == 1])


@pytest.mark.parametrize("build", [Personalised, LocalExperts, FineTuned])
def test_the_generic_expert_and_users_never_learn_at_once(build):
    model = build(SMALL, **TINY).train()
    image, user = sample()

    def with_gradient():
        found = {name.split(".")[0] for name, p in model.named_parameters() if p.grad is not None and p.grad.any()}
        model.zero_grad(set_to_none=True)
        return found

    model(image).logits.square().sum().backward()
    assert with_gradient() == {"generic"}
    output = model(image, user)
    gates = sum(record.logits.sum() for record in output.routing.values())
    (output.local.square().sum() + gates).backward()
    assert "generic" not in (found := with_gradient()) and found


def test_attacks_see_the_gradient_of_the_served_image():
    model = randomised(Personalised(SMALL, **TINY)).eval()
    image, user = sample()
    image.requires_grad_()
    model(image, user).logits.logsumexp(-1).sum().backward()
    assert image.grad.isfinite().all() and (image.grad.flatten(1).abs().amax(1) > 0).all()


def test_fine_tuned_copies_equal_the_generic_network_and_then_a_loop():
    model = FineTuned(SMALL, **TINY).train()
    image, user = sample()
    first = model(image, user)
    torch.testing.assert_close(first.local, first.generic)
    randomised(model).eval()
    output = model(image, user)
    for i, k in enumerate(user.tolist()):
        x = model.normalise(image[i : i + 1])
        x = F.max_pool2d(F.relu(model.conv1.one(x, k)), 2)
        x = F.max_pool2d(F.relu(model.conv2.one(x, k)), 2).flatten(1)
        for layer in model.linear.layers:
            x = F.linear(x, layer.weight[k], layer.bias[k])
            x = F.relu(x) if layer is not model.linear.layers[-1] else x
        torch.testing.assert_close(output.logits[i], x[0])
    moved = {name: value.clone() for name, value in model.conv1.state_dict().items()}
    model.train()(image, user)
    assert all(torch.equal(value, moved[name]) for name, value in model.conv1.state_dict().items())  # copied once


@pytest.mark.parametrize("build", [Personalised, LocalExperts, FineTuned, OneForAll])
def test_saved_and_loaded_it_predicts_the_same(build, tmp_path):
    model = randomised(build(SMALL, **TINY)).eval()
    image, user = sample()
    model.save_pretrained(tmp_path / "weights")
    loaded = ZooModel.from_pretrained(tmp_path / "weights")
    assert torch.equal(loaded(image, user).logits, model(image, user).logits)
    assert torch.equal(loaded(image).logits, model(image).logits)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"schema": SCHEMA | {"image_size": 8}}, "image_size=8; LeNet needs at least 12 pixels"),
        ({"schema": SCHEMA, "widths": (6,)}, r"widths=\[6\], hidden=\[120, 84\]: expected two numbers"),
    ],
)
def test_mistakes_are_one_line(arguments, said):
    with pytest.raises(UserError, match=said):
        Personalised(**arguments)
