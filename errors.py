"""Mistakes of the user. The command line prints them as one line and exits with code 2."""


class UserError(ValueError):
    """Something the user gave is wrong; the message says what, where, what was expected and how to fix it."""
