"""Text of users' files: its encoding, and the normal form of titles."""

import codecs
import html
import io
import itertools
import re
import unicodedata
from collections.abc import Iterable, Iterator

from absl import logging

from sdpo_jax.system.errors import InputError, brief

# Requires the semicolon: without one "R&amp" is an entity, but so is "Sense &not".
_ENTITY = re.compile(r"&(?:#\d{1,7}|#[xX][0-9a-fA-F]{1,6}|[A-Za-z][A-Za-z0-9]{1,30});")
# Four non-ASCII bytes in a row: no word in Latin-1 has them, words in other encodings do.
_FOREIGN = re.compile(rb"[\x80-\xff]{4}")
_INVISIBLE = re.compile("[\u00ad\u200b\u2060\ufeff]")  # soft hyphens, zero-width characters


def plain(title: str) -> str:
    """The normal form in which titles are stored, printed and compared.

    HTML entities are resolved, accents composed (NFC), invisible characters removed, and spaces of
    any kind made single ones, with none at the ends. Titles that look the same are then equal.
    """
    while (resolved := _ENTITY.sub(lambda match: html.unescape(match[0]), title)) != title:
        title = resolved  # repeated for "&amp;amp;"
    return " ".join(unicodedata.normalize("NFC", _INVISIBLE.sub("", title)).split())


def has_entity(title: str) -> bool:
    """Whether `plain` resolves an HTML entity of the title."""
    return any(html.unescape(entity) != entity for entity in _ENTITY.findall(title))


def misread(title: str) -> str:
    """The title whose UTF-8 was read as Latin-1 ("AmÃ©lie" -> "Amélie"), or ""."""
    if title.isascii():
        return ""
    try:
        return b"".join(map(_byte, title)).decode("utf-8")
    except UnicodeError:
        return ""


def _byte(letter: str) -> bytes:
    """The inverse of `latin_1`. Raises UnicodeEncodeError."""
    try:
        return letter.encode("cp1252")
    except UnicodeEncodeError:
        return letter.encode("latin-1")


def text_lines(where: str, lines: Iterable[bytes], encoding: str = "") -> Iterator[str]:
    """Decodes each line as UTF-8, or else as `latin_1`, which is logged once; or all as `encoding`.

    Lines end in LF, CRLF or CR. A byte order mark is removed; those of UTF-16 and UTF-32 name them.
    Raises InputError for a line that is neither UTF-8 nor Latin-1, or not in `encoding`.
    """
    lines = iter(lines)
    first = next(lines, b"")
    # UTF-32 first: its mark begins with that of UTF-16.
    marks = {codecs.BOM_UTF32_LE: "utf-32", codecs.BOM_UTF16_LE: "utf-16"}
    marks |= {codecs.BOM_UTF32_BE: "utf-32", codecs.BOM_UTF16_BE: "utf-16"}
    encoding = encoding or next((marks[m] for m in marks if first.startswith(m)), "")
    if encoding:
        whole = b"".join([first, *lines])
        try:
            yield from io.StringIO(whole.decode(encoding), newline="")
        except (UnicodeDecodeError, LookupError) as error:
            raise InputError(
                f"{where}: cannot decode it as {encoding} ({error}): save it as UTF-8"
            ) from error
        return
    parts = itertools.chain([first.removeprefix(codecs.BOM_UTF8)], lines)
    warned = False
    for number, line in enumerate((p for part in parts for p in part.splitlines(True)), 1):
        try:
            yield line.decode("utf-8")
        except UnicodeDecodeError:
            text = latin_1(f"{where}:{number}", line)
            if not warned:
                logging.warning("%s:%d: read as Latin-1, as it is not UTF-8", where, number)
            warned = True
            yield text


def latin_1(where: str, line: bytes) -> str:
    """Decodes Windows' Latin-1, which has quotes and dashes in place of control characters.

    Raises InputError for text that looks like another encoding.
    """
    if _FOREIGN.search(line):
        raise InputError(
            f"{where}: found {brief(line.strip())}, expected UTF-8 or Latin-1: save the file as "
            "UTF-8, or give its --encoding with --dataset=csv"
        )
    try:
        return line.decode("cp1252")
    except UnicodeDecodeError:  # cp1252 leaves five bytes undefined
        return line.decode("latin-1")
