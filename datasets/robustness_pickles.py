"""CIFAR's batch files are pickles. They are read by stand-ins for NumPy's classes: no code of a file ever runs.

Admitted are numbers, texts, bytes, lists, tuples, dictionaries and arrays of bytes; anything else is refused.
"""

import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from ..errors import UserError

_MOST_BYTES = 2**30  # CIFAR's largest file has 155 MB


def read_pickle(file: Path) -> dict[str, Any]:
    """The dictionary in a batch file; texts as str, arrays of uint8 as NumPy arrays.

    Raises:
        UserError: the file is missing, damaged, no dictionary, or holds what is no plain data.
    """
    try:
        if file.stat().st_size > _MOST_BYTES:
            raise UserError(f"{file}: {file.stat().st_size} bytes; expected a CIFAR batch, at most {_MOST_BYTES}")
        with file.open("rb") as stream:
            found = _plain(_PlainData(stream).load())
    except FileNotFoundError:
        raise UserError(f"{file}: no such file; extract the CIFAR archive again") from None
    except UserError:
        raise
    except _Refused as refused:
        raise UserError(f"{file}: holds {refused}; expected plain data, as in the CIFAR archive: refused") from None
    except Exception as error:  # a damaged pickle fails in every way
        raise UserError(f"{file}: not a readable CIFAR batch ({type(error).__name__}: {error})") from None
    if not isinstance(found, dict):
        raise UserError(f"{file}: holds a {type(found).__name__}; expected a dictionary, as in the CIFAR archive")
    return found


class _Refused(Exception):
    """What a pickle asked for and does not get."""


class _Array:
    """Stands in for numpy.ndarray: keeps shape, dtype, order and bytes, looks at none of them."""

    __slots__ = ("dtype", "fortran", "raw", "shape")

    def __setstate__(self, state: Any) -> None:
        _, self.shape, self.dtype, self.fortran, self.raw = state


class _DType:
    """Stands in for numpy.dtype."""

    __slots__ = ("name",)

    def __init__(self, name: Any, *_: Any) -> None:
        self.name = name

    def __setstate__(self, state: Any) -> None:
        """Byte order and fields, of which bytes have none."""


class _PlainData(pickle.Unpickler):
    """Knows the few names by which NumPy, of any version, writes an array."""

    def __init__(self, stream: BinaryIO) -> None:
        super().__init__(stream, encoding="latin1")  # Python 2 wrote CIFAR: its str are bytes
        self.known: dict[tuple[str, str], Callable[..., Any]] = {
            ("numpy", "dtype"): _DType,
            ("numpy", "ndarray"): _Array,
            ("_codecs", "encode"): lambda text, encoding: text.encode("latin1"),
        }
        for core in ("numpy.core", "numpy._core"):
            self.known[f"{core}.multiarray", "_reconstruct"] = lambda *_: _Array()
            self.known[f"{core}.numeric", "_frombuffer"] = _from_buffer

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in self.known:
            raise _Refused(f"{module}.{name}")
        return self.known[module, name]

    def persistent_load(self, pid: Any) -> Any:
        raise _Refused("a reference to something outside")


def _from_buffer(raw: Any, dtype: Any, shape: Any, order: Any) -> _Array:
    array = _Array()
    array.__setstate__((1, shape, dtype, order == "F", bytes(raw)))
    return array


def _plain(value: Any) -> Any:
    if isinstance(value, _Array):
        return _checked(value)
    if isinstance(value, dict):
        return {_text(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, bytes):
        return _text(value)
    if value is None or isinstance(value, bool | int | float | str):
        return value
    raise _Refused(f"a {type(value).__name__}")


def _checked(array: _Array) -> NDArray[np.uint8]:
    kind = getattr(array.dtype, "name", None)
    if kind not in ("u1", "uint8"):
        raise _Refused(f"an array of {kind}")
    raw = array.raw.encode("latin1") if isinstance(array.raw, str) else bytes(array.raw)
    return np.frombuffer(raw, np.uint8).reshape(array.shape, order="F" if array.fortran else "C")


def _text(value: Any) -> str:
    return value.decode("latin1") if isinstance(value, bytes) else str(value)
