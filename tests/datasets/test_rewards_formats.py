"""Every layout of a user's preferences: the same facts come out, and what is wrong is said in one line."""

import gzip
import json

import numpy as np
import polars as pl
import pytest
from moezoo.datasets.rewards import RewardsData
from moezoo.datasets.rewards_benchmarks import REWARDBENCH, read_benchmark
from moezoo.datasets.rewards_formats import open_files
from moezoo.errors import UserError
from moezoo.settings import real_data_dir

USER, BOT = "user", "assistant"


def chat(*turns):
    roles = [USER, BOT] * len(turns)
    return [{"role": role, "content": text} for role, text in zip(roles, turns, strict=False)]


def write(folder, rows, name="mine.jsonl"):
    path = folder / name
    text = "\n".join(json.dumps(row, ensure_ascii=False) for row in rows) + "\n"
    if name.endswith(".gz"):
        path.write_bytes(gzip.compress(text.encode()))
    else:
        path.write_text(text if name.endswith("jsonl") else json.dumps(rows), encoding="utf-8")
    return str(path)


def only(folder, row, **arguments):
    """The one pair of a file with one row."""
    pairs = open_files(write(folder, [row]), **arguments).pairs
    assert len(pairs) == 1
    return pairs.row(0, named=True)


TWO_TURNS = "\n\nHuman: Hi\n\nAssistant: Hello\n\nHuman: And?\n\nAssistant:"


@pytest.mark.parametrize(
    ("row", "prompt"),
    [
        ({"prompt": "Hi", "chosen": "good", "rejected": "bad"}, "Hi"),
        ({"prompt": chat("Hi"), "chosen": chat("x", "good")[1:], "rejected": chat("x", "bad")[1:]}, "Hi"),
        ({"prompt": "Hi", "chosen": chat("Hi", "good"), "rejected": chat("Hi", "bad")}, "Hi"),
        ({"chosen": chat("Hi", "good"), "rejected": chat("Hi", "bad")}, "Hi"),
        ({"chosen": chat("Hi", "Hello", "And?", "good"), "rejected": chat("Hi", "Hello", "And?", "bad")}, TWO_TURNS),
        ({"prompt": chat("Hi", "Hello", "And?"), "chosen": "good", "rejected": "bad"}, TWO_TURNS),
        (
            {"chosen": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "good"}],
             "rejected": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "bad"}]},
            "Hi",
        ),
    ],
)  # fmt: skip
def test_plain_and_chat_pairs_with_and_without_a_prompt_are_one(tmp_path, row, prompt):
    got = only(tmp_path, row)
    assert (got["prompt"], got["chosen"], got["rejected"]) == (prompt, "good", "bad")
    assert got["task"] == "all" and got["source"] == got["subset"] == "mine" and got["capability"] is None


def test_hh_transcripts_part_at_the_last_common_assistant_turn(tmp_path):
    row = {"chosen": TWO_TURNS + " good, Assistant: yes", "rejected": TWO_TURNS + " gone"}
    got = only(tmp_path, row)
    assert (got["prompt"], got["chosen"], got["rejected"]) == (TWO_TURNS, " good, Assistant: yes", " gone")
    longer = {"chosen": TWO_TURNS + " one\n\nHuman: more\n\nAssistant: good", "rejected": TWO_TURNS + " two"}
    got = only(tmp_path, longer)
    assert got["prompt"] == TWO_TURNS and got["chosen"] == " one\n\nHuman: more\n\nAssistant: good"
    short = {"chosen": TWO_TURNS, "rejected": TWO_TURNS + " x"}
    assert only(tmp_path, short)["chosen"] == ""


def test_messages_that_part_early_keep_the_rest_as_a_dialogue(tmp_path):
    got = only(tmp_path, {"chosen": chat("Hi", "one", "more", "good"), "rejected": chat("Hi", "two")})
    assert got["prompt"] == "Hi" and got["chosen"] == "one\n\nHuman: more\n\nAssistant: good"
    assert got["rejected"] == "two"


