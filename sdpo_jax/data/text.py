"""Text as people's files hold it: its encoding, and titles in the one form that is compared."""

import html
import re
import unicodedata
from collections.abc import Iterable, Iterator

from absl import logging

_MARK = b"\xef\xbb\xbf"  # the byte order mark that Windows puts before UTF-8
# With its semicolon: without one "R&amp" is an entity, but so is "Sense &not".
_ENTITY = re.compile(r"&(?:#\d{1,7}|#[xX][0-9a-fA-F]{1,6}|[A-Za-z][A-Za-z0-9]{1,30});")
_ZERO_WIDTH = re.compile("[\u200b\u2060\ufeff]")


def plain(title: str) -> str:
    """A title in the form in which titles are stored, shown and compared.

    HTML entities are resolved, accents are composed (NFC), and spaces of any kind are single ones,
    none at the ends. Two titles that look the same are then equal.
    """
    while (resolved := _ENTITY.sub(lambda match: html.unescape(match[0]), title)) != title:
        title = resolved  # "&amp;amp;" is met as well
    return " ".join(unicodedata.normalize("NFC", _ZERO_WIDTH.sub("", title)).split())


def has_entity(title: str) -> bool:
    """Whether `plain` resolves an HTML entity of it."""
    return any(html.unescape(entity) != entity for entity in _ENTITY.findall(title))


def decoded(data: bytes) -> str:
    """UTF-8 where the bytes are UTF-8, with or without a byte order mark, else Latin-1.

    Windows' Latin-1, which has quotes and dashes where the standard has control characters.
    """
    for encoding in ("utf-8-sig", "cp1252"):
        try:
            return data.decode(encoding)
        except UnicodeDecodeError:
            continue
    return data.decode("latin-1")


def text_lines(where: str, lines: Iterable[bytes]) -> Iterator[str]:
    """Each line as text, line by line `decoded`; the first that is not UTF-8 is told."""
    told = False
    for number, line in enumerate(lines, 1):
        line = line.removeprefix(_MARK) if number == 1 else line
        if not told and not is_utf8(line):
            logging.warning("%s:%d: read as Latin-1, as it is not UTF-8", where, number)
            told = True
        yield decoded(line)


def is_utf8(data: bytes) -> bool:
    try:
        data.decode("utf-8")
    except UnicodeDecodeError:
        return False
    return True
