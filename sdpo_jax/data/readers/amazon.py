"""Amazon: UCSD's reviews and metadata of 2018 or 2023, or published windows.

X: interactions, as in `Interactions`.
"""

import contextlib
import dataclasses
import re
from collections.abc import Collection
from pathlib import Path
from typing import Any

import numpy as np

from sdpo_jax.data.interactions import Interactions, Rows
from sdpo_jax.data.prepared import User, UserSequence, is_title
from sdpo_jax.data.readers import raw
from sdpo_jax.data.readers.sources import Sessions
from sdpo_jax.data.readers.times import Clock
from sdpo_jax.data.sequences import MAX_HISTORY
from sdpo_jax.data.text import plain
from sdpo_jax.system.errors import InputError, brief
from sdpo_jax.system.files import NUMBER, TEXT, UTF8, Kind, list_of

WINDOWS = ("items.jsonl", "train_sequences.jsonl", "valid.jsonl", "test.jsonl")
MAX_WORDS = 20  # of a title; D3 and MiniOneRec drop longer ones
_ENDINGS = (".json.gz", ".jsonl.gz", ".json", ".jsonl")
_EXPECTED = (
    "expected a folder with one file of reviews (*_5.json.gz) and one meta_*.json.gz, or with "
    f"{', '.join(WINDOWS)}: correct --source"
)
# The keys of user, item and time, and the units of time per second.
_KEYS_2018 = ("reviewerID", "asin", "unixReviewTime", 1)
_KEYS_2023 = ("user_id", "parent_asin", "timestamp", 1000)
_USER = Kind("a text or an integer", lambda value: UTF8.right(value) or type(value) is int)
_ID = Kind("an integer", lambda value: type(value) is int)
_TAG = re.compile(r"<[A-Za-z/!]")
_PRICE = re.compile(r"\$(\d[\d,]*(?:\.\d+)?)")


def read_amazon(path: Path) -> Interactions | Sessions:
    """A folder of UCSD's reviews and metadata, or of the four files of `WINDOWS`.

    Items without a usable title (2 characters or more, at most 20 words, no HTML) are left out.
    Attributes: asin, and category, brand and price if the metadata has them. Raises InputError
    naming file and line.
    """
    names = raw.names_in(path, _EXPECTED)
    if WINDOWS[1] in names:
        return _read_windows(path)
    files = [name for name in names if name.endswith(_ENDINGS)]
    meta = [name for name in files if name.startswith("meta_")]
    reviews = [name for name in files if not name.startswith("meta_")]
    reviews = [name for name in reviews if name.partition(".")[0].endswith("_5")] or reviews
    for found, what in ((reviews, "reviews"), (meta, "meta_*.json.gz")):
        if len(found) != 1:
            raise InputError(f"{path}: found {', '.join(found) or f'no {what}'}, {_EXPECTED}")
    return _read_reviews(path / reviews[0], path / meta[0])


def usable_title(text: object) -> str:
    """The title in normal form, or "" if it is too short, too long or has HTML tags."""
    title = _clean(text)
    words = title.split(" ")
    fits = len(title) > 1 and len(words) <= MAX_WORDS
    return title if fits and not _TAG.search(title) else ""


def _read_reviews(reviews: Path, meta: Path) -> Interactions:
    with contextlib.closing(raw.records(reviews, {})) as records:
        _, first = next(records, ("", {}))
    user, item, time, second = _KEYS_2018 if _KEYS_2023[0] not in first else _KEYS_2023
    kinds, rows, clock = {user: UTF8, item: UTF8, time: NUMBER}, Rows(), Clock()
    numbers: dict[str, int] = {}
    for where, record in raw.records(reviews, kinds):
        clock.number(where, str(record[time]), record[time])
        number = numbers.setdefault(record[item], len(numbers))
        rows.add(record[user], number, 0.0, record[time] / second)
    clock.checked()
    titles, attributes = _read_meta(meta, item, numbers)
    found = rows.done({}, {}, len(rows), raw.file_digests(reviews, meta), rated=False)
    # Number of an item in the file -> its id: items with a title, in the order of first reviews.
    id_I = np.full(len(numbers), -1, np.int32)
    asins = [asin for asin in numbers if asin in titles]
    id_I[[numbers[asin] for asin in asins]] = range(len(asins))
    kept_X = id_I[found.item_X] >= 0
    return dataclasses.replace(
        found,
        titles={id: titles[asin] for id, asin in enumerate(asins)},
        attributes={id: {"asin": asin} | attributes[asin] for id, asin in enumerate(asins)},
        items=[*range(len(asins))],
        user_X=found.user_X[kept_X],
        item_X=id_I[found.item_X][kept_X],
        time_X=found.time_X[kept_X],
        untitled=(len(numbers) - len(asins), int((~kept_X).sum())),
    )


