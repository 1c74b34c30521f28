"""Results of the readers, and the reader of id sequences that two data sets share."""

import dataclasses
import io
from pathlib import Path
from typing import Any

from sdpo_jax.data.prepared import User, UserSequence, Window
from sdpo_jax.data.readers import raw
from sdpo_jax.data.sequences import SPLITS, Splits
from sdpo_jax.data.text import text_lines
from sdpo_jax.system.errors import brief
from sdpo_jax.system.files import parse_json


@dataclasses.dataclass(frozen=True)
class Sessions:
    """Windows per split; their candidates are those of the source, or empty."""

    titles: dict[int, str]
    sequences: dict[User, UserSequence]
    windows: dict[str, list[Window]]
    source: dict[str, str]


@dataclasses.dataclass(frozen=True)
class Sequences:
    """Users with their sequences per split."""

    titles: dict[int, str]
    splits: Splits
    source: dict[str, str]


def read_sequences(
    path: Path, names: tuple[str, str], what: str, repeats: bool = False
) -> Sequences:
    """A folder with a JSON file of sequences per split and an id2name file.

    A sequence is a list of item ids, and its user is then its number, or an object with "user"
    and "items". `repeats`: two ids may have the same title. Raises InputError naming file and row.
    """
    files = raw.read_files(path, names, what)
    titles = read_id2name(path, names[1], files, repeats)
    content, file = read_json(path, names[0], files), path / names[0]
    if not isinstance(content, dict) or not set(SPLITS) <= set(content):
        raise raw.bad(str(file), "no object with every split", f"lists of {', '.join(SPLITS)}")
    splits: Splits = {}
    seen: set[User] = set()
    for split in SPLITS:
        if type(content[split]) is not list:
            raise raw.bad(f"{file}: {split}", brief(content[split]), "a list of sequences")
        splits[split] = {}
        for row, sequence in enumerate(content[split]):
            where = f"{file}: {split}[{row}]"
            user, items = _user_and_items(where, sequence, len(seen), names[1], titles)
            if user in seen:
                raise raw.bad(where, f"user {brief(user)} a second time", "each user once")
            seen.add(user)
            splits[split][user] = UserSequence(user, tuple(items))
    return Sequences(titles, splits, raw.digests(files))


def _user_and_items(
    where: str, sequence: object, number: int, id2name: str, titles: dict[int, str]
) -> tuple[User, list[int]]:
    user, items = number, sequence
    if isinstance(sequence, dict):
        user, items = sequence.get("user"), sequence.get("items")
    if type(user) is not int and type(user) is not str:
        raise raw.bad(where, f"user {brief(user)}", "an integer or a string")
    if type(items) is not list or any(type(item) is not int for item in items):
        raise raw.bad(where, brief(items), "a list of item ids")
    if unknown := [item for item in items if item not in titles]:
        raise raw.bad(where, f"item {unknown[0]}", f"an id of {id2name}")
    if len(set(items)) < len(items):
        twice = next(item for n, item in enumerate(items) if item in items[:n])
        raise raw.bad(where, f"item {twice} twice", "each item once per user")
    return user, items


def read_id2name(
    path: Path, name: str, files: dict[str, bytes], repeats: bool = False
) -> dict[int, str]:
    titles: dict[int, str] = {}
    seen: set[str] = set()
    lines = io.BytesIO(files[name])
    for line, fields in raw.fields(f"{path}/{name}", lines, "::", 2):
        item, title = raw.whole(line, "item id", fields[0]), "::".join(fields[1:]).strip()
        if item in titles or not title or (title in seen and not repeats):
            once = "each id once" if repeats else "each id and each title once"
            raise raw.bad(line, f"{item}::{title}", f"{once}, none empty")
        titles[item] = title
        seen.add(title)
    return titles


def read_json(path: Path, name: str, files: dict[str, bytes]) -> Any:
    try:
        return parse_json("".join(text_lines(f"{path}/{name}", io.BytesIO(files[name]))))
    except ValueError as error:
        raise raw.bad(f"{path}/{name}", f"no valid JSON ({error})", "a JSON file") from error
