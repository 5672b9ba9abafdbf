"""AW-MoE: symmetries, padding, cold users, gradients, and its contrastive loss against NumPy."""

import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.multiprocessing as mp
from moezoo.errors import UserError
from moezoo.zoo.awmoe import AWMoE, GateNetwork, PairUnit, attention_weights, gate_contrastive_loss
from moezoo.zoo.baselines.ranking import TowerRanker

SCHEMA = {
    "dataset": "made",
    "fingerprint": "0",
    "fields": ["item", "brand"],
    "vocabulary": {"item": 30, "brand": 5, "recency": 8},
    "history_fields": ["item", "brand", "recency"],
    "query": ["brand"],
    "dense": ["a", "b", "c"],
    "slices": [],
}


def make_batch(sessions=6, cands=5, time=12, seed=0):
    rng = torch.Generator().manual_seed(seed)

    def ids(*shape, fields):
        sizes = [SCHEMA["vocabulary"][name] for name in fields]
        return torch.stack([torch.randint(2, size, shape, generator=rng) for size in sizes], -1)

    length = torch.randint(1, time + 1, (sessions,), generator=rng)
    return {
        "candidates": ids(sessions, cands, fields=SCHEMA["fields"]),
        "candidate_mask": torch.ones(sessions, cands, dtype=torch.bool),
        "history": ids(sessions, time, fields=SCHEMA["history_fields"]),
        "history_mask": torch.arange(time) >= time - length[:, None],
        "query": ids(sessions, fields=SCHEMA["query"]),
        "dense": torch.randn(sessions, cands, 3, generator=rng),
        "user": torch.arange(sessions),
    }


def make_model(**changes):
    torch.manual_seed(0)
    # Large embeddings and votes, so that every path moves the scores by much more than rounding.
    model = AWMoE(SCHEMA, **{"embedding_std": 1.0, "hidden": 8, "gate_hidden": 8, "expert_hidden": (16, 8)} | changes)
    torch.nn.init.normal_(model.gate.unit.last.weight)
    return model


GATES = [(c, n) for c in ("query", "target", "both") for n in ("softmax", "none")]


@pytest.mark.parametrize(("context", "norm"), GATES)
def test_every_parameter_gets_gradient(context, norm):
    model = make_model(gate_context=context, gate_norm=norm)
    output = model(**make_batch())
    (output.scores.square().sum() + output.routing["gate"].aux_loss).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        if name != "experts.layers.2.bias" or norm == "none":  # equal for all candidates under a softmax gate
            assert parameter.grad.abs().sum() > 0, name
    stacked = model.experts.layers[0].weight.grad
    assert (stacked.flatten(1).abs().sum(1) > 0).all(), "an expert without gradient"


