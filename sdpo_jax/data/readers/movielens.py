"""MovieLens: GroupLens' files of any size, or RecBole's copy of the smallest."""

import csv
import dataclasses
import re
from collections.abc import Iterable, Iterator
from pathlib import Path

from sdpo_jax.data.interactions import Interactions, Rows
from sdpo_jax.data.readers import raw
from sdpo_jax.data.readers.times import Clock
from sdpo_jax.data.text import text_lines
from sdpo_jax.system.wheels import PINNED, wheel_file

_ARTICLES = "The|An|A|La|Les|Le|L'|Il|Das|Der|Die|Det|El|Los|O"
_MOVED_ARTICLE = re.compile(rf"([^()]+), ({_ARTICLES})(?=\)|$| \()")
# A series has its first and last year, or a dash after the first.
_YEAR = re.compile(r"\s*\((\d{4})(?:[-\u2013](?:\d{4})?)?\)(\s*\(V\))?$")
# Of ml-100k; of ml-1m and ml-10m; of ml-20m, ml-25m, ml-32m and ml-latest.
_FORMS = (("u.data", "u.item"), ("ratings.dat", "movies.dat"), ("ratings.csv", "movies.csv"))
_COLUMNS = ("user id", "item id", "rating")
_GENRES = (
    "Action",
    "Adventure",
    "Animation",
    "Children's",
    "Comedy",
    "Crime",
    "Documentary",
    "Drama",
    "Fantasy",
    "Film-Noir",
    "Horror",
    "Musical",
    "Mystery",
    "Romance",
    "Sci-Fi",
    "Thriller",
    "War",
    "Western",
)


def read_movielens(path: Path | None) -> Interactions:
    """GroupLens' zip, its unpacked folder, or (None) MovieLens-100K from the wheel.

    Attributes of an item: year, if its title or its line has one, and genres. Raises InputError
    naming file and line.
    """
    if path is None:
        found = [wheel_file(*PINNED[0]), wheel_file(*PINNED[1])]
        places = {file.name: str(file) for file in found}
        files = raw.Files(found[0].parent, places, "expected RecBole's files: fetch them again")
    else:
        files = raw.find(path, _FORMS, "MovieLens")
    data_name, item_name = files.places
    titles: dict[int, str] = {}
    attributes: dict[int, dict] = {}
    for line, key, text, year, genres in _items(files, item_name):
        item = raw.whole(line, "item id", key)
        if item in titles:
            raise raw.bad(line, f"item id {key} a second time", "each id once")
        titles[item] = plain_title(text)
        if not titles[item]:
            raise raw.bad(line, "an empty title", "a title")
        attributes[item] = ({"year": int(year)} if year else {}) | {"genres": genres}
    rows, clock = Rows(), Clock()
    separator = {".dat": "::", ".csv": ","}.get(Path(data_name).suffix, "\t")
    header = int(data_name.endswith((".csv", ".inter")))
    where = f"{files.path}/{data_name}"
    for line, fields in raw.fields(where, files.lines(data_name), separator, 4, header):
        user, item = map(raw.whole, [line] * 2, _COLUMNS, fields)
        rating = raw.number(line, _COLUMNS[2], fields[2])
        if item not in titles:
            raise raw.bad(line, f"item id {fields[1]}", f"an id of {item_name}")
        rows.add(user, item, rating, clock.seconds(line, fields[3]))
    found = rows.done(dict(sorted(titles.items())), attributes, len(rows), files.digests())
    return dataclasses.replace(found, rounded=clock.checked())


def _items(files: raw.Files, name: str) -> Iterator[tuple[str, str, str, str, list[str]]]:
    """(file:line, id, title, year or "", genres) of every line."""
    where, lines = f"{files.path}/{name}", files.lines(name)
    if name == "u.item":
        for line, fields in raw.fields(where, lines, "|", 2):
            flags = zip(_GENRES, fields[6:], strict=False)
            genres = [genre for genre, flag in flags if flag == "1"]
            yield line, fields[0], fields[1], _year(fields[1]), genres
    elif name == "movies.dat":
        for line, fields in raw.fields(where, lines, "::", 3):
            title = "::".join(fields[1:-1])
            yield line, fields[0], title, _year(title), _genres(fields[-1].split("|"))
    elif name == "movies.csv":
        for line, fields in _csv(where, text_lines(where, lines)):
            yield line, fields[0], fields[1], _year(fields[1]), _genres(fields[2].split("|"))
    else:
        for line, fields in raw.fields(where, lines, "\t", 4, 1):
            year = fields[2] if re.fullmatch(r"\d{4}", fields[2]) else _year(fields[1])
            yield line, fields[0], fields[1], year, _genres(fields[3].split())


def _csv(where: str, text: Iterable[str]) -> Iterator[tuple[str, list[str]]]:
    lines = csv.reader(text, strict=True)
    try:
        next(lines, None)
        for fields in lines:
            if len(fields) < 3:
                raise raw.bad(f"{where}:{lines.line_num}", f"{len(fields)} fields", "3 or more")
            yield f"{where}:{lines.line_num}", fields
    except csv.Error as error:
        raise raw.bad(f"{where}:{lines.line_num}", f"invalid CSV ({error})", "a CSV row") from error


def _year(title: str) -> str:
    match = _YEAR.search(title.strip())
    return match[1] if match else ""


def _genres(names: list[str]) -> list[str]:
    return [name for name in names if name not in ("", "unknown", "(no genres listed)")]


def plain_title(text: str) -> str:
    """A title without its year and with its article in front: "Net, The (1995)" -> "The Net".

    The same for GroupLens' titles and RecBole's, which lack the year. Item 267 has no year and no
    name. It stays under GroupLens' title "unknown" (RecBole misspells it), so that no window is
    lost; cutting seven characters would leave "", a substring of every answer.
    """
    title = _YEAR.sub("", text.strip()) or text.strip()
    if title == "unkonwn":
        return "unknown"
    return _MOVED_ARTICLE.sub(_article_first, title)


def _article_first(match: re.Match) -> str:
    name, article = match.groups()
    return f"{article}{name}" if article.endswith("'") else f"{article} {name}"
