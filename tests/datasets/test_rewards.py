"""The rewards datamodule and its generator: noise, conflict, phases without leaks, padding, pools."""

import numpy as np
import polars as pl
import pytest
import torch
from moezoo.datasets import rewards_lexicon as lexicon
from moezoo.datasets.rewards import RewardsData, pool_rows, split_pairs
from moezoo.datasets.rewards_batches import Ragged, padded
from moezoo.datasets.rewards_generator import STRENGTHS, generate, judge, noisy, task_weights
from moezoo.datasets.rewards_table import conversation, first_turn, queries, transcript
from moezoo.datasets.rewards_tokens import Words, make_tokenizer, split_words
from moezoo.errors import UserError

SMALL = {"pairs_per_task": 300, "capability_pairs": 40, "eval_pairs": 60, "pools_per_task": 2, "candidates": 9}


@pytest.fixture(scope="module")
def data():
    data = RewardsData(files=SMALL, batch_size=32)
    data.setup("fit")
    return data


def gold_reward(task, response, conflict=True, weight=1.0):
    """The gold reward, read off the words of a response."""
    strength = {}
    for name, (much, little) in lexicon.CAPABILITIES.items():
        for word, value in zip([*much.split(), *reversed(little.split())], np.repeat(STRENGTHS, 2), strict=True):
            strength[word] = (name, value)
    weights = dict(zip(lexicon.TASKS[task], task_weights(task, conflict, weight), strict=True))
    said = [strength[word] for word in response.split() if word in strength]
    return sum(weights[name] * value for name, value in said)


def test_lexicon_is_the_papers_and_unambiguous():
    assert [len(names) for names in lexicon.TASKS.values()] == [6, 5, 5, 6, 5]
    texts = [*lexicon.REQUESTS.values(), lexicon.FILLERS, *(t for pair in lexicon.CAPABILITIES.values() for t in pair)]
    words = [word for text in texts for word in text.split()]
    assert len(words) == len(set(words)) == len(lexicon.vocabulary()) < 512
    assert {name for names in lexicon.TASKS.values() for name in names} == set(lexicon.CAPABILITIES)
    for task, signs in lexicon.CONFLICTING.items():
        for name in signs:  # each conflict has two sides
            others = {lexicon.CONFLICTING[other].get(name) for other in lexicon.CONFLICTING if other != task}
            assert -signs[name] in others


def test_gold_labels_are_the_words_and_people_err_in_30_percent():
    made = generate(pairs_per_task=800, eval_pairs=100, capability_pairs=20)
    human = made.pairs.filter(pl.col("capability").is_null())
    for split, wrong in (("test", 0.0), ("train", 0.3)):
        rows = human.filter(pl.col("split") == split)
        gain = [gold_reward(row["task"], row["chosen"]) - gold_reward(row["task"], row["rejected"])
                for row in rows.iter_rows(named=True)]  # fmt: skip
        assert np.mean(np.array(gain) < 0) == pytest.approx(wrong, abs=0.025)
        assert rows["agree"].mean() == pytest.approx(1 - wrong, abs=0.025)
    spread = np.sqrt((task_weights("chat") ** 2).sum())
    pool = made.pools.filter(pl.col("task") == "chat")
    expected = [gold_reward("chat", response) / spread for response in pool["response"]]
    assert pool["gold"].to_numpy() == pytest.approx(expected)
    assert generate(conflict=False, **SMALL).name != made.name


def test_conflict_turns_shared_capabilities_around():
    on, off = ({task: task_weights(task, conflict) for task in lexicon.TASKS} for conflict in (True, False))
    logic = {task: names.index("logic") for task, names in lexicon.TASKS.items() if "logic" in names}
    assert {float(np.sign(on[task][k])) for task, k in logic.items()} == {1.0, -1.0}
    assert all((off[task] == abs(on[task])).all() for task in on)


def test_the_judge_is_cleaner_than_people_and_the_swap_drops_its_lean():
    rng = np.random.default_rng(0)
    gain = rng.normal(size=40_000) * 1.7
    wins, steady = judge(gain, rng)
    right = wins == (gain > 0)
    assert 0.6 < steady.mean() < 0.9 and right[steady].mean() > max(right.mean(), 0.85)
    assert noisy(gain, 0.3, rng)[gain > 0].mean() == pytest.approx(0.7, abs=0.01)
    near = abs(gain) < 0.5
    assert steady[near].mean() < steady[~near].mean()


