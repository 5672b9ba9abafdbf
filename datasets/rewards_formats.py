"""Your own files of preferences, whatever their layout, as one table of pairs."""

import logging
from collections.abc import Iterator, Mapping, Sequence
from itertools import combinations
from pathlib import Path
from typing import Any

import polars as pl

from ..errors import UserError
from .rewards_benchmarks import READERS, kind_of
from .rewards_pairs import prompt_id, read_pairs
from .rewards_rows import Rows, files_of, read_rows
from .rewards_scores import OVERALL, Answers, pairs_of, read_lists, read_pools, read_ranked, read_scores
from .rewards_table import PAIRS, POOLS, Preferences

LAYOUTS = ("auto", "pairs", "ranked", "scores", "rewardbench2", "rmbench", "llmbar", "judgebench")
ONE_TASK = "all"  # where no row names a task

_LOG = logging.getLogger(__name__)


def open_files(
    path: str | list[str],
    layout: str = "auto",
    pools: str | list[str] | None = None,
    task: str | None = None,
    tasks: dict[str, str] | None = None,
    overall: list[str] | None = None,
    most_pairs: int = 32,
    columns: dict[str, str] | None = None,
    name: str | None = None,
) -> Preferences:
    """Reads files of preferences; several may be given, each of its own layout, e.g. pairs and scores per attribute.

    Args:
        path: file, folder or a list of them: JSON Lines (also .gz), JSON, Parquet, CSV.
        layout: `pairs` (prompt, chosen, rejected as texts or chat messages; HH transcripts), `ranked` (mtmc-rlhf),
            `scores` (per attribute), a benchmark's, or found from the fields of each file.
        pools: files of best-of-n pools: prompt, response, gold.
        task: of all rows; default: each row's own.
        tasks: names in the files -> names to use.
        overall: attributes that are the overall quality, not a capability; default: overall, overall_score, quality.
        most_pairs: of one prompt and attribute.
        columns: our name -> the files', where names differ.
        name: on the leaderboard; default: the first file's.

    Raises:
        UserError: naming the file and row that is wrong, and what was expected.
    """
    if layout not in LAYOUTS:
        raise UserError(f"data.files.layout={layout}: expected {', '.join(LAYOUTS)}")
    if most_pairs < 1:
        raise UserError(f"data.files.most_pairs={most_pairs}: expected at least 1")
    found: list[dict[str, Any]] = []
    ties = 0
    files = files_of(path)
    for file in files:
        rows = read_rows(file, columns)
        which = layout_of(rows) if layout == "auto" else layout
        read, tied = _read(rows, which, task, overall or list(OVERALL), most_pairs)
        found += [{"source": None, **pair, "file": file.stem} for pair in read]
        ties += tied
    pairs = _table(found, tasks or {})
    same = pairs["chosen"] == pairs["rejected"]
    pairs, ties = pairs.filter(~same), ties + int(same.sum())
    if pairs.is_empty():
        raise UserError(f"{files[0]}: every pair is tied; expected responses of which one is better")
    notes = [f"{len(pairs):,} pairs, {ties:,} ties left out"]
    names = pairs["task"].drop_nulls().unique(maintain_order=True).to_list()
    if not names:
        pairs, names = pairs.with_columns(task=pl.lit(ONE_TASK)), [ONE_TASK]
    lost = pairs.filter(pl.col("capability").is_not_null() & pl.col("task").is_null())
    if lost.height:
        raise UserError(
            f"{files[0]}: {lost.height:,} judgements of a capability name no task, such as '{lost['capability'][0]}', "
            f"but others do ({', '.join(names[:5])}); give each a task, or data.files.task for all"
        )
    if ties:
        _LOG.warning(f"{files[0]}: {ties:,} ties left out, {len(pairs):,} pairs kept")
    return Preferences(
        name=name or files[0].name.split(".")[0],
        tasks=[{"name": task_name, "capabilities": _capabilities(pairs, task_name)} for task_name in names],
        pairs=pairs,
        pools=_pools(pools, task, tasks or {}, names, columns),
        notes=notes,
    )


def read_candidates(path: str | Sequence[str], task: str | None = None) -> pl.DataFrame:
    """Two responses a row, for a judge to compare: of lists all pairs, ranked or not; of pairs both sides.

    Returns:
        id, source, task, group_id, split, prompt, one, two, and `better`: 0 or 1 by the file, null where it tells
        neither. Which side of a pair comes first is settled by the hash of its texts.

    Raises:
        UserError: naming the file and row that is wrong.
    """
    found: list[dict[str, Any]] = []
    for file in files_of(path):
        rows = read_rows(file)
        if layout_of(rows) == "ranked":
            found += [two for answers in read_lists(rows, task) for two in _two_by_two(answers, file.stem)]
            continue
        for pair in _read(rows, layout_of(rows), task, list(OVERALL), 32)[0]:
            if pair.get("capability") is None and pair["chosen"] != pair["rejected"]:
                turned = int(prompt_id(pair["chosen"] + pair["rejected"]), 16) % 2
                sides = [pair["chosen"], pair["rejected"]]
                row = {"source": None, **pair, "one": sides[turned], "two": sides[1 - turned], "better": turned}
                found.append(row | {"source": row["source"] or file.stem})
    columns = {name: PAIRS[name] for name in ("id", "source", "task", "group_id", "split", "prompt")}
    table = pl.DataFrame(found, schema=columns | {"one": pl.String, "two": pl.String, "better": pl.Int8})
    if table.is_empty():
        raise UserError(f"{path}: no two responses to compare; expected pairs, or lists of responses to a prompt")
    return table