def test_facts_beside_the_texts_are_kept(tmp_path):
    row = {"id": 7, "prompt": "p", "chosen": "a", "rejected": "b", "category": "law", "subset": "s", "split": "val",
           "margin": 2, "agree": 0.5, "dim": "logic", "source": "web", "group_id": 3}  # fmt: skip
    got = only(tmp_path, row, tasks={"law": "legal"})
    assert got == {"id": "7", "source": "web", "task": "legal", "subset": "s", "group_id": "3", "split": "valid",
                   "prompt": "p", "chosen": "a", "rejected": "b", "capability": "logic", "margin": 2.0,
                   "agree": 0.5}  # fmt: skip
    assert only(tmp_path, {"q": "p", "chosen": "a", "rejected": "b"}, columns={"prompt": "q"})["prompt"] == "p"
    assert only(tmp_path, row, task="mine")["task"] == "mine"


@pytest.mark.parametrize("name", ["mine.jsonl", "mine.jsonl.gz", "mine.json", "mine.parquet", "mine.csv"])
def test_every_kind_of_file_holds_the_same(tmp_path, name):
    rows = [{"prompt": f"p{i}", "chosen": "a, b", "rejected": "c\nd"} for i in range(3)]
    path = tmp_path / name
    if name.endswith("parquet"):
        pl.DataFrame(rows).write_parquet(path)
    elif name.endswith("csv"):
        pl.DataFrame(rows).write_csv(path)
    else:
        write(tmp_path, rows, name)
    assert open_files(str(tmp_path)).pairs.select("prompt", "chosen", "rejected").to_dicts() == rows


def test_ranked_lists_give_every_pair_that_is_not_tied(tmp_path):
    row = {
        "src": ["你好", "讲个故事"],
        "tgt": ["您好"],
        "response": ["甲", "乙", "丙"],
        "rank": [2, 1, 2],
        "label": "闲聊",
    }
    made = open_files(write(tmp_path, [row]), tasks={"闲聊": "chat"})
    assert made.pairs.select("chosen", "rejected").rows() == [("乙", "甲"), ("乙", "丙")]
    assert made.pairs["prompt"][0] == "\n\nHuman: 你好\n\nAssistant: 您好\n\nHuman: 讲个故事\n\nAssistant:"
    assert made.tasks == [{"name": "chat", "capabilities": []}] and "1 ties left out" in made.notes[0]
    assert made.pairs["group_id"].n_unique() == 1
    whole = [{"prompt": "p", "responses": ["a", "b"], "scores": [0.1, 0.7]}]
    assert open_files(write(tmp_path, whole)).pairs.select("chosen", "margin").row(0) == pytest.approx(("b", 0.6))


def test_scores_per_attribute_become_capabilities_and_the_overall_one_does_not(tmp_path):
    long = [{"group_id": "g", "context": "p", "response": r, "dim": d, "score": s, "task": "sum"}
            for r, d, s in [("a", "logic", 1), ("b", "logic", 0), ("c", "logic", 1), ("a", "overall", 0),
                            ("b", "overall", 3)]]  # fmt: skip
    wide = [{"prompt": "p", "response": "a", "logic": 1, "overall": 0}, {"prompt": "p", "response": "b", "logic": 0,
            "overall": 3}, {"prompt": "p", "response": "c", "logic": 1}]  # fmt: skip
    nested = [{"instruction": "p", "completions": [
        {"response": "a", "annotations": {"logic": {"Rating": "1"}}, "overall_score": 0},
        {"response": "b", "annotations": {"logic": {"Rating": "0"}, "wit": {"Rating": "N/A"}}, "overall_score": 3},
        {"response": "c", "annotations": {"logic": {"Rating": "1"}}},
    ]}]  # fmt: skip
    for rows in (long, wide, nested):
        made = open_files(write(tmp_path, rows))
        got = {(r["capability"], r["chosen"], r["rejected"], r["margin"]) for r in made.pairs.iter_rows(named=True)}
        assert got == {("logic", "a", "b", 1.0), ("logic", "c", "b", 1.0), (None, "b", "a", 3.0)}
        assert made.tasks[0]["capabilities"] == ["logic"] and "1 ties" in made.notes[0]
    assert len(open_files(write(tmp_path, long), most_pairs=1).pairs) == 2
    turned = open_files(write(tmp_path, long), overall=["logic"]).pairs
    assert turned["capability"].drop_nulls().unique().to_list() == ["overall"]


