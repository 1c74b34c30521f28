"""Reading a prepared folder: every malformed line is named with its file and number."""

import json

import pytest

from sdpo_jax.data.prepared import (
    Dataset,
    UserSequence,
    Window,
    fingerprint,
    read_dataset,
    write_dataset,
)
from sdpo_jax.system.errors import InputError

TITLES = {item: f"title {item}" for item in range(30)}
GOOD = {"user": "b", "place": 1, "history": [3], "candidates": [4, 5, 6], "target": 5}
SEQUENCE = {"user": "b", "items": [3, 5, 3], "disliked": [[0, 8], [1, 9], [1, 7]]}


@pytest.fixture
def folder(tmp_path):
    one = UserSequence(1, (0, 1, 2, 5))
    two = UserSequence("b", (3, 7, 3), ((0, 8), (1, 9)))
    rows = [one.window(3, 2, (4, 5, 6)), two.window(1, 2, (7, 8, 9)), two.window(2, 2, (1, 2, 3))]
    splits = {"train": rows, "val": rows[:1], "test": rows[1:]}
    attributes = {item: {} for item in TITLES} | {3: {"genres": ["a", "b"], "year": 1999}}
    meta = {"seed": 0, "history": 2}
    write_dataset(
        tmp_path / "data", Dataset("book", TITLES, splits, meta, {1: one, "b": two}, attributes)
    )
    return tmp_path / "data"


def put(folder, line, name="train.jsonl"):
    """Replaces line 2."""
    first = (folder / name).read_text().split("\n")[0]
    (folder / name).write_text(f"{first}\n{line}\n")


def test_what_is_written_is_read_back(folder):
    whole, part = read_dataset(folder), read_dataset(folder, ["test"])
    assert whole.splits["train"] == [
        Window(1, 3, (1, 2), (4, 5, 6), 5),
        Window("b", 1, (3,), (7, 8, 9), 7),
        Window("b", 2, (3, 7), (1, 2, 3), 3),
    ]
    assert whole.sequences["b"] == UserSequence("b", (3, 7, 3), ((0, 8), (1, 9)))
    assert whole.attributes[3] == {"genres": ["a", "b"], "year": 1999} and not whole.attributes[4]
    assert whole.titles == TITLES and whole.domain == "book" and whole.meta["seed"] == 0
    assert list(part.splits) == ["test"]
    assert part.meta["fingerprint"] == whole.meta["fingerprint"]
    assert [path.name for path in folder.parent.iterdir()] == ["data"]


def test_the_fingerprint_is_of_what_lies_on_disk(folder):
    found = {read_dataset(folder).meta["fingerprint"]}
    for name, old, new in [
        ("train.jsonl", "[4, 5, 6]", "[4, 5, 7]"),
        ("sequences.jsonl", "[[0, 8]", "[[0, 6]"),
        ("items.jsonl", "1999", "2000"),
        ("dataset.json", '"history": 2', '"history": 3'),
    ]:
        text = (folder / name).read_text()
        assert old in text
        (folder / name).write_text(text.replace(old, new))
        found.add(fingerprint(folder))
    assert len(found) == 5


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"place": 2}, "target 3 outside the candidates"),
        ({"place": 0}, "place 0, expected 1 to 2"),
        ({"place": 3}, "place 3, expected 1 to 2"),
        ({"place": "1"}, "place '1'"),
        ({"place": 1.0}, r"place 1\.0"),
        ({"place": float("nan")}, "place nan"),
        ({"place": True}, "place True"),
        ({"candidates": [4, 5, 5]}, "with a repeated id"),
        ({"candidates": [4, 5, 99]}, "item 99 in candidates"),
        ({"candidates": [4, 5]}, "2 candidates, expected 3"),
        ({"candidates": [5]}, "candidates \\[5\\]"),
        ({"candidates": "456"}, "candidates '456'"),
        ({"user": None}, "user None, expected a user of sequences"),
        ({"user": "a"}, "user 'a', expected a user of sequences"),
        ({"user": []}, r"user \[\], expected a user of sequences"),
        ({"target": 6}, "target 6, expected 5, as in the user's sequence"),
        ({"history": [5]}, r"history \[5\], expected \[3\], as in the user's sequence"),
        ({"history": "3"}, "history '3', expected"),
    ],
)
def test_a_wrong_value_is_named_with_its_line(folder, change, said):
    put(folder, json.dumps(SEQUENCE), "sequences.jsonl")
    put(folder, json.dumps(GOOD | change))
    with pytest.raises(InputError, match=rf"train\.jsonl:2: found .*{said}"):
        read_dataset(folder)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"items": [3]}, r"items \[3\], expected a list of 2 or more"),
        ({"items": "35"}, "items '35'"),
        ({"items": [0, None]}, "None in items"),
        ({"items": [0, float("nan")]}, "nan in items"),
        ({"items": [0, 77]}, "item 77 in items"),
        ({"disliked": None}, "disliked None"),
        ({"disliked": [8]}, "8 in disliked"),
        ({"disliked": [[0, 8, 1]]}, r"\[0, 8, 1\] in disliked"),
        ({"disliked": [[0.0, 8]]}, r"\[0\.0, 8\] in disliked"),
        ({"disliked": [[0, "8"]]}, "'8' in disliked"),
        ({"disliked": [[0, 77]]}, "item 77 in disliked"),
        ({"disliked": [[-1, 8]]}, "place -1 in disliked, expected 0 to 3"),
        ({"disliked": [[4, 8]]}, "place 4 in disliked, expected 0 to 3"),
        ({"disliked": [[2, 8], [1, 9]]}, "place 1 in disliked, expected 2 to 3"),
        ({"disliked": [[0, 5]]}, "item 5 in items and disliked"),
        ({"user": None}, "user None"),
        ({"user": 1}, "user 1 a second time"),
    ],
)
def test_a_wrong_value_of_a_sequence_is_named_with_its_line(folder, change, said):
    put(folder, json.dumps(SEQUENCE | change), "sequences.jsonl")
    with pytest.raises(InputError, match=rf"sequences\.jsonl:2: found .*{said}"):
        read_dataset(folder)


