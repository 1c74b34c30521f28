"""Errors that a person can cause, each reported in one line."""

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
    """The `repr` of a value from a file, for messages: shortened where it is long or deep."""
    return _SHORT.repr(value)


def expand_home(name: str, path: str) -> str:
    """`path` with the home folder for "~". Raises InputError that names `name`."""
    found = os.path.expanduser(path)
    if found.startswith("~"):
        raise InputError(
            f"{name}: found {brief(path)}, expected the home folder of a user of this machine: "
            "write the whole path"
        )
    return found


def first_line(error: BaseException) -> str:
    """What an error of another package says, as part of a line."""
    return (str(error).strip().splitlines() or [repr(error)])[0]
