"""Rivals of DMoERM: ensembles in closed form, mixtures of low-rank experts by hand, the linear model, equal sizes."""

import math

import pytest
import torch
import yaml
from moezoo.datasets.rewards_batches import PreferenceBatch
from moezoo.errors import UserError
from moezoo.recipes import resolve
from moezoo.zoo.base import ZooModel
from moezoo.zoo.baselines.rewards import (
    DenseTwin,
    EnsembleRM,
    MixtureRM,
    SingleRM,
    XLoRARM,
    localized_balance_loss,
)
from moezoo.zoo.baselines.rewards_linear import LengthRule, LinearRM
from moezoo.zoo.core.statistics import parameter_counts
from moezoo.zoo.dmoerm import DMoERM

TASKS = [
    {"name": "chat", "capabilities": ["empathy", "logic"]},
    {"name": "qa", "capabilities": ["logic", "depth", "relevance"]},
]
SCHEMA = {"vocab_size": 20, "pad_token": 0, "tasks": TASKS, "max_length": 12, "tokenizer": "words"}
SMALL = {"backbone_options": {"width": 16, "heads": 2, "hidden": 24}}


def stirred(model, seed=1):
    rng = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=rng))
    return model.eval()


def texts(rows=8, length=9, seed=0):
    rng = torch.Generator().manual_seed(seed)
    tokens = torch.randint(0, 20, (rows, length), generator=rng)
    mask = torch.arange(length) < torch.randint(2, length + 1, (rows, 1), generator=rng)
    return tokens, mask


MODELS = {
    "single": lambda: SingleRM(SCHEMA, **SMALL),
    "ensemble": lambda: EnsembleRM(SCHEMA, 3, **SMALL),
    "dense": lambda: DenseTwin(SCHEMA, **SMALL),
    "xlora": lambda: XLoRARM(SCHEMA, rank=2, **SMALL),
    "loramoe": lambda: MixtureRM(SCHEMA, experts=4, rank=2, **SMALL),
    "smora": lambda: MixtureRM(SCHEMA, "smora", experts=8, top_k=3, **SMALL),
}


@pytest.mark.parametrize("name", MODELS)
def test_rows_stand_alone_and_padding_counts_nothing(name, tmp_path):
    torch.manual_seed(0)
    model = stirred(MODELS[name]())
    tokens, mask = texts()
    given = {"tokens": tokens, "mask": mask}
    if name in ("dense", "xlora", "loramoe"):
        given["task"] = torch.tensor([0, 1, 1, 0, 1, 0, 0, 1])
    want = model(**given).reward
    alone = model(**{k: v[2:3] for k, v in given.items()}).reward
    torch.testing.assert_close(alone, want[2:3], atol=1e-5, rtol=0)
    wide, seen = torch.full((8, 12), 7), torch.zeros(8, 12, dtype=torch.bool)
    for row, (ids, there) in enumerate(zip(tokens, mask, strict=True)):
        own = ids[there]
        wide[row, 12 - len(own) :], seen[row, 12 - len(own) :] = own, True
    moved = model(**given | {"tokens": wide, "mask": seen}).reward
    torch.testing.assert_close(moved, want, atol=1e-5, rtol=0)
    model.save_pretrained(tmp_path / "weights")
    assert torch.equal(ZooModel.from_pretrained(tmp_path / "weights")(**given).reward, want)


def test_ensembles_agree_on_mean_worst_and_less_variance():
    torch.manual_seed(0)
    tokens, mask = texts(64)
    model = EnsembleRM(SCHEMA, 3, momentum=1.0, **SMALL).train()
    model(tokens, mask)
    model.eval()
    scores = model(tokens, mask).scores
    alike = (scores - scores.mean(0)) / scores.std(0, correction=0)
    want = {"mean": alike.mean(1), "wco": alike.min(1).values, "uwo": alike.mean(1) - 0.5 * alike.var(1, correction=0)}
    for model.objective, expected in want.items():
        torch.testing.assert_close(model(tokens, mask).reward, expected, atol=1e-5, rtol=1e-4)
    with torch.no_grad():  # a member on another scale changes nothing once it is standardised
        model.head.weight[1] *= 50.0
        model.head.bias[1] += 30.0
        model.train()(tokens, mask)
        model.eval()
    for model.objective, expected in want.items():
        torch.testing.assert_close(model(tokens, mask).reward, expected, atol=1e-3, rtol=1e-3)


