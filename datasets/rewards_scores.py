"""Ranked lists of responses and scores per attribute: every pair within a prompt that is not tied."""

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import polars as pl

from .rewards_pairs import facts, prompt_id, prompt_text
from .rewards_rows import Rows, shown
from .rewards_table import transcript

OVERALL = ("overall", "overall_score", "quality")
_PROMPTS = ("prompt", "context", "instruction", "question", "input")
_ANSWERS = ("response", "output", "completion", "answer")
_NO_ATTRIBUTES = {
    "id", "margin", "agree", "raw", "gold", "turn", "index", "row", "rank", "length", "n_tokens", "num_tokens",
    "tokens", "year", "timestamp",
}  # and all that end in _id  # fmt: skip


class Scored(NamedTuple):
    """One score of one response. `attribute` None is the overall quality; higher is better."""

    group: str
    prompt: str
    response: str
    attribute: str | None
    score: float
    facts: Mapping[str, Any]


class Answers(NamedTuple):
    """Several responses to a prompt with their scores, higher is better; none where they are not ranked."""

    prompt: str
    responses: list[str]
    scores: list[float] | None
    facts: Mapping[str, Any]


def read_ranked(rows: Rows, task: str | None = None) -> Iterator[Scored]:
    """Ranked lists as in mtmc-rlhf: `src` (user turns), `tgt` (earlier replies), `response`, `rank` (1 the best),
    `label` (the task). Or `prompt` with `responses` and `rank`, or `scores` (higher is better).

    Raises:
        UserError: lists whose lengths do not fit, or a rank that is no number.
    """
    for i, answers in enumerate(read_lists(rows, task)):
        if answers.scores is None:
            rows.fail(i, f"'rank' is empty; expected {len(answers.responses)} numbers, one a response")
        group = answers.facts["group_id"] or f"{rows.file.stem}:{answers.facts['id']}"
        for response, score in zip(answers.responses, answers.scores, strict=True):
            yield Scored(group, answers.prompt, response, None, score, answers.facts)


def read_lists(rows: Rows, task: str | None = None) -> Iterator[Answers]:
    """The lists of `read_ranked`, whose ranks may be missing.

    Raises:
        UserError: lists whose lengths do not fit, or a rank that is no number.
    """
    for i, row in enumerate(rows.rows):
        answers = rows.texts(i, row.get("response", row.get("responses")), "response")
        if "src" in row:
            said, told = rows.texts(i, row["src"], "src"), list(row.get("tgt") or [])
            if len(told) not in (len(said) - 1, len(said)):
                rows.fail(i, f"{len(said)} turns in 'src', {len(told)} replies in 'tgt'; expected {len(said) - 1}")
            prompt = _dialogue(rows, i, said, told[: len(said) - 1])
        else:
            prompt = _prompt(rows, i, row)
        down = "rank" in row or "ranks" in row
        field = next((name for name in ("rank", "ranks", "scores", "score") if name in row), None)
        values = row[field] if field is not None else None
        scores = None
        if values is not None:
            if not isinstance(values, list) or len(values) != len(answers):
                rows.fail(i, f"'{field}' is {shown(values)}; expected {len(answers)} numbers, one a response")
            numbers = [rows.number(i, value, str(field)) for value in values]
            scores = [-number for number in numbers] if down else numbers
        yield Answers(prompt, answers, scores, facts(rows, i, row, task))


def read_scores(rows: Rows, task: str | None = None, overall: Sequence[str] = OVERALL) -> Iterator[Scored]:
    """Scores per attribute: one row a score (`dim` or `attribute`, `score`), or one row a response with a column an
    attribute (HelpSteer), or one row a prompt with `completions` and their `annotations` (UltraFeedback).

    Responses belong together by `group_id`, else by prompt.

    Raises:
        UserError: a row without prompt, response or any score.
    """
    for i, row in enumerate(rows.rows):
        known = facts(rows, i, {name: value for name, value in row.items() if name != "dim"}, task)
        prompt = _prompt(rows, i, row)
        group = known["group_id"] or prompt_id(prompt)
        for answer, attribute, score in _row_scores(rows, i, row):
            yield Scored(group, prompt, answer, None if attribute in overall else attribute, score, known)