def test_the_same_arguments_give_the_same_data_and_another_seed_other():
    one, two, other = (generate(seed, **SMALL) for seed in (0, 0, 1))
    assert one.pairs.equals(two.pairs) and one.pools.equals(two.pools) and not one.pairs.equals(other.pairs)
    prints = {RewardsData(files=files).fingerprint for files in ({}, {"seed": 1}, {"conflict": False})}
    assert len(prints) == 3 and RewardsData().fingerprint in prints


def test_phases_are_disjoint_by_first_turn_and_complete(data):
    human = set(data.part("train", 0).tolist())
    one, two, three = (set(data.part("train", phase).tolist()) for phase in (1, 2, 3))
    assert one | three == human and not one & three and not two & human
    assert len(one) / len(human) == pytest.approx(0.6, abs=0.01)
    rows = data.rows
    turns = [{first_turn(prompt) for prompt in rows["prompt"].gather(sorted(part))} for part in (one, three)]
    assert not turns[0] & turns[1]
    splits = {name: set(rows.filter((pl.col("split") == name) & pl.col("pool").is_null())["turn"])
              for name in ("train", "valid", "test")}  # fmt: skip
    assert not splits["train"] & splits["test"] and not splits["valid"] & splits["test"]
    assert len(data.part("valid", 2)) and (data.encoded.capability[data.part("valid", 2)] >= 0).all()
    assert (data.encoded.capability[data.part("test", 2)] == -1).all()


def test_loaders_follow_the_phase(data):
    seen = {}
    for phase in (0, 1, 2, 3):
        data.set_phase(phase)
        seen[phase] = torch.cat([batch.index for batch in data.train_dataloader()])
        assert set(seen[phase].tolist()) <= set(data.part("train", phase).tolist())
        batch = next(iter(data.val_dataloader()))
        assert bool((batch.capability >= 0).all()) == (phase == 2)
    data.set_phase(0)
    with pytest.raises(UserError, match="phase=4"):
        data.set_phase(4)


def test_batches_hold_what_the_table_says(data):
    names = [task["name"] for task in data.schema["tasks"]]
    for phase in (0, 2):
        rows = data.part("train", phase)[:40]
        batch, table = data.encoded.batch(rows, data.text.pad), data.rows[rows.tolist()]
        assert [names[t] for t in batch.task.tolist()] == table["task"].to_list()
        for i, row in enumerate(table.iter_rows(named=True)):
            for side, name in enumerate(("chosen", "rejected")):
                ids = batch.tokens[i, side][batch.mask[i, side]].tolist()
                assert ids == data.text.pair(row["prompt"], row[name], data.max_length)
                assert int(batch.length[i, side]) == len(row[name])
            asked = batch.prompt_tokens[i][batch.prompt_mask[i]].tolist()
            assert asked == data.text.prompt(row["prompt"], data.prompt_length)
            known = data.schema["tasks"][batch.task[i]]["capabilities"]
            assert row["capability"] == (known[batch.capability[i]] if batch.capability[i] >= 0 else None)
    assert (batch.pool == -1).all() and (batch.margin == 0).all() and batch.gold.isnan().all()
    assert int(batch.tokens.max()) < data.schema["vocab_size"]


def test_batches_of_similar_length_serve_the_same_pairs_with_less_padding(data, monkeypatch):
    def epoch(number):
        loader = data.train_dataloader()
        loader.sampler.set_epoch(number)
        return [(batch.index.tolist(), batch.tokens.shape[2], batch.mask.float().mean()) for batch in loader]

    data.set_phase(0)
    plain = epoch(0)
    monkeypatch.setattr(data, "similar_lengths", True)
    first, again, later = epoch(0), epoch(0), epoch(1)
    assert first == again != later
    rows = [row for index, *_ in first for row in index]
    assert len(first) == len(plain) and len(set(rows)) == len(rows) == sum(len(index) for index, *_ in plain)
    assert sum(kept for *_, kept in first) > 1.1 * sum(kept for *_, kept in plain)
    widths = [width for _, width, _ in first]
    assert widths != sorted(widths) and widths != sorted(widths, reverse=True)


