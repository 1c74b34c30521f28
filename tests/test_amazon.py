"""Amazon: UCSD's reviews of 2018 and 2023, published windows, and what is refused."""

import gzip
import json
from pathlib import Path

import pytest

from sdpo_jax.data.prepared import UserSequence, read_dataset
from sdpo_jax.data.readers.amazon import WINDOWS, read_amazon, usable_title
from sdpo_jax.prepare import Options, prepare, report
from sdpo_jax.system.errors import InputError

INDUSTRIAL = Path(__file__).parents[1].parent / "shared" / "data" / "amazon-industrial"
needs_industrial = pytest.mark.skipif(
    not INDUSTRIAL.is_dir(), reason=f"needs the files in {INDUSTRIAL}"
)
USERS, ITEMS = 12, 30


def review(user, item, seconds):
    return {
        "reviewerID": f"A{user}",
        "asin": f"B{item:03}",
        "overall": 1.0,
        "verified": True,
        "unixReviewTime": seconds,
        "reviewText": "é",
    }


def reviews():
    """User u buys items u, u + 1, … u + 5 and u again, of 12 in a ring; item 29 has no title."""
    places = [(u, n) for u in range(USERS) for n in range(7)]
    rows = [review(u, (u + n % 6) % 12, 1_500_000_000 + 86_400 * (3 * n + u)) for u, n in places]
    return rows + [review(u, 29, 1_400_000_000) for u in range(USERS)]


def products():
    titles = {29: '<span id="productTitle">', 3: "Nut &amp; Bolt,\n 3&quot;"}
    rows = [
        {
            "asin": f"B{item:03}",
            "title": titles.get(item, f"Part {item}"),
            "brand": "",
            "category": ["Industrial &amp; Scientific", ""],
            "price": ".a-box{color:red}",
        }
        for item in range(ITEMS)
    ]
    rows[3] |= {"brand": "Kn&ouml;pfe", "price": "$1,012.50", "main_cat": "x"}
    return [{"asin": "B999", "title": "Never bought"}, *rows, rows[3] | {"title": "Later"}]


def write(file, records):
    with gzip.open(file, "wt", encoding="utf-8") as lines:
        lines.writelines(json.dumps(record) + "\n" for record in records)


def write_2018(folder):
    folder.mkdir()
    write(folder / "Parts_5.json.gz", reviews())
    write(folder / "meta_Parts.json.gz", products())
    return folder


def write_2023(folder):
    folder.mkdir()
    rows = [
        {
            "user_id": r["reviewerID"],
            "parent_asin": r["asin"],
            "asin": "x",
            "rating": 1.0,
            "timestamp": 1000 * r["unixReviewTime"] + 7,
        }
        for r in reviews()
    ]
    write(folder / "Parts.jsonl.gz", rows)
    rows = [
        {
            "parent_asin": r["asin"],
            "title": r["title"],
            "store": r.get("brand"),
            "categories": r.get("category", []),
            "price": 1012.5 if r["asin"] == "B003" else None,
        }
        for r in products()
    ]
    write(folder / "meta_Parts.jsonl.gz", rows)
    return folder


@pytest.mark.parametrize("write_form", [write_2018, write_2023])
def test_reviews_become_windows_by_the_time_of_their_target(tmp_path, write_form):
    meta = prepare(
        "amazon",
        str(write_form(tmp_path / "raw")),
        str(tmp_path / "out"),
        options=Options(num_candidates=5),
    )
    # 7 reviews and so 6 windows per user, the first of one item.
    assert meta["counts"] == {
        "users": USERS,
        "items": 12,
        "interactions": 84,
        "interactions_in_source": 96,
        "items_without_title": 1,
        "interactions_without_title": 12,
        "windows": {"train": 57, "val": 7, "test": 8},
    }
    data = read_dataset(tmp_path / "out")
    assert data.domain == "product" and 'Nut & Bolt, 3"' in data.titles.values()
    first = data.splits["train"][0]
    assert (first.user, first.place, len(first.history)) == ("A0", 1, 1)
    places = {
        name: [(3 * w.place + int(w.user[1:]), w) for w in rows]
        for name, rows in data.splits.items()
    }
    for name, later in (("train", "val"), ("val", "test")):
        assert max(day for day, _ in places[name]) <= min(day for day, _ in places[later])
    assert {w.user for w in data.splits["train"]} & {w.user for w in data.splits["test"]}
    assert not any(sequence.disliked for sequence in data.sequences.values())
    text = report(meta, "out")
    assert "left out: 1 items without a usable title and their 12 interactions" in text
    assert "--config.validation_split=val --workdir=RUN --config.model=MODEL" in text


