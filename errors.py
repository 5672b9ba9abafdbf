"""Mistakes of the user. The command line prints them as one line and exits with code 2."""

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
