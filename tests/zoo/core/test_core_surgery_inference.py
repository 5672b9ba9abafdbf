"""Switching, ranking, quantising, pruning online and offloading experts of trained layers."""

import copy
import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from moezoo.zoo.core import (
    DenseRouter,
    Experts,
    MLPExperts,
    ModuleExperts,
    MoE,
    NullExpertRouter,
    StackedLinear,
    TopKRouter,
    ZeroExpert,
)
from moezoo.zoo.core.dispatch import make_plan
from moezoo.zoo.core.surgery import (
    OffloadedExperts,
    OnlinePruning,
    Response,
    allocate_bits,
    answers_by_label,
    dense_mlps,
    expert_activity,
    expert_importance,
    expert_pools,
    masks_of,
    quantise_experts,
    rank_by_response,
    replaced,
    restored,
    round_to_bits,
    rounding_errors,
    routers_of,
    silenced_experts,
    stacked_layers,
    stored_bits,
    switched_experts,
    token_importance,
    watched_inputs,
)
from torch import nn


def mixture(router=None, act="gelu", seed=0):
    torch.manual_seed(seed)
    router = TopKRouter(6, 4, 2) if router is None else router
    for parameter in router.parameters():
        nn.init.normal_(parameter)
    return MoE(router, MLPExperts(4, 6, 8, 3, act=act), extra_experts=[ZeroExpert()] * router.num_extra).eval()


class Stack(nn.Module):
    def __init__(self):
        super().__init__()
        self.first = mixture()
        self.last = mixture(NullExpertRouter(6, 4, 2, 3), seed=1)

    def forward(self, x):
        y, first = self.first(x, return_routing=True)
        return y + self.last(x), {"first.router": first, "last.router": self.last.last_routing}


# --- switch


def test_switched_experts_are_off_or_on_in_the_block_and_as_before_after_it():
    model, x = Stack(), torch.randn(30, 6)
    before = model(x)[0]
    off, on = torch.tensor([True, False, True, True]), torch.tensor([0, 0, 1, 0, 0, -1], dtype=torch.int8)
    with switched_experts(model, {"first.router": off, "last.router": on}):
        y, routing = model(x)
        assert (routing["first.router"].indices != 1).all()
        assert (routing["last.router"].indices == 2).any(1).all() and (routing["last.router"].indices != 5).all()
        torch.testing.assert_close(y, model.first(x, expert_mask=off) + model.last(x, expert_mask=on))
    assert torch.equal(model(x)[0], before)
    with pytest.raises(ZeroDivisionError), switched_experts(model, {"first.router": off}):
        raise ZeroDivisionError
    assert torch.equal(model(x)[0], before)


def test_silenced_experts_answer_zero():
    moe, x = mixture(DenseRouter(6, 4)), torch.randn(9, 6)
    before, answers = moe(x), moe.experts.dense(x)
    with silenced_experts(moe.experts, [1, 3]):
        want = (answers * moe.last_routing.weights[..., None])[:, [0, 2]].sum(1)
        torch.testing.assert_close(moe(x), want)
    assert torch.equal(moe(x), before)
    with pytest.raises(ValueError, match="out of 0 to 3"), silenced_experts(moe.experts, [4]):
        pass


@pytest.mark.parametrize(
    "masks, words",
    [
        ({"first": torch.ones(4) > 0}, "'first.router', 'last.router'"),
        ({"last.router": torch.ones(4) > 0}, "6 experts"),
    ],
)
def test_switching_names_mistakes(masks, words):
    with pytest.raises(ValueError, match=words), switched_experts(Stack(), masks):
        pass


def test_ranking_finds_the_experts_that_answer_to_one_kind_of_input_and_switching_them_off_changes_that_kind():
    moe = mixture(TopKRouter(6, 4, 2))
    with torch.no_grad():
        moe.router.weight.mul_(0.3)
        moe.router.weight[2, 0] = 5.0  # expert 2 answers to a large first feature
    plain, odd = torch.randn(400, 6), torch.randn(400, 6)
    plain[:, 0], odd[:, 0] = 0.0, 3.0

    def run(x):
        return [{"router": moe(part, return_routing=True)[1]} for part in x.split(150)]

    to, than = expert_activity(run(odd)), expert_activity(run(plain))
    ranked = rank_by_response(to, than)
    assert ranked[0][:2] == ("router", 2) and ranked[0].difference > 0.4
    torch.testing.assert_close(to["router"].sum(), torch.ones((), dtype=torch.float64))
    masks = masks_of(ranked[:1], to)
    assert masks["router"].tolist() == [0, 0, -1, 0] and masks_of(ranked[:1], to, on=True)["router"][2] == 1
    with switched_experts(moe, masks):
        assert (run(odd)[0]["router"].indices != 2).all()
    with pytest.raises(ValueError, match="other layers"):
        rank_by_response(to, {})
    assert Response("a", 1, 0.5) == ("a", 1, 0.5)


