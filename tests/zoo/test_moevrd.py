"""MoE-VRD: A9 of the spec, the iteration against its formulas, the published size, variants, twins, saving."""

import itertools

import pytest
import torch
import torch.nn.functional as F
from moezoo import create_model
from moezoo.datasets.relations import RelationsData
from moezoo.errors import UserError
from moezoo.recipes import metadata
from moezoo.zoo.base import ZooModel
from moezoo.zoo.baselines.relations import FrequencyPrior, RelationExpert
from moezoo.zoo.core import NoisyTopKRouter, Routing, dispatch, make_plan
from moezoo.zoo.core.statistics import parameter_counts
from moezoo.zoo.moevrd import Belief, Labels, MoEVRD, PairExperts, Preferences, RelationOutput

SCHEMA = {"num_features": 6, "objects": list("abc"), "predicates": list("vwxyz")}
VIDVRD = {"num_features": 1536, "objects": [str(i) for i in range(35)], "predicates": [str(i) for i in range(132)]}
MODES = list(itertools.product(("logits", "probs"), (True, False), (True, False)))


def pairs(count=40, seed=0, dtype=torch.float32):
    g = torch.Generator().manual_seed(seed)
    sizes = ((count, 6), (count, 6), (count, 12))
    return tuple(torch.randn(*size, generator=g, dtype=torch.float64).to(dtype) for size in sizes)


def labels(count=40, seed=1):
    g = torch.Generator().manual_seed(seed)
    s, o = (torch.randint(0, 4, (count,), generator=g) for _ in range(2))
    return Labels(s, o, (torch.rand(count, 5, generator=g) < 0.3).float())


def shaken(model, scale=0.5, seed=3):
    """Preferences, biases and gates away from zero."""
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += scale * torch.randn(parameter.shape, generator=g)
    return model.eval()


def copied(dense: RelationExpert, **arguments) -> MoEVRD:
    """A mixture of copies of the expert, gates at random."""
    moe = shaken(MoEVRD(SCHEMA, hidden=dense.expert.dims[1], **arguments))
    with torch.no_grad():
        for own, theirs in zip(moe.moe.experts.parameters(), dense.expert.parameters(), strict=True):
            own.copy_(theirs.expand_as(own))
        for own, theirs in zip(moe.preferences.parameters(), dense.preferences.parameters(), strict=True):
            own.copy_(theirs.expand_as(own))
    return moe


def assert_same(one: RelationOutput, other: RelationOutput, atol=1e-5):
    for a, b, probability in zip(one[:3], other[:3], (torch.exp, torch.exp, torch.sigmoid), strict=True):
        torch.testing.assert_close(probability(a), probability(b), atol=atol, rtol=0)


@pytest.mark.parametrize(("combine", "mixed", "shared"), MODES)
def test_a9_copies_of_one_expert_are_the_expert(combine, mixed, shared):
    dense = shaken(RelationExpert(SCHEMA, hidden=7))
    how = {"combine": combine, "mix_every_step": mixed, "share_preferences": shared}
    for experts, k in ((1, 1), (4, 2), (4, 3), (4, 4)):
        moe = copied(dense, experts=experts, top_k=k, **how)
        assert_same(moe(*pairs()), dense(*pairs()))
        moe.train(), dense.train()
        for part in (moe.moe.experts, dense.expert):
            part.dropout = 0.0
        assert_same(moe(*pairs(), labels=labels()), dense(*pairs(), labels=labels()))
        dense.eval()


@pytest.mark.parametrize(("combine", "mixed", "shared"), MODES)
def test_a9_probabilities_sum_to_one(combine, mixed, shared):
    moe = shaken(MoEVRD(SCHEMA, 5, 4, 2, combine=combine, mix_every_step=mixed, share_preferences=shared))
    out = moe(*pairs())
    for side in (out.subject, out.object):
        torch.testing.assert_close(side.exp().sum(1), torch.ones(40))
    assert out.predicate.isfinite().all()


def test_a9_distinct_experts_have_their_own_parameters():
    one, ten = (PairExperts(e, 6, 4, 5, 7, 0.0) for e in (1, 10))
    assert sum(p.numel() for p in ten.parameters()) == 10 * sum(p.numel() for p in one.parameters())
    for weight in ten.object_hidden.weight[1:]:
        assert not torch.equal(weight, ten.object_hidden.weight[0])


def test_a9_rows_go_where_the_gate_sends_them():
    # The gate of the spec: pairs 0 to 3 choose (0, 2), (1, 2), (0), (1).
    indices = torch.tensor([[0, 2], [1, 2], [0, -1], [1, -1]])
    plan = make_plan(indices, 3)
    rows = dispatch(torch.arange(4.0)[:, None], plan)[:, 0].tolist()
    ends = plan.offsets.tolist()
    assert [rows[a:b] for a, b in itertools.pairwise([0, *ends])] == [[0, 2], [1, 3], [0, 1]]


