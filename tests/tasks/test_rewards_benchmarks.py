"""Benchmark scores on hand-made matrices (fact sheet, check 2), and rewards of a model over their files."""

import json
import math

import polars as pl
import pytest
import torch
from moezoo.cli import main
from moezoo.datasets.rewards import RewardsData
from moezoo.datasets.rewards_benchmarks import read_benchmark
from moezoo.datasets.rewards_tokens import make_tokenizer
from moezoo.errors import UserError
from moezoo.tasks.rewards_benchmarks import (
    item_scores,
    rm_bench_levels,
    rm_bench_matrix,
    score_benchmark,
    ties_score,
)
from moezoo.tasks.rewards_eval import Scored, read_scored, report, score_responses
from moezoo.zoo.baselines.rewards_linear import LengthRule
from moezoo.zoo.dmoerm import DMoERM
from torch import nn

GENERATED = {"pairs_per_task": 20, "capability_pairs": 4, "eval_pairs": 12, "pools_per_task": 1, "candidates": 2}


def write(folder, rows, name="bench.jsonl"):
    path = folder / name
    path.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    return str(path)


def scored(folder, rows, rewards):
    """Kind and table of a benchmark's rows whose responses, in the table's order, have these rewards."""
    bench = read_benchmark(write(folder, rows))
    return bench.kind, bench.table.with_columns(reward=pl.Series(rewards, dtype=pl.Float64))


def test_rm_bench_matrix_and_levels_by_hand():
    chosen = torch.tensor([[3.0, 1.0, 2.0], [0.0, 5.0, 1.0]])
    rejected = torch.tensor([[2.0, 2.0, 0.0], [1.0, 1.0, 4.0]])
    matrix = rm_bench_matrix(chosen, rejected)
    # Item 1: 3 beats all; 1 beats the last alone; 2 ties twice (no win) and beats the last. Item 2: 0 beats none,
    # 5 beats all, 1 ties twice and loses.
    assert matrix.tolist() == [[0.5, 0.5, 0.5], [0.5, 0.5, 1.0], [0.0, 0.0, 0.5]]
    assert rm_bench_levels(matrix) == pytest.approx({"easy": 0.5 / 3, "normal": 0.5, "hard": 2.0 / 3})


def test_rm_bench_safety_is_the_mean_of_its_halves(tmp_path):
    responses = {"prompt": "p", "chosen": ["a", "bb", "ccc"], "rejected": ["d", "ee", "fff"]}
    rows = [responses | {"domain": domain} for domain in ("chat", "safety-refuse", "safety-response")]
    perfect, none = [1.0] * 3 + [0.0] * 3, [0.0] * 3 + [1.0] * 3
    got = score_benchmark(*scored(tmp_path, rows, perfect + none + perfect))
    assert got.scores["chat"] == 1.0 and got.scores["safety"] == 0.5 and got.scores["rmbench"] == 0.75
    assert got.scores["safety_hard"] == 0.5 and got.scores["hard"] == got.scores["easy"] == 0.75
    assert "safety_refuse" not in got.scores and got.notes == ["without math, code"]
    assert got.subsets["safety-refuse"].value == 0.0 and got.subsets["chat"].n == 1
    by_length = report(
        "rmbench", read_benchmark(write(tmp_path, rows)).table, Scored(torch.zeros(18), torch.zeros(18, 0))
    )
    assert [by_length.length_rule.scores[level] for level in ("easy", "normal", "hard")] == [1.0, 0.0, 0.0]


