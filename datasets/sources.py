"""What the user gave for a data source, checked against the function that reads it."""

from collections.abc import Callable, Collection, Mapping
from inspect import signature
from typing import Any

from ..errors import UserError, plain_type_error


def check_arguments(
    source: str,
    reader: Callable[..., Any],
    files: Mapping[str, Any],
    hidden: Collection[str] = (),
    none: str = "none",
    hint: str = "",
) -> None:
    """Check `data.files` against the names and types that a source's reader declares.

    Args:
        source: its name, for the message.
        reader: the function (or the class of its options) that takes them.
        files: the arguments given.
        hidden: arguments of the reader that are not the user's.
        none: said of a reader without arguments.
        hint: added where an argument is unknown.

    Raises:
        UserError: an argument that the reader does not take, one that is missing, or a value of another type.
    """
    arguments = {name: p for name, p in signature(reader).parameters.items() if name not in hidden}
    for key in files:
        if key not in arguments:
            takes = ", ".join(arguments) or none
            raise UserError(f"data.files.{key}: source '{source}' has no such argument; it takes {takes}{hint}")
    missing = [name for name, p in arguments.items() if p.default is p.empty and name not in files]
    if missing:
        raise UserError(f"data.files.{missing[0]}: source '{source}' needs it, e.g. --data.files.{missing[0]} PATH")
    _check_types(reader, files, set(hidden))


def _check_types(reader: Callable[..., Any], files: Mapping[str, Any], hidden: set[str]) -> None:
    from jsonargparse import ArgumentError, ArgumentParser

    parser = ArgumentParser(exit_on_error=False)
    add = parser.add_class_arguments if isinstance(reader, type) else parser.add_function_arguments
    add(reader, skip=set(hidden), fail_untyped=False)
    try:
        parser.parse_object(dict(files))
    except ArgumentError as error:
        raise UserError(f"data.files.{plain_type_error(str(error))}") from None
