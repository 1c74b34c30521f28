"""Raw files as they come: from a folder or a zip, as text, as fields, as numbers."""

import hashlib
import lzma
import math
import os
import struct
import zipfile
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path

from sdpo_jax.errors import InputError


def read_files(path: Path, names: Sequence[str], what: str) -> dict[str, bytes]:
    """name -> content, from a folder or from inside a zip; nothing is unpacked to disk."""
    expected = f"expected {what} as a folder or zip with {' and '.join(names)}: correct --source"
    try:
        if path.is_dir():
            folders = [f for f in (path, path / "ml-100k") if (f / names[0]).exists()]
            found = {name: (folders or [path])[0] / name for name in names}
            for file in found.values():
                check_file(file, expected)
            return {name: file.read_bytes() for name, file in found.items()}
        check_file(path, expected)
        with zipfile.ZipFile(path) as archive:
            inside = {member.rsplit("/", 1)[-1]: member for member in archive.namelist()}
            if missing := [name for name in names if name not in inside]:
                raise InputError(f"{path}: found no {missing[0]} inside, {expected}")
            return {name: archive.read(inside[name]) for name in names}
    # The reader trusts offsets and sizes of the file, so a damaged one fails in many ways.
    except (
        zipfile.BadZipFile, zlib.error, lzma.LZMAError, struct.error, EOFError, RuntimeError,
        LookupError, ValueError, OverflowError, MemoryError,
    ) as error:  # fmt: skip
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


def fields(
    where: str, name: str, files: dict[str, bytes], encoding: str, separator: str, least: int,
    header: int,
) -> Iterator[tuple[str, list[str]]]:  # fmt: skip
    """(file:line, fields) of every line after the header."""
    text = decode(f"{where}/{name}", files[name], encoding)
    lines = text.rstrip("\n").split("\n")[header:]
    if not any(lines):
        raise InputError(f"{where}/{name}: found no lines, expected data: correct --source")
    for number, line in enumerate(lines, header + 1):
        fields = line.rstrip("\r").split(separator)
        if len(fields) < least:
            found = f"{len(fields)} fields in {line[:40]!r}"
            raise bad(f"{where}/{name}:{number}", found, f"{least} or more, by {separator!r}")
        yield f"{where}/{name}:{number}", fields


def decode(where: str, data: bytes, encoding: str) -> str:
    try:
        return data.decode(encoding)
    except UnicodeDecodeError as error:
        raise InputError(
            f"{where}: found bytes that are not {encoding}, expected text: correct --source"
        ) from error


def number(where: str, name: str, text: str) -> float:
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not math.isfinite(number) or (name.endswith("id") and number != int(number)):
        raise bad(where, f"{name} {text!r}", "a number")
    return number


def bad(where: str, found: str, expected: str) -> InputError:
    return InputError(f"{where}: found {found}, expected {expected}: correct --source")


def digests(files: dict[str, bytes]) -> dict[str, str]:
    return {name: hashlib.sha256(data).hexdigest() for name, data in files.items()}


def file_digests(*paths: Path) -> dict[str, str]:
    """As `digests`, of files too large to be held; a name that is no text is escaped."""
    found = {}
    for path in paths:
        with open(path, "rb") as file:
            name = os.fsencode(path.name).decode("utf-8", "backslashreplace")
            found[name] = hashlib.file_digest(file, "sha256").hexdigest()
    return found
