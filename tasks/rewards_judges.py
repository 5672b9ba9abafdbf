"""Judges: an OpenAI-compatible endpoint, or any Python callable by its name."""

import http.client
import json
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from importlib import import_module
from typing import Any
from urllib.parse import urlsplit

from ..errors import UserError

_AGAIN = {408, 409, 425, 429, 500, 502, 503, 504}  # what may go away by itself
_LONGEST_WAIT = 60.0  # s


class OpenAIJudge:
    """Asks `POST <endpoint>/chat/completions`, as vLLM, llama.cpp, Ollama and most hosted models offer it.

    Args:
        endpoint: e.g. http://localhost:8000/v1.
        model: its name there.
        key: bearer token; none for local servers.
        max_tokens: of an answer.
        temperature: of sampling; 0 is greedy.
        timeout: seconds to wait for an answer.
        retries: further tries after a timeout, a broken connection, or a status that says try again (429, 5xx).
        wait: seconds before the second try; twice as long before each further one, unless the server says otherwise.
        sleep: waits; for tests.

    Raises:
        UserError: an endpoint that is not http(s); when called, an answer that never came or is not of this protocol.
    """

    def __init__(
        self,
        endpoint: str,
        model: str,
        key: str | None = None,
        max_tokens: int = 64,
        temperature: float = 0.0,
        timeout: float = 60.0,
        retries: int = 5,
        wait: float = 1.0,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        if not endpoint.startswith(("http://", "https://")):
            raise UserError(f"--endpoint {endpoint}: expected a URL such as http://localhost:8000/v1")
        try:
            _ = urlsplit(endpoint).port
        except ValueError as error:
            raise UserError(
                f"--endpoint {endpoint}: {error}; expected a URL such as http://localhost:8000/v1"
            ) from None
        base = endpoint.rstrip("/")
        self.url = base if base.endswith("/chat/completions") else f"{base}/chat/completions"
        self.model, self.key, self.timeout, self.retries, self.wait = model, key, timeout, retries, wait
        self.options = {"max_tokens": max_tokens, "temperature": temperature}
        self.sleep = sleep

    def __call__(self, text: str) -> str:
        """The answer to one question."""
        body = {"model": self.model, "messages": [{"role": "user", "content": text}], **self.options}
        headers = {"Content-Type": "application/json"}
        if self.key:
            headers["Authorization"] = f"Bearer {self.key}"
        request = urllib.request.Request(self.url, json.dumps(body).encode(), headers, method="POST")
        wait = self.wait
        for tries_left in range(self.retries, -1, -1):
            try:
                with urllib.request.urlopen(request, timeout=self.timeout) as response:
                    return self._content(response.read())
            except urllib.error.HTTPError as error:
                reason = f"status {error.code}: {_short(error.read())}"
                if error.code not in _AGAIN or not tries_left:
                    raise UserError(f"{self.url}: {reason}") from None
                wait = _seconds(error.headers.get("Retry-After"), wait)
            except (OSError, http.client.HTTPException) as error:  # URLError and timeouts are OSErrors
                if not tries_left:
                    raise UserError(
                        f"{self.url}: {getattr(error, 'reason', error)} after {self.retries + 1} tries; is the server "
                        "up? The same command goes on where this one stopped"
                    ) from None
            self.sleep(min(wait, _LONGEST_WAIT))
            wait *= 2
        raise AssertionError("unreachable")

    def _content(self, body: bytes) -> str:
        try:
            content = json.loads(body)["choices"][0]["message"]["content"]
        except (ValueError, LookupError, TypeError):
            content = None
        if not isinstance(content, str):
            raise UserError(f"{self.url}: answered {_short(body)}; expected choices[0].message.content")
        return content


def callable_judge(name: str) -> Callable[[str], str]:
    """The Python callable `module:attribute`, text -> answer.

    Raises:
        UserError: there is none of this name.
    """
    module, _, attribute = name.partition(":")
    try:
        found: Any = import_module(module)
        for part in attribute.split("."):
            found = getattr(found, part)
    except (ImportError, AttributeError, ValueError) as error:
        raise UserError(f"--judge {name}: {error}; expected module:function that can be imported") from error
    if not callable(found):
        raise UserError(f"--judge {name}: is a {type(found).__name__}; expected a callable, text -> answer")
    return lambda text: str(found(text))


def _short(body: bytes) -> str:
    text = " ".join(body.decode("utf-8", "replace").split())
    return text if len(text) <= 200 else text[:197] + "..."


def _seconds(value: str | None, default: float) -> float:
    try:
        return max(float(value), 0.0) if value is not None else default
    except ValueError:
        return default
