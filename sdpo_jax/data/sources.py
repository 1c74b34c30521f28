"""Raw files of each data set, read and checked: MovieLens-100K and LastFM."""

import dataclasses
import os
import re
from pathlib import Path

from sdpo_jax.data import raw
from sdpo_jax.data.prepared import Window
from sdpo_jax.data.sequences import MAX_HISTORY, SPLITS, Interaction, lastfm_windows
from sdpo_jax.errors import InputError, shown
from sdpo_jax.files import parse_json
from sdpo_jax.wheels import PINNED, wheel_file

_ARTICLES = "The|An|A|La|Les|Le|L'|Il|Das|Der|Die|Det|El|Los|O"
_MOVED_ARTICLE = re.compile(rf"([^()]+), ({_ARTICLES})(?=\)|$| \()")
_KEYS = ("historyList", "itemList", "trueSelection")
_YEAR = re.compile(r"\s*\(\d{4}\)(\s*\(V\))?$")


@dataclasses.dataclass(frozen=True)
class Ratings:
    """`titles`: item id -> title; `interactions` in file order; `source`: file -> SHA-256."""

    titles: dict[int, str]
    interactions: list[Interaction]
    source: dict[str, str]


@dataclasses.dataclass(frozen=True)
class Sessions:
    """Windows per split; their candidates are empty, or those that the source lists."""

    titles: dict[int, str]
    windows: dict[str, list[Window]]
    source: dict[str, str]


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


def read_lastfm(path: Path) -> Sessions:
    """LastFM: a folder of sequences.json and id2name.txt, or of the authors' three JSON files.

    The authors' files give titles; ids come from id2name.txt where it lies beside them, else
    from the order of appearance. Raises InputError naming file and row.
    """
    if os.path.lexists(path / "sequences.json"):
        return _read_sequences(path)
    return _read_released(path)


def _read_sequences(path: Path) -> Sessions:
    files = raw.read_files(path, ("sequences.json", "id2name.txt"), "LastFM")
    titles = _id2name(path, files)
    sequences, file = _json(path, "sequences.json", files), path / "sequences.json"
    if not isinstance(sequences, dict) or not set(SPLITS) <= set(sequences):
        raise InputError(f"{file}: found no object with {SPLITS}, {_lastfm_expected()}")
    for split in SPLITS:
        if type(sequences[split]) is not list:
            raise raw.bad(f"{file}: {split}", shown(sequences[split]), "a list of sequences")
        for row, sequence in enumerate(sequences[split]):
            where = f"{file}: {split}[{row}]"
            if type(sequence) is not list or any(type(i) is not int for i in sequence):
                raise raw.bad(where, shown(sequence), "a list of item ids")
            if unknown := [item for item in sequence if item not in titles]:
                raise raw.bad(where, f"item {unknown[0]}", "an id of id2name.txt")
    return Sessions(titles, lastfm_windows(sequences), raw.digests(files))


def _read_released(path: Path) -> Sessions:
    names = {split: f"lastfm-{split}.json" for split in SPLITS}
    files = raw.read_files(path, list(names.values()), "LastFM")
    rows = {split: _json(path, name, files) for split, name in names.items()}
    for split, name in names.items():
        _check_rows(path / name, rows[split])
    ids = {}
    if os.path.lexists(path / "id2name.txt"):
        files |= raw.read_files(path, ("id2name.txt",), "LastFM")
        ids = {title: item for item, title in _id2name(path, files).items()}
    known = set(ids) or {t for split in SPLITS for row in rows[split] for t in row["itemList"]}
    parsed = {
        split: [
            _parse(f"{path / name}: row {number}", row, known, bool(ids))
            for number, row in enumerate(rows[split])
        ]
        for split, name in names.items()
    }
    ids = ids or _ids_by_appearance([row for split in SPLITS for row in parsed[split]])
    titles = {item: title for title, item in ids.items()}
    return Sessions(titles, _number_users(parsed, ids), raw.digests(files))


def _ids_by_appearance(rows: list[tuple[list[str], list[str], str]]) -> dict[str, int]:
    """title -> id: items of the sequences first, then those only shown."""
    sequences = (title for history, _, target in rows for title in (*history, target))
    shown = (title for _, candidates, _ in rows for title in candidates)
    return {title: item for item, title in enumerate(dict.fromkeys((*sequences, *shown)))}


