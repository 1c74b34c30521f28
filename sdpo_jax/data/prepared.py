"""The prepared folder: items.jsonl, sequences.jsonl, one JSONL file per split, dataset.json.

items.jsonl: {"id", "title"} and the item's attributes under further keys.
sequences.jsonl: {"user", "items", "disliked"}, one line per user over all splits.
train.jsonl and the other splits: {"user", "place", "history", "candidates", "target"}. The target
is the user's items[place], the history items[max(0, place - N):place], where N is "history" of
dataset.json.

Your own windows need neither sequences.jsonl nor "place", and dataset.json only needs "domain". N
is then their longest history.
"""

import dataclasses
import hashlib
import itertools
import json
import os
from collections.abc import Iterable, Sequence
from pathlib import Path

from absl import logging

from sdpo_jax.data.prompts import DOMAINS
from sdpo_jax.data.text import plain
from sdpo_jax.system.errors import InputError, brief
from sdpo_jax.system.files import parse_json, read_json, read_text, whole_folder

# All splits, in the order of the fingerprint; the first three are required.
SPLITS = ("train", "val", "test", "val_all", "test_all")
_SEQUENCE_KEYS = ("user", "items", "disliked")
_OWN_KEYS = ("user", "history", "candidates", "target")
_WINDOW_KEYS = ("user", "place", "history", "candidates", "target")
_PREPARE = "python -m sdpo_jax.prepare --dataset=movielens|lastfm|goodreads|amazon|csv --output={}"


User = int | str


@dataclasses.dataclass(frozen=True, slots=True)
class Window:
    """A target and the items before it.

    `place`: index of the target in the user's sequence; `history`: up to N item ids, oldest first;
    `candidates`: item ids in the prompt's order, including the target.
    """

    user: User
    place: int
    history: tuple[int, ...]
    candidates: tuple[int, ...]
    target: int


@dataclasses.dataclass(frozen=True, slots=True)
class UserSequence:
    """All items of a user, oldest first, over all splits.

    `disliked`: (place, item) of each item rated below the protocol's minimum, oldest first. The
    rating follows the first `place` items, so it precedes every target at `place` or later.
    """

    user: User
    items: tuple[int, ...]
    disliked: tuple[tuple[int, int], ...] = ()

    def window(self, place: int, history: int, candidates: tuple[int, ...] = ()) -> Window:
        """The window whose target is items[place], with at most `history` items of history."""
        before = self.items[max(0, place - history) : place]
        return Window(self.user, place, before, candidates, self.items[place])


@dataclasses.dataclass(frozen=True)
class Dataset:
    """`titles`, `attributes`: by item id, in file order; `sequences`: by user.

    `meta`: dataset.json with "fingerprint"; its "history" is the most history items per window.
    """

    domain: str
    titles: dict[int, str]
    splits: dict[str, list[Window]]
    meta: dict
    sequences: dict[User, UserSequence]
    attributes: dict[int, dict]

    def repeats(self, split: str) -> bool:
        """Whether some window's history contains its target."""
        return any(window.target in window.history for window in self.splits[split])


def write_dataset(path: str | Path, dataset: Dataset) -> None:
    """Writes the folder atomically: fills a temporary folder beside it, then renames that.

    Raises InputError if `path` is a file or a non-empty folder, or if the disk is full or
    read-only.
    """
    path = Path(path).absolute()
    try:
        with whole_folder(path) as partial:
            _write_files(partial, dataset)
    except OSError as error:
        raise InputError(
            f"{path}: cannot write the folder ({error.strerror or error}): choose another --output "
            "or free space"
        ) from error