def pairs_of(scored: Iterable[Scored], most_pairs: int) -> tuple[list[dict[str, Any]], int]:
    """Of each prompt of a group and each attribute every pair of responses with different scores, at most `most_pairs`
    by the hash of their texts; and how many pairs were tied.

    A response that was scored several times has its mean.
    """
    cells: dict[tuple[str, str, str | None], dict[str, list[float]]] = {}
    about: dict[tuple[str, str], Scored] = {}
    for one in scored:
        about.setdefault((one.group, one.prompt), one)
        cells.setdefault((one.group, one.prompt, one.attribute), {}).setdefault(one.response, []).append(one.score)
    pairs, ties = [], 0
    for (group, prompt, attribute), responses in cells.items():
        mean = {text: sum(scores) / len(scores) for text, scores in responses.items()}
        texts = sorted(mean, key=lambda text: -mean[text])
        found = [(mean[a] - mean[b], a, b) for k, a in enumerate(texts) for b in texts[k + 1 :]]
        ties += sum(gap <= 1e-9 for gap, _, _ in found)
        found = [pair for pair in found if pair[0] > 1e-9]
        if len(found) > most_pairs:
            found = sorted(found, key=lambda pair: prompt_id(pair[1] + pair[2]))[:most_pairs]
        one = about[group, prompt]
        for k, (gap, better, worse) in enumerate(found):
            pairs.append(
                {
                    **one.facts,
                    "id": f"{group}:{attribute or 'overall'}:{k}",
                    "group_id": group,
                    "capability": attribute,
                    "margin": gap,
                    "prompt": one.prompt,
                    "chosen": better,
                    "rejected": worse,
                }
            )
    return pairs, ties


def read_pools(rows: Rows, task: str | None = None) -> pl.DataFrame:
    """Candidates of best-of-n pools: prompt, response and gold (or score); a pool is a `group_id`, else a prompt.

    Raises:
        UserError: a row without one of them.
    """
    found = []
    for i, row in enumerate(rows.rows):
        known, prompt = facts(rows, i, row, task), _prompt(rows, i, row)
        gold = row.get("gold", row.get("score"))
        found.append(
            {
                "pool": known["group_id"] or prompt_id(prompt),
                "source": known["source"] or rows.file.stem,
                "task": known["task"],
                "prompt": prompt,
                "response": _answer(rows, i, row),
                "gold": rows.number(i, gold, "gold"),
            }
        )
    return pl.DataFrame(found, infer_schema_length=None)


def _row_scores(rows: Rows, i: int, row: Mapping[str, Any]) -> Iterator[tuple[str, str, float]]:
    """Response, attribute and score: all that one row tells."""
    if isinstance(row.get("completions"), list):
        for part in row["completions"]:
            yield from _completion(rows, i, part)
        return
    answer = _answer(rows, i, row)
    name = row.get("dim", row.get("attribute"))
    if name is not None:
        yield answer, rows.text(i, name, "dim"), rows.number(i, row.get("score"), "score")
        return
    untyped = rows.file.suffix in (".csv", ".tsv")  # every cell is a text
    numbers = {
        key: value
        for key, value in row.items()
        if key not in _NO_ATTRIBUTES and not key.endswith("_id") and _is_score(value, untyped)
    }
    if not numbers:
        rows.fail(
            i, f"no score; expected 'dim' and 'score', or a column of numbers an attribute (it has {', '.join(row)})"
        )
    for key, value in numbers.items():
        yield answer, key, rows.number(i, value, key)


def _is_score(value: Any, untyped: bool) -> bool:
    if untyped and isinstance(value, str):
        try:
            return math.isfinite(float(value))
        except ValueError:
            return False
    return isinstance(value, int | float) and not isinstance(value, bool)


def _completion(rows: Rows, i: int, part: Any) -> Iterator[tuple[str, str, float]]:
    if not isinstance(part, dict):
        rows.fail(i, f"'completions' holds {shown(part)}; expected objects with response and annotations")
    answer = rows.text(i, part.get("response"), "completions.response")
    for name, value in (part.get("annotations") or {}).items():
        rating = value.get("Rating") if isinstance(value, dict) else value
        if rating not in (None, "N/A"):
            yield answer, name, rows.number(i, rating, f"annotations.{name}")
    if part.get("overall_score") is not None:
        yield answer, "overall_score", rows.number(i, part["overall_score"], "overall_score")


def _prompt(rows: Rows, i: int, row: Mapping[str, Any]) -> str:
    name = next((name for name in _PROMPTS if row.get(name) is not None), None)
    if name is None:
        rows.fail(i, f"no prompt; expected one of {', '.join(_PROMPTS)} (it has {', '.join(row)})")
    return prompt_text(rows, i, row[name], name)


def _answer(rows: Rows, i: int, row: Mapping[str, Any]) -> str:
    name = next((name for name in _ANSWERS if row.get(name) is not None), None)
    if name is None:
        rows.fail(i, f"no response; expected one of {', '.join(_ANSWERS)} (it has {', '.join(row)})")
    return rows.text(i, row[name], name)


def _dialogue(rows: Rows, i: int, said: Sequence[str], told: Sequence[Any]) -> str:
    turns = []
    for k, text in enumerate(said):
        turns.append({"role": "user", "content": text})
        if k < len(told):
            turns.append({"role": "assistant", "content": rows.text(i, told[k], "tgt")})
    return transcript(turns)
