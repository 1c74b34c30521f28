"""Goodreads: the files of UCSD, or sequences of item ids made of goodbooks-10k."""

import dataclasses
import gzip
import json
import os
import re
import zlib
from array import array
from collections.abc import Iterator, Mapping
from datetime import UTC, datetime
from pathlib import Path

import numpy as np

from sdpo_jax.data import raw
from sdpo_jax.data.prepared import User, UserSequence
from sdpo_jax.data.sequences import MIN_RATING, split_users
from sdpo_jax.data.sources import Sequences, read_sequences
from sdpo_jax.errors import InputError
from sdpo_jax.files import NUMBER, TEXT, Kind, check_keys

LEAST = 20  # [paper] interactions of a user and of a book
STAND_IN = ("sequences_top4500_r3.json", "id2name_top4500.txt")
_EXPECTED = (
    "expected a folder with one goodreads_interactions*.json.gz and one goodreads_books*.json.gz, "
    f"or with {' and '.join(STAND_IN)}: correct --source"
)
_LONGEST = 1 << 24  # bytes of a line; the longest books have some 100 kB
_MONTHS = dict(
    Jan="01", Feb="02", Mar="03", Apr="04", May="05", Jun="06",
    Jul="07", Aug="08", Sep="09", Oct="10", Nov="11", Dec="12",
)  # fmt: skip
_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_YEAR_1900 = (datetime(1900, 1, 1, tzinfo=UTC) - _EPOCH).total_seconds()
_HALF_PAIR = re.compile(r"[\ud800-\udfff]")  # of surrogates: it could not be written
_UTF8: Kind = (
    "a text that UTF-8 can hold",
    lambda value: type(value) is str and not _HALF_PAIR.search(value),
)
_ID: Kind = (
    "a text of up to 18 digits",
    lambda value: type(value) is str and value.isascii() and value.isdigit() and len(value) <= 18,
)
_BOOK = {"book_id": _ID, "title": _UTF8}
_INTERACTION = {
    "user_id": _UTF8, "book_id": _ID, "rating": NUMBER, "read_at": TEXT, "date_updated": TEXT,
}  # fmt: skip


def read_goodreads(path: Path) -> Sequences:
    """UCSD's interactions and books, or the two files of `STAND_IN`, which are split already.

    An interaction is a rating of 3 or more (a book that is only shelved has 0) of a book that has
    a title. Users and books with fewer than 20 are dropped until none is left; users are split
    8:1:1 by their first. Raises InputError naming file and line.
    """
    names = _names(path)
    if STAND_IN[0] in names:
        found = read_sequences(path, STAND_IN, "Goodreads", repeats=True)
        titles = {item: short_title(title) for item, title in found.titles.items()}
        return dataclasses.replace(found, titles=titles)
    return _read_ucsd(
        _only(path, names, "goodreads_interactions"), _only(path, names, "goodreads_books")
    )


def short_title(text: str) -> str:
    """The text before "(", where Goodreads names the series; [paper]."""
    return " ".join(text.partition("(")[0].split())


def _names(path: Path) -> list[str]:
    try:
        return sorted(os.listdir(path))
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise InputError(f"{path}: found {reason}, {_EXPECTED}") from error


def _only(path: Path, names: list[str], start: str) -> Path:
    found = [name for name in names if name.startswith(start) and name.endswith(".json.gz")]
    if len(found) != 1:
        listed = ", ".join(found) or f"no {start}*.json.gz"
        raise InputError(f"{path}: found {listed}, {_EXPECTED}")
    return path / found[0]


def _read_ucsd(interactions: Path, books: Path) -> Sequences:
    titles = _titles(books)
    users: dict[str, int] = {}
    items: dict[int, int] = {}
    # 16 bytes an interaction: UCSD's whole file has 104 million ratings.
    user_N, item_N, time_N = array("i"), array("i"), array("d")
    count = 0
    for where, record in _records(interactions, _INTERACTION):
        count += 1
        book = int(record["book_id"])
        if record["rating"] >= MIN_RATING and book in titles:
            user_N.append(users.setdefault(record["user_id"], len(users)))
            item_N.append(items.setdefault(book, len(items)))
            time_N.append(_time(where, record))
    user_N, item_N = _core(*_by_time(np.array(user_N), np.array(item_N), np.array(time_N)))
    if not len(user_N):
        raise InputError(
            f"{interactions}: found no users and books with {LEAST} interactions among {count}, "
            f"expected some whose titles are in {books}: correct --source"
        )
    rows: dict[User, list[int]] = {}
    names, ids = list(users), list(items)
    for user, item in zip(user_N.tolist(), item_N.tolist(), strict=True):
        rows.setdefault(names[user], []).append(ids[item])
    sequences = {user: UserSequence(user, tuple(row)) for user, row in rows.items()}
    kept = sorted(ids[item] for item in np.unique(item_N))
    splits, source = split_users(sequences), raw.file_digests(interactions, books)
    return Sequences({item: titles[item] for item in kept}, splits, count, source)