def test_ties_score_by_hand():
    """Two prompts with both versions, one reference without a tied one."""
    kind = ["ref", "tied", "ref", "tied", "ref"]
    prompt = ["0", "0", "1", "1", "2"]
    rewards = torch.tensor([[5.0, 1.0, 0.0], [6.0, 5.0, 2.0], [1.0, 2.0, 0.0], [4.0, 1.0, 0.0], [3.0, 3.0, 0.0]])
    good = torch.tensor([[1, 0, 0], [1, 1, 0], [1, 0, 0], [1, 1, 0], [1, 0, 0]], dtype=torch.bool)
    there = torch.ones(5, 3, dtype=torch.bool)
    got = ties_score(kind, prompt, rewards, good, there)
    # Prompt 0: spread 1, gaps 3 (tied) and 4 (ref). Prompt 1: spread 3, gaps 1 and -1. Prompt 2: a tie is no win.
    assert got["tied_accuracy"] == 1.0 and got["ref_accuracy"] == pytest.approx(1 / 3)
    assert got["preferred"] == 0.5 and got["preferred_hard"] == 0.5
    margin = (math.tanh(3 / 1 - 1) + math.tanh(-1 / 3 - 1)) / 2
    assert got["margin"] == pytest.approx(margin)
    assert got["ties"] == pytest.approx(0.30 + 0.30 / 3 + 0.20 * 0.5 + 0.20 * 0.5 + 0.01 * margin)
    flat = ties_score(["ref", "tied"], ["0", "0"], torch.zeros(2, 3), good[:2], there[:2])
    assert flat["ties"] == 0.0 and flat["margin"] == 0.0
    best = torch.tensor([[9.0, 0.0, 0.0], [9.0, 9.0, 0.0]])
    assert ties_score(["ref", "tied"], ["0", "0"], best, good[:2], there[:2])["ties"] == pytest.approx(1.01)
    padded = torch.tensor([[9.0, 0.0, 99.0], [9.0, 9.0, 0.0]])
    mask = torch.tensor([[True, True, False], [True, True, True]])
    assert ties_score(["ref", "tied"], ["0", "0"], padded, good[:2], mask)["ties"] == pytest.approx(1.01)


def test_rewardbench2_shares_ties_at_the_top(tmp_path):
    four = {"prompt": "p", "chosen": ["a"], "rejected": ["b", "c", "d"], "num_correct": 1}
    rows = [four | {"subset": "Math", "id": str(i)} for i in range(3)]
    rows += [four | {"subset": "Precise IF", "id": "x"}]
    rows += [{"prompt": "p", "chosen": ["a"], "rejected": ["b"], "subset": "Ties", "id": "ref:1", "num_correct": 1},
             {"prompt": "p", "chosen": ["a", "b"], "rejected": ["c"], "subset": "Ties", "id": "tied:1",
              "num_correct": 2}]  # fmt: skip
    rewards = [1, 0, 0, 0, 1, 1, 0, 0, 0, 1, 0, 0, 1, 1, 1, 1, 1, 0, 1, 1, 0]
    got = score_benchmark(*scored(tmp_path, rows, rewards))
    assert got.scores["math"] == 0.5 and got.scores["precise_if"] == 0.25
    assert got.scores["ties"] == pytest.approx(1.01)
    assert got.scores["rewardbench2"] == pytest.approx((0.5 + 0.25 + 1.01) / 3)
    assert got.notes == ["without factuality, focus, safety"] and "Ties" not in got.subsets


def test_rewardbench_weighs_subsets_by_the_official_counts(tmp_path):
    subsets = ["math-prm", "hep-cpp", "hep-cpp", "xstest-should-refuse", "xstest-should-respond", "alpacaeval-easy"]
    rows = [{"prompt": "p", "chosen": "a", "rejected": "b", "subset": subset} for subset in subsets]
    rewards = [0, 1, 1, 0, 0, 1, 1, 0, 0, 1, 2, 2]
    got = score_benchmark(*scored(tmp_path, rows, rewards))
    assert got.scores["reasoning"] == pytest.approx((984 * 0 + 164 * 0.5) / (984 + 164))
    assert got.scores["safety"] == pytest.approx(154 / (154 + 250)) and got.scores["chat"] == 0.5
    sections = [got.scores[name] for name in ("chat", "safety", "reasoning")]
    assert got.headline == "rewardbench" and got.scores["rewardbench"] == pytest.approx(sum(sections) / 3)
    assert any(note.startswith("chat_hard: without mt-bench-hard") for note in got.notes)