def test_an_ensembles_members_are_single_models():
    torch.manual_seed(0)
    model = stirred(EnsembleRM(SCHEMA, 3, **SMALL))
    tokens, mask = texts()
    scores = model(tokens, mask).scores
    state = model.state_dict()
    for m in range(3):
        one = SingleRM(SCHEMA, **SMALL).eval()
        own = {}
        for name, value in state.items():
            if name in ("centre", "variance"):
                continue
            stacked = name.startswith(("backbone.embed", "backbone.place"))
            own[name] = value.chunk(3)[m] if stacked else value[m]
        one.load_state_dict(own)
        torch.testing.assert_close(one(tokens, mask).reward, scores[:, m], atol=1e-5, rtol=1e-5)


def test_xlora_mixes_all_experts_by_a_first_pass():
    torch.manual_seed(0)
    model = stirred(XLoRARM(SCHEMA, rank=2, **SMALL))
    tokens, mask = texts()
    task = torch.zeros(8, dtype=torch.long)
    first = model.backbone(tokens, mask)
    mixture = [(first @ gate.gate.weight.T + gate.gate.bias).softmax(-1) for gate in model.gates]
    block = model.backbone.blocks[0]
    for row in range(3):  # by hand: the mixture of low ranks merged into each row's own network
        undo = []
        for weights, layer in zip(mixture, (block.q_proj, block.v_proj), strict=True):
            low = layer.experts
            delta = torch.einsum("e,eor,eri->oi", weights[row], low.up.weight, low.down.weight) * low.scale
            undo.append((layer.base.weight, layer.base.weight.detach().clone()))
            layer.base.weight.data += delta.detach()
        hidden = model.backbone(tokens[row : row + 1], mask[row : row + 1])
        for weight, before in undo:
            weight.data.copy_(before)
        want = hidden[0] @ model.last.weight[0] + model.last.bias[0]
        torch.testing.assert_close(model(tokens, mask, task).reward[row], want, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(model(tokens, mask, 1 - task).reward, model(tokens, mask, task).reward)
    parts = [{id(p) for p in model.phase_parameters(k)} for k in (1, 2, 3)]
    assert set.union(*parts) == {id(p) for p in model.parameters()} and sum(map(len, parts)) == len(set.union(*parts))


def test_loramoes_balance_wants_each_expert_used_by_its_own_task():
    mask = torch.ones(2, 5, dtype=torch.bool)
    task = torch.tensor([0, 1])
    even = torch.full((10, 2), 0.5)
    assert float(localized_balance_loss(even, task, mask, 0.2)) == pytest.approx(0.0, abs=1e-9)
    one = torch.tensor([[1.0, 0.0]]).expand(10, 2)
    z = torch.tensor([(5 * 1.2 + 5 * 0.8) / 10, 0.0])
    want = z.var(correction=0) / z.mean()
    torch.testing.assert_close(localized_balance_loss(one, task, mask, 0.2), want)
    # Equal loads: those that follow the tasks cost no more than those that go against them.
    swapped = torch.eye(2)[1 - task].repeat_interleave(5, 0)
    own = torch.eye(2)[task].repeat_interleave(5, 0)
    uneven = torch.tensor([0, 0, 1])
    mask = torch.ones(3, 5, dtype=torch.bool)
    assert own.shape == swapped.shape
    follows, against = (torch.eye(2)[t].repeat_interleave(5, 0) for t in (uneven, 1 - uneven))
    losses = [float(localized_balance_loss(s, uneven, mask, 0.2)) for s in (follows, against)]
    assert all(loss > 0 for loss in losses)
    unknown = torch.full((3,), -1)
    z = torch.tensor([2 / 3, 1 / 3])
    torch.testing.assert_close(localized_balance_loss(follows, unknown, mask, 0.2), z.var(correction=0) / z.mean())


def test_mixtures_learn_through_routers_and_leave_no_trace():
    torch.manual_seed(0)
    tokens, mask = texts()
    for name in ("loramoe", "smora"):
        model = MODELS[name]().train()
        stirred(model).train()
        output = model(tokens, mask)
        assert len(output.routing) == 2, "one record for each feed-forward layer"
        (output.reward.sum() + sum(r.aux_loss for r in output.routing.values())).backward()
        gates = [p for n, p in model.named_parameters() if ".router." in n]
        assert gates and all(p.grad is not None and p.grad.abs().sum() > 0 for p in gates)
        assert model.context.mask is None and model.context.records == []
        padding = ~mask.flatten()
        assert all((record.indices[padding] == -1).all() for record in output.routing.values())


def pairs(count=400, seed=0, noise=0.0):
    """Token 5 is good in chat and bad in qa; the prompt's token says which task it is."""
    rng = torch.Generator().manual_seed(seed)
    task = torch.randint(0, 2, (count,), generator=rng)
    tokens = torch.randint(6, 20, (count, 2, 6), generator=rng)
    tokens[:, :, 0] = 3 + task[:, None]
    for p in range(count):
        tokens[p, int(task[p]), 1 + p % 5] = 5
    one = torch.ones(count, 2, 6, dtype=torch.bool)
    asked = tokens[:, 0, :1]
    zero = torch.zeros(count, 2)
    return PreferenceBatch(
        tokens, one, asked, asked > -1, task, torch.full((count,), -1), torch.zeros(count),
        torch.full((count, 2), 30), torch.arange(count), zero, torch.full((count,), -1),
    )  # fmt: skip


@pytest.mark.parametrize("route", ["single", "predicted", "oracle"])
def test_the_linear_model_finds_what_tasks_disagree_on(route):
    train, test = pairs(), pairs(seed=1)
    model = LinearRM(SCHEMA, route=route, ridge=1e-3)
    model.fit([train])
    output = model(test.tokens.flatten(0, 1), test.mask.flatten(0, 1), test.prompt_tokens, test.prompt_mask, test.task)
    gap = output.reward.view(-1, 2)
    right = float((gap[:, 0] > gap[:, 1]).double().mean())
    assert right > 0.97 if route != "single" else 0.4 < right < 0.6
    if route != "single":
        assert (output.task_logits.argmax(1) == test.task).all()


def test_linear_features_are_counts_of_ngrams():
    model = LinearRM(SCHEMA, ngrams=2, buckets=64)
    tokens, mask = torch.tensor([[3, 4, 3, 4, 9]]), torch.tensor([[True, True, True, True, False]])
    x = model._features(tokens, mask).to_dense()[0]
    pair = (3 * 1_000_003 + 4 + 1) % 64, (4 * 1_000_003 + 3 + 1) % 64
    want = torch.zeros(65)
    for place, n in ((3, 2), (4, 2), (pair[0], 2), (pair[1], 1)):
        want[place] += n
    want = want.sqrt()
    want[64] = math.log(5)
    torch.testing.assert_close(x, want)


def test_the_length_rule_is_the_length():
    reward = LengthRule(SCHEMA)(torch.tensor([3, 9, 4])).reward
    assert reward.tolist() == [3.0, 9.0, 4.0]
    assert LengthRule(SCHEMA, shorter=True)(torch.tensor([3])).reward.tolist() == [-3.0]


def test_mistakes_are_named():
    with pytest.raises(UserError, match="members=1: expected at least 2"):
        EnsembleRM(SCHEMA, 1)
    with pytest.raises(UserError, match="has no linear layer of such a name"):
        MixtureRM(SCHEMA, targets=["gate_proj"])
    with pytest.raises(UserError, match="route=oracle needs tasks"):
        LinearRM(SCHEMA | {"tasks": []}, route="oracle")
    with pytest.raises(UserError, match="no pair to fit"):
        LinearRM(SCHEMA).fit([])
    with pytest.raises(UserError, match="task qa has no train pair"):
        batch = pairs()
        LinearRM(SCHEMA, route="oracle").fit([batch._replace(task=torch.zeros_like(batch.task))])


@pytest.mark.parametrize("twin, size", [("dmoerm_dense", "active"), ("dmoerm_dense_total", "total")])
def test_twins_are_as_large_as_dmoerm(twin, size):
    """Within 2 %, as the recipes have them, at the default data's sizes."""
    from moezoo.datasets.rewards import RewardsData

    files = {"pairs_per_task": 4, "capability_pairs": 2, "eval_pairs": 2, "pools_per_task": 1, "candidates": 2}
    schema = RewardsData(files=files).schema
    counts = {}
    for name, kind in (("dmoerm", DMoERM), (twin, DenseTwin)):
        recipe = yaml.safe_load(resolve(f"rewards/{name}").read_text())
        counts[name] = parameter_counts(kind(schema, **recipe["model"]["init_args"]["model"]["init_args"]))
    assert counts[twin]["total"] == pytest.approx(counts["dmoerm"][size], rel=0.02)
