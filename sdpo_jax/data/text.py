"""Text as people's files hold it: its encoding, and titles in the one form that is compared."""

import codecs
import html
import io
import itertools
import re
import unicodedata
from collections.abc import Iterable, Iterator

from absl import logging

from sdpo_jax.system.errors import InputError, brief

# With its semicolon: without one "R&amp" is an entity, but so is "Sense &not".
_ENTITY = re.compile(r"&(?:#\d{1,7}|#[xX][0-9a-fA-F]{1,6}|[A-Za-z][A-Za-z0-9]{1,30});")
# Four letters in a row beyond ASCII: no word of Latin-1 has them, those of other encodings do.
_FOREIGN = re.compile(rb"[\x80-\xff]{4}")
_INVISIBLE = re.compile("[\u00ad\u200b\u2060\ufeff]")  # soft hyphens, and what has no width


def plain(title: str) -> str:
    """A title in the form in which titles are stored, shown and compared.

    HTML entities are resolved, accents are composed (NFC), and spaces of any kind are single ones,
    none at the ends. Two titles that look the same are then equal.
    """
    while (resolved := _ENTITY.sub(lambda match: html.unescape(match[0]), title)) != title:
        title = resolved  # "&amp;amp;" is met as well
    return " ".join(unicodedata.normalize("NFC", _INVISIBLE.sub("", title)).split())


def has_entity(title: str) -> bool:
    """Whether `plain` resolves an HTML entity of it."""
    return any(html.unescape(entity) != entity for entity in _ENTITY.findall(title))


def misread(title: str) -> str:
    """What a title was before its UTF-8 was read as Latin-1 ("AmÃ©lie": "Amélie"), or ""."""
    if title.isascii():
        return ""
    try:
        found = b"".join(map(_byte, title)).decode("utf-8")
    except UnicodeError:
        return ""
    return found


def _byte(letter: str) -> bytes:
    """The inverse of `latin_1`. Raises UnicodeEncodeError."""
    try:
        return letter.encode("cp1252")
    except UnicodeEncodeError:
        return letter.encode("latin-1")


def text_lines(where: str, lines: Iterable[bytes], encoding: str = "") -> Iterator[str]:
    """Each line as text: UTF-8, or else `latin_1`, whose first line is told; or all in `encoding`.

    Lines may end in any of the three ways. A byte order mark is left out; UTF-16 is known by its.
    Raises InputError for what is neither UTF-8 nor Latin-1, or not in `encoding`.
    """
    lines = iter(lines)
    first = next(lines, b"")
    if encoding or first.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        whole = b"".join([first, *lines])
        try:
            yield from io.StringIO(whole.decode(encoding or "utf-16"), newline="")
        except (UnicodeDecodeError, LookupError) as error:
            raise InputError(f"{where}: found {error}, expected text in it: correct it") from error
        return
    parts = itertools.chain([first.removeprefix(codecs.BOM_UTF8)], lines)
    told = False
    for number, line in enumerate((p for part in parts for p in part.splitlines(True)), 1):
        try:
            yield line.decode("utf-8")
        except UnicodeDecodeError:
            text = latin_1(f"{where}:{number}", line)
            if not told:
                logging.warning("%s:%d: read as Latin-1, as it is not UTF-8", where, number)
            told = True
            yield text


def latin_1(where: str, line: bytes) -> str:
    """Windows' Latin-1, which has quotes and dashes where the standard has control characters.

    Raises InputError for what looks like another encoding.
    """
    if _FOREIGN.search(line):
        raise InputError(
            f"{where}: found {brief(line.strip())}, expected UTF-8 or Latin-1: save the file as "
            "UTF-8, or give its --encoding with --dataset=csv"
        )
    try:
        return line.decode("cp1252")
    except UnicodeDecodeError:  # five bytes have no meaning there
        return line.decode("latin-1")
