"""Interactions in a CSV file whose header names the columns."""

import csv
import dataclasses
import itertools
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

from sdpo_jax.data.interactions import Interactions, Rows
from sdpo_jax.data.prepared import is_title
from sdpo_jax.data.readers import raw
from sdpo_jax.data.readers.times import Clock
from sdpo_jax.data.text import plain, text_lines
from sdpo_jax.system.errors import InputError, brief

COLUMNS = ("user", "item", "title", "timestamp")
DELIMITERS = (",", ";", "\t", "|")
_EXPECTED = f"expected a CSV file with the columns {', '.join(COLUMNS)}: correct --source"
# Words of a header for one user's rating, and for aggregates of many users' ratings.
_RATING = re.compile(r".*ratings?|rate|stars?|score|overall|grade")
_OF_MANY = re.compile("average|avg|mean|count|number|num|total|time|timestamp|date")
_OURS = ("id", "title", "item")  # keys of items.jsonl
_ROUNDED = re.compile(r"\d(\.\d+)?[eE]\+\d+")  # spreadsheets write long numbers so
_SEPARATOR = re.compile(r'"?sep=(.)"?\s*')  # the first line of some files of Excel


@dataclasses.dataclass(frozen=True)
class Form:
    """How a CSV file is written.

    `columns`: our name -> the header's, where they differ; an empty name for "rating" ignores
    ratings. `delimiter`: empty: the one of `DELIMITERS` that fits the header. `quote`: empty: no
    quotes. `encoding`: empty: UTF-8, or else Latin-1. `escape`: precedes a quote within quotes, as
    in exports of databases; empty: such a quote is doubled.
    """

    columns: Mapping[str, str] = dataclasses.field(default_factory=dict)
    delimiter: str = ""
    quote: str = '"'
    encoding: str = ""
    escape: str = ""

    @classmethod
    def of(
        cls,
        columns: str | None,
        delimiter: str | None,
        quote: str | None,
        encoding: str = "",
        escape: str = "",
    ) -> "Form":
        """The form that the command line gives. Raises InputError."""
        names, known = {}, (*COLUMNS, "rating")
        for pair in columns.split(",") if columns else []:
            name, equals, found = (part.strip() for part in pair.partition("="))
            if name not in known or not equals or not (found or name == "rating"):
                raise InputError(
                    f"--columns: found {brief(pair)}, expected NAME=COLUMN with a NAME of "
                    f"{', '.join(known)}, as in user=reviewerID,item=asin"
                )
            names[name] = found
        delimiter = "\t" if delimiter == "tab" else delimiter or ""
        quote = '"' if quote is None else "" if quote == "none" else quote
        given = {
            "delimiter": (delimiter, " or tab"),
            "quote": (quote, " or none"),
            "escape": (escape, ""),
        }
        for flag, (value, words) in given.items():
            if len(value) > 1 or value in ("\n", "\r"):
                raise InputError(f"--{flag}: found {brief(value)}, expected a character{words}")
        return cls(names, delimiter, quote, encoding, escape)

    def reader(self, lines: Iterator[str], delimiter: str):
        """A strict `csv.reader`: malformed CSV raises csv.Error."""
        quoting = csv.QUOTE_MINIMAL if self.quote else csv.QUOTE_NONE
        return csv.reader(
            lines,
            strict=True,
            delimiter=delimiter,
            quotechar=self.quote or None,
            quoting=quoting,
            escapechar=self.escape or None,
            skipinitialspace=True,
        )


def read_csv(path: Path, form: Form | None = None) -> Interactions:
    """A CSV file with the columns user, item, title, timestamp and, if there is one, rating.

    Users keep their ids as text; items are numbered in the order of their first rows, whose item id
    and further columns become the item's attributes. Without ratings every row counts. Timestamps
    are all numbers of one unit, or all ISO 8601. Raises InputError naming file and line.
    """
    rows, ids, clock = Rows(), {}, Clock()
    titles: dict[int, str] = {}
    attributes: dict[int, dict] = {}
    rated, unread = False, []
    for where, row, more in _rows(path, form or Form(), unread):
        item = ids.setdefault(row["item"], len(ids))
        if item not in titles:
            titles[item], attributes[item] = row["title"], {"item": row["item"]} | more
        if titles[item] != row["title"] and plain(titles[item]) != plain(row["title"]):
            found = f"item {brief(row['item'])} with the title {brief(row['title'])}"
            raise raw.bad(where, found, f"{brief(titles[item])} as in its first line")
        rated = "rating" in row
        rating = raw.number(where, "rating", row["rating"]) if rated else 0.0
        rows.add(row["user"], item, rating, clock.seconds(where, row["timestamp"]))
    further = list(dict.fromkeys(name for more in attributes.values() for name in more))[1:]
    notes = [
        f"columns {what}: {', '.join(names)}"
        for what, names in (("kept as attributes of the items", further), ("not read", unread))
        if names
    ]
    if not rated:
        notes.append("no column of ratings is read: every row counts as liked")
    if form and not form.quote and _in_quotes(titles.values()):
        raise InputError(
            f"{path}: found titles in quotes, expected none with --quote=none: leave it out"
        )
    found = rows.done(titles, attributes, len(rows), raw.file_digests(path), rated=rated)
    return dataclasses.replace(found, notes=tuple(notes), rounded=clock.checked())