def test_files_of_several_layouts_train_together(tmp_path):
    pairs = [{"prompt": f"question {i}", "chosen": "good", "rejected": "bad", "task": "qa"} for i in range(60)]
    scores = [{"prompt": f"other {i}", "response": r, "dim": d, "score": s, "task": "qa"}
              for i in range(60) for d in ("logic", "tone") for r, s in (("x", 1), ("y", 2))]  # fmt: skip
    pools = [{"prompt": f"pool {i}", "response": str(k), "gold": k / 7, "task": task}
             for i, task in enumerate(["qa", "unheard"]) for k in range(4)]  # fmt: skip
    files = {"path": [write(tmp_path, pairs, "a.jsonl"), write(tmp_path, scores, "b.jsonl")],
             "pools": write(tmp_path, pools, "c.jsonl")}  # fmt: skip
    data = RewardsData("files", files)
    data.setup("fit")
    assert data.schema["tasks"] == [{"name": "qa", "capabilities": ["logic", "tone"]}]
    assert data.schema["dataset"] == "a" and data.schema["max_length"] == 512
    assert len(data.part("train", 1)) and len(data.part("train", 2)) and len(data.part("train", 3))
    assert set(data.encoded.capability[data.part("train", 2)].tolist()) == {0, 1}
    batch = list(data.test_dataloader())[-1]
    assert batch.pool.max() == 1 and set(batch.task[batch.pool >= 0].tolist()) == {0, -1}
    assert data.encoded.gold[data.encoded.pool >= 0].flatten().tolist() == pytest.approx([k / 7 for k in range(4)] * 2)
    other = RewardsData("files", files | {"path": files["path"][:1]})
    assert other.fingerprint != data.fingerprint
    with pytest.raises(UserError, match="split 'train' has no pair of a single capability for phase 2"):
        other.part("train", 2)


MISTAKES = [
    ([{"prompt": "p", "chosen": "a"}], "row 1: 'rejected' is missing"),
    ([{"prompt": p, "chosen": "a", "rejected": "b"} for p in ("p", 3)], "row 2: 'prompt' is 3"),
    ([{"chosen": "a", "rejected": "b"}], "row 1: 'chosen' is 'a' and there is no 'prompt'"),
    ([{"prompt": "p", "chosen": "a", "rejected": "b", "split": "holdout"}], "'split' is 'holdout'; expected train"),
    ([{"prompt": "p", "chosen": "a", "rejected": "b", "margin": "big"}], "'margin' is 'big'; expected a number"),
    ([{"prompt": "p", "chosen": "a", "rejected": "a"}], "every pair is tied"),
    ([{"chosen": [{"role": "robot", "content": "x"}], "rejected": chat("a", "b")}], "role user, assistant or system"),
    ([{"chosen": chat("a", "b"), "rejected": chat("c", "d")}], "do not part at an assistant's message"),
    ([{"src": ["a"], "tgt": [], "response": ["x", "y"], "rank": [1]}], "'rank' is \\[1\\]; expected 2 numbers"),
    ([{"src": ["a"], "tgt": ["b", "c"], "response": ["x"], "rank": [1]}], "1 turns in 'src', 2 replies"),
    ([{"prompt": "p", "response": "x", "note": "fine"}], "no score; expected 'dim' and 'score'"),
    ([{"response": "x", "dim": "d", "score": 1}], "no prompt; expected one of prompt, context"),
    ([{"prompt": "p", "response": "x", "dim": "d", "score": None}], "'score' is empty; expected a number"),
    ([{"question": "p"}], "fields question are of no known layout"),
    ([{"prompt": "p", "chosen": ["a"], "rejected": ["b"]}], "expected 3 styles of each"),
]  # fmt: skip


@pytest.mark.parametrize(("rows", "message"), MISTAKES)
def test_a_bad_row_is_named(tmp_path, rows, message):
    with pytest.raises(UserError, match=message) as caught:
        open_files(write(tmp_path, rows))
    assert "\n" not in str(caught.value) and "mine.jsonl" in str(caught.value)


