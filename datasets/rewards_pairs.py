"""Rows of prompt, chosen and rejected, as texts, chat messages or whole transcripts, become pairs."""

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from .rewards_rows import Rows, shown
from .rewards_table import transcript

_ANSWER = "\n\nAssistant:"
_TASK_NAMES = ("task", "category", "domain", "label")
_ROLES = {"user", "assistant", "system"}
_OTHER_ROLES = {"human": "user", "gpt": "assistant", "bot": "assistant", "chatbot": "assistant"}


def read_pairs(rows: Rows, task: str | None = None) -> Iterator[dict[str, Any]]:
    """Pairs of rows with `chosen` and `rejected`, and `prompt` where it is not part of them.

    Each of the three is a text or a list of chat messages (`role`, `content`). Without `prompt`, texts are transcripts
    with `\\n\\nHuman:` and `\\n\\nAssistant:` that part at the last common assistant turn (HH-RLHF), and messages part
    after their common beginning. Of id, source, task (or category, domain, label), subset, group_id, split, capability
    (or dim), margin and agree what is there is taken. Pairs of two equal texts are yielded, for the caller to count.

    Raises:
        UserError: a row is none of these.
    """
    for i, row in enumerate(rows.rows):
        prompt, chosen, rejected = parts(rows, i, row)
        yield facts(rows, i, row, task) | {"prompt": prompt, "chosen": chosen, "rejected": rejected}


def parts(rows: Rows, i: int, row: Mapping[str, Any]) -> tuple[str, str, str]:
    """Prompt, chosen and rejected of one row, as texts."""
    for name in ("chosen", "rejected"):
        if row.get(name) is None:
            rows.fail(i, f"'{name}' is missing; expected a text or chat messages (it has {', '.join(row)})")
    prompt, chosen, rejected = row.get("prompt"), row["chosen"], row["rejected"]
    if isinstance(chosen, str) and isinstance(rejected, str):
        if prompt is None:
            return _parted_texts(rows, i, chosen, rejected)
        return prompt_text(rows, i, prompt), chosen, rejected
    sides = [messages(rows, i, side, name) for side, name in ((chosen, "chosen"), (rejected, "rejected"))]
    if prompt is not None and all(side[0]["role"] == "assistant" for side in sides):
        return prompt_text(rows, i, prompt), _answer(sides[0]), _answer(sides[1])
    return _parted_messages(rows, i, *sides)


def prompt_text(rows: Rows, i: int, prompt: Any, field: str = "prompt") -> str:
    """A prompt given as text or messages."""
    return transcript(messages(rows, i, prompt, field)) if isinstance(prompt, list) else rows.text(i, prompt, field)


def messages(rows: Rows, i: int, value: Any, field: str) -> list[dict[str, str]]:
    """Chat messages with the roles user, assistant and system; `from`, `value` are understood as well."""
    if not isinstance(value, list) or not value:
        rows.fail(i, f"'{field}' is {shown(value)}; expected a text, or a list of messages with role and content")
    found = []
    for part in value:
        role = part.get("role", part.get("from")) if isinstance(part, dict) else None
        role = _OTHER_ROLES.get(str(role).lower(), role)
        if role not in _ROLES:
            rows.fail(i, f"'{field}' holds {shown(part)}; expected messages with role user, assistant or system")
        content = part.get("content", part.get("value"))
        found.append({"role": str(role), "content": rows.text(i, content, f"{field}.content")})
    return found


def facts(rows: Rows, i: int, row: Mapping[str, Any], task: str | None) -> dict[str, Any]:
    """What a row says of itself besides the texts."""
    named = next((row[name] for name in _TASK_NAMES if isinstance(row.get(name), str)), None)
    if named is None and isinstance(row.get("task"), int):
        named = str(row["task"])
    capability = row.get("capability", row.get("dim"))
    optional = {name: row.get(name) for name in ("source", "subset", "group_id")}
    numbers = {name: row.get(name) for name in ("margin", "agree")}
    return {
        "id": str(i if row.get("id") is None else row["id"]),
        "task": named if task is None else task,
        "split": rows.split(i, row.get("split")),
        "capability": None if capability is None else rows.text(i, capability, "capability"),
        **{name: None if value is None else str(value) for name, value in optional.items()},
        **{name: None if value is None else rows.number(i, value, name) for name, value in numbers.items()},
    }


def prompt_id(prompt: str) -> str:
    """An id for the answers to the same prompt, where the file has none."""
    return hashlib.sha256(prompt.encode()).hexdigest()[:12]


def _parted_texts(rows: Rows, i: int, chosen: str, rejected: str) -> tuple[str, str, str]:
    """HH-RLHF: both are whole dialogues; the prompt reaches to the last assistant turn they both open."""
    same = next(
        (k for k, (a, b) in enumerate(zip(chosen, rejected, strict=False)) if a != b), min(len(chosen), len(rejected))
    )
    # The mark itself must be common; what follows it need not.
    at = chosen.rfind(_ANSWER, 0, same)
    if at < 0:
        rows.fail(
            i,
            f"'chosen' is {shown(chosen)} and there is no 'prompt'; expected a prompt, or transcripts with "
            "'\\n\\nHuman:' and '\\n\\nAssistant:' that begin alike",
        )
    end = at + len(_ANSWER)
    return chosen[:end], chosen[end:], rejected[end:]


def _parted_messages(
    rows: Rows, i: int, chosen: Sequence[dict[str, str]], rejected: Sequence[dict[str, str]]
) -> tuple[str, str, str]:
    """Messages that begin alike: what differs, or the last one of each, is the response."""
    same = 0
    while same < min(len(chosen), len(rejected)) - 1 and chosen[same] == rejected[same]:
        same += 1
    while same and chosen[same]["role"] != "assistant":
        same -= 1
    if not same or rejected[same]["role"] != "assistant":
        rows.fail(
            i, "'chosen' and 'rejected' do not part at an assistant's message; expected the same messages before it"
        )
    return transcript(chosen[:same]), _answer(chosen[same:]), _answer(rejected[same:])


def _answer(turns: Sequence[Mapping[str, str]]) -> str:
    """One message, or the rest of a dialogue as a transcript."""
    if len(turns) == 1:
        return turns[0]["content"]
    return turns[0]["content"] + transcript(turns[1:]).removesuffix(_ANSWER)
