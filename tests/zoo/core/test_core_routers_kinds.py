"""Switch, straight-through, expert choice, null and hash routers: the property that defines each."""

import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from moezoo.zoo.core import (
    ExpertChoiceRouter,
    HashRouter,
    NoisyTopKRouter,
    NullExpertRouter,
    StraightThroughRouter,
    SwitchRouter,
    TaskGate,
    TopKRouter,
    losses,
    statistics,
)
from torch.autograd import gradcheck

LEARNED = {
    "switch": lambda: SwitchRouter(4, 3),
    "straight": lambda: StraightThroughRouter(4, 3),
    "choice": lambda: ExpertChoiceRouter(4, 3, capacity=1.5),
    "null": lambda: NullExpertRouter(4, 3, num_null=2, top_k=3),
}


def build(name, seed=0):
    torch.manual_seed(seed)
    router = LEARNED[name]()
    torch.nn.init.normal_(router.weight, std=2.0)
    return router


@pytest.mark.parametrize("name", LEARNED)
@settings(max_examples=20, deadline=None)
@given(tokens=st.integers(0, 9), masked=st.booleans(), off=st.booleans(), seed=st.integers(0, 10**6))
def test_records_are_consistent(name, tokens, masked, off, seed):
    router = build(name, seed)
    columns = router.num_experts + router.num_extra
    kw = {}
    if masked:
        kw["token_mask"] = torch.rand(tokens) < 0.5
    if off:
        kw["expert_mask"] = torch.arange(columns) != 1
    r = router(torch.randn(tokens, 4), **kw)
    assert r.weights.shape == r.indices.shape == (tokens, router.top_k)
    assert r.scores.shape == r.logits.shape == (tokens, columns)
    assert ((r.indices >= -1) & (r.indices < columns)).all()
    assert (r.weights[r.indices < 0] == 0).all()
    assert torch.isfinite(r.weights).all() and torch.isfinite(r.aux_loss)
    if r.dropless:
        assert ((r.indices >= 0) & (r.indices < router.num_experts)).all()
    if masked:
        assert (r.indices[~kw["token_mask"]] == -1).all()
    if off:
        assert (r.indices != 1).all()


@pytest.mark.parametrize("name", LEARNED)
def test_gradcheck(name):
    router = build(name, 3).double()
    if name == "straight":  # its value is constant: check the gradient of what it stands for instead
        x = torch.randn(6, 4, dtype=torch.float64, requires_grad=True)
        r = router(x)
        grads = torch.autograd.grad(r.weights.sum(), (x, router.weight))
        scores = (x @ router.weight.T).softmax(-1)
        want = torch.autograd.grad(scores.amax(-1).sum(), (x, router.weight))
        assert (r.weights == 1).all()
        for got, expected in zip(grads, want, strict=True):
            torch.testing.assert_close(got, expected)
        return

    def run(x, weight):
        r = torch.func.functional_call(router, {"gate.weight": weight}, (x,))
        return r.weights, r.scores, r.logits, r.aux_loss

    assert gradcheck(run, (torch.randn(6, 4, dtype=torch.float64, requires_grad=True), router.weight))


def test_switch_weighs_with_the_probability_and_its_gate_learns():
    router = build("switch")
    r = router(torch.randn(50, 4))
    best, index = r.scores.max(-1, keepdim=True)
    kept = r.indices >= 0
    assert torch.equal(r.indices[kept], index[kept]) and torch.equal(r.weights[kept], best[kept])
    assert torch.bincount(r.indices[kept], minlength=3).max() <= 21  # ceil(1.25 * 50 / 3)
    assert SwitchRouter(4, 3, capacity_factor=None)(torch.randn(5, 4)).dropless
    (from_weights,) = torch.autograd.grad(r.weights.sum(), router.weight)
    assert from_weights.abs().max() > 0