def _read_meta(meta: Path, key: str, wanted: Collection[str]) -> tuple[dict, dict]:
    """asin -> title, asin -> attributes, of each item's first line with a usable title."""
    titles: dict[str, str] = {}
    attributes: dict[str, dict] = {}
    for _, record in raw.records(meta, {key: UTF8}):
        asin = record[key]
        if asin in wanted and asin not in titles and (title := usable_title(record.get("title"))):
            titles[asin], attributes[asin] = title, _attributes(record)
    return titles, attributes


def _attributes(record: dict) -> dict:
    category = record.get("category", record.get("categories"))
    found = {
        "category": [*filter(None, map(_clean, category))] if type(category) is list else [],
        "brand": _clean(record.get("brand", record.get("store"))),
        "price": _price(record.get("price")),
    }
    return {key: value for key, value in found.items() if value}


def _clean(text: Any) -> str:
    return plain(text) if UTF8.right(text) else ""


def _price(value: Any) -> float | None:
    if type(value) is str:
        match = _PRICE.fullmatch(value.strip())
        value = float(match[1].replace(",", "")) if match else 0.0
    return float(value) if type(value) in (int, float) and 0 < value < 1e9 else None


def _read_windows(path: Path) -> Sessions:
    """Published windows; a user's sequence is the chain of its windows."""
    items, train, *others = (path / name for name in WINDOWS)
    titles: dict[int, str] = {}
    for where, record in raw.records(items, {"id": _ID, "title": TEXT}):
        if record["id"] in titles:
            raise raw.bad(where, f"id {record['id']} a second time", "each id once")
        if not is_title(record["title"]):
            raise raw.bad(where, f"title {brief(record['title'])}", "one line of text")
        titles[record["id"]] = record["title"]
    own: dict[User, list[int]] = {}
    placed: dict[str, list[tuple[User, int]]] = {"train": [], "val": [], "test": []}
    for where, record in raw.records(train, {"user": _USER, "items": list_of(_ID)}):
        user = record["user"]
        if user in own:
            raise raw.bad(where, f"user {brief(user)} a second time", "each user once")
        own[user] = _known(where, record["items"], titles)
        placed["train"] += [(user, place) for place in range(1, len(own[user]))]
    kinds = {"user": _USER, "history": list_of(_ID), "target": _ID}
    for split, file in zip(("val", "test"), others, strict=True):
        for where, record in raw.records(file, kinds):
            user, history = record["user"], _known(where, record["history"], titles)
            if not 1 <= len(history) <= MAX_HISTORY:
                raise raw.bad(where, f"a history of {len(history)} items", f"1 to {MAX_HISTORY}")
            before = own.setdefault(user, history)
            if before[-MAX_HISTORY:] != history:
                found = f"history {brief(history)} of user {brief(user)}"
                raise raw.bad(where, found, f"{before[-MAX_HISTORY:]}, its latest items so far")
            own[user] = [*before, *_known(where, [record["target"]], titles)]
            placed[split].append((user, len(before)))
    sequences = {user: UserSequence(user, tuple(found)) for user, found in own.items()}
    windows = {
        split: [sequences[user].window(place, MAX_HISTORY) for user, place in rows]
        for split, rows in placed.items()
    }
    return Sessions(titles, sequences, windows, raw.file_digests(*(path / n for n in WINDOWS)))


def _known(where: str, items: list[int], titles: dict[int, str]) -> list[int]:
    if unknown := [item for item in items if item not in titles]:
        raise raw.bad(where, f"item {unknown[0]}", f"an id of {WINDOWS[0]}")
    return items
