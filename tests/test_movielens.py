"""MovieLens in the three forms that GroupLens gives it, from folders and zips."""

import shutil
import zipfile

import numpy as np
import pytest
from test_prepare import write_movielens

from sdpo_jax.data.prepared import read_dataset
from sdpo_jax.data.readers.movielens import plain_title, read_movielens
from sdpo_jax.prepare import prepare, report
from sdpo_jax.system.errors import InputError

MOVIES = [
    (1, "Toy Story (1995)", "Adventure|Animation|Children's"),
    (5, "Misérables, Les (1995)", "Drama"),
    (9, "Death Note: Desu nôto (2006–2007)", "(no genres listed)"),
    (4, "Babylon 5", "Sci-Fi"),
]
RATINGS = [(7, 4, 2.5, 30), (7, 9, 3.5, 40), (7, 5, 5.0, 10), (2, 1, 3.0, 20), (7, 1, 0.5, 10)]


def write_form(folder, form):
    """ml-1m, ml-10m and ml-20m differ in names, separators, headers and encoding."""
    folder.mkdir(parents=True)
    if form == "ml-20m":
        movies = [
            '1,Toy Story (1995),"Adventure|Animation|Children\'s"',
            '5,"Misérables, Les (1995)",Drama',
            "9,Death Note: Desu nôto (2006–2007),(no genres listed)",
            "4,Babylon 5,Sci-Fi",
        ]
        text = "\r\n".join(["movieId,title,genres", *movies, ""])
        (folder / "movies.csv").write_bytes(text.encode())
        rows = [",".join(map(str, row)) for row in RATINGS]
        (folder / "ratings.csv").write_text(
            "\r\n".join(["userId,movieId,rating,timestamp", *rows, ""])
        )
        return folder
    encoding = {"ml-1m": "latin-1", "ml-10m": "utf-8"}[form]
    lines = [f"{item}::{title}::{genres}\n" for item, title, genres in MOVIES]
    text = "".join(lines).replace("–", "-")
    (folder / "movies.dat").write_bytes(text.encode(encoding))
    (folder / "ratings.dat").write_text("".join("::".join(map(str, r)) + "\n" for r in RATINGS))
    (folder / "README").write_text("of GroupLens")
    return folder


@pytest.mark.parametrize("form", ["ml-1m", "ml-10m", "ml-20m"])
@pytest.mark.parametrize("place", ["folder", "inside", "zip"])
def test_each_form_gives_the_same_interactions_titles_and_attributes(tmp_path, form, place):
    path = write_form(tmp_path / "data" / form, form)
    if place == "inside":
        path = path.parent
    elif place == "zip":
        path = shutil.make_archive(str(tmp_path / form), "zip", path.parent)
    found = read_movielens(tmp_path / path)
    assert found.titles == {
        1: "Toy Story",
        4: "Babylon 5",
        5: "Les Misérables",
        9: "Death Note: Desu nôto",
    }
    assert found.attributes == {
        1: {"year": 1995, "genres": ["Adventure", "Animation", "Children's"]},
        4: {"genres": ["Sci-Fi"]},
        5: {"year": 1995, "genres": ["Drama"]},
        9: {"year": 2006, "genres": []},
    }
    rows = zip(found.user_X, found.item_X, found.rating_X, found.time_X, strict=True)
    assert [(found.users[u], found.items[i], r, t) for u, i, r, t in rows] == RATINGS
    assert found.count == 5 and len(found.source) == 2


def test_genres_of_the_smallest_are_flags_and_its_year_stands_in_the_title(tmp_path):
    folder = tmp_path / "ml"
    folder.mkdir()
    flags = "|".join("1" if place in (1, 18) else "0" for place in range(19))
    (folder / "u.item").write_text(f"1|Heat (1995)|15-Dec-1995||http|{flags}\n2|unknown|\n")
    (folder / "u.data").write_text("3\t1\t4\t881250949\n")
    found = read_movielens(folder)
    assert found.attributes == {
        1: {"year": 1995, "genres": ["Action", "Western"]},
        2: {"genres": []},
    }


@pytest.mark.parametrize(
    ("raw", "title"),
    [
        ("Cosmos (1980-)", "Cosmos"),
        ("Fawlty Towers (1975–1979)", "Fawlty Towers"),
        ("(1990)", "(1990)"),
        ("1984 (1956)", "1984"),
    ],
)
def test_a_series_loses_its_years_and_no_title_becomes_empty(raw, title):
    assert plain_title(raw) == title


def test_a_larger_one_is_prepared_by_the_same_protocol_without_the_papers_counts(tmp_path):
    rng, folder = np.random.default_rng(0), tmp_path / "ml-latest"
    folder.mkdir()
    drawn = {user: rng.permutation(60)[:9] for user in range(1, 21)}
    rows = [
        f"{user},{item},{'0.5' if place == 3 else '3.0'},{100 * user + place}"
        for user, items in drawn.items()
        for place, item in enumerate(items)
    ]
    (folder / "ratings.csv").write_text("\n".join(["userId,movieId,rating,timestamp", *rows]))
    movies = [f"{item},Film {item} (1990),Drama" for item in range(60)]
    (folder / "movies.csv").write_text("\n".join(["movieId,title,genres", *movies]))
    meta = prepare("movielens", str(folder), str(tmp_path / "out"))
    windows = {"train": 80, "val": 2, "test": 2, "val_all": 10, "test_all": 10}
    assert meta["counts"]["windows"] == windows
    data = read_dataset(tmp_path / "out")
    assert {len(s.items) for s in data.sequences.values()} == {8}
    assert {tuple(p for p, _ in s.disliked) for s in data.sequences.values()} == {(3,)}
    assert data.attributes[0] == {"year": 1990, "genres": ["Drama"]}
    assert "paper" not in report(meta, "out")