def test_a_repeated_item_stays_in_the_sequence_and_is_a_target_again(tmp_path):
    prepare(
        "amazon",
        str(write_2018(tmp_path / "raw")),
        str(tmp_path / "out"),
        options=Options(num_candidates=5),
    )
    data = read_dataset(tmp_path / "out")
    items = data.sequences["A5"].items
    assert items[0] == items[-1] and len(items) == 7
    assert any(w.target in w.history for rows in data.splits.values() for w in rows)


@pytest.mark.parametrize("write_form", [write_2018, write_2023])
def test_attributes_are_kept_where_they_are_there(tmp_path, write_form):
    found = read_amazon(write_form(tmp_path / "raw"))
    by_asin = {more["asin"]: more for more in found.attributes.values()}
    assert by_asin["B004"] == {"asin": "B004", "category": ["Industrial & Scientific"]}
    assert by_asin["B003"] == {
        "asin": "B003",
        "category": ["Industrial & Scientific"],
        "brand": "Knöpfe",
        "price": 1012.5,
    }
    assert "B029" not in by_asin and "B999" not in by_asin
    assert [*found.titles] == [*range(len(by_asin))] and found.time_X.min() // 1 == 1_500_000_000


@pytest.mark.parametrize(
    ("text", "title"),
    [
        ("  Nut &amp;\n Bolt ", "Nut & Bolt"),
        ("Noise &lt;60dB", "Noise <60dB"),
        (" ".join(["w"] * 20), " ".join(["w"] * 20)),
        (" ".join(["w"] * 21), ""),
        ("<span id='x'>Nut", ""),
        ("x", ""),
        ("\ud800ab", ""),
        (None, ""),
        (["Nut"], ""),
    ],
)
def test_a_title_is_cleaned_or_left_out(text, title):
    assert usable_title(text) == title


@pytest.mark.parametrize(
    ("name", "text", "said"),
    [
        ("Parts_5", "{", ":1: found no valid JSON"),
        ("Parts_5", "[]", ":1: found a list, expected an object"),
        ("Parts_5", "{}", ":1: reviewerID: found nothing, expected a text"),
        ("Parts_5", '{"user_id": "a"}', ":1: parent_asin: found nothing, expected a text"),
        ("Parts_5", json.dumps(review(1, 1, "now")), ":1: unixReviewTime: found 'now', expected"),
        ("Parts_5", json.dumps(review("\ud800", 1, 1)), ":1: reviewerID: found"),
        ("meta_Parts", '{"title": "x"}', ":1: asin: found nothing, expected a text"),
        ("meta_Parts", "x" * 100, ":1: found no valid JSON"),
        ("meta_Parts", b"\xff", ":1: found no valid JSON"),
        ("meta_Parts", None, ": found damaged gzip data"),
    ],
)
def test_a_wrong_line_is_named(tmp_path, name, text, said):
    file = write_2018(tmp_path / "raw") / f"{name}.json.gz"
    text = text.encode() if isinstance(text, str) else text
    file.write_bytes(b"no gzip" if text is None else gzip.compress(text))
    refused(tmp_path / "raw", f"{file}{said}")


def refused(folder, said):
    with pytest.raises(InputError) as error:
        prepare("amazon", str(folder), str(folder.parent / "out"))
    assert str(error.value).startswith(said), error.value
    assert not (folder.parent / "out").exists()


def test_a_folder_without_one_of_each_or_with_too_little_is_told(tmp_path):
    folder = tmp_path / "raw"
    refused(folder, f"{folder}: found No such file or directory, expected a folder with one file")
    write_2018(folder)
    (folder / "Others_5.json.gz").touch()
    refused(folder, f"{folder}: found Others_5.json.gz, Parts_5.json.gz, expected")
    (folder / "Others_5.json.gz").rename(folder / "Others.json.gz")  # not the 5-core file
    write(folder / "Parts_5.json.gz", reviews()[:3])
    refused(folder, f"{folder}: found no users and items with 5 interactions among 3 (every")
    (folder / "meta_Parts.json.gz").unlink()
    refused(folder, f"{folder}: found no meta_*.json.gz, expected")


def write_windows(folder, **change):
    """Two users in all splits, one new in val, one new in test; item 0 is bought again."""
    folder.mkdir()
    content = {
        "items": [{"id": item, "title": f"Part  {item}"} for item in range(30)],
        "train_sequences": [{"user": "a", "items": [*range(10)]}, {"user": 5, "items": [0, 0]}],
        "valid": [
            {"user": "a", "history": [*range(10)], "target": 0},
            {"user": "new", "history": [7], "target": 8},
        ],
        "test": [
            {"user": 5, "history": [0, 0], "target": 3},
            {"user": "a", "history": [*range(1, 10), 0], "target": 12},
            {"user": "b", "history": [1, 2], "target": 3},
        ],
    }
    for name, rows in (content | change).items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def lines_of(file):
    return [json.loads(line) for line in file.read_text().splitlines()]


