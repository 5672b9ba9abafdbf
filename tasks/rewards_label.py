"""Labels from a judge model: which of two replies is better in one capability, asked in both orders.

Only verdicts that name the same reply in both orders are kept (Quan 2024, DMoERM, section 3.3). Every answer goes into
a JSON Lines cache as it comes, so that a broken run resumes and nothing is asked twice.
"""

import hashlib
import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import polars as pl
import torch

from ..datasets.rewards_table import conversation
from ..errors import UserError
from .rewards_metrics import judge_report

Judge = Callable[[str], str]

# Task -> its capability points, as in DMoERM's released configuration.
CAPABILITIES: Mapping[str, Sequence[str]] = {
    "roleplay": (
        "character setting and emotional investment", "conversational sense", "empathy",
        "manifestation of relationship traits", "personalised characteristic expression", "content richness",
    ),
    "chat": ("conversational sense", "proactivity", "emotion expression", "empathy", "content richness"),
    "subj_qa": ("convincing ability", "logic", "viewpoint richness", "breadth of knowledge", "question-specific"),
    "obj_qa": (
        "correctness", "objectiveness", "reasoning ability", "logic", "depth of knowledge", "question-specific",
    ),
    "text": ("intent conformity", "expressiveness", "readability", "content richness", "logic"),
}  # fmt: skip
TEMPLATE = """Two assistants replied to the same request. Compare their replies in one respect only: {capability}. \
Leave all other qualities aside, and do not let the order or the length of the replies sway you.

[Request]
{prompt}

[Reply 1]
{first}

[Reply 2]
{second}

Which reply is better in respect of "{capability}"? Answer with 1 or 2 and nothing else."""
_FIELDS = ("capability", "prompt", "first", "second")
_VERDICT = re.compile(r"(?<!\d)[12](?!\d)")


class Question(NamedTuple):
    """One text for the judge. `swapped`: the second response of `pair` stands first."""

    pair: int
    capability: str
    swapped: bool
    text: str
    key: str


@dataclass(frozen=True)
class LabelReport:
    """How a judge did. Shares are of pairs (times capabilities); NaN where there were none.

    Attributes:
        pairs: questions about a pair and a capability, each asked in both orders.
        asked, cached: answers that were asked for now, and that the cache had.
        kept: verdicts that name the same reply in both orders; they become pairs.
        inconsistent: verdicts that change with the order.
        unparsed: pairs with an answer that names neither reply.
        kept_share: kept / pairs.
        first_place: share of readable answers that name the reply that stands first; 0.5 without a lean.
        agreement: share of all pairs whose kept verdict is the better reply by the file; NaN where it tells none.
        by_capability: kept share of each capability.
    """

    pairs: int
    asked: int
    cached: int
    kept: int
    inconsistent: int
    unparsed: int
    kept_share: float
    first_place: float
    agreement: float
    by_capability: dict[str, float]

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def questions(
    pairs: pl.DataFrame, capabilities: Mapping[str, Sequence[str]], judge_name: str, template: str = TEMPLATE
) -> list[Question]:
    """Both orders of every pair and every capability of its task.

    Args:
        pairs: columns task, prompt, one, two.
        capabilities: of each task; those of the task "*" are asked of tasks that are not listed.
        judge_name: part of the cache's key, as other judges answer otherwise.

    Raises:
        UserError: a task without capabilities, or a template without one of its fields.
    """
    for field in _FIELDS:
        if f"{{{field}}}" not in template:
            raise UserError(
                f"--template: no {{{field}}} in it; expected {', '.join(f'{{{name}}}' for name in _FIELDS)}"
            )
    found = []
    for i, row in enumerate(pairs.iter_rows(named=True)):
        names = capabilities.get(row["task"], capabilities.get("*"))
        if not names:
            raise UserError(
                f"row {i + 1}: task '{row['task']}' has no capabilities to ask about; there are those of "
                f"{', '.join(capabilities)}; give yours with --capabilities"
            )
        messages = conversation(row["prompt"])
        asked = messages[0]["content"] if len(messages) == 1 else row["prompt"].strip()
        for name in names:
            for swapped in (False, True):
                first, second = (row["two"], row["one"]) if swapped else (row["one"], row["two"])
                given = {"capability": name, "prompt": asked, "first": first, "second": second}
                text = _filled(template, given)
                key = hashlib.sha256(f"{judge_name}\n{text}".encode()).hexdigest()[:32]
                found.append(Question(i, name, swapped, text, key))
    return found


