"""Goodreads: the files of UCSD, or sequences of item ids made from goodbooks-10k."""

import dataclasses
from datetime import UTC, datetime
from pathlib import Path

from sdpo_jax.data.interactions import Interactions, Rows
from sdpo_jax.data.readers import raw
from sdpo_jax.data.readers.sources import Sequences, read_sequences
from sdpo_jax.system.errors import InputError
from sdpo_jax.system.files import NUMBER, TEXT, UTF8, Kind

STAND_IN = ("sequences_top4500_r3.json", "id2name_top4500.txt")
_EXPECTED = (
    "expected a folder with one goodreads_interactions*.json.gz and one goodreads_books*.json.gz, "
    f"or with {' and '.join(STAND_IN)}: correct --source"
)
_NAMES = ["Jan", "Feb", "Mar", "Apr", "May", "Jun", "Jul", "Aug", "Sep", "Oct", "Nov", "Dec"]
_MONTHS = {name: f"{number:02}" for number, name in enumerate(_NAMES, 1)}
_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_YEAR_1900 = (datetime(1900, 1, 1, tzinfo=UTC) - _EPOCH).total_seconds()
_ID = Kind(
    "a text of up to 18 digits",
    lambda value: type(value) is str and value.isascii() and value.isdigit() and len(value) <= 18,
)
_BOOK = {"book_id": _ID, "title": UTF8}
_INTERACTION = {
    "user_id": UTF8,
    "book_id": _ID,
    "rating": NUMBER,
    "read_at": TEXT,
    "date_updated": TEXT,
}


def read_goodreads(path: Path) -> Interactions | Sequences:
    """UCSD's interactions and books, or the two files of `STAND_IN`, which are split already.

    Books that are only shelved (rating 0) and books without a title are left out.
    Raises InputError naming file and line.
    """
    names = raw.names_in(path, _EXPECTED)
    if STAND_IN[0] in names:
        found = read_sequences(path, STAND_IN, "Goodreads", repeats=True)
        titles = {item: short_title(title) for item, title in found.titles.items()}
        return dataclasses.replace(found, titles=titles)
    return _read_ucsd(
        _only(path, names, "goodreads_interactions"), _only(path, names, "goodreads_books")
    )


def short_title(text: str) -> str:
    """The text before "(", after which Goodreads names the series (as in the paper).

    A title that begins with "(" is left whole, such as "(Un)arranged Marriage".
    """
    return " ".join(text.partition("(")[0].split()) or " ".join(text.split())


def _only(path: Path, names: list[str], start: str) -> Path:
    found = [name for name in names if name.startswith(start) and name.endswith(".json.gz")]
    if len(found) != 1:
        listed = ", ".join(found) or f"no {start}*.json.gz"
        raise InputError(f"{path}: found {listed}, {_EXPECTED}")
    return path / found[0]


def _read_ucsd(interactions: Path, books: Path) -> Interactions:
    titles, rows, count = _titles(books), Rows(), 0
    for where, record in raw.records(interactions, _INTERACTION):
        count += 1
        book = int(record["book_id"])
        if record["rating"] > 0 and book in titles:
            rows.add(record["user_id"], book, record["rating"], _time(where, record))
    kept = {book: titles[book] for book in sorted(rows.items)}
    return rows.done(kept, {}, count, raw.file_digests(interactions, books))


def _titles(file: Path) -> dict[int, str]:
    """book id -> title, of the books that have one."""
    titles: dict[int, str] = {}
    for where, record in raw.records(file, _BOOK):
        book = int(record["book_id"])
        if book in titles:
            raise raw.bad(where, f"book_id {book} a second time", "each id once")
        titles[book] = short_title(record["title"])
    return {book: title for book, title in titles.items() if title}


def _time(where: str, record: dict) -> float:
    """When a book was finished, in seconds since 1970.

    Sequences follow `read_at`; `date_added` may be years earlier, when the book went onto a shelf
    of books to read. But users type `read_at`, so it may be missing or have any year; then
    `date_updated`, which Goodreads sets, is nearest to the rating.
    """
    updated = _seconds(record["date_updated"])
    if updated is None:
        expected = 'a date as "Sun Jul 30 07:44:10 -0700 2017"'
        raise raw.bad(where, f"date_updated {record['date_updated']!r:.80}", expected)
    finished = _seconds(record["read_at"])
    return finished if finished is not None and _YEAR_1900 <= finished <= updated else updated


def _seconds(text: str) -> float | None:
    """Seconds since 1970 of "Sun Jul 30 07:44:10 -0700 2017"; None for text in another form."""
    try:
        _, month, day, clock, zone, year = text.split()  # three times as fast as strptime
        moment = datetime.fromisoformat(f"{year}-{_MONTHS[month]}-{day}T{clock}{zone}")
        return (moment - _EPOCH).total_seconds()
    except (KeyError, TypeError, ValueError):  # TypeError: a date without zone
        return None