def test_a_bad_file_is_named(tmp_path):
    (tmp_path / "bad.jsonl").write_text('{"prompt": "p"}\n{oops\n')
    with pytest.raises(UserError, match=r"bad.jsonl, line 2: not JSON \(.*column 2\)"):
        open_files(str(tmp_path / "bad.jsonl"))
    (tmp_path / "list.jsonl").write_text("[1]\n")
    with pytest.raises(UserError, match="line 1: \\[1\\]; expected a JSON object"):
        open_files(str(tmp_path / "list.jsonl"))
    (tmp_path / "bad.json").write_text('{"a": 1}')
    with pytest.raises(UserError, match="expected a list of objects"):
        open_files(str(tmp_path / "bad.json"))
    (tmp_path / "empty.jsonl").write_text("\n")
    with pytest.raises(UserError, match="no rows"):
        open_files(str(tmp_path / "empty.jsonl"))
    (tmp_path / "bad.txt").write_text("x")
    with pytest.raises(UserError, match=r"unknown kind of file; expected .jsonl"):
        open_files(str(tmp_path / "bad.txt"))
    with pytest.raises(UserError, match="no such file or folder"):
        open_files(str(tmp_path / "none"))
    (tmp_path / "folder").mkdir()
    with pytest.raises(UserError, match="file in this folder"):
        open_files(str(tmp_path / "folder"))
    (tmp_path / "broken.jsonl.gz").write_bytes(b"no zip")
    with pytest.raises(UserError, match="cannot be read"):
        open_files(str(tmp_path / "broken.jsonl.gz"))
    path = write(tmp_path, [{"prompt": "p", "chosen": "a", "rejected": "b"}])
    with pytest.raises(UserError, match=r"no 'q' as named in data.files.columns; it has prompt"):
        open_files(path, columns={"prompt": "q"})
    for arguments, message in (({"layout": "hh"}, "layout=hh"), ({"most_pairs": 0}, "most_pairs=0")):
        with pytest.raises(UserError, match=message):
            open_files(path, **arguments)
    with pytest.raises(UserError, match=r"needs it, e.g. --data.files.path PATH"):
        RewardsData("files").schema  # noqa: B018


def test_a_renamed_field_may_be_missing_in_some_rows(tmp_path):
    rows = [{"q": "p", "chosen": "a", "rejected": "b", "area": "t"}, {"q": "q", "chosen": "a", "rejected": "b"}]
    pairs = open_files(write(tmp_path, rows), columns={"prompt": "q", "task": "area"}).pairs
    assert pairs["prompt"].to_list() == ["p", "q"] and pairs["task"][0] == "t" != pairs["task"][1]


def test_benchmarks_are_told_apart_and_read(tmp_path):
    rows = {
        "rewardbench": {"prompt": "p", "chosen": "a", "rejected": "b", "subset": "hep-cpp", "id": 4},
        "rewardbench2": {"prompt": "p", "chosen": ["a"], "rejected": ["b", "c", "d"], "subset": "Math", "id": "m1",
                         "num_correct": 1},
        "rmbench": {"prompt": "p", "chosen": ["a", "b", "c"], "rejected": ["d", "e", "f"], "domain": "safety-refuse"},
        "llmbar": {"input": "p", "output_1": "b", "output_2": "a", "label": 2},
        "judgebench": {"question": "p", "response_A": "a", "response_B": "b", "label": "A>B", "source": "mmlu-pro-law",
                       "pair_id": "x9"},
        "pairs": {"prompt": "p", "chosen": "a", "rejected": "b", "subset": "mine"},
    }  # fmt: skip
    subsets = {"rewardbench": "hep-cpp", "rewardbench2": "Math", "rmbench": "safety-refuse", "llmbar": "mine",
               "judgebench": "knowledge", "pairs": "mine"}  # fmt: skip
    for kind, row in rows.items():
        got = read_benchmark(write(tmp_path, [row]))
        assert got.kind == kind and set(got.table["subset"]) == {subsets[kind]}
        good = got.table.filter("good")["response"].to_list()
        assert good == (["a", "b", "c"] if kind == "rmbench" else ["a"])
        pairs = open_files(write(tmp_path, [row])).pairs
        assert len(pairs) == {"rmbench": 9, "rewardbench2": 3}.get(kind, 1) and pairs["chosen"][0] == "a"
        assert pairs["group_id"].n_unique() == 1
    assert sum(sum(subset.values()) for subset in REWARDBENCH.values()) == 358 + 456 + 740 + 984 + 984


