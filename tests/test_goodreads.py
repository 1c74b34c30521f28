"""Goodreads: UCSD's files by the paper's rules, the stand-in, and what is refused."""

import gzip
import json
import os
from datetime import UTC, datetime
from pathlib import Path

import pytest

from configs import goodreads as config
from sdpo_jax.data.prepared import read_dataset
from sdpo_jax.data.protocol import Options, read_windows
from sdpo_jax.data.readers import goodreads, raw
from sdpo_jax.data.readers.goodreads import STAND_IN, read_goodreads, short_title
from sdpo_jax.data.sequences import last_windows
from sdpo_jax.prepare import prepare, report
from sdpo_jax.system.errors import InputError

STAND_IN_FOLDER = Path(__file__).parents[1].parent / "shared" / "data" / "goodbooks"
needs_stand_in = pytest.mark.skipif(
    not STAND_IN_FOLDER.is_dir(), reason=f"needs the files in {STAND_IN_FOLDER}"
)
USERS, BOOKS = 22, 30


def stamp(seconds):
    return datetime.fromtimestamp(seconds, UTC).strftime("%a %b %d %H:%M:%S +0000 %Y")


def line(user, book, seconds=1e9, rating=3, **more):
    return {
        "user_id": f"u{user}",
        "book_id": str(book),
        "is_read": True,
        "rating": rating,
        "date_updated": stamp(seconds),
        "read_at": "",
        **more,
    }


def write(file, records):
    with gzip.open(file, "wt", encoding="utf-8") as lines:
        lines.writelines(json.dumps(record) + "\n" for record in records)


def write_ucsd(folder, more=()):
    """22 users with the same 30 books each; user u's first one is book u, then u + 1, …"""
    folder.mkdir()
    rows = [line(u, (u + n) % BOOKS, 1e9 + 100 * u + n) for u in range(USERS) for n in range(BOOKS)]
    write(folder / "goodreads_interactions_poetry.json.gz", [*more, *reversed(rows)])
    titles = [*(f"Book {n} (Series, #{n})" for n in range(BOOKS)), "Rare", " "]
    books = [{"book_id": str(n), "title": title} for n, title in enumerate(titles)]
    write(folder / "goodreads_books_poetry.json.gz", books)
    return folder


def test_ucsd_files_become_windows_by_the_rules_of_the_paper(tmp_path):
    folder = write_ucsd(tmp_path / "raw")
    meta = prepare("goodreads", str(folder), str(tmp_path / "out"))
    counts = {"train": 17 * 27, "val": 2, "test": 3, "val_all": 2 * 27, "test_all": 3 * 27}
    assert meta["counts"]["windows"] == counts and meta["counts"]["interactions"] == USERS * BOOKS
    dataset = read_dataset(tmp_path / "out")
    assert dataset.domain == "book" and dataset.titles[7] == "Book 7"
    assert dataset.splits["train"][0].user == "u0" and dataset.splits["test"][0].user == "u19"
    assert dataset.splits["test"][0].target == (19 + BOOKS - 1) % BOOKS
    assert [dataset.splits["val_all"][0].history, dataset.splits["val_all"][0].target] == [
        (17, 18, 19),
        20,
    ]
    lines = report(meta, "out").splitlines()
    assert lines[2].split() == ["paper,", "Table", "3", "6,031", "4,500", "220,100"]
    assert "--config=configs/goodreads.py" in lines[-1]


def test_users_and_books_below_20_pull_each_other_down_to_a_fixed_point(tmp_path):
    # Book 30 has 20 readers: 19 of the 22 and u99, who has 20 books with it. Without u99's rating
    # of book 0, which is a 2, u99 falls, then book 30, then nothing more.
    more = [line(99, book) for book in (*range(1, 19), 30)] + [line(99, 0, rating=2)]
    more += [line(user, 30, 2e9) for user in range(19)]
    found = windows_of(write_ucsd(tmp_path / "raw", more))
    assert sorted(found.titles) == list(range(BOOKS))
    assert list(found.sequences) == [f"u{user}" for user in range(USERS)]
    assert {len(sequence.items) for sequence in found.sequences.values()} == {BOOKS}
    more[-20]["rating"] = 3
    found = windows_of(write_ucsd(tmp_path / "more", more))
    assert len(found.titles) == BOOKS + 1 and "u99" in found.sequences
    assert found.count == USERS * BOOKS + 39
    found = windows_of(tmp_path / "raw", Options(min_interactions=19))
    assert len(found.titles) == BOOKS + 1 and "u99" in found.sequences


