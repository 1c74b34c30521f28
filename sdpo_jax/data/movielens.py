"""MovieLens-100K: GroupLens' files, or RecBole's copy of them."""

import re
from pathlib import Path

from sdpo_jax.data import raw
from sdpo_jax.data.sources import Ratings
from sdpo_jax.wheels import PINNED, wheel_file

_ARTICLES = "The|An|A|La|Les|Le|L'|Il|Das|Der|Die|Det|El|Los|O"
_MOVED_ARTICLE = re.compile(rf"([^()]+), ({_ARTICLES})(?=\)|$| \()")
_YEAR = re.compile(r"\s*\(\d{4}\)(\s*\(V\))?$")


def read_movielens(path: Path | None) -> Ratings:
    """MovieLens-100K from GroupLens' ml-100k.zip, its unpacked folder, or (None) the wheel.

    Raises InputError naming file and line.
    """
    if path is None:
        data = wheel_file(*PINNED[0])
        items = wheel_file(*PINNED[1])
        files = {file.name: file.read_bytes() for file in (data, items)}
        where, encoding, separator, header = str(data.parent), "utf-8", "\t", 1
    else:
        files = raw.read_files(path, ("u.data", "u.item"), "MovieLens-100K")
        where, encoding, separator, header = str(path), "latin-1", "|", 0
    data_name, item_name = files
    titles: dict[int, str] = {}
    for line, fields in raw.fields(where, item_name, files, encoding, separator, 2, header):
        item = raw.number(line, "item id", fields[0])
        if item in titles:
            raise raw.bad(line, f"item id {fields[0]} a second time", "each id once")
        titles[int(item)] = plain_title(fields[1])
        if not titles[int(item)]:
            raise raw.bad(line, "an empty title", "a title")
    interactions = []
    for line, fields in raw.fields(where, data_name, files, encoding, "\t", 4, header):
        names = ("user id", "item id", "rating", "timestamp")
        user, item, rating, time = map(raw.number, [line] * 4, names, fields)
        if item not in titles:
            raise raw.bad(line, f"item id {fields[1]}", f"an id of {item_name}")
        interactions.append((int(user), int(item), rating, time))
    return Ratings(dict(sorted(titles.items())), interactions, raw.digests(files))


def plain_title(text: str) -> str:
    """A title without its year and with its article in front: "Net, The (1995)" -> "The Net".

    The same for GroupLens' titles and RecBole's, which lack the year. Item 267 has no year and
    no name: a rule that cuts seven characters leaves it empty, a substring of every answer; it
    is kept under GroupLens' title "unknown" (RecBole misspells it), so that no window is lost.
    """
    title = _YEAR.sub("", text.strip())
    if title == "unkonwn":
        return "unknown"
    return _MOVED_ARTICLE.sub(_article_first, title)


def _article_first(match: re.Match) -> str:
    name, article = match.groups()
    return f"{article}{name}" if article.endswith("'") else f"{article} {name}"