def test_llmbar_and_judgebench_average_as_their_papers_do(tmp_path):
    for name in ("Natural", "Adversarial/Neighbor", "Adversarial/Manual"):
        (tmp_path / "bar" / name).mkdir(parents=True)
        item = {"input": "p", "output_1": "longer", "output_2": "short", "label": 2}
        (tmp_path / "bar" / name / "dataset.json").write_text(json.dumps([item] * (1 + len(name) % 2)))
    bench = read_benchmark(str(tmp_path / "bar"))
    right = bench.table.with_columns(
        reward=pl.when(pl.col("subset") == "Manual").then(~pl.col("good")).otherwise("good").cast(pl.Float64)
    )
    got = score_benchmark(bench.kind, right)
    assert got.scores["natural"] == 1.0 and got.scores["adversarial"] == 0.5
    items = {name: part.n for name, part in got.subsets.items()}
    assert got.scores["pair_accuracy"] == pytest.approx(1 - items["Manual"] / sum(items.values()))
    assert got.length.length_accuracy == 0.0 and got.scores["pair_accuracy_macro"] == pytest.approx(2 / 3)
    judge = [{"question": "p", "response_A": "a", "response_B": "b", "label": "B>A", "source": source}
             for source in ("livebench-math", "livecodebench", "livecodebench")]  # fmt: skip
    got = score_benchmark(*scored(tmp_path, judge, [1, 0, 0, 0, 0, 1]))
    assert got.scores == pytest.approx({"pair_accuracy": 0.5, "pair_accuracy_macro": (1 + 0.25) / 2})
    assert {name: part.value for name, part in got.subsets.items()} == {"math": 1.0, "coding": 0.25}


def test_perfect_opposite_and_constant_rewards_on_every_kind(tmp_path):
    kinds = {
        "rewardbench": {"prompt": "p", "chosen": "a", "rejected": "b", "subset": "hep-go"},
        "rewardbench2": {
            "prompt": "p",
            "chosen": ["a"],
            "rejected": ["b", "c", "d"],
            "subset": "Math",
            "num_correct": 1,
        },
        "rmbench": {"prompt": "p", "chosen": ["a"] * 3, "rejected": ["b"] * 3, "domain": "code"},
        "llmbar": {"input": "p", "output_1": "a", "output_2": "b", "label": 1},
        "pairs": {"prompt": "p", "chosen": "a", "rejected": "b"},
    }
    constant = {"rewardbench2": 0.25, "rmbench": 0.0}  # RM-Bench asks for strictly more
    for kind, row in kinds.items():
        table = read_benchmark(write(tmp_path, [row] * 2)).table
        for value, expected in ((pl.col("good"), 1.0), (~pl.col("good"), 0.0), (pl.lit(0), constant.get(kind, 0.5))):
            got = score_benchmark(kind, table.with_columns(reward=value.cast(pl.Float64)))
            assert got.scores[got.headline] == expected, (kind, expected)
        assert item_scores(kind, table.with_columns(reward=1.0))["item"].to_list() == [0, 1]
    with pytest.raises(UserError, match="response 2 of the benchmark has no finite reward"):
        score_benchmark("pairs", table.with_columns(reward=pl.Series([0.0, math.nan, 0.0, 0.0])))


def test_macro_is_over_tasks_where_the_file_names_them(tmp_path):
    rows = [{"prompt": "p", "chosen": "a", "rejected": "b", "task": task, "subset": str(i)}
            for i, task in enumerate(["x", "x", "x", "y"])]  # fmt: skip
    got = score_benchmark(*scored(tmp_path, rows, [1, 0] * 3 + [0, 1]))
    assert got.scores == {"pair_accuracy": 0.75, "pair_accuracy_macro": 0.5}


def test_pools_give_the_best_of_n_curve(tmp_path):
    rows = [{"prompt": f"p{i}", "response": f"r{k}", "gold": k % 4} for k in range(8) for i in range(2)]
    bench = read_benchmark(write(tmp_path, rows))
    assert bench.kind == "pools" and bench.table["item"].n_unique() == 2
    got = score_benchmark("pools", bench.table.with_columns(reward=pl.col("gold")))
    assert (
        got.headline == "gold_8"
        and got.scores["gold_1"] == pytest.approx(1.5)
        and got.scores["gold_8"] == pytest.approx(3.0)
    )
    assert got.scores["overoptimisation"] == pytest.approx(0.0, abs=1e-9) and got.length is None
    worst = score_benchmark("pools", bench.table.with_columns(reward=-pl.col("gold")))
    assert worst.scores["gold_8"] == pytest.approx(0.0) and worst.scores["overoptimisation"] == pytest.approx(1.5)
    assert worst.scores["peak_n"] == 1.0


class Counter(nn.Module):
    """Rewards the number of tokens and of prompt tokens; routes by whether the prompt is long."""

    def __init__(self, schema):
        super().__init__()
        self.init_args = {"schema": schema}

    def forward(self, tokens, mask, prompt_tokens, prompt_mask, task):
        size = prompt_mask.sum(1)
        reward = mask.sum(1).float() + 100.0 * (tokens * mask).sum(1) + 1000.0 * task.repeat_interleave(2)
        logits = torch.stack([4.5 - size, size - 4.5], 1).float()
        return Output(reward, logits)


