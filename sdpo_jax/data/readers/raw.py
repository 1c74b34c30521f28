"""Reads raw files of a folder or a zip as lines, fields, numbers or JSON records."""

import contextlib
import dataclasses
import gzip
import hashlib
import json
import lzma
import math
import os
import re
import struct
import zipfile
import zlib
from collections.abc import Generator, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO

from sdpo_jax.data.text import text_lines
from sdpo_jax.system.errors import InputError, brief
from sdpo_jax.system.files import Kind, check_keys

LONGEST = 1 << 24  # bytes per line; those of the longest books have some 100 kB
_COMMA = re.compile(r"-?\d+,\d+")  # a number with a decimal comma
_GZIP = "expected lines of JSON, compressed by gzip: correct --source or fetch it again"
_JSON = "expected lines of JSON: correct --source or fetch it again"


@dataclasses.dataclass(frozen=True)
class Files:
    """Files of a folder, or of a zip, which is not unpacked to disk.

    `places`: name -> path, in the zip or on disk. Reading raises InputError for damaged or
    unreadable files.
    """

    path: Path
    places: dict[str, str]
    expected: str
    zipped: bool = False

    def read(self, name: str) -> bytes:
        with self._open(name) as file:
            return file.read()

    def lines(self, name: str) -> Iterator[bytes]:
        """Yields line by line, so that a file may be larger than memory."""
        with self._open(name) as file:
            yield from _lines(file, f"{self.path}/{name}", self.expected)

    def digests(self) -> dict[str, str]:
        """name -> SHA-256."""
        found = {}
        for name in self.places:
            with self._open(name) as file:
                digest = hashlib.sha256()
                while data := file.read(1 << 20):
                    digest.update(data)
                found[name] = digest.hexdigest()
        return found

    @contextlib.contextmanager
    def _open(self, name: str) -> Iterator[IO[bytes]]:
        with _told(self.path, self.expected):
            if self.zipped:
                with zipfile.ZipFile(self.path) as archive, archive.open(self.places[name]) as file:
                    yield file
            else:
                check_file(Path(self.places[name]), self.expected)
                with open(self.places[name], "rb") as file:
                    yield file


def find(path: Path, forms: Sequence[Sequence[str]], what: str) -> Files:
    """The first of `forms`, names of files, that is in a folder, one of its folders, or a zip.

    Raises InputError naming a missing file.
    """
    listed = " or ".join(" and ".join(names) for names in forms)
    expected = f"expected {what} as a folder or zip with {listed}: correct --source"
    with _told(path, expected):
        if path.is_dir():
            here = {file.name: str(file) for file in path.iterdir()}
            places = [here, *(_inside(Path(here[name])) for name in sorted(here))]
        else:
            check_file(path, expected)
            with zipfile.ZipFile(path) as archive:
                members = sorted(archive.namelist(), key=lambda member: -member.count("/"))
            places = [{member.rsplit("/", 1)[-1]: member for member in members}]
    for names in forms:
        for inside in places:
            if set(names) <= set(inside):
                return Files(path, {n: inside[n] for n in names}, expected, not path.is_dir())
    # The form and the place that match best, to name a missing file.
    pairs = [(names, inside) for names in forms for inside in places]
    names, inside = max(pairs, key=lambda pair: len(set(pair[0]) & set(pair[1])))
    missing = next(name for name in names if name not in inside)
    raise InputError(f"{path}: found no {missing} inside, {expected}")


def _inside(folder: Path) -> dict[str, str]:
    """Name -> path of a folder's content; {} if it is not a folder or cannot be read."""
    try:
        return {file.name: str(file) for file in folder.iterdir()}
    except OSError:
        return {}


def read_files(path: Path, names: Sequence[str], what: str) -> dict[str, bytes]:
    """name -> content, of files that fit into memory; otherwise as `find`."""
    files = find(path, [names], what)
    return {name: files.read(name) for name in names}


@contextlib.contextmanager
def _told(path: Path, expected: str) -> Iterator[None]:
    """Raises the errors of reading as InputError."""
    try:
        yield
    # zipfile trusts offsets and sizes of the file, so a damaged one fails in many ways.
    except (
        zipfile.BadZipFile,
        zlib.error,
        lzma.LZMAError,
        struct.error,
        EOFError,
        RuntimeError,
        LookupError,
        ValueError,
        OverflowError,
        MemoryError,
    ) as error:
        raise InputError(
            f"{path}: found a damaged or unreadable zip ({error}), {expected} or fetch it again"
        ) from error
    except OSError as error:
        reason = error.strerror or error  # bz2's has no strerror
        raise InputError(f"{error.filename or path}: found {reason}, {expected}") from error


