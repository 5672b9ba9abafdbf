"""MIGA: gates, symmetries, padding, the plain mixture it contains, and its attention against a loop."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from moezoo.errors import UserError
from moezoo.zoo.base import ZooModel
from moezoo.zoo.core.statistics import parameter_counts
from moezoo.zoo.miga import MIGA, CrossSection, ExpertGroups, make_encoder, router_penalty
from torch.nn import functional as F

SCHEMA = {"num_features": 5, "lookback": 6, "horizon": 1, "styles": ["size"], "dataset": "made", "fingerprint": "0"}
ENCODERS = ("conv", "rec", "attn", "mlp", "linear")


def make_batch(days=3, names=24, seed=0):
    rng = torch.Generator().manual_seed(seed)
    features = torch.randn(days, names, 6, 5, generator=rng)
    valid = torch.ones(days, names, dtype=torch.bool)
    valid[0, -4:] = False
    return features * valid[..., None, None], valid


def make_model(**changes):
    torch.manual_seed(0)
    return MIGA(SCHEMA, **{"hidden": 16, "groups": 3, "experts_per_group": 4, "top_k": 5, "expert_dim": 4} | changes)


@pytest.mark.parametrize("encoder", ENCODERS)
@pytest.mark.parametrize("attend", ["all", "selected"])
def test_every_parameter_gets_gradient(encoder, attend):
    features, valid = make_batch()
    model = make_model(encoder=encoder, attend=attend, cross_section=True, layers=2)
    output = model(features, valid)
    (output.score.square().sum() + output.routing["experts"].aux_loss).backward()
    assert all(p.grad.isfinite().all() for p in model.parameters())
    dead = [n for n, p in model.named_parameters() if p.grad.abs().sum() == 0]
    # A bias of all keys, or of a query against them, leaves a softmax as it is: only those may have none.
    assert all("bias" in name for name in dead), dead


@settings(deadline=None, max_examples=15)
@given(st.integers(1, 4), st.integers(1, 4), st.data())
def test_gates_sum_to_one_over_exactly_k_experts_of_all_groups(groups, per_group, draw):
    top_k = draw.draw(st.integers(1, groups * per_group))
    features, valid = make_batch()
    model = make_model(groups=groups, experts_per_group=per_group, top_k=top_k).eval()
    record = model(features, valid).routing["experts"]
    gate = record.dense_weights()
    real = valid.flatten()
    assert ((gate > 0).sum(1)[real] == top_k).all() and (gate[~real] == 0).all()
    if top_k > 1:
        torch.testing.assert_close(gate.sum(1)[real], torch.ones(int(real.sum())))
        logits = record.logits[real]
        best = logits.topk(top_k, -1)
        expected = torch.zeros_like(logits).scatter(1, best.indices, best.values.softmax(-1))
        torch.testing.assert_close(gate[real], expected)


@pytest.mark.parametrize("encoder", ENCODERS)
@pytest.mark.parametrize("cross_section", [False, True])
def test_permuting_names_permutes_scores(encoder, cross_section):
    features, valid = make_batch()
    model = make_model(encoder=encoder, cross_section=cross_section).eval()
    order = torch.randperm(24, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(
        model(features, valid).score[:, order], model(features[:, order], valid[:, order]).score, atol=1e-5, rtol=1e-5
    )


@pytest.mark.parametrize("encoder", ENCODERS)
@pytest.mark.parametrize("cross_section", [False, True])
@pytest.mark.parametrize("training", [False, True])
def test_padding_changes_neither_scores_nor_losses(encoder, cross_section, training):
    features, valid = make_batch()
    model = make_model(encoder=encoder, cross_section=cross_section, z_coef=1e-3).train(training)
    wider = torch.cat([features, torch.randn(3, 7, 6, 5)], 1)
    once = model(features, valid)
    padded = model(wider, F.pad(valid, (0, 7)))
    torch.testing.assert_close(padded.score[:, :24], once.score, atol=1e-5, rtol=1e-5)
    assert (padded.score[:, 24:] == 0).all() and (once.score[~valid] == 0).all()
    torch.testing.assert_close(padded.routing["experts"].aux_loss, once.routing["experts"].aux_loss)


def test_a_day_of_padding_alone_stays_finite():
    features, valid = make_batch()
    model = make_model(cross_section=True)
    output = model(features, valid & (torch.arange(3) > 0)[:, None])
    output.score.sum().backward()
    assert output.score.isfinite().all()
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())


def test_names_meet_in_the_cross_section_alone():
    features, valid = make_batch()
    moved = features.clone()
    moved[:, 0] += 1
    for cross_section in (False, True):
        model = make_model(cross_section=cross_section).eval()
        same = torch.isclose(model(features, valid).score, model(moved, valid).score)[:, 1:].all()
        assert bool(same) is not cross_section


def test_scalar_experts_without_attention_are_a_softmax_mixture_of_linear_heads():
    features, valid = make_batch()
    model = make_model(expert_dim=1, group_attention=False, top_k=12, encoder="linear").eval()
    hidden = features[:, :, -1] @ model.encoder.net[0].weight.T + model.encoder.net[0].bias
    layer = model.groups.experts.layers[0]
    heads = (hidden @ layer.weight[:, 0].T + layer.bias[:, 0]) * model.groups.readout.flatten()
    expected = ((hidden @ model.router.weight.T).softmax(-1) * heads).sum(-1)
    torch.testing.assert_close(model(features, valid).score[valid], expected[valid], atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("attend", ["all", "selected"])
@pytest.mark.parametrize("heads", [1, 2, 4])
def test_group_attention_equals_the_loop_of_the_paper(attend, heads):
    features, valid = make_batch(days=1)
    model = make_model(attend=attend, heads=heads, encoder="linear").double().eval()
    features = features.double()
    record = model(features, valid).routing["experts"]
    hidden = (features[:, :, -1] @ model.encoder.net[0].weight.T + model.encoder.net[0].bias)[0]
    gate, attention = record.dense_weights(), model.groups.attention
    expected = torch.zeros(24, dtype=torch.double)
    for n in range(24):
        for g in range(3):
            layer = model.groups.experts.layers[0]
            z = torch.stack([layer.weight[4 * g + e] @ hidden[n] + layer.bias[4 * g + e] for e in range(4)])
            key, value = (z @ attention.key_value[g]).split(4, -1)
            query, mixed = z @ attention.query[g], []
            for h in range(heads):
                part = slice(h * 4 // heads, (h + 1) * 4 // heads)
                logits = query[:, part] @ key[:, part].T / (4 // heads) ** 0.5
                if attend == "selected":
                    logits[:, gate[n, 4 * g : 4 * g + 4] == 0] = -torch.inf
                mixed.append(logits.softmax(-1) @ value[:, part])
            heard = torch.cat(mixed, -1).nan_to_num()  # a group of which none is chosen hears nothing
            votes = ((z + heard @ attention.output[g]) * model.groups.readout[g]).sum(-1)
            expected[n] += gate[n, 4 * g : 4 * g + 4] @ votes
    torch.testing.assert_close(model(features, valid).score[0], expected * valid[0])


def test_gradients_of_the_groups_are_right():
    torch.manual_seed(0)
    model = make_model(encoder="linear", hidden=3, groups=2, experts_per_group=2, top_k=2, expert_dim=2).double()
    model.router.weight.data.normal_()  # far from ties, where a choice would jump
    tokens = torch.randn(4, 3, dtype=torch.double, requires_grad=True)
    assert torch.autograd.gradcheck(lambda t: model.groups(t, model.router(t)), tokens)
    assert isinstance(model.groups, ExpertGroups)


@pytest.mark.parametrize("kind", ["cv2", "variance", "l2prob", "switch", "none"])
def test_router_losses_know_balance_from_collapse(kind):
    features, valid = make_batch()
    model = make_model(router_loss=kind, router_coef=1.0)
    even = model(features, valid).routing["experts"].aux_loss
    with torch.no_grad():
        model.router.weight.mul_(200)
    uneven = model(features, valid).routing["experts"].aux_loss
    assert (uneven == even == 0) if kind == "none" else (uneven > 1.1 * even)
    assert model.eval()(features, valid).routing["experts"].aux_loss == 0


def test_penalties_of_uniform_probabilities():
    features, valid = make_batch()
    model = make_model()
    torch.nn.init.zeros_(model.router.weight)
    record = model(features, valid).routing["experts"]
    assert router_penalty(record, valid.flatten(), "variance").item() == pytest.approx(0, abs=1e-10)
    assert router_penalty(record, valid.flatten(), "l2prob").item() == pytest.approx(1)


@pytest.mark.parametrize("encoder", ["conv", "rec", "attn"])
def test_encoders_read_the_whole_window_and_last_day_ones_the_last_day(encoder):
    x = torch.randn(8, 6, 5, requires_grad=True)
    make_encoder(SCHEMA, encoder, 16, 2)(x).square().sum().backward()
    assert (x.grad.abs().sum((0, 2)) > 0).all()
    x.grad = None
    make_encoder(SCHEMA, "mlp", 16, 2)(x).square().sum().backward()
    assert (x.grad[:, :-1] == 0).all() and (x.grad[:, -1] != 0).any()


def test_the_last_block_of_the_convolution_is_not_a_shortcut():
    """Computing the last day alone must equal computing all days and taking the last."""
    torch.manual_seed(0)
    encoder = make_encoder(SCHEMA, "conv", 16, 2)
    x = torch.randn(8, 6, 5)
    hidden = encoder.project(x)
    for block in encoder.blocks:
        hidden = block(hidden)
    torch.testing.assert_close(encoder(x), hidden[:, -1], atol=1e-6, rtol=1e-5)


def test_all_experts_are_active_as_the_attention_asks_them_all():
    counts = parameter_counts(make_model())
    assert counts["active"] == counts["total"] == sum(p.numel() for p in make_model().parameters())


def test_weights_survive_the_round_trip(tmp_path):
    features, valid = make_batch()
    model = make_model(cross_section=True).eval()
    model.save_pretrained(tmp_path / "w")
    again = ZooModel.from_pretrained(tmp_path / "w")
    assert torch.equal(again(features, valid).score, model(features, valid).score)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"heads": 3}, "heads=3"),
        ({"top_k": 13}, "top_k=13"),
        ({"layers": 0}, "layers=0"),
    ],
)
def test_mistakes_are_one_line(changes, says):
    with pytest.raises(UserError, match=says):
        make_model(**changes)
    with pytest.raises(UserError, match="multiple of 4"):
        CrossSection(10)