def test_answers_are_averaged_by_label():
    weights = torch.tensor([[1.0, 1.0, 0.0], [0.0, 3.0, 1.0], [-2.0, 0.0, 2.0], [0.0, 0.0, 0.0], [5.0, 0.0, 0.0]])
    labels = torch.tensor([1, 1, 0, 0, 7])
    got = answers_by_label(weights, labels, 3)
    want = torch.tensor([[0.5, 0.0, 0.5], [0.25, 0.625, 0.125], [0.0, 0.0, 0.0]], dtype=torch.float64)
    torch.testing.assert_close(got, want)


def test_dense_mlps_are_found_and_parts_are_replaced_and_restored():
    model = nn.Sequential(nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2)), nn.Sequential(nn.Linear(2, 2)))
    assert list(dense_mlps(model)) == ["0"]
    x, part = torch.randn(5, 3), model[0]
    before = model(x)
    with replaced(model, "0", nn.Linear(3, 2)):
        assert not torch.equal(model(x), before)
    assert model[0] is part
    with pytest.raises(ZeroDivisionError), restored(part):
        part[0].weight.data.zero_()
        raise ZeroDivisionError
    assert torch.equal(model(x), before)


def test_pools_of_any_stacked_layers_are_found_and_silenced():
    class Pairs(Experts):
        def __init__(self):
            super().__init__(3)
            self.down, self.up = StackedLinear(3, 4, 2), StackedLinear(3, 2, 5, bias=False)

        def forward(self, x_sorted, plan, *, backend="auto"):
            raise NotImplementedError

        def dense(self, x, weights=None):
            return self.up.batched(self.down.wide(x).transpose(0, 1)).transpose(0, 1)

    pairs, x = Pairs(), torch.randn(6, 4)
    pools = expert_pools(nn.ModuleDict({"pairs": pairs, "others": ModuleExperts([nn.Linear(4, 2) for _ in "ab"])}))
    assert list(pools) == ["pairs"] and stacked_layers(pairs) == [pairs.down, pairs.up]
    before = pairs.dense(x)
    with silenced_experts(pairs, [1]):
        assert (pairs.dense(x)[:, 1] == 0).all() and torch.equal(pairs.dense(x)[:, [0, 2]], before[:, [0, 2]])
    quantise_experts(pairs, [16, 2, 16])
    torch.testing.assert_close(pairs.up.weight[1], round_to_bits(pairs.up.weight[1], 2))
    errors = rounding_errors(pairs, x, torch.ones(6, 3), [2, 16])
    assert errors[0, 0] > 0 and (errors[:, 1] == 0).all()


def test_pools_and_their_inputs_are_found_in_any_model():
    model, x = Stack(), torch.randn(30, 6)
    pools = expert_pools(model)
    assert list(pools) == ["first.experts", "last.experts"]
    assert list(routers_of(model, pools["last.experts"])) == ["first.router", "last.router"]
    assert expert_pools(MoE(TopKRouter(6, 1, 1), MLPExperts(1, 6, 8))) == {}
    before = model(x)[0]
    for backend in ("auto", "dense", "segment"):
        model.first.backend = backend
        with watched_inputs(pools["first.experts"]) as seen:
            model(x)
        assert len(seen) == 1 and torch.equal(seen[0], x)
        model(x)
        assert len(seen) == 1
    torch.testing.assert_close(model(x)[0], before)
    with torch.no_grad(), watched_inputs(pools["first.experts"]) as seen:
        model(x[:1])
    assert len(seen) == 1


# --- bits


@settings(max_examples=25, deadline=None)
@given(bits=st.integers(2, 8), rows=st.integers(1, 5), columns=st.integers(1, 9), seed=st.integers(0, 10**6))
def test_rounding_has_so_many_levels_and_is_never_far_off(bits, rows, columns, seed):
    weight = torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    got = round_to_bits(weight, bits)
    step = (weight.amax(1) - weight.amin(1)) / (2**bits - 1)
    assert ((got - weight).abs() <= step[:, None] / 2 + 1e-12).all()
    assert all(len(row.unique()) <= 2**bits for row in got)
    torch.testing.assert_close(round_to_bits(got, bits), got)


def test_one_bit_is_a_sign_and_sixteen_change_nothing():
    weight = torch.randn(5, 7)
    assert torch.equal(round_to_bits(weight, 16), weight)
    one = round_to_bits(weight, 1)
    torch.testing.assert_close(one.abs(), weight.abs().mean(1, keepdim=True).expand(5, 7))
    assert torch.equal(one > 0, weight >= 0)
    with pytest.raises(ValueError, match="bits=0"):
        round_to_bits(weight, 0)