@pytest.mark.parametrize(
    ("form", "file", "line", "said"),
    [
        ("ml-1m", "ratings.dat", "7::4::2", "ratings.dat:6: found 3 fields in '7::4::2', exp"),
        ("ml-1m", "ratings.dat", "7::4::2::x", "ratings.dat:6: found timestamp 'x', expected"),
        ("ml-1m", "ratings.dat", "7::99::2::1", "ratings.dat:6: found item id 99, expected an id"),
        ("ml-1m", "ratings.dat", "\n7::4::2::1", "ratings.dat:6: found an empty line, expected"),
        ("ml-10m", "movies.dat", "8::Heat", "movies.dat:5: found 2 fields in '8::Heat'"),
        ("ml-10m", "movies.dat", "1::Heat::x", "movies.dat:5: found item id 1 a second time"),
        ("ml-20m", "ratings.csv", "7,4,nan,3", "ratings.csv:7: found rating 'nan'"),
        ("ml-20m", "movies.csv", "8,Heat", "movies.csv:6: found 2 fields"),
        ("ml-20m", "movies.csv", '8,"Heat,x', "movies.csv:6: found invalid CSV ("),
    ],
)
def test_a_bad_line_is_named(tmp_path, form, file, line, said):
    path = write_form(tmp_path / form, form)
    with open(path / file, "a", encoding="utf-8") as text:
        text.write(line + "\n")
    refused(path, said)


def refused(path, said):
    with pytest.raises(InputError) as error:
        prepare("movielens", str(path), str(path.parent / "out"))
    assert str(error.value).startswith(f"{path}/{said}"), error.value
    assert not (path.parent / "out").exists()


@pytest.mark.parametrize(
    ("form", "file", "header"), [("ml-1m", "ratings.dat", 0), ("ml-20m", "ratings.csv", 1)]
)
def test_a_file_without_lines_is_named(tmp_path, form, file, header):
    path = write_form(tmp_path / form, form)
    first = (path / file).read_text().splitlines(keepends=True)[:header]
    (path / file).write_text("".join(first))
    refused(path, f"{file}: found no lines, expected data")


def test_what_has_no_form_or_half_of_one_is_told(tmp_path):
    path = write_form(tmp_path / "ml-1m", "ml-1m")
    (path / "movies.dat").unlink()
    for source in (path, tmp_path):
        with pytest.raises(InputError, match=rf"{source}: found no movies\.dat inside, expected"):
            read_movielens(source)
    with pytest.raises(InputError, match=r"a\.zip: found a damaged or unreadable zip"):
        (tmp_path / "a.zip").write_bytes(b"PK")
        read_movielens(tmp_path / "a.zip")
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match=r"no u\.data inside, expected MovieLens as a folder or"):
        read_movielens(tmp_path / "empty")


def test_a_folder_that_may_not_be_read_beside_the_data_is_passed_over(tmp_path):
    path = write_movielens(tmp_path / "ml-100k").parent
    (path / "a").symlink_to("a")
    assert len(read_movielens(path).titles) == 60


def test_a_line_that_never_ends_is_told(tmp_path, monkeypatch):
    monkeypatch.setattr("sdpo_jax.data.readers.raw.LONGEST", 64)
    path = write_form(tmp_path / "ml-1m", "ml-1m")
    with zipfile.ZipFile(tmp_path / "a.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("movies.dat", (path / "movies.dat").read_bytes())
        archive.writestr("ratings.dat", "1" * 100_000)
    with pytest.raises(InputError, match=r"a\.zip/ratings\.dat: found a line of over 64 bytes"):
        read_movielens(tmp_path / "a.zip")


STEAM = 76561197960265728  # ids of 17 digits, which a float rounds to multiples of 16


@pytest.mark.parametrize(
    ("names", "item", "rating", "headers"),
    [
        (("u.item", "u.data"), "{}|Game {} (2001)|", "{}\t{}\t5\t{}", ("", "")),
        (("movies.dat", "ratings.dat"), "{}::Game {} (2001)::Drama", "{}::{}::5::{}", ("", "")),
        (("movies.csv", "ratings.csv"), "{},Game {} (2001),Drama", "{},{},5,{}", ("h\n", "h\n")),
    ],
)
def test_ids_of_any_length_stay_apart(tmp_path, names, item, rating, headers):
    users, items = range(STEAM, STEAM + 40), range(STEAM, STEAM + 30)
    lines = [item.format(i, i - STEAM) for i in items]
    rows = [rating.format(u, i, n) for u in users for n, i in enumerate(items)]
    for name, header, content in zip(names, headers, (lines, rows), strict=True):
        (tmp_path / name).write_text(header + "\n".join(content) + "\n")
    found = read_movielens(tmp_path)
    assert found.users == list(users) and found.items == list(items)
    assert found.titles == {i: f"Game {i - STEAM}" for i in items}


@pytest.mark.parametrize("number", ["1.0", "1e3", "0x1", "nan", "1 2"])
def test_an_id_that_is_no_whole_number_is_named(tmp_path, number):
    (tmp_path / "u.item").write_text("1|Heat (1995)|\n")
    (tmp_path / "u.data").write_text(f"{number}\t1\t5\t9\n")
    refused(tmp_path, f"u.data:1: found user id {number!r}, expected a whole number")