@pytest.mark.parametrize("combine", ["logits", "probs"])
def test_a9_the_task_teaches_the_gate_with_two_experts_and_not_with_one(combine):
    grads = []
    for k in (2, 1):
        moe = shaken(MoEVRD(SCHEMA, 5, 4, 2, combine=combine, balance=0.0)).train()
        moe.moe.router.top_k = k  # one is refused when built
        out = moe(*pairs(), labels=labels())
        (F.nll_loss(out.subject, labels().subject) + out.predicate.square().mean()).backward()
        grads.append(moe.moe.router.gate.linear.weight.grad.abs().max())
    assert grads[0] > 1e-4 and grads[1] < 1e-7


def test_k1_is_refused_behind_a_noisy_gate_and_learns_behind_a_softmax():
    with pytest.raises(UserError, match="top_k=1"):
        MoEVRD(SCHEMA, 5, 4, 1)
    moe = shaken(MoEVRD(SCHEMA, 5, 4, 1, gate="softmax", balance=0.0)).train()
    F.nll_loss(moe(*pairs(), labels=labels()).subject, labels().subject).backward()
    assert moe.moe.router.gate.linear.weight.grad.abs().max() > 1e-4
    with pytest.raises(UserError, match="combine=logits"):
        MoEVRD(SCHEMA, 5, 4, 1, gate="softmax", combine="probs")


def slow_expert(experts: PairExperts, e: int, s, o, position):
    """One expert by plain matrices."""

    def linear(layer, x):
        y = x @ layer.weight[e].T
        return y if layer.bias is None else y + layer.bias[e]

    sides = [linear(experts.object_out, linear(experts.object_hidden, x).relu()) for x in (s, o)]
    h = linear(experts.pair_hidden, torch.cat([s, o], 1)).relu()
    h = linear(experts.position_hidden, torch.cat([h, position], 1)).relu()
    return [*sides, linear(experts.predicate_out, h)]


def slow_moe(moe: MoEVRD, s, o, position, combine, mixed, shared):
    """Pair by pair, expert by expert, step by step."""
    routing = moe.moe.router(torch.cat([s, o, position], 1))
    results = []
    for n in range(len(s)):
        chosen = list(zip(routing.weights[n], routing.indices[n].tolist(), strict=True))
        seen = [slow_expert(moe.moe.experts, e, *(x[n : n + 1] for x in (s, o, position))) for _, e in chosen]

        def bias(name, left, right, e):
            if left is None:
                return 0.0
            matrix = getattr(moe.preferences, name)
            return torch.outer(left, right).flatten() @ (matrix if shared else matrix[e])

        def act(logits):
            return [logits[0].softmax(-1), logits[1].softmax(-1), logits[2].sigmoid()]

        def mean(parts, chosen=chosen):
            return [sum(w * part[i] for (w, _), part in zip(chosen, parts, strict=True)) for i in range(3)]

        beliefs = [[None, None, None] for _ in chosen]
        for _ in range(moe.steps):
            logits = []
            for (_, e), v, b in zip(chosen, seen, beliefs, strict=True):
                logits.append([v[0][0] + bias("po2s", b[2], b[1], e), v[1][0] + bias("sp2o", b[0], b[2], e), v[2][0]])
            if mixed:
                both = act(mean(logits)) if combine == "logits" else mean([act(part) for part in logits])
                after = [both for _ in chosen]
            else:
                after = [act(part) for part in logits]
            for (_, e), part, a in zip(chosen, logits, after, strict=True):
                part[2] = part[2] + bias("so2p", a[0], a[1], e)
            if mixed:
                both = act(mean(logits)) if combine == "logits" else mean([act(part) for part in logits])
                beliefs = [both for _ in chosen]
            else:
                beliefs = [act(part) for part in logits]
        results.append(act(mean(logits)) if combine == "logits" else mean([act(part) for part in logits]))
    return [torch.stack(parts) for parts in zip(*results, strict=True)]


@pytest.mark.parametrize(("combine", "mixed", "shared"), MODES)
@pytest.mark.parametrize("experts", [3, 9])  # computed densely and sorted
def test_the_mixture_equals_a_loop(combine, mixed, shared, experts, monkeypatch):
    moe = MoEVRD(SCHEMA, 5, experts, 2, combine=combine, mix_every_step=mixed, share_preferences=shared, unseen="none")
    moe = shaken(moe.double())
    backend = "dense" if experts == 3 else "segment"
    monkeypatch.setattr(PairExperts, "select", lambda self, x, top_k: backend)
    inputs = pairs(12, dtype=torch.float64)
    got = moe(*inputs)
    wanted = slow_moe(moe, *inputs, combine, mixed, shared)
    for a, b in zip((got.subject.exp(), got.object.exp(), got.predicate.sigmoid()), wanted, strict=True):
        torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("sizes", [(6, 9, 16), (8, 4, 5), (8, 12, 16)])  # features, classes, predicates
