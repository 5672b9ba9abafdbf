"""Rewards of a trained model for every response of a benchmark, and the report they give."""

import json
from collections.abc import Callable, Mapping
from inspect import signature
from pathlib import Path
from typing import Any, Literal, NamedTuple

import polars as pl
import torch
from jaxtyping import Float
from torch import Tensor, nn

from ..datasets.rewards_batches import Encoded, encode_texts
from ..datasets.rewards_tokens import make_tokenizer
from ..errors import UserError
from .rewards_benchmarks import BenchmarkScores, score_benchmark
from .rewards_metrics import RouterReport, router_report

Route = Literal["predicted", "oracle"]


class Scored(NamedTuple):
    """Rewards in the order of the table's rows, and the router's logits (no columns for models without one)."""

    reward: Float[Tensor, " rows"]
    logits: Float[Tensor, "rows tasks"]


class Report(NamedTuple):
    """A model's scores, those of the rule that the longer response is better, and its routing where tasks are known."""

    scores: BenchmarkScores
    length_rule: BenchmarkScores
    router: RouterReport | None

    def to_dict(self) -> dict[str, Any]:
        """JSON-able."""
        router = None if self.router is None else self.router._asdict()
        if router is not None:
            router["confusion"] = router["confusion"].tolist()
        return {"scores": self.scores.to_dict(), "length_rule": self.length_rule.to_dict(), "router": router}


def model_schema(model: nn.Module, name: str) -> dict[str, Any]:
    """The schema a zoo model was built with.

    Raises:
        UserError: it is not a reward model.
    """
    schema = getattr(model, "init_args", {}).get("schema")
    if not isinstance(schema, Mapping) or not {"tokenizer", "vocab_size", "max_length", "tasks"} <= set(schema):
        raise UserError(f"--weights {name}: {type(model).__name__} is no reward model; see `moezoo list 'rewards/*'`")
    return dict(schema)