def read_dataset(path: str | Path, splits: Sequence[str] | None = None) -> Dataset:
    """Reads and checks a prepared folder; `splits`: those whose windows are read (default: all).

    `meta["fingerprint"]` is `fingerprint` of all files, whichever splits are read. Raises
    InputError naming the file and the malformed line.
    """
    path = Path(path)
    meta = read_meta(path)
    titles, attributes = read_items(path / "items.jsonl")
    available = [s for s in SPLITS if s in SPLITS[:3] or os.path.lexists(path / f"{s}.jsonl")]
    if _is_own(path):
        sequences, rows, meta["history"] = _read_own(path, available, titles)
    else:
        sequences = _read_sequences(path / "sequences.jsonl", titles)
        rows = {name: _rows(path / f"{name}.jsonl", _WINDOW_KEYS) for name in available}
    N = _history(path / "dataset.json", meta)
    size: int | None = None
    windows: dict[str, list[Window]] = {}
    for name in splits or available:
        windows[name] = _read_windows(rows[name], titles, sequences, N, size)
        size = len(windows[name][0].candidates)
    found = fingerprint(path)
    if meta.get("fingerprint", found) != found:
        logging.warning("%s: files changed since they were prepared", path)
    meta["fingerprint"] = found
    return Dataset(meta["domain"], titles, windows, meta, sequences, attributes)


def read_split(path: Path, split: str) -> Dataset:
    """`read_dataset` of one split. Raises InputError naming --split if the split is missing."""
    known = [name for name in SPLITS if os.path.lexists(path / f"{name}.jsonl")]
    if known and split not in known:
        raise InputError(
            f"--split: found {split}, expected one that {path} has: {', '.join(known)}"
        )
    return read_dataset(path, [split])


def fingerprint(path: Path) -> str:
    """Hexadecimal SHA-256 of everything that determines the windows.

    That is "history" of dataset.json, and the names and bytes of items.jsonl, sequences.jsonl and
    the available splits.
    """
    meta = read_meta(path)
    return _digest(path, 0 if _is_own(path) else _history(path / "dataset.json", meta))


def _digest(path: Path, history: int) -> str:
    digest = hashlib.sha256(f"history {history}\n".encode())
    for name in ("items", "sequences", *SPLITS):
        file = path / f"{name}.jsonl"
        if file.is_file():
            data = file.read_bytes()
            digest.update(f"{name} {len(data)}\n".encode() + data)
    return digest.hexdigest()


def _write_files(folder: Path, dataset: Dataset) -> None:
    rows = (
        {"id": item, "title": title} | dataset.attributes[item]
        for item, title in dataset.titles.items()
    )
    _write_lines(folder / "items.jsonl", rows)
    rows = ({key: getattr(s, key) for key in _SEQUENCE_KEYS} for s in dataset.sequences.values())
    _write_lines(folder / "sequences.jsonl", rows)
    for name, windows in dataset.splits.items():
        rows = ({key: getattr(w, key) for key in _WINDOW_KEYS} for w in windows)
        _write_lines(folder / f"{name}.jsonl", rows)
    digest = _digest(folder, dataset.meta["history"])
    meta = dataset.meta | {"domain": dataset.domain, "fingerprint": digest}
    text = json.dumps(meta, indent=2, ensure_ascii=False) + "\n"
    (folder / "dataset.json").write_text(text, encoding="utf-8")


def _write_lines(path: Path, rows: Iterable[dict]) -> None:
    encode = json.JSONEncoder(ensure_ascii=False).encode
    with open(path, "w", encoding="utf-8", newline="\n") as file:
        file.writelines(encode(row) + "\n" for row in rows)


def _expected(path: Path) -> str:
    return f"expected a prepared folder: run {_PREPARE.format(path.parent)}"


def read_meta(path: Path) -> dict:
    """The content of a prepared folder's dataset.json."""
    file = path / "dataset.json"
    meta = read_json(file, _expected(file))
    domain = meta.get("domain") if isinstance(meta, dict) else None
    if domain not in DOMAINS:
        raise InputError(
            f"{file}: found domain {brief(domain)}, expected one of {', '.join(DOMAINS)}: "
            "correct the key or prepare the data again"
        )
    return meta