def check_file(path: Path, expected: str) -> None:
    """Raises InputError for a pipe or a device, which could be read without end."""
    if path.exists() and not path.is_file() and not path.is_dir():
        raise InputError(f"{path}: found no regular file, {expected}")


def _lines(file: IO[bytes] | gzip.GzipFile, where: str, expected: str) -> Iterator[bytes]:
    while line := file.readline(LONGEST):
        if len(line) == LONGEST:
            raise InputError(f"{where}: found a line of over {LONGEST} bytes, {expected}")
        yield line


def fields(
    where: str, lines: Iterable[bytes], separator: str, least: int, header: int = 0
) -> Iterator[tuple[str, list[str]]]:
    """(file:line, fields) of every line after the header; only the last lines may be empty."""
    empty, found = "", []
    for number, line in enumerate(text_lines(where, lines), 1):
        if number <= header:
            continue
        here = f"{where}:{number}"
        text = line.rstrip("\r\n")
        if not text:
            empty = empty or here
            continue
        if empty:
            raise bad(empty, "an empty line", f"{least} or more fields, by {separator!r}")
        found = text.split(separator)
        if len(found) < least:
            what = f"{len(found)} fields in {text[:40]!r}"
            raise bad(here, what, f"{least} or more, by {separator!r}")
        yield here, found
    if not found:
        raise InputError(f"{where}: found no lines, expected data: correct --source")


def number(where: str, name: str, text: str) -> float:
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not math.isfinite(number):
        point = f" with a point, as {text.replace(',', '.')}" if _COMMA.fullmatch(text) else ""
        raise bad(where, f"{name} {text!r}", f"a number{point}")
    return number


def whole(where: str, name: str, text: str) -> int:
    """A whole number of any length: a float would round an id of 17 digits."""
    try:
        return int(text)
    except ValueError as error:
        raise bad(where, f"{name} {brief(text)}", "a whole number") from error


def records(file: Path, kinds: Mapping[str, Kind]) -> Generator[tuple[str, dict]]:
    """(file:line, object) of every line of JSON, in gzip if the file's name ends in .gz.

    Raises InputError naming file and line.
    """
    for number, line in enumerate(_json_lines(file), 1):
        where = f"{file}:{number}"
        try:
            # Not `parse_json`, which would also refuse values of keys that are not read.
            record = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise bad(where, f"no valid JSON ({error})", "one object per line") from error
        check_keys(where, record, kinds, "correct --source")
        yield where, record


def _json_lines(file: Path) -> Iterator[str]:
    zipped = file.name.endswith(".gz")
    expected = _GZIP if zipped else _JSON
    try:
        check_file(file, expected)
        with gzip.open(file) if zipped else open(file, "rb") as lines:
            yield from text_lines(str(file), _lines(lines, str(file), expected))
    except (EOFError, zlib.error, OSError) as error:
        reason = getattr(error, "strerror", None) or f"damaged gzip data ({error})"
        raise InputError(f"{file}: found {reason}, {expected}") from error


def names_in(path: Path, expected: str) -> list[str]:
    """Names of a folder's files, sorted. Raises InputError that ends in `expected`."""
    try:
        return sorted(os.listdir(path))
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise InputError(f"{path}: found {reason}, {expected}") from error


def bad(where: str, found: str, expected: str) -> InputError:
    return InputError(f"{where}: found {found}, expected {expected}: correct --source")


def digests(files: dict[str, bytes]) -> dict[str, str]:
    return {name: hashlib.sha256(data).hexdigest() for name, data in files.items()}


def file_digests(*paths: Path) -> dict[str, str]:
    """As `digests`, of files too large for memory; undecodable bytes of a name are escaped."""
    found = {}
    for path in paths:
        with open(path, "rb") as file:
            name = os.fsencode(path.name).decode("utf-8", "backslashreplace")
            found[name] = hashlib.file_digest(file, "sha256").hexdigest()
    return found
