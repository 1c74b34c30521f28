"""The prepared folder: items.jsonl, one JSONL file per split, dataset.json."""

import dataclasses
import hashlib
import json
import os
import shutil
from collections.abc import Sequence
from pathlib import Path

from absl import logging

from sdpo_jax.errors import InputError, shown
from sdpo_jax.files import parse_json, read_json, read_text

DOMAINS = ("movie", "music", "book")
# Every split a folder can hold, in the order of the fingerprint; the first three must be there.
SPLITS = ("train", "val", "test", "val_all", "test_all")
_WINDOW_KEYS = ("user", "history", "candidates", "target")
_PREPARE = "python -m sdpo_jax.prepare --dataset=movielens|lastfm|goodreads|csv --output={}"


@dataclasses.dataclass(frozen=True, slots=True)
class Window:
    """Up to 10 item ids of history (oldest first), candidates in display order, the target."""

    user: int | str
    history: tuple[int, ...]
    candidates: tuple[int, ...]
    target: int


@dataclasses.dataclass(frozen=True)
class Dataset:
    """`titles`: item id -> title, in file order. `meta`: dataset.json, with "fingerprint"."""

    domain: str
    titles: dict[int, str]
    splits: dict[str, list[Window]]
    meta: dict


def write_dataset(path: str | Path, dataset: Dataset) -> None:
    """Writes the whole folder, or nothing: a folder beside it is filled and then renamed.

    Raises InputError when `path` is a file or a folder with something in it, and when the disk
    is full or not writable.
    """
    path = Path(path).absolute()
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        partial.mkdir(parents=True)
        _write_files(partial, dataset)
        os.rename(partial, path)
    except OSError as error:
        raise InputError(
            f"{path}: found {error.strerror or error}, expected to write a new folder: "
            "choose another --output or free space"
        ) from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def read_dataset(path: str | Path, splits: Sequence[str] | None = None) -> Dataset:
    """Reads and checks a prepared folder; `splits` (default: all there are) limits the windows.

    `meta["fingerprint"]` is the SHA-256 of items and all splits as they lie on disk, whichever
    splits are read. Raises InputError naming the file, and the line of a malformed window.
    """
    path = Path(path)
    meta = read_meta(path)
    titles = _read_items(path / "items.jsonl")
    names = splits or [s for s in SPLITS if s in SPLITS[:3] or os.path.lexists(path / f"{s}.jsonl")]
    size: int | None = None
    windows: dict[str, list[Window]] = {}
    for name in names:
        windows[name] = _read_windows(path / f"{name}.jsonl", titles, size)
        size = len(windows[name][0].candidates)
    found = fingerprint(path)
    if meta.get("fingerprint", found) != found:
        logging.warning("%s: files were changed after they were prepared", path)
    return Dataset(meta["domain"], titles, windows, meta | {"fingerprint": found})


def read_split(path: Path, split: str) -> Dataset:
    """`read_dataset` of one split. Raises InputError that names --split where it is not there."""
    known = [name for name in SPLITS if os.path.lexists(path / f"{name}.jsonl")]
    if known and split not in known:
        raise InputError(
            f"--split: found {split}, expected one that {path} has: {', '.join(known)}"
        )
    return read_dataset(path, [split])


def fingerprint(path: Path) -> str:
    """Hexadecimal SHA-256 over names and bytes of items.jsonl and the splits that are there."""
    digest = hashlib.sha256()
    for name in ("items", *SPLITS):
        file = path / f"{name}.jsonl"
        if file.is_file():
            data = file.read_bytes()
            digest.update(f"{name} {len(data)}\n".encode() + data)
    return digest.hexdigest()