def test_experts_are_rounded_each_to_its_bits_and_their_size_is_counted():
    experts = MLPExperts(3, 6, 8)
    before = copy.deepcopy(experts)
    quantise_experts(experts, [16, 2, 4])
    for layer, old in zip(experts.layers, before.layers, strict=True):
        assert torch.equal(layer.weight[0], old.weight[0]) and torch.equal(layer.bias, old.bias)
        for e, bits in ((1, 2), (2, 4)):
            torch.testing.assert_close(layer.weight[e], round_to_bits(old.weight[e], bits))
    assert stored_bits(experts, [16, 16, 16]) == 16 * sum(p.numel() for p in experts.parameters())
    rows, weights = 8 + 6, 2 * 6 * 8
    assert stored_bits(experts, [2, 2, 2]) == 3 * (2 * weights + 32 * rows + 16 * rows)
    with pytest.raises(ValueError, match="2 numbers of bits"):
        quantise_experts(experts, [1, 2])


def test_errors_fall_with_bits_and_count_an_experts_own_tokens():
    moe, x = mixture(), torch.randn(80, 6)
    weights = moe(x, return_routing=True)[1].dense_weights()
    errors = rounding_errors(moe.experts, x, weights, [2, 4, 8, 16])
    assert (errors.diff(dim=1) < 0).all() and (errors[:, -1] == 0).all()
    rounded = copy.deepcopy(moe.experts)
    quantise_experts(rounded, [2] * 4)
    own = weights[:, 1] > 0
    change = (rounded.dense(x[own])[:, 1] - moe.experts.dense(x[own])[:, 1]).square().mean()
    torch.testing.assert_close(errors[1, 0].float(), change)


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 10**6), budget=st.floats(1.5, 3.0), both=st.booleans())
def test_the_allocation_is_the_best_of_all(seed, budget, both):
    g = torch.Generator().manual_seed(seed)
    importance, errors = torch.rand(6, generator=g), torch.rand(6, 3, generator=g).sort(1, descending=True).values
    needs = (2, 3) if both else ()
    chosen = allocate_bits(importance, errors, (1, 2, 3), budget, needs)
    cost = importance[:, None].double() * errors.double()
    prices = {
        bits: sum(cost[e, b - 1].item() for e, b in enumerate(bits))
        for bits in itertools.product((1, 2, 3), repeat=6)
        if sum(bits) <= 6 * budget + 1e-9 and set(needs) <= set(bits)
    }
    assert prices[tuple(chosen.tolist())] == pytest.approx(min(prices.values()), abs=1e-12)


def test_allocation_names_what_cannot_be():
    importance, errors = torch.ones(3), torch.rand(3, 2)
    with pytest.raises(ValueError, match="mean of at most 1"):
        allocate_bits(importance, errors, (2, 3), 1.0)
    with pytest.raises(ValueError, match=r"each of \[3\] at least once"):
        allocate_bits(importance, errors, (2, 3), 2.0, (3,))
    with pytest.raises(ValueError, match="must be among"):
        allocate_bits(importance, errors, (2, 3), 3.0, (4,))


def test_allocated_bits_are_better_than_the_same_for_all():
    moe = mixture(act="relu")
    with torch.no_grad():
        moe.router.weight[3] *= 4  # one expert matters more
        moe.experts.layers[0].weight[0] *= 0.05
    x = torch.randn(500, 6)
    y, routing = moe(x, return_routing=True)
    weights, bits = routing.dense_weights(), (1, 2, 3)
    importance = expert_importance(weights)
    torch.testing.assert_close(expert_importance(weights, 1.0, 0.0).sum(), torch.ones((), dtype=torch.float64))
    mixed = allocate_bits(importance, rounding_errors(moe.experts, x, weights, bits), bits, 2.0)
    errors = []
    for chosen in (mixed, [2] * 4):
        rounded = copy.deepcopy(moe)
        quantise_experts(rounded.experts, chosen)
        errors.append((rounded(x) - y).square().mean())
    assert errors[0] < errors[1] and sum(mixed.tolist()) <= 8


