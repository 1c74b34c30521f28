"""Small files that a person can break: read and checked, or refused in one line."""

import contextlib
import json
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from sdpo_jax.system.errors import InputError, brief

LEVELS = 64  # of nested lists and objects: deeper ones would break recursive functions


class Kind(NamedTuple):
    """A kind of value: its description, and whether a value is of the kind."""

    expected: str
    right: Callable[[Any], bool]


TEXT = Kind("a text", lambda value: type(value) is str)
_HALF_PAIR = re.compile(r"[\ud800-\udfff]")  # of surrogates: UTF-8 cannot encode it
UTF8 = Kind("a text that UTF-8 can hold", lambda v: TEXT.right(v) and not _HALF_PAIR.search(v))
COUNT = Kind("a whole number, 0 or more", lambda value: type(value) is int and value >= 0)
POSITIVE = Kind("a whole number, more than 0", lambda value: COUNT.right(value) and value > 0)
# Comparing instead of math.isfinite, which fails on integers that no float holds.
NUMBER = Kind("a finite number", lambda v: type(v) in (int, float) and -1e300 < v < 1e300)
ABOVE_ZERO = Kind("a finite number, more than 0", lambda value: NUMBER.right(value) and value > 0)
SHARE = Kind("a number from 0 to 1", lambda value: NUMBER.right(value) and 0 <= value <= 1)
OBJECT = Kind("a JSON object", lambda value: type(value) is dict)


def one_of(*known: str) -> Kind:
    return Kind(f"one of {', '.join(known)}", lambda v: type(v) is str and v in known)


def list_of(kind: Kind) -> Kind:
    return Kind(
        f"a list, each {kind.expected}", lambda v: type(v) is list and all(map(kind.right, v))
    )


def is_free(path: Path) -> bool:
    """Whether nothing is there, or an empty folder."""
    if not os.path.lexists(path):
        return True
    try:
        return not os.listdir(path)
    except OSError:  # no folder, or one that cannot be read
        return False


@contextlib.contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """Yields a path to write to, which becomes `path` at the end: an atomic write."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        yield partial
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


@contextlib.contextmanager
def whole_folder(path: Path) -> Iterator[Path]:
    """Yields a new folder, which becomes `path` at the end; nothing or an empty folder is there."""
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        partial.mkdir(parents=True)
        yield partial
        os.rename(partial, path)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def write_json(path: Path, content: Any) -> None:
    """Writes JSON atomically."""
    with whole_file(path) as file:
        file.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


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
    """The content of a JSON file. Raises InputError as `read_text` does."""
    text = read_text(path, expected)
    try:
        return parse_json(text)
    except ValueError as error:
        raise InputError(f"{path}: found no valid JSON ({error}), {expected}") from error


def read_object(path: Path, expected: str) -> dict[str, Any]:
    """The object in a JSON file. Raises InputError as `read_text` does."""
    content = read_json(path, expected)
    if not isinstance(content, dict):
        raise InputError(f"{path}: found a {type(content).__name__}, expected a JSON object")
    return content


def read_json_lines(
    path: Path, kinds: Mapping[str, Kind], expected: str, advice: str, *, unfinished: bool = False
) -> list[dict[str, Any]]:
    """The objects of a file with one per line, each with the keys of `kinds`.

    `unfinished`: a last line without its line break, left by a killed process, is dropped. Raises
    InputError naming file and line.
    """
    lines = read_text(path, f"{expected}: {advice}").split("\n")
    if unfinished or lines[-1] == "":
        lines.pop()
    found = []
    for number, line in enumerate(lines, 1):
        try:
            content = parse_json(line)
        except ValueError as error:
            raise InputError(
                f"{path}:{number}: found no valid JSON ({error}), {expected}: {advice}"
            ) from error
        check_keys(f"{path}:{number}", content, kinds, advice)
        found.append(content)
    return found


def parse_json(text: str) -> Any:
    """`json.loads`, with a ValueError also for deep nesting and for half a surrogate pair."""
    try:
        value = json.loads(text)
    except RecursionError:
        raise ValueError(f"more than {LEVELS} levels") from None
    if text.count("[") + text.count("{") > LEVELS and _deeper(value):
        raise ValueError(f"more than {LEVELS} levels")
    if re.search(r"\\u[dD]", text):  # UTF-8 cannot encode half a pair
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

    A key that ends in "?" may be missing.
    """
    if not isinstance(content, dict):
        raise InputError(f"{where}: found a {type(content).__name__}, expected an object: {advice}")
    for name, (expected, right) in kinds.items():
        key = name.removesuffix("?")
        if key not in content and key != name:
            continue
        if key not in content or not right(content[key]):
            found = brief(content[key]) if key in content else "nothing"
            raise InputError(f"{where}: {key}: found {found}, expected {expected}: {advice}")


def check_room(folder: Path, needed: int) -> None:
    """Raises InputError unless `needed` bytes can be written into `folder`.

    Called before Orbax writes, which reports a full disk with a page of tracebacks. Reserving the
    space also finds quotas and limits on file sizes.
    """
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise InputError(
            f"{folder}: found {free / 1e9:.2f} GB free, expected {needed / 1e9:.2f} GB: free space "
            "or choose another folder"
        )
    if needed == 0 or not hasattr(os, "posix_fallocate"):
        return
    try:
        with tempfile.TemporaryFile(dir=folder) as file:
            os.posix_fallocate(file.fileno(), 0, needed)
    except OSError as error:
        raise InputError(
            f"{folder}: {error.strerror} on reserving {needed / 1e9:.2f} GB: free space or choose "
            "another folder"
        ) from error