def _filled(template: str, given: Mapping[str, str]) -> str:
    """The template with its fields filled in one go: braces in the texts stay what they are."""
    return re.sub(r"\{(\w+)\}", lambda match: given.get(match[1], match[0]), template)


def verdict(answer: str) -> int:
    """0 or 1 for the first or second reply, by which of the digits 1 and 2 comes first; -1 where neither does."""
    match = _VERDICT.search(answer)
    return int(match[0]) - 1 if match else -1


def read_cache(cache: Path) -> dict[str, str]:
    """Answers by key. A last line that was cut off is dropped from the file.

    Raises:
        UserError: another line is broken.
    """
    if not cache.exists():
        return {}
    answers: dict[str, str] = {}
    lines = cache.read_bytes().split(b"\n")
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            answers[row["key"]] = row["answer"]
        except (ValueError, KeyError, TypeError) as error:
            if number == len(lines):  # the run was killed while it wrote
                cache.write_bytes(b"\n".join(lines[:-1]) + b"\n" if len(lines) > 1 else b"")
                break
            raise UserError(f"{cache}, line {number}: not an answer of a judge; mend the line or remove it") from error
    return answers


def ask(
    asked: Sequence[Question], judge: Judge, cache: Path, jobs: int = 1, answers: Mapping[str, str] | None = None
) -> Iterator[tuple[Question, str]]:
    """Answers to all questions, as they come; what the cache holds is not asked again.

    Args:
        asked: several questions with the same text are asked once.
        judge: any callable, text -> answer; called from `jobs` threads.
        cache: JSON Lines of key, capability, swapped, answer; grown line by line.
        answers: the cache's content, where it has been read.

    Raises:
        Exception: whatever the judge raises; every answer that came, or was under way, is in the cache.
    """
    known = dict(read_cache(cache) if answers is None else answers)
    waiting: dict[str, list[Question]] = {}
    for question in asked:
        if question.key in known:
            yield question, known[question.key]
        else:
            waiting.setdefault(question.key, []).append(question)
    if not waiting:
        return
    cache.parent.mkdir(parents=True, exist_ok=True)
    if cache.exists() and (content := cache.read_bytes()) and not content.endswith(b"\n"):
        cache.write_bytes(content + b"\n")  # the run was killed between a line and its end
    with cache.open("a", encoding="utf-8") as stream, ThreadPoolExecutor(jobs) as pool:
        running: dict[Future[str], str] = {}

        def keep(future: Future[str]) -> tuple[list[Question], str]:
            key = running.pop(future)
            first, answer = waiting[key][0], future.result()
            row = {"key": key, "capability": first.capability, "swapped": first.swapped, "answer": answer}
            stream.write(json.dumps(row, ensure_ascii=False) + "\n")
            stream.flush()
            return waiting[key], answer

        queue = iter(waiting)
        try:
            while True:
                while len(running) < 2 * jobs and (key := next(queue, None)) is not None:
                    running[pool.submit(judge, waiting[key][0].text)] = key
                if not running:
                    return
                for future in wait(running, return_when=FIRST_COMPLETED).done:
                    questions_of, answer = keep(future)
                    for question in questions_of:
                        yield question, answer
        finally:
            # After a failure or Ctrl-C: what is under way is paid for, so it is kept; what is not begun is dropped.
            for future in [future for future in running if not future.cancel()]:
                if future.exception() is None:
                    keep(future)