def test_benchmark_folders_and_mistakes(tmp_path):
    for name in ("Natural", "Neighbor"):
        (tmp_path / "bar" / name).mkdir(parents=True)
        write(tmp_path / "bar" / name, [{"input": "p", "output_1": "a", "output_2": "b", "label": 1}], "dataset.json")
    bar = read_benchmark(str(tmp_path / "bar"))
    assert bar.table["subset"].unique(maintain_order=True).to_list() == ["Natural", "Neighbor"]
    assert bar.table["item"].to_list() == [0, 0, 1, 1]
    plain = write(tmp_path, [{"prompt": "p", "chosen": "a", "rejected": "b"}])
    with pytest.raises(UserError, match=r"files of several kinds, llmbar .dataset.json., pairs"):
        read_benchmark([str(tmp_path / "bar"), plain])
    for row, message in (
        ({"input": "p", "output_1": "a", "output_2": "b", "label": 3}, "expected 1 or 2"),
        ({"question": "p", "response_A": "a", "response_B": "b", "label": "A=B", "source": "s"}, "expected 'A>B'"),
        ({"prompt": "p", "chosen": ["a"], "rejected": ["b"], "subset": "Ties", "id": "7"}, "expected 'ref:<n>'"),
        ({"text": "p"}, "no known benchmark .it has text"),
    ):
        with pytest.raises(UserError, match=message):
            read_benchmark(write(tmp_path, [row]))
    with pytest.raises(UserError, match="--kind best: expected auto"):
        read_benchmark(plain, "best")


def real(name):
    folder = real_data_dir()
    if folder is None or not (folder / "dmoerm" / name).exists():
        pytest.skip(f"MOEZOO_REAL_DATA has no dmoerm/{name}")
    return str(folder / "dmoerm" / name)


@pytest.mark.real
def test_real_preferences_are_read_as_the_spec_counts_them():
    """Fact sheet 2.3 and 3.3: rows, splits without leaks on HH, and what the length rule gets."""
    path = real("prefs.parquet")
    data = RewardsData("files", {"path": path})
    assert len(data.opened.pairs) == 7765
    hh = RewardsData("files", {"path": path}, tasks=["helpful", "harmless"])
    assert {(s, t): n for s, t, n in hh.rows.group_by("split", "task").len().iter_rows()} == {
        ("train", "helpful"): 1631, ("valid", "helpful"): 239, ("test", "helpful"): 478,
        ("train", "harmless"): 1595, ("valid", "harmless"): 250, ("test", "harmless"): 463,
    }  # fmt: skip
    turns = {name: set(hh.rows.filter(pl.col("split") == name)["turn"]) for name in ("train", "test")}
    assert not turns["train"] & turns["test"]
    longer = pl.col("chosen").str.len_chars(), pl.col("rejected").str.len_chars()
    rule = ((longer[0] > longer[1]).cast(pl.Float64) + (longer[0] == longer[1]).cast(pl.Float64) / 2).mean()
    every = data.opened.pairs
    expected = {"helpful": 0.597, "harmless": 0.447}
    for task, value in expected.items():
        assert every.filter(pl.col("task") == task).select(rule).item() == pytest.approx(value, abs=6e-4)
    for source, value in {"webgpt": 0.665, "pandalm": 0.660}.items():
        assert every.filter(pl.col("source") == source).select(rule).item() == pytest.approx(value, abs=6e-4)
    for task, value in {"text_creation": 0.745, "objective_qa": 0.666, "subjective_qa": 0.674}.items():
        autoj = every.filter((pl.col("task") == task) & (pl.col("source") == "auto-j"))
        assert autoj.select(rule).item() == pytest.approx(value, abs=6e-4)


