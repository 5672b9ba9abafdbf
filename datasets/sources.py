"""What the user gave for a data source, checked against the function that reads it."""

from collections.abc import Callable, Collection, Mapping, Sequence
from copy import deepcopy
from inspect import signature
from pathlib import Path
from typing import Any

from ..errors import UserError, plain_type_error


def check_arguments(
    source: str,
    readers: Mapping[str, Callable[..., Any]],
    files: Mapping[str, Any],
    hidden: Collection[str] = (),
    none: str = "none",
) -> dict[str, Any]:
    """Check `data.files` against the names and types that a source's reader declares.

    On the way `null` of the command line, which arrives as a text, becomes None, a path a text, and a number that
    stands for a text (a name such as 2021) that text.

    Args:
        source: its name.
        readers: every source's function (or the class of its options) that takes them.
        files: the arguments given.
        hidden: arguments of a reader that are not the user's.
        none: said of a reader without arguments.

    Returns:
        The arguments for the reader.

    Raises:
        UserError: an argument that the reader does not take, one that is missing, or a value of another type.
    """
    reader = readers[source]
    arguments = {name: p for name, p in signature(reader).parameters.items() if name not in hidden}
    for key in files:
        if key not in arguments:
            takes = ", ".join(arguments) or none
            elsewhere = [name for name, other in readers.items() if key in signature(other).parameters]
            hint = f"; it goes with --data.source {_listed(elsewhere)}" if elsewhere and key not in hidden else ""
            raise UserError(f"data.files.{key}: source '{source}' has no such argument; it takes {takes}{hint}")
    for name, parameter in arguments.items():
        if parameter.default is parameter.empty and name not in files:
            value = "NUMBER" if parameter.annotation in (int, float) else "NAME" if name == "name" else "PATH"
            raise UserError(f"data.files.{name}: source '{source}' needs it, e.g. --data.files.{name} {value}")

    given = {}
    for name, value in files.items():
        others = set(arguments) - {name} | set(hidden)
        errors = []
        for meant in _readings(value):
            error = _type_error(reader, {name: meant}, others)
            if error is None:
                given[name] = meant
                break
            errors.append(error)
        else:
            raise UserError(f"data.files.{plain_type_error(errors[0])}")
    return given


def _listed(names: Sequence[str]) -> str:
    return " or ".join([", ".join(names[:-1]), names[-1]] if names[1:] else names)


def _readings(value: Any) -> list[Any]:
    """What a value may stand for, the likeliest first."""
    if isinstance(value, Path):
        return [str(value)]
    if value in ("None", "null"):
        return [None, value]
    if isinstance(value, int | float) and not isinstance(value, bool):
        return [value, str(value)]
    return [value]


def _type_error(reader: Callable[..., Any], files: Mapping[str, Any], hidden: set[str]) -> str | None:
    """What jsonargparse says of the values; nothing of those that are hidden."""
    from jsonargparse import ArgumentError, ArgumentParser

    parser = ArgumentParser(exit_on_error=False)
    add = parser.add_class_arguments if isinstance(reader, type) else parser.add_function_arguments
    add(reader, skip=set(hidden), fail_untyped=False)
    try:
        parser.parse_object(deepcopy(dict(files)))
    except ArgumentError as error:
        return str(error)
    return None