def _two_by_two(answers: Answers, source: str) -> Iterator[dict[str, Any]]:
    known, scores = answers.facts, answers.scores
    for (i, one), (j, two) in combinations(enumerate(answers.responses), 2):
        if one == two:
            continue
        better = None if scores is None or scores[i] == scores[j] else int(scores[j] > scores[i])
        texts = {"prompt": answers.prompt, "one": one, "two": two, "better": better}
        group = known["group_id"] or f"{source}:{known['id']}"
        yield {**known, "id": f"{known['id']}:{i}-{j}", "source": known["source"] or source, "group_id": group} | texts


def content(files: Mapping[str, Any]) -> list[Path]:
    """The files that `open_files` reads for these arguments."""
    return [file for key in ("path", "pools") if files.get(key) for file in files_of(files[key])]


def layout_of(rows: Rows) -> str:
    """The layout a file's first row speaks of.

    Raises:
        UserError: none of those known.
    """
    first = rows.rows[0]
    benchmark = kind_of(rows)
    if benchmark in ("rewardbench", "pairs") or (("rejected" in first or "chosen" in first) and benchmark is None):
        return "pairs"
    if benchmark is not None and benchmark != "pools":
        return benchmark
    if "src" in first or isinstance(first.get("responses", first.get("response")), list):
        return "ranked"
    if "completions" in first or any(name in first for name in ("response", "output", "completion", "answer")):
        return "scores"
    raise UserError(
        f"{rows.file}: fields {', '.join(first)} are of no known layout; expected prompt, chosen, rejected; or src, "
        "response, rank; or prompt, response and scores; data.files.columns renames"
    )


def _read(
    rows: Rows, layout: str, task: str | None, overall: Sequence[str], most_pairs: int
) -> tuple[list[dict[str, Any]], int]:
    """Pairs of one file and how many were ties."""
    if layout == "pairs":
        return list(read_pairs(rows, task)), 0
    if layout == "ranked":
        return pairs_of(read_ranked(rows, task), most_pairs)
    if layout == "scores":
        return pairs_of(read_scores(rows, task, overall), most_pairs)
    pairs = [
        {**item, "id": f"{item['id']}:{i}{j}", "group_id": item["id"], "task": task or item["task"],
         "chosen": good, "rejected": bad, "split": "test"}
        for item in READERS[layout](rows)
        for i, good in enumerate(item["good"])
        for j, bad in enumerate(item["bad"])
    ]  # fmt: skip
    return pairs, 0


def _table(found: Sequence[Mapping[str, Any]], tasks: Mapping[str, str]) -> pl.DataFrame:
    """Columns `PAIRS`, with the file's name where a pair has no source or subset."""
    table = pl.DataFrame(found, schema=PAIRS | {"file": pl.String})
    table = table.with_columns(
        source=pl.col("source").fill_null(pl.col("file")),
        subset=pl.coalesce("subset", "task", "file"),
        task=pl.col("task").replace(dict(tasks)),
        group_id=pl.col("group_id").fill_null(
            pl.col("prompt").map_elements(prompt_id, return_dtype=pl.String, skip_nulls=False)
        ),
    )
    return table.select(*PAIRS)


def _capabilities(pairs: pl.DataFrame, task: str) -> list[str]:
    found = pairs.filter(pl.col("task") == task)["capability"].drop_nulls()
    return sorted(set(found))


def _pools(
    path: str | list[str] | None,
    task: str | None,
    tasks: Mapping[str, str],
    names: Sequence[str],
    columns: Mapping[str, str] | None,
) -> pl.DataFrame:
    if path is None:
        return pl.DataFrame(schema=POOLS)
    tables = [read_pools(read_rows(file, columns), task) for file in files_of(path)]
    table = pl.concat(tables, how="diagonal_relaxed").cast({"task": pl.String}).select(*POOLS)
    table = table.with_columns(task=pl.col("task").replace(dict(tasks)))
    # A task no pair has cannot be told to a model: such pools are routed, as unlabelled ones are.
    return table.with_columns(task=pl.when(pl.col("task").is_in(list(names))).then("task"))