def _in_quotes(titles: Iterable[str]) -> bool:
    """Whether most of the texts begin and end in a quotation mark."""
    found = [len(title) > 1 and title[0] == title[-1] and title[0] in "\"'" for title in titles]
    return 2 * sum(found) > len(found) > 0


def _rows(
    path: Path, form: Form, unread: list[str]
) -> Iterator[tuple[str, dict[str, str], dict[str, str]]]:
    """(file:line, column -> text, further column -> text) of every row that is not blank.

    Appends the names of the other columns to `unread`.
    """
    lines, before = None, 0
    try:
        raw.check_file(path, _EXPECTED)
        with open(path, "rb") as file:
            texts = text_lines(str(path), file, form.encoding)
            first, before, delimiter = next(texts, ""), 0, form.delimiter
            if separator := _SEPARATOR.fullmatch(first):
                first, before, delimiter = next(texts, ""), 1, delimiter or separator[1]
            delimiter = delimiter or _delimiter(first, form)
            lines = form.reader(itertools.chain([first], texts), delimiter)
            header = [name.strip() for name in next(lines, [])]
            places, further = _places(path, header, form)
            known = {*places.values(), *further.values()}
            unread += [name or "(no name)" for n, name in enumerate(header) if n not in known]
            for row in lines:
                where = f"{path}:{lines.line_num + before}"
                if row and len(row) != len(header):
                    expected = f"{len(header)} as in the header, those with commas in quotes"
                    raise raw.bad(where, f"{len(row)} fields", expected)
                if row:
                    fields = {name: row[place].strip() for name, place in places.items()}
                    _check(where, fields)
                    more = {name: row[place].strip() for name, place in further.items()}
                    yield where, fields, {name: text for name, text in more.items() if text}
    except csv.Error as error:
        where = f"{path}:{lines.line_num + before if lines else 1}"
        others = ", or give --quote=none, or --escape='\\' where \\\" stands for a quote"
        expected = f"a CSV row{others if form.quote and not form.escape else ''}"
        raise raw.bad(where, f"invalid CSV ({error})", expected) from error
    except (OSError, ValueError) as error:  # ValueError: a path with a zero byte
        reason = getattr(error, "strerror", None) or error
        raise InputError(f"{path}: found {reason}, {_EXPECTED}") from error


def _delimiter(header: str, form: Form) -> str:
    """The delimiter that yields most of the header's wanted columns, then the most frequent one."""
    wanted = {form.columns.get(name, name) for name in COLUMNS}

    def fit(delimiter: str) -> tuple[int, int]:
        names = {name.strip().strip(form.quote) for name in header.split(delimiter)}
        return len(wanted & names), header.count(delimiter)

    return max(DELIMITERS, key=fit)


def _places(path: Path, header: list[str], form: Form) -> tuple[dict[str, int], dict[str, int]]:
    """Column -> its index: for the columns that are read, and for further ones.

    The latter exclude columns without a name and those named as in `_OURS`.
    """
    names = {name: form.columns.get(name, name) for name in (*COLUMNS, "rating")}
    for name, column in names.items():
        count = header.count(column) if column else 0
        if count > 1 or (count == 0 and (name != "rating" or form.columns.get(name))):
            found = f"{count} columns {column!r} in {brief(header)}"
            raise raw.bad(
                f"{path}:1", found, f"one of each of {', '.join(COLUMNS)}, or --columns={name}=NAME"
            )
    places = {
        name: header.index(column) for name, column in names.items() if column and column in header
    }
    if "rating" not in places and "rating" not in form.columns:
        _check_ratings(path, header)
    used = {*places.values()}
    further = {
        name: place
        for place, name in enumerate(header)
        if name and place not in used and name not in _OURS
    }
    if twice := [name for name in further if header.count(name) > 1]:
        raise raw.bad(f"{path}:1", f"2 columns {brief(twice[0])}", "each column once")
    return places, further


def _check_ratings(path: Path, header: list[str]) -> None:
    """Raises InputError if a column that is not read seems to contain users' ratings."""
    for name in header:
        words = re.findall(r"[a-z]+", re.sub(r"(?<=[a-z])(?=[A-Z])", " ", name).lower())
        if any(map(_RATING.fullmatch, words)) and not any(map(_OF_MANY.fullmatch, words)):
            raise InputError(
                f"{path}:1: found column {brief(name)} but none named rating: give "
                f"--columns=rating={name} if it contains ratings, or --columns=rating= to count "
                "every row as liked"
            )


def _check(where: str, row: dict[str, str]) -> None:
    for name in ("user", "item"):
        if not row[name]:
            raise raw.bad(where, f"an empty {name}", "any text")
        if _ROUNDED.fullmatch(row[name]):
            found = f"{name} {brief(row[name])}, rounded as spreadsheets do"
            raise raw.bad(where, found, "all digits: save the column again as text")
    if not is_title(row["title"]):
        raise raw.bad(where, f"title {brief(row['title'])}", "one line of text")
