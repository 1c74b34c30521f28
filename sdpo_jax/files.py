"""Small files that a person can break: read whole and checked, or told in one line."""

import json
import os
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from sdpo_jax.errors import InputError, shown

LEVELS = 64  # of lists and objects in each other: deeper ones would break what walks them
Kind = tuple[str, Callable[[Any], bool]]  # what is expected, and whether a value is that

TEXT: Kind = ("a text", lambda value: type(value) is str)
_HALF_PAIR = re.compile(r"[\ud800-\udfff]")  # of surrogates: it could not be written
UTF8: Kind = (
    "a text that UTF-8 can hold",
    lambda value: type(value) is str and not _HALF_PAIR.search(value),
)
COUNT: Kind = ("a whole number, 0 or more", lambda value: type(value) is int and value >= 0)
POSITIVE: Kind = ("a whole number, more than 0", lambda value: COUNT[1](value) and value > 0)
# Comparing instead of math.isfinite, which fails on integers that no float holds.
NUMBER: Kind = (
    "a finite number",
    lambda value: type(value) in (int, float) and -1e300 < value < 1e300,
)
ABOVE_ZERO: Kind = (
    "a finite number, more than 0",
    lambda value: NUMBER[1](value) and value > 0,
)
SHARE: Kind = ("a number from 0 to 1", lambda value: NUMBER[1](value) and 0 <= value <= 1)
OBJECT: Kind = ("a JSON object", lambda value: type(value) is dict)


def one_of(*known: str) -> Kind:
    return f"one of {', '.join(known)}", lambda value: type(value) is str and value in known


def list_of(kind: Kind) -> Kind:
    expected, right = kind
    return f"a list, each {expected}", lambda value: type(value) is list and all(map(right, value))


def is_free(path: Path) -> bool:
    """Nothing lies there, or an empty folder."""
    if not os.path.lexists(path):
        return True
    try:
        return not os.listdir(path)
    except OSError:  # no folder, or one that cannot be read
        return False


def read_text(path: Path, expected: str) -> str:
    """UTF-8 text with line ends as "\\n", less a byte order mark.

    Raises InputError: `path`, what was found, then `expected`.
    """
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: found bytes that are not UTF-8, {expected}") from error
    except (OSError, ValueError) as error:  # a ValueError is of a path with a zero byte
        reason = getattr(error, "strerror", None) or error
        raise InputError(f"{path}: found {reason}, {expected}") from error


def read_json(path: Path, expected: str) -> Any:
    """What a JSON file holds. Raises InputError as `read_text` does."""
    text = read_text(path, expected)
    try:
        return parse_json(text)
    except ValueError as error:
        raise InputError(f"{path}: found no valid JSON ({error}), {expected}") from error


def parse_json(text: str) -> Any:
    """`json.loads`, with a ValueError also for what would break whoever walks or writes it."""
    try:
        value = json.loads(text)
    except RecursionError:
        raise ValueError(f"more than {LEVELS} levels") from None
    if text.count("[") + text.count("{") > LEVELS and _deeper(value):
        raise ValueError(f"more than {LEVELS} levels")
    if re.search(r"\\u[dD]", text):  # half of a surrogate pair cannot be written as UTF-8
        json.dumps(value, ensure_ascii=False).encode()
    return value


def _deeper(value: Any) -> bool:
    layer = [value]
    for _ in range(LEVELS + 1):
        layer = [
            child
            for node in layer
            if type(node) in (list, dict)
            for child in (node if type(node) is list else node.values())
        ]
    return bool(layer)


def check_keys(where: object, content: Any, kinds: Mapping[str, Kind], advice: str) -> None:
    """Raises InputError unless `content` is an object with all keys of `kinds`, each of its kind.

    A key with "?" at its end may be missing.
    """
    if not isinstance(content, dict):
        raise InputError(f"{where}: found a {type(content).__name__}, expected an object: {advice}")
    for name, (expected, right) in kinds.items():
        key = name.removesuffix("?")
        if key not in content and key != name:
            continue
        if key not in content or not right(content[key]):
            found = shown(content[key]) if key in content else "nothing"
            raise InputError(f"{where}: {key}: found {found}, expected {expected}: {advice}")