def _check_rows(file: Path, rows: object) -> None:
    if type(rows) is not list or not rows:
        raise InputError(f"{file}: found no list of rows, {_lastfm_expected()}")
    for number, row in enumerate(rows):
        if found := _problem(row):
            raise raw.bad(f"{file}: row {number}", found, "one of the authors' rows")
        if len(row["itemList"]) != (size := len(rows[0]["itemList"])):
            found = f"{len(row['itemList'])} titles in itemList"
            raise raw.bad(f"{file}: row {number}", found, f"{size} as in row 0")


def _problem(row: object) -> str | None:
    if not isinstance(row, dict) or not set(_KEYS) <= set(row):
        return f"no object with {', '.join(_KEYS)}"
    history, listed, target = (row[key] for key in _KEYS)
    for titles in ([history] if type(history) is str else history, listed):
        if type(titles) is not list or not titles:
            return "a historyList or itemList that is empty or no list"
        if any(type(title) is not str or not title.strip() for title in titles):
            return "a title that is empty or no text"
    if target not in listed:
        return f"trueSelection {shown(target)} outside itemList"
    return "a title twice in itemList" if len(set(listed)) < len(listed) else None


def _parse(
    where: str, row: dict, known: set[str], complete: bool
) -> tuple[list[str], list[str], str]:
    """(history, candidates, target) titles; `complete`: no title outside `known` is right."""
    history, listed, target = (row[key] for key in _KEYS)
    titles = split_titles(history, known) if type(history) is str else history
    if titles is None and not complete and ":::" not in history:
        titles = history.split("::")
    if titles is None or (complete and not known.issuperset((*titles, *listed))):
        raise raw.bad(where, f"unknown titles in {history!r:.80}", 'known titles joined by "::"')
    return titles, listed, target


def split_titles(text: str, known: set[str]) -> list[str] | None:
    """Titles of a text that joined them by "::"; None when no cut gives known titles only.

    Names such as ":wumpscut:" make a plain split wrong in 120 rows of the release.
    """
    if known.issuperset(text.split("::")):
        return text.split("::")
    # From the end on, so that no part is tried twice and nothing recurs.
    ends = [*(match.start() for match in re.finditer("(?=::)", text)), len(text)]
    cut = {len(text) + 2: []}  # where a title may begin -> the titles from there on
    for start in [*(end + 2 for end in reversed(ends[:-1])), 0]:
        for end in ends:
            if end + 2 in cut and text[start:end] in known:
                cut[start] = [text[start:end], *cut[end + 2]]
                break
    return cut.get(0)


def _number_users(parsed: dict, ids: dict[str, int]) -> dict[str, list[Window]]:
    """Rows name no user: a row that does not continue the row before begins the next user."""
    windows, user = {}, -1
    for split, rows in parsed.items():
        windows[split], expected = [], None
        for history, candidates, target in rows:
            user += history != expected
            expected = [*history, target][-MAX_HISTORY:]
            window = Window(
                user, tuple(ids[t] for t in history), tuple(ids[t] for t in candidates), ids[target]
            )
            windows[split].append(window)
    return windows


def _id2name(path: Path, files: dict[str, bytes]) -> dict[int, str]:
    titles: dict[int, str] = {}
    seen: set[str] = set()
    for line, fields in raw.fields(str(path), "id2name.txt", files, "utf-8", "::", 2, 0):
        item, title = raw.number(line, "item id", fields[0]), "::".join(fields[1:]).strip()
        if item in titles or not title or title in seen:
            raise raw.bad(line, f"{item:.0f}::{title}", "each id and each title once, none empty")
        titles[int(item)] = title
        seen.add(title)
    return titles


def _json(path: Path, name: str, files: dict[str, bytes]) -> object:
    try:
        return parse_json(raw.decode(f"{path}/{name}", files[name], "utf-8"))
    except ValueError as error:
        raise InputError(f"{path}/{name}: found no valid JSON ({error}), {_lastfm_expected()}") \
            from error  # fmt: skip


def _lastfm_expected() -> str:
    return "expected the authors' lastfm-{train,val,test}.json or sequences.json: correct --source"