@pytest.mark.parametrize(("context", "norm"), GATES)
def test_scores_ignore_the_order_of_history(context, norm):
    model, batch = make_model(gate_context=context, gate_norm=norm).eval(), make_batch()
    order = torch.randperm(batch["history"].shape[1])
    shuffled = batch | {"history": batch["history"][:, order], "history_mask": batch["history_mask"][:, order]}
    torch.testing.assert_close(model(**batch).scores, model(**shuffled).scores, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("norm", ["none", "softmax", "sqrt_len"])
def test_padding_changes_nothing(norm):
    model, batch = make_model(attention_norm=norm).eval(), make_batch(time=20)
    pad = torch.zeros(6, 30, 3, dtype=torch.long)
    longer = batch | {
        "history": torch.cat([pad, batch["history"]], 1),
        "history_mask": torch.cat([pad[..., 0].bool(), batch["history_mask"]], 1),
    }
    torch.testing.assert_close(model(**batch).scores, model(**longer).scores, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("norm", ["none", "softmax", "sqrt_len"])
@pytest.mark.parametrize("gate_norm", ["none", "softmax"])
def test_a_cold_user_still_gets_a_ranking(norm, gate_norm):
    model, batch = make_model(attention_norm=norm, gate_norm=gate_norm).eval(), make_batch()
    scores = model(**batch | {"history_mask": torch.zeros_like(batch["history_mask"])}).scores
    assert scores.isfinite().all()
    assert (scores.std(1) > 1e-3).all()


def test_a_history_of_length_zero_is_the_fully_padded_one():
    model, batch = make_model().eval(), make_batch()
    none = batch | {"history": batch["history"][:, :0], "history_mask": batch["history_mask"][:, :0]}
    padded = batch | {"history_mask": torch.zeros_like(batch["history_mask"])}
    torch.testing.assert_close(model(**none).scores, model(**padded).scores)


@pytest.mark.parametrize(("context", "norm"), GATES)
def test_candidates_are_treated_alike(context, norm):
    model, batch = make_model(gate_context=context, gate_norm=norm).eval(), make_batch()
    order = torch.tensor([3, 0, 4, 1, 2])
    moved = batch | {"candidates": batch["candidates"][:, order], "dense": batch["dense"][:, order]}
    torch.testing.assert_close(model(**batch).scores[:, order], model(**moved).scores, atol=1e-5, rtol=1e-5)


def test_the_query_gate_is_one_a_request_and_serves_every_candidate():
    model, batch = make_model().eval(), make_batch(cands=40)
    state = model.encode_user(batch["history"], batch["history_mask"], batch["query"])
    assert state.gate is not None and state.gate.shape == (6, 1, 4)
    once = model.score(state, batch["candidates"], batch["dense"])
    singly = [model.score(state, batch["candidates"][:, i : i + 1], batch["dense"][:, i : i + 1]) for i in range(40)]
    torch.testing.assert_close(once, torch.cat(singly, 1), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(once, model(**batch).scores)


def test_one_expert_under_a_softmax_gate_is_din():
    model, batch = make_model(num_experts=1).eval(), make_batch()
    din = TowerRanker(SCHEMA, hidden=8, tower_hidden=(16, 8)).eval()
    own = model.state_dict()
    shared = {k.replace("experts.", "tower."): v for k, v in own.items() if not k.startswith("gate.")}
    din.load_state_dict(shared)
    inputs = {k: v for k, v in batch.items() if k not in ("user", "candidate_mask")}
    torch.testing.assert_close(model(**batch).scores, din(**inputs).scores, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("difference", [True, False])
def test_the_pair_unit_is_the_mlp_on_the_concatenation(difference):
    torch.manual_seed(0)
    unit = PairUnit(6, 7, 3, difference).double()
    rows, context = torch.randn(2, 5, 6).double(), torch.randn(2, 4, 6).double()
    a, b = rows[:, None].expand(2, 4, 5, 6), context[:, :, None].expand(2, 4, 5, 6)
    blocks = [a, b, a * b, a - b] if difference else [a, b, a * b]
    expected = unit.last(torch.relu(unit.first(torch.cat(blocks, -1))))
    torch.testing.assert_close(unit(rows, context), expected)


def test_attention_of_padding_is_exactly_zero():
    mask = torch.tensor([[[True, False, True]], [[False, False, False]]])
    for norm in ("none", "softmax", "sqrt_len"):
        weights = attention_weights(torch.randn(2, 4, 3), mask, norm)
        assert weights.isfinite().all()
        assert (weights[0, :, 1] == 0).all() and (weights[1] == 0).all()


def info_nce(gate, view, user, temperature):
    """The definition, sample by sample."""
    unit = lambda m: m / np.linalg.norm(m, axis=1, keepdims=True)  # noqa: E731
    z, v = unit(gate), unit(view)
    losses = []
    for i in range(len(z)):
        others = [j for j in range(len(z)) if j == i or user[j] != user[i]]
        e = np.exp(v[others] @ z[i] / temperature)
        losses.append(-np.log(e[others.index(i)] / e.sum()))
    return np.mean(losses)


def test_the_contrastive_loss_equals_numpy_and_skips_the_users_own_sessions():
    rng = np.random.default_rng(0)
    gate, view = rng.normal(size=(8, 4)), rng.normal(size=(8, 4))
    for user in (np.arange(8), np.array([0, 0, 1, 1, 1, 2, 3, 3])):
        loss = gate_contrastive_loss(
            torch.tensor(gate, dtype=torch.float32), torch.tensor(view, dtype=torch.float32), torch.tensor(user), 0.1
        )
        assert float(loss) == pytest.approx(info_nce(gate, view, user, 0.1), rel=1e-6)


def test_masking_nothing_compares_a_gate_with_itself_and_masking_all_with_the_default():
    batch = make_batch()
    model = make_model(mask_rate=0.0, contrastive_weight=1.0).train()
    record = model(**batch).routing["gate"]
    gate = record.weights.detach().double().numpy()
    assert float(record.aux_loss.detach()) == pytest.approx(info_nce(gate, gate, np.arange(6), 0.1), rel=1e-5)
    model = make_model(mask_rate=1.0, contrastive_weight=1.0).train()
    record = model(**batch).routing["gate"]
    nothing = torch.zeros_like(batch["history_mask"])
    default = model.encode_user(batch["history"], nothing, batch["query"]).gate.squeeze(1)
    expected = info_nce(record.weights.detach().double().numpy(), default.detach().double().numpy(), np.arange(6), 0.1)
    assert float(record.aux_loss.detach()) == pytest.approx(expected, rel=1e-5)


def test_the_contrastive_loss_reaches_the_gate_and_evaluation_is_deterministic():
    model, batch = make_model(contrastive_weight=1.0), make_batch()
    model.train()(**batch).routing["gate"].aux_loss.backward()
    assert all(p.grad.abs().sum() > 0 for p in model.gate.unit.parameters())
    model.eval()
    first, second = model(**batch), model(**batch)
    assert torch.equal(first.scores, second.scores) and float(first.routing["gate"].aux_loss) == 0


def _gathered_loss(rank, port, gate, view, user, out):
    torch.distributed.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    half = slice(4 * rank, 4 * rank + 4)
    part = gate[half].clone().requires_grad_()
    loss = gate_contrastive_loss(part, view[half], user[half], 0.1)
    loss.backward()
    out[rank] = (loss.item(), part.grad)
    torch.distributed.destroy_process_group()


def test_two_processes_see_the_negatives_of_both():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    torch.manual_seed(0)
    gate, view, user = torch.randn(8, 4), torch.randn(8, 4), torch.tensor([0, 1, 2, 3, 0, 4, 5, 6])
    with mp.Manager() as manager:
        out = manager.dict()
        mp.start_processes(_gathered_loss, (port, gate, view, user, out), nprocs=2, start_method="fork")
        losses, grads = zip(*(out[rank] for rank in range(2)), strict=True)
    whole = gate.clone().requires_grad_()
    loss = gate_contrastive_loss(whole, view, user, 0.1)
    loss.backward()
    assert np.mean(losses) == pytest.approx(float(loss.detach()), rel=1e-5)
    torch.testing.assert_close(torch.cat(grads) / 2, whole.grad)


def test_the_gate_starts_at_its_default_whatever_the_history():
    """Summed votes of a long history would saturate the softmax from the first step on."""
    model, batch = AWMoE(SCHEMA).eval(), make_batch(time=200)
    long = model.encode_user(batch["history"], batch["history_mask"], batch["query"]).gate
    none = model.encode_user(batch["history"], torch.zeros_like(batch["history_mask"]), batch["query"]).gate
    torch.testing.assert_close(long, none)
    assert long.max() < 0.6


def test_a_query_gate_without_a_query_is_refused():
    with pytest.raises(UserError, match="gate_context to target"):
        AWMoE(SCHEMA | {"query": []}, gate_context="query")
    assert AWMoE(SCHEMA | {"query": []}).gate.context == "target"
    assert AWMoE(SCHEMA).gate.context == "query"


def test_a_candidate_gate_needs_candidates():
    gate = GateNetwork({"query": 4, "fields": 4, "history_fields": 4}, 8, 8, 2, "target")
    with pytest.raises(ValueError, match="needs the candidates"):
        gate(torch.zeros(1, 3, 8), torch.ones(1, 3, dtype=torch.bool), torch.zeros(1, 4), None)


def test_compiled_scores_are_the_same():
    # Its own process: the tests' type checks are no part of what users compile.
    done = subprocess.run([sys.executable, __file__], capture_output=True, text=True, cwd=Path(__file__).parent)
    assert done.returncode == 0, done.stderr[-2000:]


def test_saved_weights_score_the_same(tmp_path):
    model, batch = make_model().eval(), make_batch()
    model.save_pretrained(tmp_path / "weights")
    again = AWMoE.from_pretrained(tmp_path / "weights")
    assert torch.equal(model(**batch).scores, again(**batch).scores)


if __name__ == "__main__":
    model, batch = make_model().eval(), make_batch()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(**batch).scores, model(**batch).scores, atol=1e-5, rtol=1e-5)