def test_unrated_untitled_unknown_and_repeated_books_count_for_nothing(tmp_path):
    more = [line(user, 30, rating=0) for user in range(USERS)]
    more += [line(user, 31) for user in range(USERS)] + [line(user, 77) for user in range(USERS)]
    more += [line(user, user, 2e9) for user in range(USERS)]
    plain, found = (windows_of(write_ucsd(tmp_path / n, m)) for n, m in (("a", ()), ("b", more)))
    assert (found.windows, found.titles) == (plain.windows, plain.titles)
    assert found.sequences == plain.sequences


def test_a_book_rated_1_or_2_is_disliked_and_a_shelved_one_is_not(tmp_path):
    more = [line(0, 25, 1e9 - 9, rating=2), line(1, 26, 2e9, rating=1), line(2, 27, 1e9, rating=0)]
    folder = write_ucsd(tmp_path / "raw", more)
    records = [r for _, r in raw.records(folder / "goodreads_interactions_poetry.json.gz", {})]
    others = {("u0", "25", 3), ("u1", "26", 3), ("u2", "27", 3)}
    write(
        folder / "goodreads_interactions_poetry.json.gz",
        [r for r in records if (r["user_id"], r["book_id"], r["rating"]) not in others],
    )
    found = windows_of(folder)
    disliked = [found.sequences[f"u{user}"].disliked for user in range(3)]
    assert disliked == [((0, 25),), ((BOOKS - 1, 26),), ()]


def windows_of(folder, options=None):
    return read_windows("goodreads", str(folder), options or Options())


@pytest.mark.parametrize(
    ("read_at", "seconds"),
    [
        ("Sat Sep 08 17:46:40 -0800 2001", 1e9),
        ("", 1.5e9),
        ("Sat Sep 08 17:46:40 -0800 0201", 1.5e9),
        ("Sat Sep 08 17:46:40 -0800 20113", 1.5e9),
        ("Sat Sep 08 17:46:40 -0800 2031", 1.5e9),
    ],
)
def test_the_time_is_when_the_book_was_read_or_else_its_last_change(read_at, seconds):
    assert goodreads._time("", line(1, 1, 1.5e9, read_at=read_at)) == seconds


@pytest.mark.parametrize(
    ("title", "short"),
    [
        ("Angels & Demons  (Robert Langdon, #1)", "Angels & Demons"),
        ("The Hobbit", "The Hobbit"),
        ("(Un)arranged  Marriage", "(Un)arranged Marriage"),
        ("A\n B (C) (D)", "A B"),
    ],
)
def test_a_title_ends_before_its_first_bracket_unless_it_begins_with_one(title, short):
    assert short_title(title) == short


@needs_stand_in
def test_the_stand_in_has_its_counts():
    found = read_goodreads(STAND_IN_FOLDER)
    assert sum(map(len, found.splits.values())) == 2671
    assert len(found.titles) == 4500
    sequences = [s for users in found.splits.values() for s in users.values()]
    assert sum(len(sequence.items) for sequence in sequences) == 232477
    assert len(set(found.titles.values())) == 4456
    windows = last_windows(found.splits)
    counts = {"train": 181465, "val": 267, "test": 268, "val_all": 21558, "test_all": 21441}
    assert {name: len(rows) for name, rows in windows.items()} == counts
    assert windows["val"][0].user == next(iter(found.splits["val"]))


def write_stand_in(folder, **change):
    """Four users; items 0 and 1 are "Twilight" both."""
    folder.mkdir()
    sequences = {
        "train": [{"user": 58, "items": [0, 2, 3, 4, 1]}, {"user": 7, "items": [5, 6]}],
        "val": [{"user": 9, "items": [5, 6, 7, 8, 9]}],
        "test": [{"user": "x", "items": [0, 1, 2, 3]}],
    }
    (folder / STAND_IN[0]).write_text(json.dumps(sequences | change))
    names = ["Twilight (Twilight, #1)", "Twilight (The Mediator, #6)", *map(str, range(2, 40))]
    text = "".join(f"{item}::{name}\n" for item, name in enumerate(names))
    (folder / STAND_IN[1]).write_text(text)
    return str(folder)


def test_a_title_that_two_books_share_is_once_among_the_candidates(tmp_path):
    prepare("goodreads", write_stand_in(tmp_path / "raw"), str(tmp_path / "out"))
    dataset = read_dataset(tmp_path / "out")
    assert dataset.titles[0] == dataset.titles[1] == "Twilight"
    again = dataset.splits["train"][1]
    assert (again.history, again.target) == ((0, 2, 3, 4), 1)
    for window in (again, *dataset.splits["test"]):
        shown = {dataset.titles[item] for item in window.candidates if item != window.target}
        assert len(shown) == 19 and "Twilight" not in shown
    meta = prepare("goodreads", str(tmp_path / "raw"), str(tmp_path / "out"))
    assert meta["counts"]["interactions"] == 16 and "goodbooks-10k" in report(meta, "out")


