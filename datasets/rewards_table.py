"""What every source of preferences becomes: one table of pairs, one of best-of-n pools, and the tasks."""

import re
import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import polars as pl

# One row a pair that is not tied. `capability` null: the human's overall judgement. `split`: train | valid | test.
PAIRS: dict[str, Any] = {
    "id": pl.String,
    "source": pl.String,
    "task": pl.String,
    "subset": pl.String,
    "group_id": pl.String,
    "split": pl.String,
    "prompt": pl.String,
    "chosen": pl.String,
    "rejected": pl.String,
    "capability": pl.String,
    "margin": pl.Float64,
    "agree": pl.Float64,
}
# One row a candidate response to a prompt; `gold` is its true quality, on any scale.
POOLS: dict[str, Any] = {
    "pool": pl.String,
    "source": pl.String,
    "task": pl.String,
    "prompt": pl.String,
    "response": pl.String,
    "gold": pl.Float64,
}
_TURN = re.compile(r"\n\n(Human|Assistant|System):")
_ROLES = {"Human": "user", "Assistant": "assistant", "System": "system"}
_MARKS = {role: mark for mark, role in _ROLES.items()}


@dataclass(frozen=True)
class Preferences:
    """A source of preferences, read and checked.

    Attributes:
        name: of the dataset, on the leaderboard.
        tasks: name and capabilities of each task, in the order of their indices.
        pairs: columns `PAIRS`, any order of rows.
        pools: columns `POOLS`; empty where there are none.
        tokenizer: what `words` stands for: `words` hashes them, `lexicon` knows every word of the generator's.
        notes: what a reader should be told, e.g. how many rows were ties.
    """

    name: str
    tasks: Sequence[Mapping[str, Any]]
    pairs: pl.DataFrame
    pools: pl.DataFrame = field(default_factory=lambda: pl.DataFrame(schema=POOLS))
    tokenizer: str = "words"
    notes: Sequence[str] = ()


def conversation(prompt: str) -> list[dict[str, str]]:
    """A prompt as chat messages: turns `\\n\\nHuman:`, `\\n\\nAssistant:`, `\\n\\nSystem:`, or one of the user's.

    An open `\\n\\nAssistant:` at the end, where the response follows, is no message.
    """
    parts = _TURN.split(prompt)
    if len(parts) == 1:
        return [{"role": "user", "content": prompt}]
    messages = [{"role": "user", "content": parts[0].strip()}] if parts[0].strip() else []
    for mark, text in zip(parts[1::2], parts[2::2], strict=True):
        messages.append({"role": _ROLES[mark], "content": text.strip()})
    if messages[-1]["role"] == "assistant" and not messages[-1]["content"]:
        messages.pop()
    return messages


def transcript(messages: Sequence[Mapping[str, str]]) -> str:
    """Chat messages as a prompt, the inverse of `conversation`; a single user's message stays as it is."""
    if len(messages) == 1 and messages[0]["role"] == "user":
        return messages[0]["content"]
    turns = "".join(f"\n\n{_MARKS[message['role']]}: {message['content']}" for message in messages)
    return turns + "\n\nAssistant:"


def queries(prompt: str) -> list[str]:
    """What the user said, turn by turn."""
    return [message["content"] for message in conversation(prompt) if message["role"] == "user"]


def first_turn(prompt: str) -> str:
    """The user's first turn with case, white space and Unicode forms levelled: what no two splits may share.

    Prompts that are equal have equal first turns, so a split by it is one by prompt as well (fact sheet, section 7).
    """
    said = queries(prompt)
    return " ".join(unicodedata.normalize("NFKC", said[0] if said else prompt).casefold().split())
