"""Anyone's interactions: a CSV file whose header names the columns."""

import csv
import math
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path

from sdpo_jax.data import raw
from sdpo_jax.data.interactions import Interactions, Rows
from sdpo_jax.data.prepared import is_title
from sdpo_jax.errors import InputError, shown

COLUMNS = ("user", "item", "title", "timestamp")
_EXPECTED = f"expected a CSV file with the columns {', '.join(COLUMNS)}: correct --source"


def read_csv(path: Path) -> Interactions:
    """A CSV file with the columns user, item, title, timestamp and, if there is one, rating.

    Users are kept as they are written; items are numbered by their first appearance. Further
    columns are attributes of the item, as its first row has them. Without ratings every row counts.
    All timestamps are numbers, or all ISO 8601. Raises InputError naming file and line.
    """
    rows, ids = Rows(), {}
    titles: dict[int, str] = {}
    attributes: dict[int, dict] = {}
    numbers, rated = None, False
    for where, row, more in _rows(path):
        item = ids.setdefault(row["item"], len(ids))
        if item not in titles:
            titles[item], attributes[item] = row["title"], more
        if titles[item] != row["title"]:
            found = f"item {shown(row['item'])} with the title {shown(row['title'])}"
            raise raw.bad(where, found, f"{shown(titles[item])} as in its first line")
        rated = "rating" in row
        rating = raw.number(where, "rating", row["rating"]) if rated else 0.0
        seconds, number = _seconds(where, row["timestamp"])
        if numbers not in (None, number):
            forms = ("ISO 8601", "a number") if number else ("a number", "ISO 8601")
            found = f"timestamp {shown(row['timestamp'])}, {forms[1]}"
            raise raw.bad(where, found, f"{forms[0]} as in the lines before")
        numbers = number
        rows.add(row["user"], item, rating, seconds)
    return rows.done(titles, attributes, len(rows), raw.file_digests(path), rated=rated)


def _rows(path: Path) -> Iterator[tuple[str, dict[str, str], dict[str, str]]]:
    """(file:line, column -> text, further column -> text) of every row that is not blank."""
    try:
        raw.check_file(path, _EXPECTED)
        with open(path, encoding="utf-8-sig", newline="") as file:
            lines = csv.reader(file, strict=True)
            header = [name.strip() for name in next(lines, [])]
            places, further = _places(path, header)
            for row in lines:
                where = f"{path}:{lines.line_num}"
                if row and len(row) != len(header):
                    expected = f"{len(header)} as in the header, those with commas in quotes"
                    raise raw.bad(where, f"{len(row)} fields", expected)
                if row:
                    fields = {name: row[place].strip() for name, place in places.items()}
                    _check(where, fields)
                    more = {name: row[place].strip() for name, place in further.items()}
                    yield where, fields, {name: text for name, text in more.items() if text}
    except csv.Error as error:
        raise raw.bad(f"{path}:{lines.line_num}", f"no CSV ({error})", "a row of it") from error
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: found bytes that are not UTF-8, {_EXPECTED}") from error
    except (OSError, ValueError) as error:  # a ValueError is of a path with a zero byte
        reason = getattr(error, "strerror", None) or error
        raise InputError(f"{path}: found {reason}, {_EXPECTED}") from error


def _places(path: Path, header: list[str]) -> tuple[dict[str, int], dict[str, int]]:
    """Column -> its place, of those that are read, and of further ones.

    Those without a name are left out, and "id", which is the item's number in items.jsonl.
    """
    known = (*COLUMNS, "rating")
    for name in known:
        count = header.count(name)
        if count > 1 or (count == 0 and name != "rating"):
            found = f"{count} columns {name!r} in {shown(header)}"
            raise raw.bad(f"{path}:1", found, f"one of each of {', '.join(COLUMNS)}")
    if odd := [name for name in header if name.lower() == "rating" != name]:
        raise raw.bad(f"{path}:1", f"column {shown(odd[0])}", "rating, in small letters")
    places = {name: place for place, name in enumerate(header) if name}
    further = {name: place for name, place in places.items() if name not in (*known, "id")}
    if twice := [name for name in further if header.count(name) > 1]:
        raise raw.bad(f"{path}:1", f"2 columns {shown(twice[0])}", "each column once")
    return {name: places[name] for name in known if name in places}, further


def _check(where: str, row: dict[str, str]) -> None:
    for name in ("user", "item"):
        if not row[name]:
            raise raw.bad(where, f"an empty {name}", "any text")
    if not is_title(row["title"]):
        raise raw.bad(where, f"title {shown(row['title'])}", "one line of text")


def _seconds(where: str, text: str) -> tuple[float, bool]:
    """A number as it is; ISO 8601 in seconds since 1970, without a zone in UTC; which it was."""
    try:
        number = math.nan if "_" in text else float(text)
    except ValueError:
        number = math.nan
    if math.isfinite(number):
        return number, True
    try:
        moment = datetime.fromisoformat(text)
    except ValueError as error:
        expected = "a number or ISO 8601 (2026-11-24T12:30:00Z)"
        raise raw.bad(where, f"timestamp {shown(text)}", expected) from error
    return (moment if moment.tzinfo else moment.replace(tzinfo=UTC)).timestamp(), False