@pytest.mark.parametrize("backend", ["auto", "grouped", "segment", "padded"])
def test_sorted_rows_give_what_all_experts_on_all_rows_give(sizes, backend):
    torch.manual_seed(0)
    experts = PairExperts(3, *sizes, 8, 0.0)
    x, indices = torch.randn(40, 2 * sizes[0] + 12), torch.randint(0, 3, (40, 2))
    plan = make_plan(indices, 3, dropless=True)
    weights = torch.rand(40, 2)
    got = experts.routed(x, weights, plan, backend=backend)
    every = experts.dense(x).gather(1, indices[..., None].expand(-1, -1, got.shape[1]))
    torch.testing.assert_close(got, (every * weights[..., None]).sum(1), atol=1e-5, rtol=1e-5)


def test_one_expert_of_vidvrd_has_the_published_size():
    expert = RelationExpert(VIDVRD, hidden=768)
    assert parameter_counts(expert)["total"] == 4_782_528
    matrices = {name: tuple(getattr(expert.preferences, name).shape) for name in ("po2s", "sp2o", "so2p")}
    assert matrices == {"po2s": (132 * 36, 36), "sp2o": (36 * 132, 36), "so2p": (36 * 36, 132)}


def test_untouched_rows_count_as_the_median_of_what_was_learned_once_training_is_over():
    preferences = Preferences(4, 5, "iterative", unseen="global_median")
    with torch.no_grad():
        preferences.so2p[3] = torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0])
        preferences.so2p[7] = 0.5
    assert torch.equal(preferences.train().matrix("so2p"), preferences.so2p)
    filled = preferences.eval().matrix("so2p")
    assert torch.equal(filled[[3, 7]], preferences.so2p[[3, 7]])
    assert (filled[0] == 0.5).all(), "of ten values the fifth"
    assert (preferences.matrix("po2s") == 0).all(), "nothing learned"
    for unseen, expected in (
        ("global_mean", [1.75] * 5),
        ("class_mean", [0.75, 1.25, 1.75, 2.25, 2.75]),
        ("class_median", [0.5] * 5),
        ("none", [0.0] * 5),
    ):
        preferences.unseen = unseen
        assert preferences.matrix("so2p")[0].tolist() == pytest.approx(expected)
    own = Preferences(4, 5, "cascade", experts=2).eval()
    with torch.no_grad():
        own.so2p[0, 3], own.so2p[1, 3] = 1.0, 2.0
    assert own.matrix("so2p")[:, 0, 0].tolist() == [1.0, 2.0], "each expert its own"


def test_variants_have_what_they_are_named_for():
    seen = shaken(RelationExpert(SCHEMA, 5, preference="none"))
    assert_same(seen(*pairs()), RelationOutput(*_independent(seen), {}))
    cascade = shaken(RelationExpert(SCHEMA, 5, preference="cascade"))
    assert [n for n, _ in cascade.preferences.named_parameters()] == ["so2p"]
    s, o, p = _independent(cascade)
    both = (s.exp()[:, :, None] * o.exp()[:, None]).flatten(1)
    torch.testing.assert_close(cascade(*pairs()).predicate, p + both @ cascade.preferences.so2p)
    refine = shaken(RelationExpert(SCHEMA, 5, dropout=0.0, teacher="predicted")).train()
    other = labels(seed=9)
    assert_same(refine(*pairs(), labels=labels()), refine(*pairs(), labels=other)), "labels are not read"
    hard = shaken(RelationExpert(SCHEMA, 5, soft=False))
    assert hard(*pairs()).subject.isfinite().all()


def _independent(model):
    parts = model.expert.dense(torch.cat(pairs(), 1))[:, 0].split([4, 4, 5], 1)
    return parts[0].log_softmax(1), parts[1].log_softmax(1), parts[2]


def test_ngram_counts_what_training_shows():
    model = RelationExpert(SCHEMA, 5, frequencies=True, smoothing=0.5)

    class Batch:
        subject_class, object_class = torch.tensor([0, 0, 0, -1]), torch.tensor([1, 1, 2, 1])
        predicate = torch.tensor([[1.0, 0, 0, 0, 0], [1, 1, 0, 0, 0], [0, 1, 0, 0, 0], [1, 0, 0, 0, 0]])

    model.count_triplets([Batch()])
    so2p = model.preferences.so2p[0 * 4 + 1]
    assert so2p.tolist() == pytest.approx([2.5 / 5.5, 1.5 / 5.5, 0.5 / 5.5, 0.5 / 5.5, 0.5 / 5.5])
    assert model.preferences.po2s[1 * 4 + 2].tolist() == pytest.approx([1.5 / 3, 0.5 / 3, 0.5 / 3, 0.5 / 3])
    assert model.preferences.sp2o[0 * 5 + 1].tolist() == pytest.approx([0.5 / 4, 1.5 / 4, 1.5 / 4, 0.5 / 4])
    assert sum(p.numel() for p in model.preferences.parameters()) == 3, "a factor each"
    before = shaken(model)(*pairs()).predicate
    assert before.isfinite().all()