def test_padding_on_either_side_holds_the_same_tokens(data):
    rows = data.part("test")[:16]
    right, left = (data.encoded.batch(rows, 0, side) for side in (False, True))
    assert right.mask[..., 0].all() and left.mask[..., -1].all() and not right.mask.all()
    assert right.tokens.shape == left.tokens.shape and right.tokens.shape[-1] % 8 == 0
    for name, mask in (("tokens", "mask"), ("prompt_tokens", "prompt_mask")):
        assert torch.equal(getattr(right, name)[getattr(right, mask)], getattr(left, name)[getattr(left, mask)])
        assert (getattr(right, name)[~getattr(right, mask)] == 0).all()


def test_padded_equals_a_loop():
    lists = [[5, 6, 7], [], [8], list(range(20))]
    store = Ragged.of(lists)
    tokens, mask = padded(store, torch.tensor([[0, 2], [3, 1]]), pad=9)
    assert tokens.shape == (2, 2, 24) and store.values.dtype == torch.int32
    assert tokens[0, 0].tolist() == [5, 6, 7] + [9] * 21 and tokens[1, 0, :20].tolist() == lists[3]
    assert mask.sum(-1).tolist() == [[3, 1], [20, 0]]
    assert padded(store, torch.tensor([0]), 9, left=True)[0].tolist() == [[9] * 5 + [5, 6, 7]]


def test_pools_come_after_the_pairs_of_the_test_alone(data):
    batches = list(data.test_dataloader())
    pool, gold = (torch.cat([getattr(batch, name) for batch in batches]) for name in ("pool", "gold"))
    first = int((pool >= 0).int().argmax())
    assert (pool[:first] == -1).all() and (pool[first:] >= 0).all() and len(pool[:first].unique()) == 1
    assert pool.max() == 9 and (pool[first:].bincount() == 5).all()  # 9 candidates in five rows
    assert gold[first:].isnan().sum() == 10 and gold[:first].isnan().all()
    for loader in (data.train_dataloader(), data.val_dataloader()):
        assert all((batch.pool == -1).all() for batch in loader)


def test_pool_rows_pair_candidates_and_repeat_an_odd_one():
    pools = pl.DataFrame({"pool": ["a", "b", "a", "a"], "source": "s", "task": "t", "prompt": "p",
                          "response": ["1", "2", "3", "4"], "gold": [1.0, 2.0, 3.0, 4.0]})  # fmt: skip
    rows = pool_rows(pools)
    assert rows.select("pool", "chosen", "rejected", "gold_chosen").rows() == [
        ("a", "1", "3", 1.0), ("b", "2", "2", 2.0), ("a", "4", "4", 4.0),
    ]  # fmt: skip
    assert rows["gold_rejected"].to_list()[0] == 3.0 and rows["gold_rejected"].is_nan().to_list() == [False, True, True]


def test_schema_is_json_able_and_names_tasks_in_order(data):
    import json

    schema = data.schema
    assert json.loads(json.dumps(schema)) == schema
    assert schema["tasks"][0] == {"name": "roleplay", "capabilities": list(lexicon.TASKS["roleplay"])}
    two = RewardsData(files=SMALL, tasks=["text", "chat"])
    assert [task["name"] for task in two.schema["tasks"]] == ["text", "chat"]
    assert set(two.rows["task"]) == {"text", "chat"}
    batch = next(iter(two.test_dataloader()))
    assert set(batch.task.tolist()) <= {0, 1}


def test_decode_names_the_rows(data):
    batch = next(iter(data.predict_dataloader()))
    table = data.decode(pl.DataFrame({"index": batch.index.numpy(), "reward": batch.margin.numpy()}))
    assert table.columns == ["id", "source", "subset", "group_id", "labelled_task", "reward"]
    assert table["id"].to_list() == data.rows["id"].gather(batch.index.tolist()).to_list()


def test_splits_are_drawn_by_the_first_turn():
    prompts = [f"\n\nHuman: Hello {i % 50}\n\nAssistant: hi\n\nHuman: more {i}\n\nAssistant:" for i in range(400)]
    table = pl.DataFrame({"prompt": prompts, "split": pl.Series([None] * 400, dtype=pl.String)})
    table = table.with_columns(turn=pl.Series([first_turn(prompt) for prompt in prompts]))
    drawn = split_pairs(table, (0.6, 0.2, 0.2), False, "x")
    assert (drawn.group_by("turn").agg(pl.col("split").n_unique())["split"] == 1).all()
    assert set(drawn["split"]) == {"train", "valid", "test"}
    assert split_pairs(table.reverse(), (0.6, 0.2, 0.2), True, "x").reverse()["split"].equals(drawn["split"])