@pytest.mark.real
def test_real_tasks_disturb_one_another():
    """Fact sheet, check 5: linear Bradley-Terry on hashed 1-2-grams and length; one model for both tasks is 55-56
    pooled, task experts by the true task at least 61, by a learned router at least 58, across tasks below 45."""
    text = pytest.importorskip("sklearn.feature_extraction.text")
    linear = pytest.importorskip("sklearn.linear_model")
    from scipy import sparse

    rows = RewardsData("files", {"path": real("prefs.parquet")}, tasks=["helpful", "harmless"]).rows
    hashed = text.HashingVectorizer(ngram_range=(1, 2), n_features=2**18, alternate_sign=False, token_pattern=r"\w+")
    sides = [hashed.transform(rows[side]) for side in ("chosen", "rejected")]
    length = [np.log1p(rows[side].str.len_chars().to_numpy()) for side in ("chosen", "rejected")]
    x = sparse.hstack([sides[0] - sides[1], sparse.csr_matrix((length[0] - length[1])[:, None])]).tocsr()
    helpful, train, test = (
        (rows["task"] == "helpful").to_numpy(),
        *((rows["split"] == s).to_numpy() for s in ("train", "test")),
    )

    def fit(chosen):
        both = sparse.vstack([x[chosen], -x[chosen]])
        label = np.repeat([1, 0], chosen.sum())
        return linear.LogisticRegression(C=0.5, fit_intercept=False, max_iter=300).fit(both, label).coef_[0]

    def accuracy(margin):
        return float(((margin > 0) + (margin == 0) / 2).mean())

    experts, single = [fit(train & helpful), fit(train & ~helpful)], fit(train)
    asked = hashed.transform(rows["prompt"])
    router = linear.LogisticRegression(C=10.0, max_iter=300).fit(asked[train], helpful[train])
    margins = np.stack([x @ expert for expert in experts])
    oracle, routed = np.where(helpful, *margins)[test], np.where(router.predict(asked), *margins)[test]
    across = [accuracy(margins[1][test & helpful]), accuracy(margins[0][test & ~helpful])]
    one = accuracy((x @ single)[test])
    numbers = {"single": one, "oracle": accuracy(oracle), "routed": accuracy(routed), "across": across}
    print(numbers, "router", float((router.predict(asked) == helpful)[test].mean()))
    assert 0.54 <= one <= 0.575 and numbers["oracle"] >= 0.61 and numbers["routed"] >= 0.58 and max(across) < 0.45


@pytest.mark.real
def test_real_capability_scores_are_pairs_per_dimension():
    made = open_files(real("capability.parquet"), most_pairs=8)
    tasks = {task["name"]: task["capabilities"] for task in made.tasks}
    assert tasks["chitchat"] == ["coherence", "engagingness", "groundedness", "naturalness", "understandability"]
    assert tasks["data2text"] == ["informativeness", "naturalness"]
    human = made.pairs.filter(pl.col("capability").is_null())
    assert set(human["task"]) == {"chitchat", "data2text"} and (made.pairs["margin"] > 0).all()
    assert made.pairs.group_by("group_id", "capability").len()["len"].max() == 8


def test_answers_to_different_prompts_are_never_compared(tmp_path):
    rows = [{"id": None, "prompt": f"p{i}", "responses": [f"a{i}", f"b{i}"], "rank": [1, 2]} for i in range(3)]
    for same in (None, "conv1"):
        (tmp_path / "lists.jsonl").write_text("\n".join(json.dumps(row | {"id": same}) for row in rows))
        pairs = open_files(str(tmp_path / "lists.jsonl")).pairs
        found = sorted(pairs.select("prompt", "chosen", "rejected").rows())
        assert found == [(f"p{i}", f"a{i}", f"b{i}") for i in range(3)]


def test_scores_in_csv_are_numbers_and_counts_no_attributes(tmp_path):
    lines = ["prompt,response,helpfulness,n_tokens"] + [
        f"p,{text},{score},{9 - score}" for score, text in enumerate("abc")
    ]
    (tmp_path / "s.csv").write_text("\n".join(lines))
    pairs = open_files(str(tmp_path / "s.csv"), task="chat").pairs
    assert set(pairs["capability"]) == {"helpfulness"} and ("c", "a") in pairs.select("chosen", "rejected").rows()


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{"prompt": "p \ud83d", "chosen": "a", "rejected": "b"}], "row 1: 'prompt' holds half a character"),
        (
            [
                {"prompt": "p", "chosen": "a", "rejected": "b", "task": "t"},
                {"prompt": "q", "chosen": "a", "rejected": "b", "capability": "k"},
            ],
            "1 judgements of a capability name no task, such as 'k', but others do",
        ),
    ],
)
def test_rows_that_would_train_the_wrong_thing_are_told(tmp_path, rows, message):
    (tmp_path / "x.jsonl").write_text("\n".join(map(json.dumps, rows)))
    with pytest.raises(UserError, match=message):
        open_files(str(tmp_path / "x.jsonl"))


def test_numbered_tasks_are_tasks(tmp_path):
    rows = [{"prompt": f"p{i}", "chosen": "a", "rejected": "b", "task": i % 2} for i in range(4)]
    (tmp_path / "x.jsonl").write_text("\n".join(map(json.dumps, rows)))
    assert [task["name"] for task in open_files(str(tmp_path / "x.jsonl")).tasks] == ["0", "1"]