def test_each_expert_takes_its_best_tokens():
    router = build("choice")
    x = torch.randn(20, 4)
    r = router(x)
    for e in range(3):
        mine = (r.indices == e).any(-1).nonzero().flatten()
        assert set(mine.tolist()) == set(r.scores[:, e].topk(10).indices.tolist())  # ceil(1.5 * 20 / 3)
    taken = r.indices >= 0
    assert torch.equal(r.weights, r.scores * taken)
    assert statistics.max_violation(r) == 0 and statistics.min_violation(r) == 0
    assert (taken.sum(-1) == 0).any() or (taken.sum(-1) > 1).any()


def test_expert_choice_of_a_lone_token_is_the_dense_mixture():
    r = build("choice")(torch.randn(1, 4))
    assert r.indices.tolist() == [[0, 1, 2]]
    torch.testing.assert_close(r.weights.sum(), torch.ones(()))
    with pytest.raises(ValueError, match="capacity=4"):
        ExpertChoiceRouter(4, 3, capacity=4.0)


def test_expert_choice_takes_no_padding():
    router = build("choice")
    x, mask = torch.randn(20, 4), torch.arange(20) < 3
    r = router(x, token_mask=mask)
    assert (r.indices[:3] >= 0).all() and (r.indices[3:] == -1).all()


def test_null_experts_take_slots_and_give_nothing():
    router = build("null")
    r = router(torch.randn(400, 4))
    null = r.indices >= 3
    assert (r.weights[null] == 0).all() and (r.weights[~null] > 0).all()
    torch.testing.assert_close(r.weights.sum(-1), torch.ones(400))  # 3 slots, 2 null experts: one true at least
    chosen = r.logits.exp().gather(1, r.indices) * ~null
    torch.testing.assert_close(r.weights, chosen / chosen.sum(-1, keepdim=True))
    assert null.any() and set((~null).sum(-1).tolist()) == {1, 2, 3}


def test_a_token_that_chooses_only_null_experts_gets_nothing_and_harmless_gradients():
    router = NullExpertRouter(4, 3, num_null=4, top_k=2)
    with torch.no_grad():
        router.weight.zero_()[3:] = 5.0
    r = router(torch.ones(6, 4))
    assert (r.weights == 0).all() and (r.indices >= 3).all()
    (r.weights.sum() + r.aux_loss).backward()
    assert torch.isfinite(router.weight.grad).all()


def test_moe_plus_plus_keeps_copy_and_constant_weights():
    torch.manual_seed(0)
    router = NullExpertRouter(4, 3, num_null=1, top_k=2, num_other=3)
    torch.nn.init.normal_(router.weight)
    r = router(torch.randn(300, 4))
    assert r.num_extra == 4 and router.first_null == 6
    assert (r.weights[r.indices == 6] == 0).all() and (r.weights[r.indices < 6] > 0).all()
    assert (r.indices == 6).any() and ((r.indices >= 3) & (r.indices < 6)).any()


def test_the_null_loss_does_not_care_how_null_experts_share():
    scores = torch.rand(8, 4).softmax(-1)
    even = torch.tensor([[0, 2], [1, 3]]).repeat(4, 1)
    one_null = torch.tensor([[0, 2], [1, 2]]).repeat(4, 1)
    torch.testing.assert_close(losses.null_balance_loss(scores, even, 2), losses.null_balance_loss(scores, one_null, 2))
    torch.testing.assert_close(losses.null_balance_loss(scores, even, 2), losses.switch_balance_loss(scores, even))
    assert losses.switch_balance_loss(scores, one_null) != losses.switch_balance_loss(scores, even)
    with pytest.raises(ValueError, match="top_k >= 2"):
        NullExpertRouter(4, 3, num_null=1, top_k=1)


def test_a_hash_is_fixed_balanced_and_total():
    router = HashRouter(7)
    ids = torch.arange(-700, 700)
    r = router(torch.zeros(1400, 1), task_id=ids)
    assert r.dropless and (r.weights == 1).all() and not list(router.parameters())
    assert torch.bincount(r.indices.flatten(), minlength=7).tolist() == [200] * 7
    again = router(torch.ones(1400, 1), task_id=ids)
    assert torch.equal(again.indices, r.indices)
    want = [i * router.prime % 7 for i in ids.tolist()]
    assert r.indices.flatten().tolist() == want
    assert router(torch.zeros(1, 1), task_id=torch.tensor([2**62])).indices.item() == 2**62 * router.prime % 7
    with pytest.raises(ValueError, match="common factor"):
        HashRouter(6, prime=3)
    with pytest.raises(ValueError, match="needs task_id"):
        router(torch.zeros(1, 1))