def _history(file: Path, meta: dict) -> int:
    value = meta.get("history")
    if type(value) is not int or value < 1:
        raise InputError(
            f"{file}: found history {brief(value)}, expected the most history items per window, 1 "
            "or more: prepare the data again"
        )
    return value


def _rows(path: Path, keys: Sequence[str]):
    """Yields (file:line, record) for every line; each record is a dict with `keys`."""
    expected = f"an object with {', '.join(keys)}"
    lines = read_text(path, _expected(path)).removesuffix("\n").split("\n")
    if lines == [""]:
        raise InputError(f"{path}: found no lines, expected at least one: prepare the data again")
    for number, line in enumerate(lines, 1):
        where = f"{path}:{number}"
        try:
            record = parse_json(line)
        except ValueError as error:
            raise _bad(where, f"no valid JSON ({error})", expected) from error
        if not isinstance(record, dict):
            raise _bad(where, f"a {type(record).__name__}", expected)
        for key in keys:
            if key not in record:
                raise _bad(where, f"no key {key!r}", expected)
        yield where, record


def _bad(where: str, found: str, expected: str) -> InputError:
    return InputError(f"{where}: found {found}, expected {expected}: correct this line")


def read_items(path: Path) -> tuple[dict[int, str], dict[int, dict]]:
    """Item -> title, and item -> attributes: all further keys of its line."""
    titles: dict[int, str] = {}
    attributes: dict[int, dict] = {}
    for where, record in _rows(path, ("id", "title")):
        item, title = record.pop("id"), record.pop("title")
        if type(item) is not int:
            raise _bad(where, f"id {brief(item)}", "an integer")
        if item in titles:
            raise _bad(where, f"id {item} a second time", "each id once")
        if not is_title(title) or not plain(title):
            raise _bad(where, f"title {brief(title)}", "one line of text that is not empty")
        titles[item], attributes[item] = plain(title), record
    return titles, attributes


def is_title(title: object) -> bool:
    """Whether it is a non-empty line; an empty title is a substring of every answer."""
    return type(title) is str and title.strip() != "" and not {"\n", "\r"} & set(title)


def _read_sequences(path: Path, titles: dict[int, str]) -> dict[User, UserSequence]:
    sequences: dict[User, UserSequence] = {}
    for where, record in _rows(path, _SEQUENCE_KEYS):
        user = record["user"]
        if type(user) not in (int, str):
            raise _bad(where, f"user {brief(user)}", "an integer or a string")
        if user in sequences:
            raise _bad(where, f"user {brief(user)} a second time", "each user once")
        items = _ids(where, "items", record["items"], titles, 2)
        disliked = _disliked(where, record["disliked"], items, titles)
        sequences[user] = UserSequence(user, items, disliked)
    return sequences


def _disliked(
    where: str, pairs: object, items: tuple[int, ...], titles: dict[int, str]
) -> tuple[tuple[int, int], ...]:
    if type(pairs) is not list:
        raise _bad(where, f"disliked {brief(pairs)}", "a list of [place, item]")
    last = 0
    for pair in pairs:
        if type(pair) is not list or len(pair) != 2 or type(pair[0]) is not int:
            raise _bad(where, f"{brief(pair)} in disliked", "a list of [place, item]")
        place, item = pair
        if not last <= place <= len(items):
            raise _bad(where, f"place {brief(place)} in disliked", f"{last} to {len(items)}")
        _ids(where, "disliked", [item], titles, 1)
        if item in items:
            raise _bad(where, f"item {item} in items and disliked", "it in one of the two")
        last = place
    return tuple((place, item) for place, item in pairs)


def _is_own(path: Path) -> bool:
    """Whether the folder has your own windows: without places and sequences.jsonl."""
    if os.path.lexists(path / "sequences.jsonl") or not os.path.lexists(path / "train.jsonl"):
        return False
    _, first = next(_rows(path / "train.jsonl", ("user", "candidates")))
    return "place" not in first


