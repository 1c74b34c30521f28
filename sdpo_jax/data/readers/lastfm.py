"""LastFM: sequences of item ids, or the lists that the S-DPO authors released."""

import os
import re
from pathlib import Path

from sdpo_jax.data.prepared import User, UserSequence, Window
from sdpo_jax.data.readers import raw
from sdpo_jax.data.readers.sources import Sessions, read_id2name, read_json, read_sequences
from sdpo_jax.data.sequences import MAX_HISTORY, SPLITS, all_windows
from sdpo_jax.system.errors import brief

# History, candidates and target, as titles.
_Row = tuple[list[str], list[str], str]
_KEYS = ("historyList", "itemList", "trueSelection")


def read_lastfm(path: Path) -> Sessions:
    """LastFM: a folder of sequences.json and id2name.txt, or of the authors' three JSON files.

    The authors' files contain titles; ids come from id2name.txt if the folder has it, else from
    the order of appearance. Raises InputError naming file and row.
    """
    if os.path.lexists(path / "sequences.json"):
        found = read_sequences(path, ("sequences.json", "id2name.txt"), "LastFM")
        sequences = {user: s for users in found.splits.values() for user, s in users.items()}
        return Sessions(found.titles, sequences, all_windows(found.splits), found.source)
    return _read_released(path)


def _read_released(path: Path) -> Sessions:
    names = {split: f"lastfm-{split}.json" for split in SPLITS}
    files = raw.read_files(path, list(names.values()), "LastFM")
    rows = {split: read_json(path, name, files) for split, name in names.items()}
    for split, name in names.items():
        _check_rows(path / name, rows[split])
    ids = {}
    if os.path.lexists(path / "id2name.txt"):
        files |= raw.read_files(path, ("id2name.txt",), "LastFM")
        ids = {title: item for item, title in read_id2name(path, "id2name.txt", files).items()}
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
    sequences, windows = _number_users(parsed, ids)
    return Sessions(titles, sequences, windows, raw.digests(files))


def _ids_by_appearance(rows: list[_Row]) -> dict[str, int]:
    """title -> id: items of the sequences first, then those that are candidates only."""
    sequences = (title for history, _, target in rows for title in (*history, target))
    shown = (title for _, candidates, _ in rows for title in candidates)
    return {title: item for item, title in enumerate(dict.fromkeys((*sequences, *shown)))}


def _check_rows(file: Path, rows: object) -> None:
    if type(rows) is not list or not rows:
        raise raw.bad(
            str(file), "no list of rows", "one of the authors' lastfm-{train,val,test}.json"
        )
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
        return f"trueSelection {brief(target)} outside itemList"
    return "a title twice in itemList" if len(set(listed)) < len(listed) else None


def _parse(where: str, row: dict, known: set[str], complete: bool) -> _Row:
    """(history, candidates, target) titles; `complete`: titles outside `known` are errors."""
    history, listed, target = (row[key] for key in _KEYS)
    titles = split_titles(history, known) if type(history) is str else history
    if titles is None and not complete and ":::" not in history:
        titles = history.split("::")
    if titles is None or (complete and not known.issuperset((*titles, *listed))):
        raise raw.bad(where, f"unknown titles in {history!r:.80}", 'known titles joined by "::"')
    if len(titles) > MAX_HISTORY:
        raise raw.bad(where, f"{len(titles)} titles of history", f"at most {MAX_HISTORY}")
    return titles, listed, target


def split_titles(text: str, known: set[str]) -> list[str] | None:
    """Titles of a text that joins them by "::"; None if no cut gives known titles only.

    A plain split is wrong in 120 rows of the release, because of names such as ":wumpscut:".
    """
    if known.issuperset(text.split("::")):
        return text.split("::")
    # From the end, so that no part is tried twice and no recursion is needed.
    ends = [*(match.start() for match in re.finditer("(?=::)", text)), len(text)]
    cut = {len(text) + 2: []}  # where a title may begin -> the titles from there on
    for start in [*(end + 2 for end in reversed(ends[:-1])), 0]:
        for end in ends:
            if end + 2 in cut and text[start:end] in known:
                cut[start] = [text[start:end], *cut[end + 2]]
                break
    return cut.get(0)


def _number_users(
    parsed: dict[str, list[_Row]], ids: dict[str, int]
) -> tuple[dict[User, UserSequence], dict[str, list[Window]]]:
    """Sequences and windows; a row that does not continue the previous one begins a new user.

    Rows name no user and contain at most 10 items of history; the rows before have the others.
    """
    items: list[list[int]] = []
    windows: dict[str, list[Window]] = {}
    for split, rows in parsed.items():
        windows[split], expected = [], None
        for history, candidates, target in rows:
            if history != expected:
                items.append([ids[title] for title in history])
            expected = [*history, target][-MAX_HISTORY:]
            user, place = len(items) - 1, len(items[-1])
            before = tuple(ids[title] for title in history)
            shown = tuple(ids[title] for title in candidates)
            windows[split].append(Window(user, place, before, shown, ids[target]))
            items[-1].append(ids[target])
    return {user: UserSequence(user, tuple(found)) for user, found in enumerate(items)}, windows