def test_published_windows_are_kept_and_chained_to_sequences(tmp_path):
    folder = write_windows(tmp_path / "raw")
    meta = prepare("amazon", str(folder), str(tmp_path / "out"), options=Options(num_candidates=4))
    assert meta["counts"]["windows"] == {"train": 10, "val": 2, "test": 3}
    data = read_dataset(tmp_path / "out")
    assert data.sequences == {
        "a": UserSequence("a", (*range(10), 0, 12)),
        5: UserSequence(5, (0, 0, 3)),
        "new": UserSequence("new", (7, 8)),
        "b": UserSequence("b", (1, 2, 3)),
    }
    for split, name in (("val", "valid"), ("test", "test")):
        rows = lines_of(folder / f"{name}.jsonl")
        found = [(w.user, [*w.history], w.target) for w in data.splits[split]]
        assert found == [(row["user"], row["history"], row["target"]) for row in rows]
    assert data.titles[3] == "Part 3"
    assert "published windows" in meta["protocol"] and "published windows" in report(meta, "x")


@pytest.mark.parametrize(
    ("name", "row", "said"),
    [
        ("items", {"id": 3, "title": "x"}, ":31: found id 3 a second time"),
        ("items", {"id": 31, "title": " "}, ":31: found title ' '"),
        ("items", {"id": "31", "title": "x"}, ":31: id: found '31', expected an integer"),
        ("train_sequences", {"user": "a", "items": [1]}, ":3: found user 'a' a second time"),
        ("train_sequences", {"user": "c", "items": [99]}, ":3: found item 99, expected an id of"),
        ("train_sequences", {"user": "c", "items": "1"}, ":3: items: found '1', expected a list"),
        ("valid", {"user": "a", "history": [1], "target": 2}, ":3: found history [1] of user 'a'"),
        ("valid", {"user": "c", "history": [], "target": 2}, ":3: found a history of 0 items"),
        ("valid", {"user": "c", "history": [1] * 11, "target": 2}, ":3: found a history of 11"),
        ("test", {"user": "c", "history": [1], "target": 99}, ":4: found item 99"),
        ("test", {"user": "c", "history": [1]}, ":4: target: found nothing, expected an integer"),
        ("test", {"user": None, "history": [1], "target": 1}, ":4: user: found None, expected"),
    ],
)
def test_a_wrong_published_line_is_named(tmp_path, name, row, said):
    folder = write_windows(tmp_path / "raw")
    with open(folder / f"{name}.jsonl", "a") as file:
        file.write(json.dumps(row) + "\n")
    refused(folder, f"{folder / name}.jsonl{said}")


@pytest.mark.parametrize("name", WINDOWS)
def test_a_missing_published_file_is_named(tmp_path, name):
    folder = write_windows(tmp_path / "raw")
    (folder / name).unlink()
    if name == WINDOWS[1]:  # what the folder is known by
        return refused(folder, f"{folder}: found items.jsonl, test.jsonl, valid.jsonl, expected")
    return refused(folder, f"{folder / name}: found No such file or directory")


@pytest.mark.parametrize(
    "options", [Options(split="time"), Options(history=5), Options(min_interactions=2)]
)
def test_published_windows_take_no_option_that_would_change_them(tmp_path, options):
    with pytest.raises(InputError, match=r"^--\w+: found .*, expected none for this amazon, whose"):
        prepare(
            "amazon", str(write_windows(tmp_path / "raw")), str(tmp_path / "out"), options=options
        )
    assert not (tmp_path / "out").exists()


@needs_industrial
def test_the_published_windows_of_industrial_are_all_there(tmp_path):
    meta = prepare("amazon", str(INDUSTRIAL), str(tmp_path / "out"))
    assert meta["counts"]["windows"] == {"train": 10393, "val": 4532, "test": 4533}
    assert meta["counts"]["items"] == 3686
    data = read_dataset(tmp_path / "out")
    assert len({w.user for w in data.splits["train"]}) == 2625 and len(data.sequences) == 3285
    rows = lines_of(INDUSTRIAL / "test.jsonl")
    found = [(w.user, [*w.history], w.target) for w in data.splits["test"]]
    assert found == [(row["user"], row["history"], row["target"]) for row in rows]
    assert {len(w.candidates) for w in data.splits["test"]} == {20}
