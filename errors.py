"""Mistakes of the user. The command line prints them as one line and exits with code 2."""

import re
from importlib.util import find_spec


class UserError(ValueError):
    """Something the user gave is wrong; the message says what, where, what was expected and how to fix it."""


def require(what: str, *packages: str) -> None:
    """Checks that packages, which are named on PyPI as they are imported, can be found.

    Raises:
        UserError: names what needs them, all that are missing, and the line that installs them.
    """
    missing = [package for package in packages if find_spec(package) is None]
    if missing:
        raise UserError(f"{what} needs {' and '.join(missing)}: pip install {' '.join(missing)}")


def plain_type_error(message: str) -> str:
    """A message of jsonargparse's on a value of a wrong type as `KEY: expected TYPES, got VALUE`; others unchanged,
    but in one line."""
    key = re.search(r'Parser key "(.+?)":', message)
    value = re.search(r"(?:Got|Given) value: (.*)\Z", message, re.DOTALL)
    types = re.findall(r"Expected an? (?:<class '(?:\w+\.)*(\w+)'>|typing\.Literal\[(.+?)\])", message)
    if not (key and value and types):
        return " ".join(line.strip(" -") for line in message.splitlines() if line.strip(" -"))
    names = {"NoneType": "null", "Sequence": "list", "Mapping": "dict"}
    expected = [f"one of {choices}" if choices else names.get(name, name) for name, choices in types]
    return f"{key[1]}: expected {' or '.join(dict.fromkeys(expected))}, got {' '.join(value[1].split())}"