def _titles(file: Path) -> dict[int, str]:
    """book id -> title, of the books that have one."""
    titles: dict[int, str] = {}
    for where, record in _records(file, _BOOK):
        book = int(record["book_id"])
        if book in titles:
            raise raw.bad(where, f"book_id {book} a second time", "each id once")
        titles[book] = short_title(record["title"])
    return {book: title for book, title in titles.items() if title}


def _records(file: Path, kinds: Mapping[str, Kind]) -> Iterator[tuple[str, dict]]:
    """(file:line, object) of every line."""
    for number, line in enumerate(_lines(file), 1):
        where = f"{file}:{number}"
        try:
            # Not `parse_json`, which refuses what lies in keys that nobody reads.
            record = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise raw.bad(where, f"no valid JSON ({error})", "an object a line") from error
        check_keys(where, record, kinds, "correct --source")
        yield where, record


def _lines(file: Path) -> Iterator[str]:
    expected = "expected lines of JSON, compressed by gzip: correct --source or fetch it again"
    try:
        raw.check_file(file, expected)
        with gzip.open(file) as lines:
            while line := lines.readline(_LONGEST):
                if len(line) == _LONGEST:
                    raise InputError(f"{file}: found a line of over {_LONGEST} bytes, {expected}")
                yield line.decode("utf-8")
    except UnicodeDecodeError as error:
        raise InputError(f"{file}: found bytes that are not UTF-8, {expected}") from error
    except (EOFError, zlib.error, OSError) as error:
        reason = getattr(error, "strerror", None) or f"damaged gzip data ({error})"
        raise InputError(f"{file}: found {reason}, {expected}") from error


def _time(where: str, record: dict) -> float:
    """When a book was finished, in seconds.

    `read_at` is what the sequences are about, and `date_added` may be years before it, when the
    book went on a shelf of books to read. But readers type `read_at` or leave it out, and its
    year may be any; then the last change, which Goodreads dates, is nearest to the rating.
    """
    updated = _seconds(record["date_updated"])
    if updated is None:
        expected = 'a date as "Sun Jul 30 07:44:10 -0700 2017"'
        raise raw.bad(where, f"date_updated {record['date_updated']!r:.80}", expected)
    finished = _seconds(record["read_at"])
    return finished if finished is not None and _YEAR_1900 <= finished <= updated else updated


def _seconds(text: str) -> float | None:
    """Of "Sun Jul 30 07:44:10 -0700 2017", three times as fast as strptime; None: no date."""
    try:
        _, month, day, clock, zone, year = text.split()
        moment = datetime.fromisoformat(f"{year}-{_MONTHS[month]}-{day}T{clock}{zone}")
        return (moment - _EPOCH).total_seconds()
    except (KeyError, TypeError, ValueError):  # a TypeError is of a date without zone
        return None


def _by_time(
    user_N: np.ndarray, item_N: np.ndarray, time_N: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Interactions by time, ties as in the file; a book that a user has twice stays once."""
    order = np.argsort(time_N, kind="stable")
    pair_N = user_N[order].astype(np.int64) << 32 | item_N[order]
    first = np.sort(np.unique(pair_N, return_index=True)[1])
    return user_N[order][first], item_N[order][first]


def _core(user_N: np.ndarray, item_N: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Drops users and items with fewer than 20 interactions until none is left."""
    while len(user_N):
        few = (np.bincount(user_N)[user_N] < LEAST) | (np.bincount(item_N)[item_N] < LEAST)
        if not few.any():
            break
        user_N, item_N = user_N[~few], item_N[~few]
    return user_N, item_N
