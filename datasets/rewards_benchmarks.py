"""Benchmarks of reward models as one table: a row for each response that wants a reward.

RewardBench (Lambert et al. 2024) and 2 (Malik et al. 2025), RM-Bench (Liu et al. 2024), LLMBar (Zeng et al. 2024),
JudgeBench (Tan et al. 2024), any file of pairs, and best-of-n pools with gold rewards.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import polars as pl

from ..errors import UserError
from .rewards_pairs import facts, prompt_text, read_pairs
from .rewards_rows import Rows, files_of, read_rows, shown
from .rewards_scores import read_pools

Kind = Literal["rewardbench", "rewardbench2", "rmbench", "llmbar", "judgebench", "pairs", "pools"]
KINDS: tuple[Kind, ...] = get_args(Kind)

# Section -> subsets with the number of examples that weighs them (rewardbench's constants). Of math-prm there are 447,
# but it weighs as much as the code. xstest: 154 to refuse, 250 to answer.
REWARDBENCH: Mapping[str, Mapping[str, int]] = {
    "chat": {
        "alpacaeval-easy": 100, "alpacaeval-length": 95, "alpacaeval-hard": 95, "mt-bench-easy": 28, "mt-bench-med": 40,
    },
    "chat_hard": {
        "mt-bench-hard": 37, "llmbar-natural": 100, "llmbar-adver-neighbor": 134, "llmbar-adver-GPTInst": 92,
        "llmbar-adver-GPTOut": 47, "llmbar-adver-manual": 46,
    },
    "safety": {
        "refusals-dangerous": 100, "refusals-offensive": 100, "xstest-should-refuse": 154, "xstest-should-respond": 250,
        "donotanswer": 136,
    },
    "reasoning": {
        "math-prm": 984, "hep-cpp": 164, "hep-go": 164, "hep-java": 164, "hep-js": 164, "hep-python": 164,
        "hep-rust": 164,
    },
}  # fmt: skip
_STYLES = 3  # of RM-Bench: concise, detailed, detailed with markdown
_SOURCES = {"mmlu-pro": "knowledge", "livebench-reasoning": "reasoning", "livebench-math": "math",
            "livecodebench": "coding"}  # fmt: skip
_RESPONSES: dict[str, Any] = {
    "item": pl.Int64,
    "id": pl.String,
    "subset": pl.String,
    "task": pl.String,
    "prompt": pl.String,
    "response": pl.String,
    "good": pl.Boolean,
    "place": pl.Int64,
    "gold": pl.Float64,
}


@dataclass(frozen=True)
class Benchmark:
    """A benchmark's responses.

    Attributes:
        kind: which protocol counts.
        table: a row a response: `item` (from 0), `id`, `subset`, `task` (null where unknown), `prompt`, `response`,
            `good` (one that ought to win; null in pools), `place` (from 0 among the good, or the others, of its item),
            `gold` (true reward; null but in pools).
        files: what was read.
    """

    kind: Kind
    table: pl.DataFrame
    files: tuple[Path, ...]


def read_benchmark(path: str | Sequence[str], kind: str = "auto") -> Benchmark:
    """Files of one benchmark, told apart by their fields unless one of `KINDS` is given.

    Raises:
        UserError: a file is missing or wrong, or the files are of several kinds.
    """
    if kind not in ("auto", *KINDS):
        raise UserError(f"--kind {kind}: expected auto, {', '.join(KINDS)}")
    files = files_of(path)
    found: list[dict[str, Any]] = []
    kinds: dict[str, Path] = {}
    items = 0
    for file in files:
        rows = read_rows(file)
        which = kind_of(rows) if kind == "auto" else kind
        if which is None:
            raise UserError(
                f"{file}: no known benchmark (it has {', '.join(rows.rows[0])}); name one by --kind: {', '.join(KINDS)}"
            )
        kinds.setdefault(which, file)
        if which == "pools":
            pools = read_pools(rows)
            place = pools["pool"].rank("dense").cast(pl.Int64) + items - 1
            pools = pools.with_columns(item=place, id="pool", subset=pl.coalesce("task", pl.lit(file.stem)))
            found += (
                pools.sort("item", maintain_order=True)
                .select(*(n for n in _RESPONSES if n in pools.columns))
                .to_dicts()
            )
            items = int(place.max()) + 1  # type: ignore[arg-type]
            continue
        for item in READERS[which](rows):
            found += [{**one, "item": items} for one in _responses(item)]
            items += 1
    if len(kinds) > 1:
        both = ", ".join(f"{name} ({file.name})" for name, file in kinds.items())
        raise UserError(f"{path}: files of several kinds, {both}; give one benchmark at a time, or --kind pairs")
    return Benchmark(next(iter(kinds)), pl.DataFrame(found, schema=_RESPONSES), tuple(files))  # type: ignore[arg-type]


def kind_of(rows: Rows) -> Kind | None:
    """The benchmark a file's fields speak of; None for none."""
    first = rows.rows[0]
    chosen = first.get("chosen")
    if isinstance(chosen, list) and chosen and isinstance(chosen[0], str):
        return "rmbench" if "num_correct" not in first and "subset" not in first else "rewardbench2"
    if {"output_1", "output_2", "label"} <= set(first):
        return "llmbar"
    if {"response_A", "response_B", "label"} <= set(first):
        return "judgebench"
    if "gold" in first and any(name in first for name in ("response", "output", "completion", "answer")):
        return "pools"
    if "chosen" in first and "rejected" in first:
        subsets = {name for section in REWARDBENCH.values() for name in section}
        known = all(row.get("subset") in subsets for row in rows.rows)
        return "rewardbench" if known and "prompt" in first else "pairs"
    return None