def test_online_pruning_drops_the_weaker_of_two_where_the_stronger_is_sure():
    moe, x = mixture(), torch.randn(200, 6)
    plain = moe(x, return_routing=True)[1]
    router = OnlinePruning(moe.router, beta=0.5).eval()
    pruned = router(x)
    sure = plain.weights[:, 1] < 0.5 * plain.weights[:, 0]
    assert sure.any() and not sure.all()
    assert (pruned.indices[sure, 1] == -1).all() and torch.equal(pruned.indices[~sure], plain.indices[~sure])
    torch.testing.assert_close(pruned.weights.sum(1), plain.weights.sum(1))
    torch.testing.assert_close(pruned.weights[sure, 0], torch.ones(int(sure.sum())))
    exact, segment = MoE(router, moe.experts, backend="dense"), MoE(router, moe.experts, backend="segment")
    torch.testing.assert_close(exact(x), segment(x))
    assert torch.equal(router.train()(x).indices, plain.indices)
    null = OnlinePruning(NullExpertRouter(6, 4, 4, 2)).eval()
    assert torch.isfinite(null(x).weights).all()
    with pytest.raises(ValueError, match="beta=2"):
        OnlinePruning(moe.router, beta=2.0)


def test_online_pruning_skips_tokens_that_matter_least_and_spares_those_that_matter_most():
    moe, x = mixture(), torch.randn(40, 6)
    plain = moe.router(x)
    router = OnlinePruning(moe.router, beta=1.0, skip=0.25, spare=0.25).eval()
    order = x.abs().sum(1).argsort()
    least, middle, most = order[:10], order[10:30], order[30:]
    record = router(x)
    assert (record.indices[least] == -1).all() and (record.weights[least] == 0).all()
    assert (record.indices[middle, 0] >= 0).all() and (record.indices[middle, 1] == -1).all()
    assert torch.equal(record.indices[most], plain.indices[most])
    torch.testing.assert_close(record.weights[most], plain.weights[most])
    paid = torch.rand(40)
    mask = torch.arange(40) < 20
    given = router(x, importance=token_importance(x, paid), token_mask=mask)
    rank = (x.abs().sum(1) * paid)[:20].argsort()
    assert (given.indices[20:] == -1).all() and (given.indices[rank[:5]] == -1).all()
    assert (given.indices[rank[5:]] >= 0).any(1).all() and (given.indices[rank[-5:]] >= 0).all()
    assert (router(x[:1]).indices[:, 0] >= 0).all() and router(x[:0]).indices.shape == (0, 2)  # one alone stays
    with pytest.raises(ValueError, match="together at most 1"):
        OnlinePruning(moe.router, skip=0.6, spare=0.6)


# --- offload


@pytest.mark.parametrize("act", ["gelu", "swiglu"])
def test_offloaded_experts_give_the_same_numbers(act):
    moe, x = mixture(act=act), torch.randn(50, 6)
    small = OffloadedExperts(moe.experts, cache=2)
    with torch.no_grad():
        torch.testing.assert_close(MoE(moe.router, small)(x), moe(x))
        torch.testing.assert_close(small.dense(x), moe.experts.dense(x))
        mask = torch.arange(50) % 3 > 0
        torch.testing.assert_close(MoE(moe.router, small)(x, token_mask=mask), moe(x, token_mask=mask))
        assert MoE(moe.router, small)(x[:0]).shape == (0, 3)
    assert not list(small.parameters()) and len(small._held) == 2


def test_the_cache_keeps_what_was_used_last_and_prefetching_makes_hits():
    torch.manual_seed(0)
    small = OffloadedExperts(MLPExperts(4, 6, 8), cache=2)

    def use(*experts):
        indices = torch.tensor(experts)[:, None]
        small(torch.randn(len(experts), 6), make_plan(indices, 4, dropless=True))

    assert small.hit_ratio == 1
    use(0), use(1), use(0), use(2)
    assert (small.hits, small.misses) == (1, 3) and list(small._held) == [0, 2]
    use(1, 2)  # 2 first, since it is there
    assert (small.hits, small.misses) == (2, 4) and list(small._held) == [2, 1]
    small.prefetch(torch.tensor([[3, 0], [3, -1], [0, 3]]))
    use(0, 3)
    assert (small.hits, small.misses) == (4, 4) and small.hit_ratio == 0.5
    small.prefetch([1, 2, 3])  # more than there is room for: the first two
    assert set(small._held) == {1, 2}
    small.reset()
    assert small.hit_ratio == 1 and not small._held
    with pytest.raises(ValueError, match="cache=5"):
        OffloadedExperts(MLPExperts(4, 6, 8), cache=5)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_offloaded_experts_on_a_gpu():
    moe, x = mixture(), torch.randn(50, 6)
    small = OffloadedExperts(moe.experts, cache=2, device="cuda")
    ours = MoE(copy.deepcopy(moe.router).cuda(), small)
    with torch.no_grad():
        for part in x.split(10):
            got, routing = ours(part.cuda(), return_routing=True)
            torch.testing.assert_close(got.cpu(), moe(part), rtol=1e-3, atol=1e-3)
            small.prefetch(routing.indices)
    assert small.hits > 0
