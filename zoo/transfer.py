"""Files to and from a remote store: fsspec underneath; checked, resumed and retried here."""

import errno
import hashlib
import json
import re
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from fsspec import AbstractFileSystem
from fsspec.core import url_to_fs

from ..errors import UserError

_CHUNK = 1 << 20  # bytes read at once
_SMALL = 1 << 20  # bytes; a manifest is about 600
_ATTEMPTS = 4  # in a row without a byte gained
_LOCAL_TROUBLE = {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM}


class Remote:
    """A folder at an fsspec URL (https, s3, gs, hf, file, ...); paths are relative to it, with slashes.

    `UserError` when the URL's protocol is unknown or its library is not installed. `pause` is the wait before
    the first retry, in seconds; it doubles each time.
    """

    def __init__(self, url: str, pause: float = 0.5) -> None:
        self.pause = pause
        self._url = url.rstrip("/")
        try:
            filesystem, root = url_to_fs(self._url)
        except (ImportError, ValueError) as error:
            raise UserError(f"{self.shown()}: {error}; expected a URL such as https://, s3://, file://") from error
        self._fs: AbstractFileSystem = filesystem
        self._root = str(root).rstrip("/")
        self._http = "http" in filesystem.protocol

    def shown(self, path: str = "") -> str:
        """The URL for messages, without a password it may hold."""
        url = f"{self._url}/{path}" if path else self._url
        return re.sub(r"//[^/@]*@", "//***@", url)

    def read_json(self, path: str) -> dict[str, Any] | None:
        """A small JSON object, None when there is no such file; `UserError` when it cannot be had."""
        failures = 0
        while True:
            try:
                text = self._read(path)
                break
            except FileNotFoundError:
                return None
            except Exception as error:
                failures = self._wait_or_give_up(failures, error, self.shown(path))
        try:
            value = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise UserError(f"{self.shown(path)}: not readable as JSON ({error})") from error
        if not isinstance(value, dict):
            raise UserError(f"{self.shown(path)}: expected a JSON object, got {type(value).__name__}")
        return value

    def fetch(self, path: str, target: Path, *, size: int, sha256: str) -> None:
        """Bring a file of `size` bytes to `target`, which appears only when size and sha256 are right.

        What a broken download has brought stays in `<target>.part`; the next one asks for the rest only.
        `UserError` when the file is missing, has another size or sum, or the connection keeps breaking.
        """
        part = target.with_name(target.name + ".part")
        if part.exists() and part.stat().st_size > size:
            part.unlink()
        resumed = part.exists() and part.stat().st_size > 0
        _check_space(target.parent, size)
        self._fill(path, part, size)
        got = sha256_of(part)
        if got == sha256:
            part.replace(target)
            return
        part.unlink()
        if resumed:  # its first bytes may have been of another edition
            self.fetch(path, target, size=size, sha256=sha256)
            return
        raise UserError(f"{self.shown(path)}: sha256 is {got}, expected {sha256}; the file was removed, try again")

    def check_writable(self) -> None:
        """`UserError` for http and https, which can only be read."""
        if self._http:
            raise UserError(f"{self.shown()}: http cannot be written to; publish to s3://, gs://, hf:// or file://")

    def upload(self, files: dict[str, Path], texts: dict[str, str]) -> None:
        """Copy local files, then write small texts, in order; keys are remote paths."""
        for path in [*files, *texts]:
            full = f"{self._root}/{path}"
            try:
                self._fs.makedirs(full.rpartition("/")[0], exist_ok=True)
                if path in files:
                    self._fs.put_file(str(files[path]), full)
                else:
                    self._fs.pipe_file(full, texts[path].encode())
            except Exception as error:  # every filesystem has its own errors
                raise UserError(f"{self.shown(path)}: not written ({_line(error)})") from error

    def _fill(self, path: str, part: Path, size: int) -> None:
        failures = 0
        with byte_bar(path, size) as show:
            while (have := part.stat().st_size if part.exists() else 0) < size or not part.exists():
                show(have)
                try:
                    self._append(path, part, size, show)
                except FileNotFoundError:
                    raise UserError(f"{self.shown(path)}: no such file") from None
                except UserError:
                    raise
                except Exception as error:  # every filesystem has its own errors for a broken connection
                    gained = part.exists() and part.stat().st_size > have
                    what = f"{self.shown(path)}: broke off after {have} of {size} bytes, run again to go on"
                    failures = self._wait_or_give_up(0 if gained else failures, error, what)

    def _append(self, path: str, part: Path, size: int, show: Callable[[int], None]) -> None:
        with part.open("ab") as local:
            remote, start = self._open(path, local.tell(), size)
            with remote:
                local.truncate(start)
                have = start
                while chunk := remote.read(_CHUNK):
                    local.write(chunk)
                    local.flush()  # a killed process keeps what it has
                    have += len(chunk)
                    show(have)
                    if have > size:
                        break
        if have != size:
            part.unlink()
            more = "more than that" if have > size else f"{have}"
            raise UserError(f"{self.shown(path)}: expected {size} bytes, got {more}; the file was removed")

    def _open(self, path: str, start: int, size: int) -> tuple[Any, int]:
        """The remote file and the position it stands at: `start`, or 0 where the server knows no ranges."""
        if not self._http:
            remote = self._fs.open(f"{self._root}/{path}", "rb")
            remote.seek(start)
            return remote, start
        from aiohttp import ClientTimeout

        # One streamed request: fsspec's own seek sends one per block and fails where ranges are unknown.
        headers = {"Accept-Encoding": "identity"} | ({"Range": f"bytes={start}-"} if start else {})
        remote = self._fs.open(
            f"{self._root}/{path}",
            "rb",
            block_size=0,
            size=size,
            headers=headers,
            timeout=ClientTimeout(total=None, sock_connect=30, sock_read=60),
        )
        return remote, start if remote.r.status == 206 else 0

    def _read(self, path: str) -> bytes:
        remote, _ = self._open(path, 0, _SMALL)
        with remote:
            text = b""
            while chunk := remote.read(_CHUNK):
                text += chunk
                if len(text) > _SMALL:
                    raise UserError(f"{self.shown(path)}: expected less than {_SMALL} bytes")
        return text

    def _wait_or_give_up(self, failures: int, error: Exception, what: str) -> int:
        if isinstance(error, UserError):
            raise error
        local = isinstance(error, OSError) and error.errno in _LOCAL_TROUBLE
        if local or failures + 1 >= _ATTEMPTS:
            raise UserError(f"{what} ({_line(error)})") from error
        time.sleep(self.pause * 2**failures)
        return failures + 1


def sha256_of(path: Path) -> str:
    """Hexadecimal SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _check_space(folder: Path, size: int) -> None:
    free = shutil.disk_usage(folder).free
    if free < size:
        raise UserError(f"{folder}: {free} bytes free, {size} needed; set MOEZOO_CACHE to a larger disk")


def _line(error: Exception) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())


@contextmanager
def byte_bar(label: str, size: int) -> Iterator[Callable[[int], None]]:
    """A bar on stderr when it is a terminal; yields a function that takes the number of bytes present."""
    if not sys.stderr.isatty():
        yield lambda _: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn

    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    with Progress(*columns, console=Console(stderr=True)) as bar:
        task = bar.add_task(label, total=size)
        yield lambda have: bar.update(task, completed=have)