def test_a_start_from_an_earlier_window_is_where_the_steps_begin():
    model = shaken(RelationExpert(SCHEMA, 5, steps=1))
    start = Belief(torch.rand(40, 1, 4), torch.rand(40, 1, 4), torch.rand(40, 1, 5))
    zero = Belief(*(torch.zeros_like(part) for part in start))
    assert_same(model(*pairs()), model(*pairs(), start=zero))
    assert (model(*pairs()).subject - model(*pairs(), start=start).subject).abs().max() > 0.01


def test_labels_reach_the_model_in_training_alone():
    model = shaken(MoEVRD(SCHEMA, 5, 4, 2))
    out = model(*pairs())
    assert isinstance(out.routing["experts"], Routing) and out.routing["experts"].weights.shape == (40, 2)
    assert out.routing["experts"].aux_loss == 0, "no balance loss when serving"


def test_the_balance_losses_grow_with_their_weight():
    torch.manual_seed(0)
    losses = []
    for balance in (0.0, 0.01, 0.02):
        moe = shaken(MoEVRD(SCHEMA, 5, 4, 2, balance=balance)).train()
        torch.manual_seed(5)
        losses.append(float(moe(*pairs(), labels=labels()).routing["experts"].aux_loss))
    assert losses[0] == 0 and losses[2] == pytest.approx(2 * losses[1]) and losses[1] > 0
    assert isinstance(MoEVRD(SCHEMA, 5, 4, 2).moe.router, NoisyTopKRouter)


@pytest.mark.parametrize(
    "model",
    [
        lambda: MoEVRD(SCHEMA, 5, 4, 2, combine="probs", share_preferences=False),
        lambda: RelationExpert(SCHEMA, 5, frequencies=True),
        lambda: FrequencyPrior(SCHEMA),
    ],
)
def test_saved_and_loaded_it_says_the_same(model, tmp_path):
    built = shaken(model())
    built.save_pretrained(tmp_path / "w")
    back = ZooModel.from_pretrained(tmp_path / "w")
    assert_same(back(*pairs()), built(*pairs()), atol=0)


def test_the_prior_finds_classes_and_counts_predicates():
    torch.manual_seed(0)
    centres = torch.randn(4, 6) * 5
    s, o = torch.randint(0, 4, (2, 400))
    held = torch.zeros(400, 5)
    held[(s == 1) & (o == 2), 3] = 1

    class Batch:
        subject, object = centres[s] + torch.randn(400, 6), centres[o] + torch.randn(400, 6)
        subject_class, object_class, predicate = s, o, held

    prior = FrequencyPrior(SCHEMA)
    prior.fit([Batch()])
    out = prior(Batch.subject, Batch.object, torch.zeros(400, 12))
    assert (out.subject.argmax(1) == s).float().mean() > 0.95
    known = out.predicate.sigmoid()[:, 3]
    assert known[held[:, 3] > 0].min() > 0.5 > known[held[:, 3] == 0].median()


def test_wrong_arguments_get_one_line():
    for arguments, message in (
        ({"experts": 2, "top_k": 3}, "top_k=3"),
        ({"hidden": 0}, "hidden=0"),
        ({"steps": 0}, "steps=0"),
    ):
        with pytest.raises(UserError, match=message):
            MoEVRD(SCHEMA, **arguments)
    with pytest.raises(UserError, match="smoothing"):
        RelationExpert(SCHEMA, smoothing=0.0)


@pytest.mark.parametrize(
    ("twin", "of", "count"),
    [
        ("relations/moevrd_dense", "relations/moevrd", "active"),
        ("relations/moevrd_dense_total", "relations/moevrd", "total"),
        ("relations/moevrd_geom_dense", "relations/moevrd_geom", "active"),
    ],
)
def test_dense_twins_have_as_many_parameters(twin, of, count):
    schema = RelationsData(features="geom" if "geom" in of else "visual").schema
    sizes = [parameter_counts(create_model(name, schema=schema)) for name in (twin, of)]
    assert metadata(twin).twin_of == of
    assert sizes[0]["active"] == pytest.approx(sizes[1][count], rel=0.02), sizes