def test_straight_through_takes_any_gate():
    router = StraightThroughRouter(4, 3, gate=TaskGate(4, 3, 2, std=1.0))
    x = torch.randn(5, 4)
    a, b = (router(x, task_id=torch.full((5,), t)).indices for t in (0, 1))
    assert not torch.equal(a, b)


TEACHERS = {  # what each router's aux_loss teaches
    "aux": (lambda: TopKRouter(4, 3, 2), {"gate.weight"}),
    "seq_aux": (lambda: TopKRouter(4, 3, 2, balance="seq_aux"), {"gate.weight"}),
    "z alone": (lambda: TopKRouter(4, 3, 2, balance="none", z_coef=1.0), {"gate.weight"}),
    "bias": (lambda: TopKRouter(4, 3, 2, balance="bias"), set()),
    "none": (lambda: TopKRouter(4, 3, 2, balance="none"), set()),
    "importance": (lambda: NoisyTopKRouter(4, 3, 2, load_coef=0.0), {"gate.weight", "noise_gate.weight"}),
    "load": (lambda: NoisyTopKRouter(4, 3, 2, importance_coef=0.0), {"gate.weight", "noise_gate.weight"}),
    "load of all": (lambda: NoisyTopKRouter(4, 3, 3, importance_coef=0.0), set()),
    "null": (lambda: NullExpertRouter(4, 3, 2, 2), {"gate.weight"}),
    "switch": (lambda: SwitchRouter(4, 3), {"gate.weight"}),
    "straight": (lambda: StraightThroughRouter(4, 3), set()),
    "choice": (lambda: ExpertChoiceRouter(4, 3), set()),
}


