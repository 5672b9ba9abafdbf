"""Turn parsed JSON or YAML into dataclasses, refusing whatever the dataclass does not say."""

import dataclasses
import math
import types
import typing
from typing import Any, Literal, TypeVar, Union, get_args, get_origin

from ..errors import UserError

T = TypeVar("T")


def decode(kind: type[T], value: Any, where: str = "") -> T:
    """Build a `kind` from plain data; `where` is the dotted key that a message names.

    Supports dataclasses, `str`, `bool`, `int`, finite `float`, `None`, `X | None`, `Literal`, `list[X]` and
    `dict[str, X]`. An int is accepted where a float is expected, nothing else is converted.

    Raises:
        UserError: unknown or missing key, wrong type, NaN or infinity.
    """
    return typing.cast(T, _decode(kind, value, where))


def _decode(kind: Any, value: Any, where: str) -> Any:
    if dataclasses.is_dataclass(kind):
        return _decode_dataclass(kind, value, where)
    origin, arguments = get_origin(kind), get_args(kind)
    if origin in (Union, types.UnionType):
        inner = [argument for argument in arguments if argument is not type(None)]
        return None if value is None else _decode(inner[0], value, where)
    if origin is Literal:
        if value not in arguments:
            raise _mismatch(where, " or ".join(map(repr, arguments)), value)
        return value
    if origin is list:
        if not isinstance(value, list):
            raise _mismatch(where, "a list", value)
        return [_decode(arguments[0], item, f"{where}[{i}]") for i, item in enumerate(value)]
    if origin is dict:
        _check_mapping(value, where)
        return {key: _decode(arguments[1], item, _join(where, key)) for key, item in value.items()}
    return _decode_scalar(kind, value, where)


def _decode_dataclass(kind: Any, value: Any, where: str) -> Any:
    _check_mapping(value, where)
    fields = {field.name: field for field in dataclasses.fields(kind)}
    if unknown := [key for key in value if key not in fields]:
        raise UserError(f"unknown key {_join(where, unknown[0])!r}; expected one of {', '.join(fields)}")
    hints = typing.get_type_hints(kind)
    arguments = {}
    for name, field in fields.items():
        if name in value:
            arguments[name] = _decode(hints[name], value[name], _join(where, name))
        elif field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING:
            raise UserError(f"key {_join(where, name)!r} is missing")
    return kind(**arguments)


def _decode_scalar(kind: Any, value: Any, where: str) -> Any:
    if kind is float and isinstance(value, (int, float)) and not isinstance(value, bool):
        if not math.isfinite(value):
            raise UserError(f"{where!r} is {value}; expected a finite number")
        return float(value)
    if type(value) is not kind:
        raise _mismatch(where, kind.__name__, value)
    return value


def _check_mapping(value: Any, where: str) -> None:
    if not isinstance(value, dict) or not all(isinstance(key, str) for key in value):
        raise _mismatch(where or "the document", "a mapping with string keys", value)


def _mismatch(where: str, expected: str, value: Any) -> UserError:
    return UserError(f"{where!r} is {value!r} ({type(value).__name__}); expected {expected}")


def _join(where: str, key: str) -> str:
    return f"{where}.{key}" if where else key