def test_leaky_splits_of_a_file_are_told(caplog):
    table = pl.DataFrame({"prompt": ["a", "A "], "split": ["train", "test"], "turn": ["a", "a"]})
    split_pairs(table, (0.6, 0.2, 0.2), False, "mine")
    assert "1 test pairs share" in caplog.text


def test_conversations_and_transcripts_are_inverse():
    turns = [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "Hi\nthere"},
             {"role": "assistant", "content": "Hello"}, {"role": "user", "content": "And?"}]  # fmt: skip
    text = transcript(turns)
    assert text.endswith("\n\nAssistant:") and conversation(text) == turns
    assert queries(text) == ["Hi\nthere", "And?"] and first_turn(text) == "hi there"
    assert transcript([{"role": "user", "content": "plain"}]) == "plain"
    assert conversation("plain") == [{"role": "user", "content": "plain"}]
    assert first_turn("  Ｆｕｌｌ width ") == "full width"


def test_words_split_cut_from_the_left_and_hash_alike_everywhere():
    assert split_words("Don't stop, 你好 world!") == ["don", "'", "t", "stop", ",", "你", "好", "world", "!"]
    text = Words(vocab_size=1000)
    ids = text.pair("one two three", "four five", 64)
    assert ids[0] == 2 and ids[4] == 3 and ids[-1] == 5 and len(ids) == 8
    assert text.pair("one two three", "four five", 5) == ids[-5:] and max(ids) < 1000
    assert text.pair("one", "four five", 64)[-3:] == ids[-3:]
    assert text.prompt("\n\nHuman: one\n\nAssistant: four\n\nHuman: two\n\nAssistant:", 9) == [2, ids[1], 2, ids[2]]
    assert Words(vocab_size=8192).pair("moe", "zoo", 9) == [2, 5356, 3, 891, 5]
    assert make_tokenizer("lexicon").vocab_size == len(lexicon.vocabulary()) + 6
    closed = Words(["one", "two"])
    assert closed.vocab_size == 8 and closed.pair("one zebra", "two", 9) == [2, 6, 1, 3, 7, 5]
    assert text.prompt("", 9) == [2]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"files": {"pears": 1}}, "no such argument; it takes seed, conflict"),
        ({"files": {"noise": 0.7}}, "noise=0.7"),
        ({"files": {"eval_pairs": 0}}, "eval_pairs=0"),
        ({"files": SMALL, "tasks": ["law"]}, "no task 'law'.*it has roleplay"),
        ({"phase1_share": 1.0}, "phase1_share=1.0"),
        ({"shares": (0.5, 0.5, 0.1)}, "sum to 1"),
        ({"batch_size": 0}, "data.batch_size"),
        ({"max_length": 4}, "data.max_length: expected at least 8"),
        ({"files": SMALL, "vocab_size": 3, "tokenizer": "no/such/folder"}, "data.tokenizer=no/such/folder"),
    ],
)
def test_mistakes_are_one_line(arguments, message, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(UserError, match=message) as caught:
        RewardsData(**arguments).schema  # noqa: B018
    assert "\n" not in str(caught.value)
    with pytest.raises(UserError, match="vocab_size=6"):
        make_tokenizer("words", 6)


def test_a_generators_arguments_stand_beside_your_files_without_effect(tmp_path):
    rows = [{"prompt": f"p{i}", "chosen": "yes indeed", "rejected": "no"} for i in range(60)]
    pl.DataFrame(rows).write_parquet(tmp_path / "mine.parquet")
    mine = {"path": str(tmp_path / "mine.parquet")}
    plain, beside = (RewardsData("files", files) for files in (mine, mine | {"pairs_per_task": 1500}))
    assert beside.schema == plain.schema and len(beside.rows) == 60
    with pytest.raises(UserError, match=r"data.files.pathh: source 'files' has no such argument"):
        RewardsData("files", mine | {"pathh": "x"}).schema  # noqa: B018
    with pytest.raises(UserError, match=r"it goes with --data.source files$"):
        RewardsData("generator", mine).schema  # noqa: B018