def _read_own(
    path: Path, splits: Sequence[str], titles: dict[int, str]
) -> tuple[dict[User, UserSequence], dict[str, list[tuple[str, dict]]], int]:
    """Sequences, (file:line, record with its place) per split, and the longest history.

    A user's windows must be consecutive: each history is the end of the user's items so far.
    """
    own: dict[User, list[int]] = {}
    rows: dict[str, list[tuple[str, dict]]] = {}
    for name in splits:
        rows[name] = []
        for where, record in _rows(path / f"{name}.jsonl", _OWN_KEYS):
            user = record["user"]
            if type(user) not in (int, str):
                raise _bad(where, f"user {brief(user)}", "an integer or a string")
            history = _ids(where, "history", record["history"], titles, 1)
            (target,) = _ids(where, "target", [record["target"]], titles, 1)
            before = own.setdefault(user, [*history])
            if tuple(before[-len(history) :]) != history:
                found = f"history {brief(list(history))} of user {brief(user)}"
                raise _bad(where, found, f"the latest of the user's items so far, {brief(before)}")
            rows[name].append((where, record | {"place": len(before)}))
            before.append(target)
    N = max(len(record["history"]) for part in rows.values() for _, record in part)
    for where, record in itertools.chain.from_iterable(rows.values()):
        count, expected = len(record["history"]), min(N, record["place"])
        if count != expected:
            found = f"a history of {count} items"
            raise _bad(where, found, f"the {expected} latest of user {brief(record['user'])}")
    sequences = {user: UserSequence(user, tuple(items)) for user, items in own.items()}
    return sequences, rows, N


def _read_windows(
    rows: Iterable[tuple[str, dict]],
    titles: dict[int, str],
    sequences: dict[User, UserSequence],
    history: int,
    size: int | None,
) -> list[Window]:
    windows = []
    for where, record in rows:
        window = _window(where, record, titles, sequences, history)
        size = size or len(window.candidates)
        if len(window.candidates) != size:
            raise _bad(where, f"{len(window.candidates)} candidates", f"{size} as in other rows")
        windows.append(window)
    return windows


def _window(
    where: str,
    record: dict,
    titles: dict[int, str],
    sequences: dict[User, UserSequence],
    history: int,
) -> Window:
    user, place = record["user"], record["place"]
    if type(user) not in (int, str) or user not in sequences:
        raise _bad(where, f"user {brief(user)}", "a user of sequences.jsonl")
    sequence = sequences[user]
    if type(place) is not int or not 1 <= place < len(sequence.items):
        last = len(sequence.items) - 1
        raise _bad(where, f"place {brief(place)}", f"1 to {last}, a place in the user's items")
    candidates = _ids(where, "candidates", record["candidates"], titles, 2)
    target = sequence.items[place]
    if target not in candidates:
        raise _bad(where, f"target {target} outside the candidates", "the target among them")
    if len(set(candidates)) < len(candidates):
        raise _bad(
            where, f"candidates {brief(list(candidates))} with a repeated id", "distinct ids"
        )
    if len({titles[item] for item in candidates}) < len(candidates):
        raise _bad(where, "two candidates with the same title", "distinct titles")
    window = sequence.window(place, history, candidates)
    for key, expected in (("history", list(window.history)), ("target", target)):
        if record[key] != expected:
            found = f"{key} {brief(record[key])}"
            raise _bad(where, found, f"{brief(expected)}, as in the user's sequence")
    return window


def _ids(where: str, key: str, value: object, titles: dict[int, str], least: int):
    if type(value) is not list or len(value) < least:
        raise _bad(where, f"{key} {brief(value)}", f"a list of {least} or more item ids")
    for item in value:
        if type(item) is not int:
            raise _bad(where, f"{brief(item)} in {key}", "integer item ids")
        if item not in titles:
            raise _bad(where, f"item {item} in {key}", "an id of items.jsonl")
    return tuple(value)