@pytest.mark.parametrize(
    ("rows", "said"),
    [
        ([{"user": 58, "items": [1, 2]}], r"val\[0\]: found user 58 a second time"),
        ([{"user": 1.5, "items": [1, 2]}], r"val\[0\]: found user 1\.5, expected"),
        ([{"user": 1}], r"val\[0\]: found None, expected a list of item ids"),
        ([{"user": 1, "items": [99]}], r"val\[0\]: found item 99, expected an id of id2name_top"),
        ({}, r"val: found \{\}, expected a list of sequences"),
    ],
)
def test_a_wrong_sequence_is_named(tmp_path, rows, said):
    with pytest.raises(InputError, match=said):
        prepare("goodreads", write_stand_in(tmp_path / "raw", val=rows), str(tmp_path / "out"))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("name", "text", "said"),
    [
        ("interactions", "{", ":1: found no valid JSON"),
        ("interactions", "[" * 100_000, ":1: found no valid JSON"),
        ("interactions", "[]", ":1: found a list, expected an object"),
        ("interactions", "{}", ":1: user_id: found nothing, expected a text"),
        ("interactions", json.dumps(line(1, 1, rating="5")), ":1: rating: found '5', expected"),
        ("interactions", json.dumps(line(1, "1.0")), ":1: book_id: found '1.0', expected"),
        ("interactions", json.dumps(line(1, 1, date_updated="")), ":1: found date_updated ''"),
        ("interactions", json.dumps(line("\ud800", 1)), ":1: user_id: found"),
        ("books", '{"book_id": "1", "title": null}', ":1: title: found None, expected a text"),
        ("books", '{"book_id": "1", "title": "a"}\n' * 2, ":2: found book_id 1 a second time"),
        ("books", b"\xff", ":1: found no valid JSON"),
        ("books", "x" * 100, ": found a line of over 64 bytes"),
    ],
)
def test_a_wrong_line_is_named(tmp_path, monkeypatch, name, text, said):
    if len(text) == 100:
        monkeypatch.setattr(raw, "LONGEST", 64)
    file = write_ucsd(tmp_path / "raw") / f"goodreads_{name}_poetry.json.gz"
    file.write_bytes(gzip.compress(text if isinstance(text, bytes) else text.encode()))
    refused(tmp_path, f"{file}{said}")


@pytest.mark.parametrize(("records", "count"), [([], 0), ([line(1, 1)], 1)])
def test_too_few_interactions_are_told(tmp_path, records, count):
    write(write_ucsd(tmp_path / "raw") / "goodreads_interactions_poetry.json.gz", records)
    said = f"{tmp_path / 'raw'}: found no users and items with 20 interactions among {count}"
    refused(tmp_path, said)


def refused(tmp_path, said):
    with pytest.raises(InputError) as error:
        prepare("goodreads", str(tmp_path / "raw"), str(tmp_path / "out"))
    assert str(error.value).startswith(said), error.value
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["interactions", "books"])
def test_a_damaged_file_or_what_is_no_file_is_named(tmp_path, name):
    file = write_ucsd(tmp_path / "raw") / f"goodreads_{name}_poetry.json.gz"
    whole = file.read_bytes()
    turned = bytearray(whole)
    turned[-6] ^= 1
    for content in (whole[: len(whole) // 2], whole[:-4], bytes(turned), b"{}\n"):
        file.write_bytes(content)
        refused(tmp_path, f"{file}: found damaged gzip data (")
    file.unlink()
    refused(tmp_path, f"{tmp_path / 'raw'}: found no goodreads_{name}*.json.gz, expected a folder")
    os.mkfifo(file)
    refused(tmp_path, f"{file}: found no regular file")
    file.unlink()
    file.mkdir()
    refused(tmp_path, f"{file}: found Is a directory")


def test_a_folder_that_is_none_or_has_two_of_a_file_is_named(tmp_path):
    refused(tmp_path, f"{tmp_path / 'raw'}: found No such file or directory")
    folder = write_ucsd(tmp_path / "raw")
    (folder / "goodreads_books.json.gz").touch()
    said = f"{folder}: found goodreads_books.json.gz, goodreads_books_poetry.json.gz, expected"
    refused(tmp_path, said)
    os.mkfifo(folder / STAND_IN[0])
    refused(tmp_path, f"{folder}: found no {STAND_IN[1]} inside, expected Goodreads as a folder")
    (folder / STAND_IN[1]).touch()
    refused(tmp_path, f"{folder / STAND_IN[0]}: found no regular file")
    with pytest.raises(InputError, match="--source: found nothing, expected a folder with the Go"):
        prepare("goodreads", None, str(tmp_path / "out"))


@pytest.mark.parametrize("arg", ["", "medium", "small", "smoke"])
def test_the_config_trains_on_the_prepared_folder(arg):
    assert config.get_config(arg).dataset == "runs/goodreads/data"
