"""Token ids of a split's pairs in one flat store, and batches gathered from it without a loop over rows."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.utils.data import Dataset

from .rewards_tokens import Tokenizer

_STEP = 8  # widths of batches are multiples of it, so that few shapes occur


class PreferenceBatch(NamedTuple):
    """Pairs of responses. Axis 1 of `tokens`, `mask`, `length`, `gold`: the chosen, then the rejected response.

    Masks are true at tokens. `task` is -1 where it is not known. `capability` is an index into the task's
    capabilities, -1 for the overall judgement. `margin` is how much better the chosen one is (0 if not told), `length`
    counts the characters of the responses, `gold` is their true quality (NaN where unknown), `index` the row in the
    datamodule's `rows`. `pool` is -1 for a labelled pair; otherwise both sides are merely two candidates of that
    best-of-n pool and belong in no pair metric; a side with NaN gold repeats another.
    """

    tokens: Int[Tensor, "pairs 2 length"]
    mask: Bool[Tensor, "pairs 2 length"]
    prompt_tokens: Int[Tensor, "pairs prompt_length"]
    prompt_mask: Bool[Tensor, "pairs prompt_length"]
    task: Int[Tensor, " pairs"]
    capability: Int[Tensor, " pairs"]
    margin: Float[Tensor, " pairs"]
    length: Int[Tensor, "pairs 2"]
    index: Int[Tensor, " pairs"]  # type: ignore[assignment]  # hides tuple.index
    gold: Float[Tensor, "pairs 2"]
    pool: Int[Tensor, " pairs"]


class Ragged(NamedTuple):
    """Sequences of different lengths: row i is `values[start[i] : start[i] + size[i]]`."""

    values: Int[Tensor, " tokens"]
    start: Int[Tensor, " rows"]
    size: Int[Tensor, " rows"]

    @classmethod
    def of(cls, sequences: Sequence[Sequence[int]]) -> "Ragged":
        """Int32 store of lists of ids."""
        size = torch.tensor([len(sequence) for sequence in sequences], dtype=torch.long)
        total = int(size.sum())
        values = np.fromiter((i for sequence in sequences for i in sequence), np.int32, total)
        return cls(torch.from_numpy(values), size.cumsum(0) - size, size)


def padded(
    store: Ragged, rows: Int[Tensor, "*batch"], pad: int, left: bool = False
) -> tuple[Int[Tensor, "*batch length"], Bool[Tensor, "*batch length"]]:
    """Rows side by side with their mask, as wide as the longest of them, rounded up to a multiple of 8."""
    start, size = store.start[rows].unsqueeze(-1), store.size[rows].unsqueeze(-1)
    width = -(-max(int(size.max()), 1) // _STEP) * _STEP
    place = torch.arange(width, device=rows.device)
    if left:
        place = place - (width - size)
    mask = (place >= 0) & (place < size)
    at = (start + place.expand(mask.shape)).masked_fill(~mask, 0)
    return store.values[at].long().masked_fill(~mask, pad), mask


class Encoded(NamedTuple):
    """All rows of a datamodule, encoded; responses are stored as two rows each, chosen and rejected."""

    responses: Ragged
    prompts: Ragged
    prompt_row: Int[Tensor, " rows"]
    task: Int[Tensor, " rows"]
    capability: Int[Tensor, " rows"]
    margin: Float[Tensor, " rows"]
    length: Int[Tensor, "rows 2"]
    gold: Float[Tensor, "rows 2"]
    pool: Int[Tensor, " rows"]

    def batch(self, rows: Int[Tensor, " pairs"], pad: int, left: bool = False) -> PreferenceBatch:
        """The batch of some rows."""
        tokens, mask = padded(self.responses, torch.stack([2 * rows, 2 * rows + 1], 1), pad, left)
        prompt_tokens, prompt_mask = padded(self.prompts, self.prompt_row[rows], pad, left)
        return PreferenceBatch(
            tokens=tokens,
            mask=mask,
            prompt_tokens=prompt_tokens,
            prompt_mask=prompt_mask,
            task=self.task[rows],
            capability=self.capability[rows],
            margin=self.margin[rows],
            length=self.length[rows],
            index=rows,
            gold=self.gold[rows],
            pool=self.pool[rows],
        )


class Texts(NamedTuple):
    """What `encode_texts` makes: responses of each row, prompts once each, and which prompt a row has."""

    responses: Ragged
    prompts: Ragged
    prompt_row: Int[Tensor, " rows"]


def encode_texts(
    tokenizer: Tokenizer,
    prompts: Sequence[str],
    responses: Sequence[tuple[str, str]],
    max_length: int,
    prompt_length: int,
) -> Texts:
    """Ids of every pair's two sequences, and of each distinct prompt."""
    place: dict[str, int] = {}
    row = [place.setdefault(prompt, len(place)) for prompt in prompts]
    sides = [
        tokenizer.pair(prompt, side, max_length)
        for prompt, pair in zip(prompts, responses, strict=True)
        for side in pair
    ]
    asked = [tokenizer.prompt(prompt, prompt_length) for prompt in place]
    return Texts(Ragged.of(sides), Ragged.of(asked), torch.tensor(row, dtype=torch.long))


class Pairs(Dataset[PreferenceBatch]):
    """Builds whole batches from positions in a list of rows."""

    def __init__(self, store: Encoded, rows: Int[Tensor, " rows"], pad: int, left: bool = False) -> None:
        self.store, self.rows, self.pad, self.left = store, rows, pad, left

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: list[int]) -> PreferenceBatch:
        return self.store.batch(self.rows[torch.tensor(index)], self.pad, self.left)