def _write_files(folder: Path, dataset: Dataset) -> None:
    rows = [{"id": item, "title": title} for item, title in dataset.titles.items()]
    _write_lines(folder / "items.jsonl", rows)
    for name, windows in dataset.splits.items():
        rows = [{key: getattr(w, key) for key in _WINDOW_KEYS} for w in windows]
        _write_lines(folder / f"{name}.jsonl", rows)
    meta = dataset.meta | {"domain": dataset.domain, "fingerprint": fingerprint(folder)}
    text = json.dumps(meta, indent=2, ensure_ascii=False) + "\n"
    (folder / "dataset.json").write_text(text, encoding="utf-8")


def _write_lines(path: Path, rows: list[dict]) -> None:
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
            f"{file}: found domain {shown(domain)}, expected one of {', '.join(DOMAINS)}: "
            "correct the key or prepare the data again"
        )
    return meta


def _rows(path: Path, keys: Sequence[str]):
    """(file:line, record) for every line; each record is a dict with `keys`."""
    lines = read_text(path, _expected(path)).removesuffix("\n").split("\n")
    if lines == [""]:
        raise InputError(f"{path}: found no lines, expected at least one: prepare the data again")
    for number, line in enumerate(lines, 1):
        where = f"{path}:{number}"
        try:
            record = parse_json(line)
        except ValueError as error:
            raise _bad(where, f"no valid JSON ({error})", f"an object with {keys}") from error
        if not isinstance(record, dict):
            raise _bad(where, f"a {type(record).__name__}", f"an object with {keys}")
        for key in keys:
            if key not in record:
                raise _bad(where, f"no key {key!r}", f"an object with {keys}")
        yield where, record


def _bad(where: str, found: str, expected: str) -> InputError:
    return InputError(f"{where}: found {found}, expected {expected}: correct this line")


def _read_items(path: Path) -> dict[int, str]:
    titles: dict[int, str] = {}
    for where, record in _rows(path, ("id", "title")):
        item, title = record["id"], record["title"]
        if type(item) is not int:
            raise _bad(where, f"id {shown(item)}", "an integer")
        if item in titles:
            raise _bad(where, f"id {item} a second time", "each id once")
        if not is_title(title):
            raise _bad(where, f"title {shown(title)}", "one line of text that is not empty")
        titles[item] = title
    return titles


def is_title(title: object) -> bool:
    """One line of text. An empty one is a substring of every answer and encodes to no tokens."""
    return type(title) is str and title.strip() != "" and not {"\n", "\r"} & set(title)


def _read_windows(path: Path, titles: dict[int, str], size: int | None) -> list[Window]:
    windows = []
    for where, record in _rows(path, _WINDOW_KEYS):
        window = _window(where, record, titles)
        size = size or len(window.candidates)
        if len(window.candidates) != size:
            raise _bad(where, f"{len(window.candidates)} candidates", f"{size} as in other rows")
        windows.append(window)
    return windows


def _window(where: str, record: dict, titles: dict[int, str]) -> Window:
    user, target = record["user"], record["target"]
    if type(user) not in (int, str):
        raise _bad(where, f"user {shown(user)}", "an integer or a string")
    history = _ids(where, "history", record["history"], titles, 1)
    candidates = _ids(where, "candidates", record["candidates"], titles, 2)
    if type(target) is not int:
        raise _bad(where, f"target {shown(target)}", "an integer item id")
    if target not in candidates:
        raise _bad(where, f"target {target} outside the candidates", "the target among them")
    if len(set(candidates)) < len(candidates):
        raise _bad(
            where, f"candidates {shown(list(candidates))} with a repeated id", "distinct ids"
        )
    if len({titles[item] for item in candidates}) < len(candidates):
        raise _bad(where, "two candidates with the same title", "distinct titles")
    return Window(user, history, candidates, target)


def _ids(where: str, key: str, value: object, titles: dict[int, str], least: int):
    if type(value) is not list or len(value) < least:
        raise _bad(where, f"{key} {shown(value)}", f"a list of {least} or more item ids")
    for item in value:
        if type(item) is not int:
            raise _bad(where, f"{shown(item)} in {key}", "integer item ids")
        if item not in titles:
            raise _bad(where, f"item {item} in {key}", "an id of items.jsonl")
    return tuple(value)
