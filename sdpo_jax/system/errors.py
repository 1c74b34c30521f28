"""Errors that a person can cause, each told in one line."""

import os
import reprlib


class InputError(Exception):
    """A wrong path, file, key, shape or size.

    The message is one line: what and where (file:line or key), what was found, what was
    expected, what to do.
    """


_SHORT = reprlib.Repr()
_SHORT.maxlevel = 4
_SHORT.maxlist = _SHORT.maxtuple = _SHORT.maxdict = 20
_SHORT.maxstring = _SHORT.maxlong = _SHORT.maxother = 80


def brief(value: object) -> str:
    """A value out of a file, as messages tell it: its `repr`, cut where it is long or deep."""
    return _SHORT.repr(value)


def expand_home(name: str, path: str) -> str:
    """`path` with the home folder for "~". Raises InputError that names what holds it."""
    found = os.path.expanduser(path)
    if found.startswith("~"):
        raise InputError(
            f"{name}: found {brief(path)}, expected the home folder of a user that is here: write "
            "the path whole"
        )
    return found
