"""TMMOE: causality, receptive field, gates, variants, the fast TCN, gradients, equal sizes, round trip."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from moezoo.errors import UserError
from moezoo.zoo.base import ZooModel
from moezoo.zoo.baselines.trajectories import DenseTwin
from moezoo.zoo.core.statistics import parameter_counts
from moezoo.zoo.tmmoe import TASKS, TCN, TMMOE, LastConvExperts, Towers, make_experts

SCHEMA = {"num_features": 5, "history": 9, "horizon": 6, "frame_rate": 5.0}
SMALL = {"channels": 8, "layers": 3, "experts": 3, "expert_dim": 6, "expert_stride": 2, "tower": 7}
KINDS = ["lstm", "gru", "tcn", "mlp"]
VARIANTS = ["mmoe", "ple", "shared_bottom"]


def inputs(batch=4, seed=0, dtype=torch.float32):
    rng = torch.Generator().manual_seed(seed)
    return torch.randn(batch, 9, 5, generator=rng, dtype=dtype), torch.randn(batch, 2, generator=rng, dtype=dtype)


def stir(model):
    """Give the gates, which start at zero, something to say."""
    for name, parameter in model.named_parameters():
        if ".gate." in name:
            torch.nn.init.normal_(parameter)
    return model


@settings(max_examples=15, deadline=None)
@given(kernel=st.integers(2, 4), layers=st.integers(1, 4), time=st.integers(1, 40), frame=st.integers(0, 39))
def test_the_tcn_is_causal_and_sees_exactly_its_receptive_field(kernel, layers, time, frame):
    torch.manual_seed(0)
    tcn = TCN(3, 4, kernel, layers, 0.0).eval().double()
    frame %= time
    x = torch.randn(2, time, 3, dtype=torch.float64)
    changed = x.clone()
    changed[:, frame] += 1.0
    y, y_changed = tcn(x), tcn(changed)
    assert torch.equal(y[:, :frame], y_changed[:, :frame])
    field = tcn.receptive_field
    assert field == 1 + 2 * (kernel - 1) * (2**layers - 1)
    assert torch.equal(y[:, frame + field :], y_changed[:, frame + field :])
    torch.testing.assert_close(tcn.summary(x), y[:, -1])
    for stride in (2**level for level in range(layers)):
        torch.testing.assert_close(tcn(x, stride), y[:, (time - 1) % stride :: stride])


def test_the_last_output_reaches_back_to_the_first_frame_of_its_field():
    torch.manual_seed(0)
    tcn = TCN(3, 16, 3, 2, 0.0).eval()
    for parameter in tcn.parameters():  # all positive: no ReLU closes a path
        parameter.data.abs_()
    x = torch.rand(1, tcn.receptive_field + 1, 3, requires_grad=True)
    tcn(x)[0, -1].sum().backward()
    reached = x.grad[0].abs().sum(-1) > 0
    assert not reached[0] and reached[1:].all()


def test_a_tcn_that_does_not_see_the_history_is_refused():
    with pytest.raises(UserError, match="sees 61 frames of a history of 62; give more layers"):
        TMMOE({**SCHEMA, "history": 62})
    TMMOE({**SCHEMA, "history": 61})
    with pytest.raises(UserError, match=r"expert_stride=3: with 3 layers expected one of \[1, 2, 4\]"):
        TMMOE(SCHEMA, **{**SMALL, "expert_stride": 3})


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("expert", KINDS)
def test_every_window_stands_alone_and_gates_sum_to_one(expert, variant):
    torch.manual_seed(0)
    model = stir(TMMOE(SCHEMA, expert=expert, variant=variant, **SMALL)).eval()
    history, velocity = inputs()
    output = model(history, velocity)
    assert output.position.shape == (4, 6, 2) and output.intention.shape == (4, 3)
    alone = model(history[1:2], velocity[1:2])
    torch.testing.assert_close(output.position[1:2], alone.position)
    torch.testing.assert_close(output.intention[1:2], alone.intention)
    assert list(output.routing) == ([] if variant == "shared_bottom" else list(TASKS))
    for record in output.routing.values():
        torch.testing.assert_close(record.dense_weights().sum(-1), torch.ones(4))


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("expert", KINDS)
def test_every_parameter_gets_gradient(expert, variant):
    torch.manual_seed(0)
    model = stir(TMMOE(SCHEMA, expert=expert, variant=variant, **SMALL, dropout=0.0))
    output = model(*inputs(batch=16))
    (output.position.square().sum() + output.intention.square().sum()).backward()
    quiet = [n for n, p in model.named_parameters() if p.grad is None or not p.grad.abs().sum()]
    assert not quiet, quiet


@pytest.mark.parametrize("expert", KINDS)
def test_gradients_are_right(expert):
    torch.manual_seed(0)
    model = stir(TMMOE(SCHEMA, expert=expert, **SMALL, dropout=0.0)).double()
    history, velocity = inputs(batch=2, dtype=torch.float64)
    names = [n for n, _ in model.named_parameters() if ".gate." in n]
    values = tuple(dict(model.named_parameters())[n].detach().requires_grad_() for n in names)

    def run(history, *gates):
        output = torch.func.functional_call(model, dict(zip(names, gates, strict=True)), (history, velocity))
        return output.position, output.intention

    assert torch.autograd.gradcheck(run, (history.requires_grad_(), *values), fast_mode=True)


def test_the_mixture_is_the_weighted_sum_of_experts_per_task():
    torch.manual_seed(0)
    model = stir(TMMOE(SCHEMA, **SMALL)).eval()
    history, velocity = inputs()
    output = model(history, velocity)
    sequence = model.tcn(history)[:, ::2]
    each = model.mixture.experts.dense(sequence)
    states = []
    for task, router in zip(TASKS, model.mixture.routers, strict=True):
        gate = (sequence[:, -1] @ router.gate.weight.T + router.gate.bias).softmax(-1)
        torch.testing.assert_close(output.routing[task].dense_weights(), gate)
        states.append(sum(gate[:, e, None] * each[:, e] for e in range(3)))
    expected = model.towers(torch.stack(states), velocity, {})
    torch.testing.assert_close(output.position, expected.position)
    torch.testing.assert_close(output.intention, expected.intention)
    assert not torch.allclose(output.routing["lateral"].weights, output.routing["intention"].weights)


def test_gates_start_uniform_and_part_in_training():
    torch.manual_seed(0)
    model = TMMOE(SCHEMA, **SMALL)
    history, velocity = inputs(64)
    for record in model(history, velocity).routing.values():
        torch.testing.assert_close(record.weights, torch.full((64, 3), 1 / 3))
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    for _ in range(30):
        output = model(history, velocity)
        loss = (output.position - history[:, :6, :2]).square().mean() + (output.intention**2).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    gates = [record.scores for record in model.eval()(history, velocity).routing.values()]
    for i, j in ((0, 1), (0, 2), (1, 2)):
        assert (gates[i] - gates[j]).abs().max() > 1e-3


@pytest.mark.parametrize("expert", KINDS)
def test_one_expert_is_a_shared_bottom(expert):
    torch.manual_seed(0)
    model = stir(TMMOE(SCHEMA, **{**SMALL, "experts": 1}, expert=expert)).eval()
    bottom = TMMOE(SCHEMA, **SMALL, expert=expert, variant="shared_bottom").eval()
    state = {k.replace("mixture.experts", "bottom"): v for k, v in model.state_dict().items() if "routers" not in k}
    bottom.load_state_dict(state, strict=True)
    one, other = model(*inputs()), bottom(*inputs())
    torch.testing.assert_close(one.position, other.position)
    torch.testing.assert_close(one.intention, other.intention)


@pytest.mark.parametrize("reading", ["both", "history"])
@pytest.mark.parametrize("expert", KINDS)
def test_experts_may_read_the_history_itself(expert, reading):
    torch.manual_seed(0)
    model = stir(TMMOE(SCHEMA, **SMALL, expert=expert, experts_read=reading)).eval()
    history, velocity = inputs()
    frames = history if reading == "history" else torch.cat([model.tcn(history), history], -1)
    frames = frames[:, ::2]
    read = {"mlp": frames[:, -1], "tcn": frames[:, -3:].mT}.get(expert, frames)
    mixed, _ = model.mixture(read, model.tcn(history)[:, -1])
    torch.testing.assert_close(model(history, velocity).position, model.towers(mixed, velocity, {}).position)


def test_ple_gates_see_shared_experts_and_their_own_alone():
    torch.manual_seed(0)
    model = stir(TMMOE(SCHEMA, **{**SMALL, "experts": 2}, variant="ple", task_experts=2)).eval()
    for task, record in enumerate(model(*inputs()).routing.values()):
        used = record.dense_weights() > 0
        own = [0, 1, 2 + 2 * task, 3 + 2 * task]
        assert used[:, own].all() and used.sum() == 4 * len(own)


def test_position_is_constant_velocity_plus_scaled_towers():
    torch.manual_seed(0)
    towers = Towers(6, 7, SCHEMA).eval()
    for head in (towers.longitudinal, towers.lateral):
        torch.nn.init.zeros_(head[-1].weight)
        torch.nn.init.constant_(head[-1].bias, 0.5)
    velocity = torch.tensor([[10.0, 3.0]])
    output = towers(torch.randn(3, 1, 6), velocity, {})
    seconds = torch.arange(1, 7) / 5.0
    torch.testing.assert_close(output.position[0, :, 0], 10.0 * seconds + 2.0 * 0.5)
    torch.testing.assert_close(output.position[0, :, 1], torch.full((6,), 0.5))


def test_regularisers_reward_spread_in_training_alone():
    torch.manual_seed(0)
    model = stir(TMMOE(SCHEMA, **SMALL, entropy_coef=0.1, balance_coef=0.01))
    for record in model(*inputs()).routing.values():
        p = record.scores
        token = -(p * p.log()).sum(-1).mean() / torch.log(torch.tensor(3.0))
        mean = p.mean(0)
        batch = -(mean * mean.log()).sum() / torch.log(torch.tensor(3.0))
        torch.testing.assert_close(record.aux_loss, -0.1 * token - 0.01 * batch)
    assert all(record.aux_loss == 0 for record in model.eval()(*inputs()).routing.values())


def test_convolutional_experts_equal_a_loop():
    torch.manual_seed(0)
    experts = make_experts("tcn", 3, 4, 6, 2)
    assert isinstance(experts, LastConvExperts)
    x = torch.randn(5, 4, 2)
    weights = experts.weight.view(3, 6, 4, 2)
    expected = torch.stack([(torch.einsum("bct,oct->bo", x, w)) for w in weights], 1) + experts.bias.view(3, 6)
    torch.testing.assert_close(experts.dense(x), expected.relu())
    gate = torch.rand(5, 3)
    torch.testing.assert_close(experts.dense(x, gate), (expected.relu() * gate[..., None]).sum(1))


def test_the_sizes_of_the_fact_sheet():
    schema = {"num_features": 20, "history": 31, "horizon": 30, "frame_rate": 10.0}
    assert parameter_counts(TMMOE(schema))["total"] == pytest.approx(69_230, abs=10)


@pytest.mark.parametrize(("expert", "dim"), [("lstm", 67), ("gru", 65), ("mlp", 61), ("tcn", 66)])
def test_the_default_twin_has_the_same_active_parameters(expert, dim):
    schema = {"num_features": 20, "history": 31, "horizon": 30, "frame_rate": 10.0}
    moe, twin = (
        parameter_counts(m)["active"]
        for m in (TMMOE(schema, expert=expert), DenseTwin(schema, expert=expert, expert_dim=dim))
    )
    assert twin == pytest.approx(moe, rel=0.02)


@pytest.mark.parametrize("variant", VARIANTS)
def test_weights_come_back(tmp_path, variant):
    torch.manual_seed(0)
    model = stir(TMMOE(SCHEMA, variant=variant, **SMALL)).eval()
    model.save_pretrained(tmp_path / "w")
    again = ZooModel.from_pretrained(tmp_path / "w")
    for one, other in zip(model(*inputs())[:2], again(*inputs())[:2], strict=True):
        assert torch.equal(one, other)