def score_responses(
    model: nn.Module,
    schema: Mapping[str, Any],
    table: pl.DataFrame,
    route: Route = "predicted",
    batch_size: int = 32,
    progress: Callable[[int, int], None] | None = None,
) -> Scored:
    """The model's reward for each row's prompt and response.

    Responses of an item are scored two by two, pairs of like length together; a reward does not depend on it.

    Args:
        model: takes fields of a `PreferenceBatch` by name, flattened as in `RewardsTask`; its device is used.
        schema: what it was trained with: tokenizer, vocab_size, max_length, prompt_length, padding, tasks.
        table: columns item, prompt, response, and `task` for the oracle's route.
        route: `predicted` leaves the choice of the task to the model, `oracle` takes the table's.
        batch_size: pairs at a time.

    Raises:
        UserError: `oracle`, and a row's task is not one of the model's.
    """
    left, right = _pairs(table)
    prompts, texts = table["prompt"].to_list(), table["response"].to_list()
    size = [len(texts[i]) + len(texts[j]) + 2 * len(prompts[i]) for i, j in zip(left, right, strict=True)]
    order = sorted(range(len(left)), key=size.__getitem__)
    left, right = [left[i] for i in order], [right[i] for i in order]
    store, pad = _encode(schema, table, left, right, route)
    device = next((tensor.device for tensor in [*model.parameters(), *model.buffers()]), torch.device("cpu"))
    inputs, forced = set(signature(model.forward).parameters), route == "oracle"
    rewards, logits = torch.zeros(len(texts)), torch.zeros(len(texts), 0)
    for start in range(0, len(left), batch_size):
        rows = torch.arange(start, min(start + batch_size, len(left)))
        batch = store.batch(rows, pad, schema.get("padding") == "left")
        given = batch._asdict() | {name: getattr(batch, name).flatten(0, 1) for name in ("tokens", "mask", "length")}
        given = {name: value.to(device) for name, value in given.items()} | ({"route": route} if forced else {})
        given = {name: value for name, value in given.items() if name in inputs}
        with torch.inference_mode():
            output = model(**given)
        at = torch.tensor([left[start : start + len(rows)], right[start : start + len(rows)]]).T.flatten()
        rewards[at] = output.reward.float().cpu()
        routed = output.task_logits.float().cpu()
        if routed.shape[1] and not logits.shape[1]:
            logits = torch.zeros(len(texts), routed.shape[1])
        logits[at] = routed.repeat_interleave(len(at) // len(routed), 0)
        if progress is not None:
            progress(start + len(rows), len(left))
    return Scored(rewards, logits)


def report(kind: str, table: pl.DataFrame, scored: Scored, schema: Mapping[str, Any] | None = None) -> Report:
    """Scores of a benchmark beside those of the length rule, and router metrics where the table names known tasks."""
    rewards = table.with_columns(reward=pl.Series(scored.reward.numpy()))
    lengths = table.with_columns(reward=pl.col("response").str.len_chars().cast(pl.Float64))
    router = None
    if schema is not None and scored.logits.shape[1]:
        task = _tasks(schema, table)
        first = torch.tensor(table.with_row_index().group_by("item").agg(pl.col("index").first())["index"].to_list())
        if bool((task[first] >= 0).any()):
            router = router_report(scored.logits[first], task[first])
    return Report(score_benchmark(kind, rewards), score_benchmark(kind, lengths), router)


def read_scored(file: Path, table: pl.DataFrame) -> Scored:
    """Rewards of any model from a table with `reward` and, row by row, the benchmark's responses.

    Rows are compared by item, place and label, and by id and response where the table has them.

    Raises:
        UserError: rows do not match the benchmark's.
    """
    if file.suffix not in (".parquet", ".csv") or not file.is_file():
        raise UserError(f"--scored {file}: expected an existing .parquet or .csv file, as --scores writes")
    texts = {"id": pl.String, "response": pl.String}
    found = pl.read_parquet(file) if file.suffix == ".parquet" else pl.read_csv(file, schema_overrides=texts)
    for column in ("item", "place", "good", "reward"):
        if column not in found.columns:
            raise UserError(f"--scored {file}: column '{column}' is missing; it has {', '.join(found.columns)}")
    same = len(found) == len(table) and all(
        found[column].cast(pl.Int64).equals(table[column].cast(pl.Int64), check_names=False)
        for column in ("item", "place", "good")
    )
    if not same:
        raise UserError(
            f"--scored {file}: its {len(found):,} rows are not those of the benchmark ({len(table):,} rows)"
        )
    for column in [column for column in texts if column in found.columns]:
        theirs, ours = (frame[column].cast(pl.String).fill_null("") for frame in (found, table))
        if (other := (theirs != ours).arg_max()) is not None and theirs[other] != ours[other]:
            raise UserError(
                f"--scored {file}: row {other + 1} has {column} {theirs[other][:40]!r}, the benchmark "
                f"{ours[other][:40]!r}"
            )
    return Scored(found["reward"].cast(pl.Float32).to_torch(), torch.zeros(len(found), 0))


def write_json(file: Path, content: Mapping[str, Any]) -> None:
    """The file appears whole or not at all; NaN becomes null."""
    file.parent.mkdir(parents=True, exist_ok=True)
    partial = file.with_name(f".{file.name}.partial")
    partial.write_text(json.dumps(_plain(content), indent=2, ensure_ascii=False, allow_nan=False) + "\n", "utf-8")
    partial.replace(file)


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _plain(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(part) for part in value]
    return None if isinstance(value, float) and value != value else value


def _pairs(table: pl.DataFrame) -> tuple[list[int], list[int]]:
    """Row numbers of each item's responses two by two; an odd one stands beside itself."""
    left, right = [], []
    for rows in table.with_row_index().group_by("item", "prompt", maintain_order=True).agg("index")["index"]:
        places = rows.to_list()
        places += places[-1:] if len(places) % 2 else []
        left += places[::2]
        right += places[1::2]
    return left, right


def _tasks(schema: Mapping[str, Any], table: pl.DataFrame) -> Tensor:
    place = {task["name"]: t for t, task in enumerate(schema["tasks"])}
    return torch.tensor([place.get(name, -1) for name in table["task"]], dtype=torch.long)


def _encode(
    schema: Mapping[str, Any], table: pl.DataFrame, left: list[int], right: list[int], route: Route
) -> tuple[Encoded, int]:
    task = _tasks(schema, table)
    if route == "oracle" and bool((task < 0).any()):
        name = table["task"][int((task < 0).int().argmax())]
        raise UserError(
            f"--route oracle: task '{name}' in the files is none of the model's "
            f"({', '.join(known['name'] for known in schema['tasks'])}); use --route predicted"
        )
    tokenizer = make_tokenizer(str(schema["tokenizer"]), int(schema["vocab_size"]))
    prompts, texts = table["prompt"].to_list(), table["response"].to_list()
    longest = int(schema["max_length"])
    encoded = encode_texts(
        tokenizer,
        [prompts[i] for i in left],
        [(texts[i], texts[j]) for i, j in zip(left, right, strict=True)],
        longest,
        int(schema.get("prompt_length") or longest),
    )
    unknown = torch.full((len(left),), -1)
    store = Encoded(
        *encoded,
        task=task[torch.tensor(left)] if route == "oracle" else unknown,
        capability=unknown,
        margin=torch.zeros(len(left)),
        length=torch.tensor([[len(texts[i]), len(texts[j])] for i, j in zip(left, right, strict=True)]),
        gold=torch.full((len(left), 2), torch.nan),
        pool=unknown,
    )
    return store, tokenizer.pad
