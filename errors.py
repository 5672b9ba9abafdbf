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
    values = re.findall(r"(?:Got|Given) value: ([^\n]*)", message)
    union = re.search(r"Subtypes: \[(.*)\]", message)
    if union:
        types = re.split(r", (?![^\[]*\])", union[1])
    else:
        types = re.findall(r"Expected an? (<class '[\w.]+'>|typing\.Literal\[.+?\]|tuple with \d+ elements?)", message)
    if not (key and values and types):
        return " ".join(line.strip(" -") for line in message.splitlines() if line.strip(" -"))
    expected = " or ".join(dict.fromkeys(_type_name(one) for one in types))
    return f"{key[1]}: expected {expected}, got {values[-1].strip()}"


def _type_name(one: str) -> str:
    names = {"NoneType": "null", "Sequence": "list", "Mapping": "dict"}
    if one.startswith("typing.Literal["):
        return f"one of {one[15:-1]}"
    found = re.fullmatch(r"<class '(?:\w+\.)*(\w+)'>", one)
    return names.get(found[1], found[1]) if found else one.replace("collections.abc.", "").replace("typing.", "")