@pytest.mark.parametrize("value", [0, -1, 2.0, "2", True, None])
def test_a_history_that_is_no_length_is_named(folder, value):
    meta = json.loads((folder / "dataset.json").read_text())
    (folder / "dataset.json").write_text(json.dumps(meta | {"history": value}))
    with pytest.raises(InputError, match=rf"dataset\.json: found history {value!r}, expected"):
        read_dataset(folder)


@pytest.mark.parametrize("line", ['{"user": 1', "", "[1, 2]", '{"user": 1, "place": 1}'])
def test_a_malformed_line_is_named(folder, line):
    put(folder, line + "\n")
    with pytest.raises(InputError, match=r"train\.jsonl:2: found"):
        read_dataset(folder)


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ('{"id": 1, "title": " "}', "title ' '"),
        ('{"id": 1, "title": "a\\nb"}', "title"),
        ('{"id": 1, "title": 3}', "title 3"),
        ('{"id": "1", "title": "a"}', "id '1'"),
        ('{"id": 0, "title": "a"}', "id 0 a second time"),
    ],
)
def test_a_wrong_item_is_named_with_its_line(folder, line, said):
    put(folder, line, "items.jsonl")
    with pytest.raises(InputError, match=rf"items\.jsonl:2: found .*{said}"):
        read_dataset(folder)


def test_candidates_with_one_title_between_them_are_an_error(folder):
    text = (folder / "items.jsonl").read_text().replace("title 6", "title 4")
    (folder / "items.jsonl").write_text(text)
    with pytest.raises(InputError, match=r"train\.jsonl:1: found two candidates with the same"):
        read_dataset(folder)


def test_missing_and_empty_files_say_what_to_run(folder):
    (folder / "val.jsonl").write_text("")
    with pytest.raises(InputError, match=r"val\.jsonl: found no lines"):
        read_dataset(folder)
    (folder / "val.jsonl").unlink()
    with pytest.raises(InputError, match=r"val\.jsonl: .*run python -m sdpo_jax\.prepare"):
        read_dataset(folder)
    (folder / "dataset.json").write_text('{"domain": "food"}')
    with pytest.raises(InputError, match="found domain 'food'"):
        read_dataset(folder)
    with pytest.raises(InputError, match=r"nowhere/dataset\.json: .*run python -m"):
        read_dataset(folder.parent / "nowhere")


def test_writing_over_a_folder_with_something_in_it_is_refused(folder):
    dataset = read_dataset(folder)
    with pytest.raises(InputError, match="choose another --output"):
        write_dataset(folder, dataset)
    assert [path.name for path in folder.parent.iterdir()] == ["data"]