def label(
    pairs: pl.DataFrame,
    capabilities: Mapping[str, Sequence[str]],
    judge: Judge,
    cache: Path,
    judge_name: str = "judge",
    jobs: int = 1,
    template: str = TEMPLATE,
    progress: Callable[[int, int], None] | None = None,
) -> tuple[pl.DataFrame, LabelReport]:
    """Asks the judge about every pair and capability, and keeps the verdicts that do not depend on the order.

    Args:
        pairs: columns id, source, task, group_id, split, prompt, one, two, and `better` (0, 1, or null where unknown).
        progress: called with answers so far and all.

    Returns:
        The kept pairs (id, source, task, group_id, split, prompt, chosen, rejected, capability), and the report.
    """
    asked = questions(pairs, capabilities, judge_name, template)
    answers = read_cache(cache)
    cached = sum(question.key in answers for question in asked)
    cells: dict[tuple[int, str], list[int]] = {}
    first, readable = 0, 0
    for count, (question, answer) in enumerate(ask(asked, judge, cache, jobs, answers), 1):
        place = verdict(answer)
        first, readable = first + (place == 0), readable + (place >= 0)
        named = -1 if place < 0 else place ^ question.swapped
        cells.setdefault((question.pair, question.capability), [-1, -1])[question.swapped] = named
        if progress is not None:
            progress(count, len(asked))
    table, verdicts = _kept(pairs, cells)
    return table, _report(pairs, cells, verdicts, len(asked) - cached, cached, first / readable if readable else None)


def _kept(
    pairs: pl.DataFrame, cells: Mapping[tuple[int, str], Sequence[int]]
) -> tuple[pl.DataFrame, dict[tuple[int, str], int]]:
    verdicts = {cell: both[0] for cell, both in sorted(cells.items()) if both[0] == both[1] and both[0] >= 0}
    rows = pairs.to_dicts()
    found = []
    for (i, name), better in verdicts.items():
        row, sides = rows[i], ("one", "two")
        kept = {key: row[key] for key in ("source", "task", "group_id", "split", "prompt")}
        chosen, rejected = row[sides[better]], row[sides[1 - better]]
        found.append({"id": f"{row['id']}:{name}", **kept, "chosen": chosen, "rejected": rejected, "capability": name})
    names = ("id", "source", "task", "group_id", "split", "prompt", "chosen", "rejected", "capability")
    return pl.DataFrame(found, schema=dict.fromkeys(names, pl.String)), verdicts


def _report(
    pairs: pl.DataFrame,
    cells: Mapping[tuple[int, str], Sequence[int]],
    verdicts: Mapping[tuple[int, str], int],
    asked: int,
    cached: int,
    first_place: float | None,
) -> LabelReport:
    unparsed = sum(min(both) < 0 for both in cells.values())
    names = list(dict.fromkeys(name for _, name in cells))
    total = {name: sum(n == name for _, n in cells) for name in names}
    kept = {name: sum(n == name for _, n in verdicts) for name in names}
    better = pairs["better"].fill_null(-2).to_list()
    labelled = [(both, better[i]) for (i, _), both in cells.items() if better[i] >= 0]
    columns = torch.tensor([[*both, truth] for both, truth in labelled], dtype=torch.long).view(-1, 3)
    return LabelReport(
        pairs=len(cells),
        asked=asked,
        cached=cached,
        kept=len(verdicts),
        inconsistent=len(cells) - len(verdicts) - unparsed,
        unparsed=unparsed,
        kept_share=len(verdicts) / len(cells) if cells else float("nan"),
        first_place=float("nan") if first_place is None else first_place,
        agreement=judge_report(*columns.unbind(1)).agreement,
        by_capability={name: kept[name] / total[name] for name in names},
    )