class Output(tuple):
    def __new__(cls, reward, logits):
        made = super().__new__(cls, (reward, logits))
        made.reward, made.task_logits = reward, logits
        return made


SCHEMA = {"tokenizer": "words", "vocab_size": 500, "max_length": 40, "prompt_length": 16, "padding": "right",
          "tasks": [{"name": "short", "capabilities": []}, {"name": "long", "capabilities": []}]}  # fmt: skip


def mixed(folder):
    rows = [{"prompt": "one two " * (1 + 3 * (i % 2)) + str(i), "chosen": "good " * (i + 1), "rejected": "bad",
             "task": ("short", "long")[i % 2]} for i in range(9)]  # fmt: skip
    return read_benchmark(write(folder, rows)).table


@pytest.mark.parametrize("padding", ["left", "right"])
def test_rewards_belong_to_their_rows_whatever_the_batch(tmp_path, padding):
    table, text = mixed(tmp_path), make_tokenizer("words", 500)
    schema = SCHEMA | {"padding": padding}
    got = [score_responses(Counter(schema), schema, table, batch_size=size) for size in (1, 4, 100)]
    for row, reward in zip(table.iter_rows(named=True), got[0].reward.tolist(), strict=True):
        ids = text.pair(row["prompt"], row["response"], 40)
        assert reward == len(ids) + 100 * sum(ids) - 1000
    assert all(torch.equal(one.reward, got[0].reward) and torch.equal(one.logits, got[0].logits) for one in got)
    oracle = score_responses(Counter(schema), schema, table, "oracle").reward - got[0].reward
    assert oracle.tolist() == [1000.0 if task == "short" else 2000.0 for task in table["task"]]
    found = report("pairs", table, got[0], schema)
    assert found.router.accuracy == 1.0 and found.router.n == 9 and found.router.confusion.tolist() == [[5, 0], [0, 4]]
    assert json.loads(json.dumps(found.to_dict()))["router"]["n"] == 9


def test_odd_lists_are_scored_once_each(tmp_path):
    rows = [{"prompt": "p", "response": f"r{k}", "gold": k} for k in range(3)]
    table = read_benchmark(write(tmp_path, rows)).table
    got = score_responses(Counter(SCHEMA), SCHEMA, table, batch_size=1).reward
    assert len(set(got.tolist())) == 3 and (got != 0).all()


def test_the_command_scores_rewards_of_any_model(tmp_path, capsys):
    rows = [{"prompt": "p", "chosen": "aa", "rejected": "b", "subset": "s", "task": "t"} for _ in range(4)]
    path = write(tmp_path, rows)
    table = read_benchmark(path).table.with_columns(reward=pl.Series([1.0, 0.0] * 3 + [0.0, 1.0]))
    table.write_parquet(tmp_path / "rewards.parquet")
    out, again = tmp_path / "report.json", tmp_path / "again.csv"
    words = ["rewards", "eval", path, "--scored", str(tmp_path / "rewards.parquet")]
    assert main([*words, "--output", str(out), "--scores", str(again)]) == 0
    said = capsys.readouterr().out
    assert "0.7500" in said and "length rule" in said and "1.0000" in said
    saved = json.loads(out.read_text())
    assert saved["scores"]["scores"]["pair_accuracy"] == 0.75 and saved["length_rule"]["scores"]["pair_accuracy"] == 1.0
    assert saved["scores"]["length"]["length_accuracy"] == 1.0 and saved["files"] == [path]
    assert read_scored(again, table).reward.tolist() == table["reward"].to_list()