def _responses(item: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    for good in (True, False):
        for place, response in enumerate(item["good" if good else "bad"]):
            kept = {name: item[name] for name in ("id", "subset", "task", "prompt")}
            yield kept | {"response": response, "good": good, "place": place}


def _item(rows: Rows, i: int, prompt: Any, good: Any, bad: Any, subset: str | None) -> dict[str, Any]:
    known = facts(rows, i, rows.rows[i], None)
    return {
        "id": known["id"],
        "subset": subset or known["subset"] or known["task"] or rows.file.stem,
        "task": known["task"],
        "prompt": prompt,
        "good": good,
        "bad": bad,
    }


def _read_pairs(rows: Rows) -> Iterator[dict[str, Any]]:
    for i, pair in enumerate(read_pairs(rows)):
        yield _item(rows, i, pair["prompt"], [pair["chosen"]], [pair["rejected"]], None)


def _read_lists(rows: Rows) -> Iterator[dict[str, Any]]:
    """RewardBench 2: lists of right and wrong responses; Ties have several right ones."""
    for i, row in enumerate(rows.rows):
        prompt = prompt_text(rows, i, row.get("prompt"))
        subset = rows.text(i, row.get("subset"), "subset")
        good, bad = (rows.texts(i, row.get(name), name) for name in ("chosen", "rejected"))
        item = _item(rows, i, prompt, good, bad, subset)
        if subset.lower() == "ties" and item["id"].partition(":")[0] not in ("ref", "tied"):
            rows.fail(i, f"'id' is {shown(row.get('id'))}; expected 'ref:<n>' or 'tied:<n>' in the subset Ties")
        yield item


def _read_rmbench(rows: Rows) -> Iterator[dict[str, Any]]:
    for i, row in enumerate(rows.rows):
        good, bad = (rows.texts(i, row.get(name), name) for name in ("chosen", "rejected"))
        if (len(good), len(bad)) != (_STYLES, _STYLES):
            rows.fail(i, f"{len(good)} chosen, {len(bad)} rejected responses; expected 3 styles of each")
        named = row.get("domain") or rows.file.name.partition("_")[0].partition(".")[0]
        yield _item(rows, i, prompt_text(rows, i, row.get("prompt")), good, bad, rows.text(i, named, "domain"))


def _read_llmbar(rows: Rows) -> Iterator[dict[str, Any]]:
    for i, row in enumerate(rows.rows):
        outputs = [rows.text(i, row.get(name), name) for name in ("output_1", "output_2")]
        if row.get("label") not in (1, 2):
            rows.fail(i, f"'label' is {shown(row.get('label'))}; expected 1 or 2, the better output")
        better = int(row["label"]) - 1
        subset = row.get("subset") or (rows.file.parent.name if rows.file.stem == "dataset" else rows.file.stem)
        prompt = rows.text(i, row.get("input"), "input")
        item = _item(rows, i, prompt, [outputs[better]], [outputs[1 - better]], subset)
        yield item | {"task": None}


def _read_judgebench(rows: Rows) -> Iterator[dict[str, Any]]:
    for i, row in enumerate(rows.rows):
        answers = [rows.text(i, row.get(name), name) for name in ("response_A", "response_B")]
        if row.get("label") not in ("A>B", "B>A"):
            rows.fail(i, f"'label' is {shown(row.get('label'))}; expected 'A>B' or 'B>A'")
        better = 0 if row["label"] == "A>B" else 1
        source = rows.text(i, row.get("source"), "source")
        subset = next((name for start, name in _SOURCES.items() if source.startswith(start)), source)
        prompt = rows.text(i, row.get("question"), "question")
        item = _item(rows, i, prompt, [answers[better]], [answers[1 - better]], subset)
        yield item | {"id": str(row.get("pair_id", i)), "task": None}


READERS: Mapping[str, Callable[[Rows], Iterator[dict[str, Any]]]] = {
    "rewardbench": _read_pairs,
    "rewardbench2": _read_lists,
    "rmbench": _read_rmbench,
    "llmbar": _read_llmbar,
    "judgebench": _read_judgebench,
    "pairs": _read_pairs,
}