@pytest.mark.parametrize("name", TEACHERS)
def test_the_aux_loss_teaches_what_it_says_and_nothing_outside_training(name):
    torch.manual_seed(0)
    make, expected = TEACHERS[name]
    router = make()
    for parameter in router.parameters():
        torch.nn.init.normal_(parameter)
    kw = {"sequence_id": torch.arange(20) // 5} if name == "seq_aux" else {}
    x = torch.randn(20, 4)
    loss = router(x, **kw).aux_loss
    if loss.requires_grad:
        loss.backward()
    taught = {n for n, p in router.named_parameters() if p.grad is not None and p.grad.abs().max() > 0}
    assert taught == expected
    quiet = router.eval()(x, **kw).aux_loss
    assert quiet == 0 and not quiet.requires_grad


TWO_PROCESSES = """
import sys, torch
import torch.distributed as dist
from moezoo.zoo.core import TopKRouter, update_router_bias
rank = int(sys.argv[1])
dist.init_process_group("gloo", init_method="file://" + sys.argv[2], rank=rank, world_size=2)
model = torch.nn.ModuleList(TopKRouter(4, 3, 2, balance="bias", bias_update_rate=0.1) for _ in range(2))
model[0].expert_counts.copy_(torch.tensor([[5.0, 0, 1], [0, 6, 1]])[rank])  # together 5, 6, 2
model[1].expert_counts.copy_(torch.tensor([[9.0, 0, 0], [0, 0, 9]])[rank])  # together 9, 0, 9
update_router_bias(model)
want = [torch.tensor([-1.0, -1, 1]), torch.tensor([-1.0, 1, -1])]
for router, sign in zip(model, want):
    torch.testing.assert_close(router.expert_bias, 0.1 * (sign - sign.mean()))
print("same step")
"""


def test_the_bias_follows_the_load_of_all_processes(tmp_path):
    command = [sys.executable, "-c", TWO_PROCESSES]
    ranks = [
        subprocess.Popen([*command, str(r), str(tmp_path / "meet")], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        for r in range(2)
    ]
    for rank in ranks:
        out, err = rank.communicate(timeout=120)
        assert b"same step" in out, err[-2000:].decode()


COMPILE = """
import sys, warnings; warnings.filterwarnings("ignore")
import torch
from moezoo.zoo.core import *

torch.manual_seed(0)
torch._dynamo.config.error_on_recompile = True
permutation = PermutationLearner(6)
permutation.freeze()
routers = {
    "topk": TopKRouter(8, 6, 2, z_coef=0.1),
    "sigmoid groups bias": TopKRouter(8, 6, 2, "sigmoid", num_groups=3, topk_groups=2, balance="bias"),
    "extra, capacity": TopKRouter(8, 6, 2, num_extra=2, capacity_factor=0.5, priority="prob"),
    "sequences": TopKRouter(8, 6, 2, balance="seq_aux"),
    "dense": DenseRouter(8, 6, 2.0, activation=torch.tanh, bias=True),
    "switch": SwitchRouter(8, 6, gate=TaskGate(8, 6, 2)),
    "noisy": NoisyTopKRouter(8, 6, 2, capacity_factor=1.0).eval(),
    "straight": StraightThroughRouter(8, 6),
    "choice": ExpertChoiceRouter(8, 6),
    "null": NullExpertRouter(8, 6, 2, 3),
    "hash": HashRouter(6),
    "fixed": FixedRouter(6),
    "dselect": DSelectKRouter(8, 6, 2),
    "static": DSelectKRouter(8, 6, 2, gate=StaticGate(8, num_tasks=2), sparse_eval=True).eval(),
    "comet": CometRouter(8, 6, 2),
    "permuted": CometRouter(8, 6, 2, permutation=permutation),
    "dense to sparse": DenseToSparseRouter(8, 6, 2).eval(),
    "recurrent": RecurrentRouter(8, TopKRouter(5, 6, 2), torch.nn.GRUCell(5, 5)),
    "gating residual": GatingResidualRouter(NullExpertRouter(8, 6, 2, 3)),
    "product keys": ProductKeyRouter(8, 6, 2, heads=2),
    "sparsity": TopKRouter(8, 6, 2, gate=SparsityGate(MLPExperts(6, 8, 12, act="relu"))),
}
chosen = sys.argv[1:] or list(routers)
for name in chosen:
    router = routers[name]
    for parameter in router.parameters():
        torch.nn.init.normal_(parameter)
    torch._dynamo.reset()
    compiled = torch.compile(router, fullgraph=True, dynamic=True, backend="aot_eager")
    for tokens in (40, 12):
        x = torch.randn(tokens, 8, requires_grad=True)
        kw = {"task_id": torch.arange(tokens) % 2}
        if name == "sequences":
            kw["sequence_id"] = torch.arange(tokens) // 7
        if name in ("extra, capacity", "null", "choice"):
            kw["token_mask"] = torch.arange(tokens) % 5 > 0
        plain, traced = router(x, **kw), compiled(x, **kw)
        assert torch.equal(plain.indices, traced.indices), name
        for field in ("weights", "scores", "logits", "aux_loss"):
            torch.testing.assert_close(getattr(plain, field), getattr(traced, field), msg=name)
        if plain.weights.requires_grad:
            (traced.weights.square().sum() + traced.aux_loss).backward()
            assert (x.grad is None) == (name == "static") and (x.grad is None or torch.isfinite(x.grad).all()), name
    if name == "sigmoid groups bias":
        assert router.expert_counts.sum() == 2 * 2 * 52
print("compiled", len(chosen))
"""
QUICK = ["sigmoid groups bias", "extra, capacity", "choice", "gating residual", "product keys"]


@pytest.mark.parametrize("names", [QUICK, pytest.param([], id="all", marks=pytest.mark.slow)])
def test_routers_trace_as_one_graph_with_dynamic_batches(names):
    """In its own process: the shape-checking import hook of the tests does not trace."""
    ran = subprocess.run([sys.executable, "-c", COMPILE, *names], capture_output=True, text=True, timeout=480)
    assert f"compiled {len(names) or 21}" in ran.stdout, ran.stderr[-3000:]