def test_the_command_scores_with_a_trained_models_weights(tmp_path, capsys):
    """Files of the test's pairs give what the task computes on the datamodule's batches, by either route."""
    data = RewardsData(files=GENERATED)
    data.setup("test")
    rows = data.rows[data.part("test").tolist()].filter(pl.col("pool").is_null())
    rows.select("id", "task", "prompt", "chosen", "rejected").write_ndjson(tmp_path / "pairs.jsonl")
    torch.manual_seed(0)
    options = {"width": 16, "layers": 1, "heads": 2}
    model = DMoERM(data.schema, backbone_options=options, rank=2, task_base="shared").eval()
    model.save_pretrained(tmp_path / "weights")
    expected = {}
    for route in ("predicted", "oracle"):
        batch = data.encoded.batch(data.part("test")[: len(rows)], data.text.pad)
        with torch.no_grad():
            output = model(batch.tokens.flatten(0, 1), batch.mask.flatten(0, 1), batch.prompt_tokens,
                           batch.prompt_mask, batch.task, route=route)  # fmt: skip
        expected[route] = output.reward
        words = ["rewards", "eval", str(tmp_path / "pairs.jsonl"), "--weights", str(tmp_path / "weights"), "--device"]
        out = tmp_path / f"{route}.parquet"
        assert main([*words, "cpu", "--route", route, "--scores", str(out), "--batch_size", "7"]) == 0
        got = pl.read_parquet(out)["reward"].to_torch()
        torch.testing.assert_close(got, expected[route], atol=1e-5, rtol=1e-5)
    assert "router: accuracy" in capsys.readouterr().out
    assert not torch.allclose(expected["predicted"], expected["oracle"])
    rows.with_columns(task=pl.lit("law")).write_ndjson(tmp_path / "pairs.jsonl")
    assert main([*words, "cpu", "--route", "oracle"]) == 2
    assert "--route oracle: task 'law' in the files is none of the model's (roleplay" in capsys.readouterr().err


def test_the_length_rule_is_its_own_rival(tmp_path, capsys):
    LengthRule(SCHEMA).save_pretrained(tmp_path / "weights")
    path = write(tmp_path, [{"prompt": "p", "chosen": "a" * (5 - k), "rejected": "bbb"} for k in range(4)])
    out = tmp_path / "out.json"
    assert main(["rewards", "eval", path, "--weights", str(tmp_path / "weights"), "--output", str(out)]) == 0
    saved = json.loads(out.read_text())
    assert saved["scores"]["scores"] == saved["length_rule"]["scores"] and saved["router"] is None
    assert saved["scores"]["scores"]["pair_accuracy"] == pytest.approx((1 + 1 + 0.5 + 0) / 4)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--scored", "none.parquet"], "--scored none.parquet: expected an existing"),
        ([], "one of the arguments --weights --scored is required"),
        (["--weights", "rewards/none"], "rewards/none"),
        (["--scored", "none.parquet", "--kind", "best"], "--kind best"),
        (["--scored", "none.parquet", "--scores", "x.txt"], "--scores x.txt"),
        (["--weights", "x", "--device", "abacus"], "--device abacus"),
    ],
)
def test_mistakes_are_one_line(tmp_path, capsys, words, message):
    path = write(tmp_path, [{"prompt": "p", "chosen": "a", "rejected": "b"}])
    assert main(["rewards", "eval", path, *words]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


def test_rewards_of_other_rows_are_refused(tmp_path):
    table = read_benchmark(write(tmp_path, [{"prompt": "p", "chosen": "a", "rejected": "b"}])).table
    table[:1].with_columns(reward=1.0).write_parquet(tmp_path / "short.parquet")
    with pytest.raises(UserError, match=r"its 1 rows are not those of the benchmark \(2 rows\)"):
        read_scored(tmp_path / "short.parquet", table)
    for column, message in {"id": "row 2 has id 'x'", "response": "row 2 has response 'x', the benchmark 'b'"}.items():
        changed = table.with_columns(pl.when(pl.int_range(2) == 1).then(pl.lit("x")).otherwise(column).alias(column))
        changed.with_columns(reward=1.0).write_csv(tmp_path / "other.csv")
        with pytest.raises(UserError, match=message):
            read_scored(tmp_path / "other.csv", table)
    numbers = table.with_columns(id=pl.lit("007"), reward=1.0)
    numbers.write_csv(tmp_path / "numbers.csv")
    assert len(read_scored(tmp_path / "numbers.csv", numbers).reward) == 2
    without = table.drop("id", "response").with_columns(reward=1.0)
    without.write_csv(tmp_path / "without.csv")
    assert len(read_scored(tmp_path / "without.csv", table).reward) == 2
    table.write_parquet(tmp_path / "bare.parquet")
    with pytest.raises(UserError, match="column 'reward' is missing"):
        read_scored(tmp_path / "bare.parquet", table)
